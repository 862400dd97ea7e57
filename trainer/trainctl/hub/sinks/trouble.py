"""When a sink that failed is tried again, and when to tell of it. Pure: the clock is an argument."""

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 300.0
_CALM_S = 30.0


class Trouble:
    """An episode begins with a failure and ends when the sink has worked for as long as it was last left alone
    (at most half a minute), so that one which fails at every other write is told of once."""

    def __init__(self) -> None:
        self._delay_s = 0.0
        self._well_since: float | None = None

    def failed(self) -> tuple[float, bool]:
        """It failed: seconds until the next try, and whether this begins an episode."""
        begins = self._delay_s == 0.0
        self._delay_s = FIRST_DELAY_S if begins else min(2 * self._delay_s, LONGEST_DELAY_S)
        self._well_since = None
        return self._delay_s, begins

    def worked(self, now: float) -> bool:
        """It wrote and flushed; true when that ends an episode."""
        if self._delay_s == 0.0:
            return False
        if self._well_since is None:
            self._well_since = now
        if now - self._well_since < min(self._delay_s, _CALM_S):
            return False
        self._delay_s, self._well_since = 0.0, None
        return True
