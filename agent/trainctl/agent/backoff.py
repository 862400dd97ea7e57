"""When to try again what failed: later each time. Pure, the clock is an argument."""


class Backoff:
    """Doubles the wait from `first_s` to `limit_s` with every failure."""

    def __init__(self, *, first_s: float, limit_s: float) -> None:
        self._first_s = first_s
        self._limit_s = limit_s
        self._wait_s = first_s
        self._until = float("-inf")

    def due(self, now: float) -> bool:
        return now >= self._until

    def failed(self, now: float, *, at_least_s: float = 0.0) -> None:
        self._until = now + max(self._wait_s, at_least_s)
        self._wait_s = min(2 * self._wait_s, self._limit_s)

    def worked(self) -> None:
        self._wait_s = self._first_s
        self._until = float("-inf")
