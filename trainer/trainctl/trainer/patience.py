"""How long the end of training waits for a device and for a hub, so that what is left is sent. Pure."""

LIMIT_S = 10.0  # the hub of a very short run may only be starting, and one that takes what is left gets this long
SILENT_S = 3.0  # a hub that was there and says nothing is frozen; a device that brings nothing may never do so
LAST_S = 1.5  # for the hub behind a device that was given up: it writes to disk once a second


class Patience:
    """Asked again and again from the end of training on. `now` is seconds of `time.monotonic`."""

    def __init__(self, now: float) -> None:
        self._end = now + LIMIT_S
        self._left: int | None = None
        self._left_at = now
        self._packets: int | None = None
        self._heard_at = now
        self._gave_up = False

    def with_device(self, now: float, left: int) -> bool:
        """Whether it is worth waiting for a device behind which `left` calls of `log()` wait."""
        if left != self._left:
            self._left, self._left_at = left, now
        self._gave_up = self._gave_up or now - self._left_at >= SILENT_S or now >= self._end - LAST_S
        return not self._gave_up

    def with_hub(self, now: float, packets: int, *, asked: bool) -> bool:
        """Whether it is worth waiting for a hub that sent `packets` so far; `asked`: it is there and owes an answer."""
        if packets != self._packets or not asked:
            self._packets, self._heard_at = packets, now
        return now < self._end and now - self._heard_at < (LAST_S if self._gave_up else SILENT_S)
