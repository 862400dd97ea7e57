"""Follow a run to its end, also when nobody is left to say how it ended."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

from trainctl.client.errors import ClientError, NotReachable
from trainctl.client.model import Item
from trainctl.client.session import Session

GONE_FOR_GOOD_S = 30.0


async def watch(session: Session, gone_for_good_s: float = GONE_FOR_GOOD_S) -> AsyncGenerator[Item | None, None]:
    """What `Session.follow` yields, until the run ended; the last item is the one that ended it.

    Rank 0 starts a dead hub again within seconds. When none is back after `gone_for_good_s`, the recording has the
    last word: a run that did not end in it is lost. Raises `NotReachable` when that cannot be read either.
    """
    model = session.model
    async with contextlib.aclosing(session.follow()) as items:
        while True:
            coming = asyncio.ensure_future(anext(items, "end"))
            try:
                while not (await asyncio.wait({coming}, timeout=1.0))[0]:
                    age_s = model.age_s()
                    if model.link != "live" and age_s is not None and age_s > gone_for_good_s:
                        yield await _last_word(session)
                        return
            finally:
                coming.cancel()  # a generator must not be closed while it is asked for its next item
                await asyncio.gather(coming, return_exceptions=True)
            item = coming.result()
            if isinstance(item, str):
                return
            yield item
            if item is not None and model.ended:  # None comes before the item that made the link live
                return


async def _last_word(session: Session) -> Item:
    from trainctl.client.recorded import load  # needs numpy

    info = session.model.info
    name = session.model.name or "the run"
    try:
        if info is None:
            raise NotReachable(f"nothing was ever heard of {name}")
        snapshot, _ = (await asyncio.to_thread(load, Path(info.dir))).summary()
    except ClientError as error:
        raise NotReachable(
            f"no word from the hub of {name}, and its recording cannot be read here ({error.message}); "
            "training may well go on",
            "look on the machine where it runs: `trainctl status`",
        ) from None
    session.model.apply(snapshot)
    return snapshot
