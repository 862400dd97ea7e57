"""What a curve's detector is shown again after a rollback, or a restart of the hub: the live branch, as recorded.

What a detector makes of a curve depends on all of its values, so it is shown all of them: a leap after a rollback is
then noticed as in a run that never left, and nothing of the abandoned branch is in what is usual. That takes 0.7 s for
a million values, while the hub does nothing else, so it is bounded.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainctl.hub.detect_spike import REFIT_EVERY
from trainctl.store.metrics import MetricStore

# Of all curves together. Of a longer one the older values are left out: they count for when the baseline is fitted anew
# after an episode, and for nothing else.
REPLAYED: Final = 1 << 18
_BUCKETS: Final = 256


def past_values(
    metrics: MetricStore, metric: str, *, incarnation: int, at_most: int, itself: bool = True
) -> NDArray[np.floating]:
    """The values of the live branch, oldest first, about `at_most` of the newest; without `itself` those that the
    newest incarnation found when it began."""
    began = next((branch for branch in metrics.branches if branch.incarnation == incarnation), None)
    to_step = None if itself or began is None else began.after_step
    buckets = metrics.query(metric, to_step=to_step, points=_BUCKETS)
    behind = np.cumsum(buckets["count"].astype("i8")[::-1])[::-1]  # how many values each bucket and later ones hold
    first = int(np.searchsorted(-behind, -at_most)) if len(behind) else 0
    first = min(first, len(behind) - 1)
    from_step = int(buckets["step"][first - 1]) + 1 if first > 0 else None
    columns = metrics.query(metric, from_step=from_step, to_step=to_step)
    values: NDArray[np.floating] = columns["value"].astype("f8")
    if from_step is not None:
        # So that a baseline goes on being fitted after the same values as by who has seen them all.
        values = values[(len(values) - int(behind[0])) % REFIT_EVERY :]
    if itself:
        return values
    return values[columns["incarnation"].astype("i8")[-len(values) :] != incarnation] if len(values) else values
