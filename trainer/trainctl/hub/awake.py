"""A clock that stands still while this process does, so that silence is not laid at others' door. Pure."""

PULSE_S = 0.5  # how often `pulse` is to be called
_AT_MOST_S = 1.0  # what counts of the time since the last pulse, however long ago that was


class AwakeClock:
    """Seconds in which somebody could have been heard. A process that is stopped, or starved, hears nobody: of the
    time between two pulses a second counts, and what came meanwhile is read before the next."""

    def __init__(self, now: float) -> None:
        """`now` is seconds of a monotonic clock, as in all methods."""
        self._awake_s = 0.0
        self._pulsed = now

    def pulse(self, now: float) -> None:
        """The process runs."""
        self._awake_s, self._pulsed = self.at(now), now

    def at(self, now: float) -> float:
        return self._awake_s + min(now - self._pulsed, _AT_MOST_S)
