"""Walk through all of a run's metrics, live or recorded, a window at a time: what `trainctl export` writes."""

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainctl.client.points import Points
from trainctl.client.session import Session
from trainctl.store.windows import ROLLUPS, logged_together, step_windows

_WINDOW = 50_000  # values
_NAMES = 100  # a request has room for so many names of any length


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some values of metrics that were logged together, in one incarnation: parallel columns, by step.

    `live` tells for each row whether it is on the branch that the run stood on when the export began.
    """

    incarnation: int
    steps: NDArray[np.int64]
    times: NDArray[np.float64]
    values: Mapping[str, NDArray[np.float64]]
    live: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.steps) * len(self.values)

    def where(self, mask: NDArray[np.bool_]) -> "Part":
        """The rows for which the mask is true."""
        return Part(
            incarnation=self.incarnation,
            steps=self.steps[mask],
            times=self.times[mask],
            values={name: values[mask] for name, values in self.values.items()},
            live=self.live[mask],
        )


async def walk(session: Session, names: Sequence[str]) -> AsyncGenerator[Part, None]:
    """Every value of the named metrics in every incarnation, incarnations in order. Raises `ClientError`."""
    state = session.model.state
    for at in range(0, len(names), _NAMES):
        some = names[at : at + _NAMES]
        cuts = _live_cuts(await session.history(some, points=ROLLUPS))
        newest = max(state.incarnation if state is not None else 1, *cuts, 1)
        for incarnation in range(1, newest + 1):
            rollups = await session.history(some, points=ROLLUPS, incarnation=incarnation)
            for first, last in step_windows((points.columns for points in rollups.values()), _WINDOW):
                found = await session.history(some, from_step=first, to_step=last, incarnation=incarnation)
                for part in _parts(found, incarnation, cuts.get(incarnation)):
                    yield part


def _live_cuts(live: Mapping[str, Points]) -> dict[int, int]:
    """The last step of each incarnation that is on the live branch: none of its later values is among the live ones."""
    cuts: dict[int, int] = {}
    for points in live.values():
        steps, incarnations = points.columns["step"], points.columns["incarnation"]
        for incarnation in np.unique(incarnations).tolist():
            cuts[incarnation] = max(cuts.get(incarnation, 0), int(steps[incarnations == incarnation].max()))
    return cuts


def _parts(found: Mapping[str, Points], incarnation: int, cut: int | None) -> Iterator[Part]:
    tables: dict[str, Mapping[str, NDArray[Any]]] = {name: points.columns for name, points in found.items()}
    for steps, times, values in logged_together(tables):
        live = np.zeros(len(steps), bool) if cut is None else steps <= cut
        yield Part(incarnation=incarnation, steps=steps, times=times, values=values, live=live)
