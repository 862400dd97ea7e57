"""History of a metric as numpy columns."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from trainctl.wire.codec import CONTROL_LIMIT
from trainctl.wire.messages import History, HistoryRequest

if TYPE_CHECKING:
    import numpy as np

_INTEGERS = frozenset({"step", "incarnation", "count", "nonfinite"})
# Of one request: an answer has a fixed size to share out, so more names would get coarser rollups each.
_NAMES_A_REQUEST = 100
_NAMES_BYTES = CONTROL_LIMIT // 2


@dataclass(frozen=True, kw_only=True)
class Points:
    """Parallel columns of one metric, by step: `step time value incarnation`, or with rollups
    `step time min max mean last count nonfinite incarnation`. Integers are int64, the rest float64.
    """

    name: str
    columns: "dict[str, np.ndarray[Any, Any]]"

    def __len__(self) -> int:
        return len(self.columns["step"]) if "step" in self.columns else 0


def by_request(metrics: Sequence[str]) -> list[list[str]]:
    """The names in as many parts as requests are needed to ask for all of them; at least one part, maybe empty."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in dict.fromkeys(metrics):
        needed = len(name.encode()) + 5  # what MessagePack puts before a string, at most
        if parts[-1] and (len(parts[-1]) >= _NAMES_A_REQUEST or size + needed > _NAMES_BYTES):
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += needed
    return parts


async def all_pages(request: HistoryRequest, ask: Callable[[HistoryRequest], Awaitable[History]]) -> dict[str, Points]:
    """Ask, and ask again for as long as an answer was cut, so that it arrives whole. Raises what `ask` raises."""
    pages: list[History] = []
    while True:
        page = await ask(request)
        pages.append(page)
        if page.next_step is None or (request.from_step is not None and page.next_step <= request.from_step):
            return join(pages)
        request = msgspec.structs.replace(request, from_step=page.next_step)


def join(pages: Sequence[History]) -> dict[str, Points]:
    """Decode the pages of one answer and put them end to end. Raises ValueError on columns that do not fit."""
    import numpy as np

    parts: dict[str, dict[str, list[np.ndarray[Any, Any]]]] = {}
    for page in pages:
        for series in page.series:
            columns = parts.setdefault(series.name, {})
            for name, data in series.columns.items():
                columns.setdefault(name, []).append(np.frombuffer(data, "<i8" if name in _INTEGERS else "<f8"))
    joined = (
        Points(name=metric, columns={name: np.concatenate(chunks) for name, chunks in columns.items()})
        for metric, columns in parts.items()
    )
    return {points.name: points for points in joined if len(points)}
