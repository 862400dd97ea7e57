"""The checkpoints that rollbacks go back to, which retention leaves alone."""

import threading


class HeldTargets:
    """By command, from when a rollback is first looked at until it has its outcome; and that of the newest since."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # never held while a disk is asked
        self._ids: dict[str, str] = {}
        self._newest: str | None = None

    def of(self, command_id: str) -> str | None:
        return self._ids.get(command_id)

    def hold(self, command_id: str, checkpoint_id: str) -> None:
        with self._lock:
            self._ids[command_id] = checkpoint_id

    def over(self, command_id: str) -> None:
        """The command has its outcome."""
        with self._lock:
            if (target := self._ids.pop(command_id, None)) is not None:
                self._newest = target

    def ids(self) -> set[str]:
        with self._lock:
            return {*self._ids.values(), *([self._newest] if self._newest is not None else [])}
