"""Telemetry that was lost, by reason: when it begins an operator is told, and when it is over how much it was. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainctl.wire.messages import Severity

CALM_S = 10.0

# What is said of a reason; the others (`value`, `names`) are said of each metric, by name.
_WORDS: dict[str, str] = {
    "buffer": "the sender thread cannot keep up with run.log(): log less often",
    "buffer-memory": "what waits for the sender thread fills its memory: log fewer metrics, or less often",
    "link": "the hub did not take them for over a minute",
    "link-memory": "the hub does not take them, and what waits for it fills its memory before a minute is over",
    "size": "a row or an event is too large for a packet",
    "device": "the device lags too far behind, captured a graph, or failed",
    "phase": "the device lags too far behind its timers",
    "ranks": "other ranks than 0 cannot keep their own losses and phases: a device lags too far behind, or failed",
}


@dataclass(kw_only=True)
class _Episode:
    before: int  # lost when it began
    grown: float  # when the count last grew


@dataclass(frozen=True, kw_only=True)
class Told:
    """That telemetry began to be lost for a reason; `good` when that is over."""

    reason: str
    text: str
    severity: Severity


class DropWatch:
    """Makes sentences of counts that grow. `now` is any clock that does not go back."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._episodes: dict[str, _Episode] = {}

    def observe(self, counts: Mapping[str, int], now: float) -> list[Told]:
        """What is to be told now."""
        told: list[Told] = []
        for reason, count in counts.items():
            seen, self._seen[reason] = self._seen.get(reason, 0), count
            episode, words = self._episodes.get(reason), _WORDS.get(reason)
            if words is None:
                continue
            if count > seen:
                if episode is None:
                    self._episodes[reason] = _Episode(before=seen, grown=now)
                    text = f"telemetry is being lost: {words}. Training goes on"
                    told.append(Told(reason=reason, text=text, severity="warning"))
                else:
                    episode.grown = now
            elif episode is not None and now - episode.grown >= CALM_S:
                del self._episodes[reason]
                text = f"no more telemetry is lost; {count - episode.before} values or rows are missing: {words}"
                told.append(Told(reason=reason, text=text, severity="good"))
        return told
