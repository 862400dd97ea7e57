"""Which events wake somebody, which tell the same thing again, and which say that it is over. Pure."""

from typing import TypeAlias

from trainctl.wire.events import severity_of
from trainctl.wire.messages import Anomaly, Event, NodeChanged, RankChanged, Severity, StateChanged

ALERT_FAILED = "alert-failed"
SETTINGS = "settings"
# What is said of the alerts themselves wakes nobody: the way to wake them is what failed.
_ABOUT_ALERTS = frozenset({ALERT_FAILED, SETTINGS})
_WAKING_STATES = frozenset({"stalled", "lost", "failed"})
_WEIGHT: dict[Severity, int] = {"info": 0, "good": 0, "warning": 1, "error": 2}
_SPIKE = "loss-spike"

# Of an episode: what it is of, and in which attempt or incarnation.
Key: TypeAlias = tuple[str, ...]


def wakes(event: Event, least: Severity) -> bool:
    """Whether an event is worth the command: a run that stalled, failed or was lost, and what is at least as severe
    as asked for. What an operator did (stop, pause) is not."""
    match event:
        case StateChanged():
            return event.state in _WAKING_STATES
        case Anomaly(what=what) if what in _ABOUT_ALERTS:
            return False
        case Anomaly() | RankChanged() | NodeChanged():
            severity = severity_of(event)
            return severity != "good" and _WEIGHT[severity] >= _WEIGHT[least]
        case _:
            return False


def sameness(event: Event) -> Key:
    """Events with the same key tell of the same episode, or tell the same thing again."""
    match event:
        case StateChanged(state=state, attempt=attempt):
            return "state", state, str(attempt)
        case Anomaly(what=what, metric=metric, subject=subject, severity=severity):
            # A new incarnation's curves are new ones; what concerns the machine goes on.
            return "anomaly", what, metric or "", subject or "", severity, str(event.incarnation) if metric else ""
        case RankChanged(rank=rank, state=state):
            return "rank", str(rank), state
        case NodeChanged(node=node, state=state):
            return "node", node, state
        case other:
            return (str(other.__struct_config__.tag),)


def is_over(key: Key, event: Event) -> bool:
    """Whether an event says that the episode of `key` has ended."""
    match key, event:
        case ("state", state, attempt), StateChanged():
            return (event.state, str(event.attempt)) != (state, attempt)
        case ("rank", _, _), StateChanged(state="starting"):
            return True  # the next attempt has ranks of its own
        case ("rank", rank, state), RankChanged():
            return str(event.rank) == rank and event.state != state
        case ("node", node, state), NodeChanged():
            return event.node == node and event.state != state
        case ("anomaly", _, _, _, _, incarnation), _ if incarnation and event.incarnation > int(incarnation):
            return True
        case ("anomaly", what, metric, subject, _, _), Anomaly():
            # A curve that has a new level spikes no more, and nobody calls that good.
            ends = event.severity == "good" or (what == _SPIKE and event.severity == "info")
            return ends and (event.what, event.metric or "", event.subject or "") == (what, metric, subject)
        case _:
            return False


def urgent(event: Event) -> str | None:
    """The state that an event tells of, where that is worth a limit of its own; None for all others."""
    return event.state if isinstance(event, StateChanged) and event.state in _WAKING_STATES else None
