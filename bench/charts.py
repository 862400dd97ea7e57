"""Four charts of four series of 100k points each, one frame; the floor is numpy's own minimum and maximum over them.

Prints one JSON line: milliseconds, the median and the worst of 30 frames.
"""

import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from trainctl.tui.axes import Span
from trainctl.tui.chart import Chart, Curve, render

CHARTS, SERIES, POINTS, FRAMES = 4, 4, 100_000, 30
WIDTH, HEIGHT = 88, 19  # a quarter of a terminal of 180 x 50


def frames_ms(draw: Callable[[], object]) -> list[float]:
    draw()
    taken = []
    for _ in range(FRAMES):
        start = time.perf_counter()
        draw()
        taken.append((time.perf_counter() - start) * 1e3)
    return sorted(taken)


def main() -> None:
    rng = np.random.default_rng(0)
    x = np.arange(1.0, POINTS + 1)
    values = [[rng.normal(size=POINTS).cumsum() for _ in range(SERIES)] for _ in range(CHARTS)]
    charts = [
        Chart(
            curves=[Curve.of(str(index), x, y, smooth=index == 0) for index, y in enumerate(series)],
            span_x=Span(low=0, high=POINTS),
        )
        for series in values
    ]
    starts = np.arange(0, POINTS, POINTS // (2 * WIDTH))
    ours = frames_ms(lambda: [render(chart, WIDTH, HEIGHT) for chart in charts])
    floor = frames_ms(
        lambda: [(np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)) for series in values for y in series]
    )
    result = {
        "bench": "charts",
        "what": f"{CHARTS} charts x {SERIES} series x {POINTS} points, one frame",
        "ms": round(statistics.median(ours), 2),
        "worst_ms": round(ours[-1], 2),
        "floor_ms": round(statistics.median(floor), 2),
        "ratio": round(statistics.median(ours) / statistics.median(floor), 2),
        "target_ms": 15,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
