"""Which checkpoint is newer: by what the run counted, never by a clock.

A run moves between nodes whose clocks differ, and a clock may be set back under it. Incarnations are handed out in
order, over attempts and rollbacks alike, and within one the steps only grow. So what follows a rollback is newer
than what it left behind, though its steps are lower; and along the live branch the order is that of the steps.

The ids that trainctl makes end in `-ATTEMPT.NUMBER`: the number counts the saves that an attempt began.
"""

import re
from collections.abc import Sequence

from trainctl.wire.messages import CheckpointInfo

_BEGUN = re.compile(r"-(\d+)\.(\d+)$")


def order_of(info: CheckpointInfo) -> tuple[int, int, int, float, str]:
    """What checkpoints are sorted by, the oldest first: incarnation, step, then which save it was.

    Only among saves of one step whose ids say nothing the clock decides.
    """
    begun = _begun(info.id)
    return info.incarnation, info.step, begun[1] if begun else 0, info.time, info.id


def next_older(checkpoints: Sequence[CheckpointInfo], checkpoint_id: str, changed: float) -> CheckpointInfo | None:
    """The newest that is older than another one, not known to be damaged and not left behind by a rollback.

    `changed`: when that other one was last changed, Unix seconds; asked for only where nothing else tells.
    """
    known = next((info for info in checkpoints if info.id == checkpoint_id), None)
    older = [
        info
        for info in checkpoints
        if info.verified is not False
        and not info.abandoned
        and info.id != checkpoint_id
        and (order_of(info) < order_of(known) if known is not None else precedes(info, checkpoint_id, changed))
    ]
    return max(older, key=order_of, default=None)


def precedes(info: CheckpointInfo, checkpoint_id: str, changed: float) -> bool:
    """Whether a checkpoint is older than one whose manifest cannot be read: only its id and its directory tell."""
    mine, other = _begun(info.id), _begun(checkpoint_id)
    return mine < other if mine is not None and other is not None else info.time < changed


def _begun(checkpoint_id: str) -> tuple[int, int] | None:
    """Attempt and number of a save, where its id is one of trainctl's own."""
    found = _BEGUN.search(checkpoint_id)
    return (int(found[1]), int(found[2])) if found else None
