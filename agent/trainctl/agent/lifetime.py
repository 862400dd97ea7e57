"""When an agent that came with the ranks goes after them. Pure: the clock is an argument."""

from typing import Final

GRACE_S: Final = 30.0  # the ranks may still be importing torch
LINGER_S: Final = 60.0  # a restarted attempt finds the same agent


class Lifetime:
    """Over `linger_s` after the last rank was seen alive, or `grace_s` after `began` when none ever was."""

    def __init__(self, began: float, *, grace_s: float = GRACE_S, linger_s: float = LINGER_S) -> None:
        self._ends = began + grace_s
        self._linger_s = linger_s

    def over(self, now: float, alive: int) -> bool:
        if alive:
            self._ends = now + self._linger_s
        return now >= self._ends
