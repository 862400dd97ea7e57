"""The values of rows, by metric."""

import numpy as np

from trainctl.wire.messages import Rows


def values_of(rows: Rows) -> dict[str, list[float]]:
    """Of each metric a value for each step. A column that has not as many is damaged, and left out as the history
    leaves it out: a sink that stumbled over it would do so again at every try."""
    return {
        column.name: np.frombuffer(column.data, f"<{column.dtype}").tolist()
        for column in rows.columns
        if len(column.data) == int(column.dtype[1]) * len(rows.steps)
    }
