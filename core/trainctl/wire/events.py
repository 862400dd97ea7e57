"""An event as people and scripts read it: a line of text, the fields of a JSON object, how much it matters. Pure.

The log, the cockpit and the alert command all tell of an event in these words.
"""

from trainctl.wire.figures import duration, file_size, plain, scalar
from trainctl.wire.messages import (
    Anomaly,
    CheckpointRemoved,
    CheckpointSaved,
    CommandUpdate,
    Event,
    NodeChanged,
    Note,
    Output,
    RankChanged,
    RolledBack,
    Scalar,
    Severity,
    StateChanged,
    Values,
)

_KINDS = {"node-event": "node", "checkpoint-removed": "checkpoint"}
# Arguments whose default says nothing; elsewhere 0 and false are what was asked for.
_NOT_ASKED_FOR = frozenset({"skip_batches", "restore_overrides", "pin", "now"})


def kind_of(event: Event) -> str:
    """The kind under which an event is listed and filtered: its tag, or what its tag is about."""
    tag = str(event.__struct_config__.tag)
    return _KINDS.get(tag, tag)


def event_json(event: Event) -> dict[str, object]:
    """An event's fields for one line of `log --json`."""
    head: dict[str, object] = {"time": event.time, "kind": kind_of(event)}
    head |= {"step": event.step, "incarnation": event.incarnation}
    return head | {name: getattr(event, name) for name in event.__struct_fields__ if name not in head}


def event_text(event: Event) -> str:
    """One line without time or glyph; control characters are gone from everything that came from outside."""
    match event:
        case StateChanged():
            words = _state_words(event)
        case CommandUpdate():
            words = command_text(event)
        case CheckpointSaved():
            words = _checkpoint_words(event)
        case CheckpointRemoved():
            freed = f", {file_size(event.bytes)} freed" if event.bytes else ""
            words = f"checkpoint {event.id} removed by {event.by}{freed}"
        case RolledBack():
            words = _rollback_words(event)
        case Anomaly():
            words = (
                event.text if str(event.step) in event.text or not event.step else f"{event.text} (step {event.step})"
            )
        case RankChanged():
            words = f"rank {event.rank} on {event.node}: {event.text or event.state}"
        case NodeChanged():
            words = f"node {event.node}: {event.text or event.state}"
        case Output():
            words = f"rank {event.rank}: {event.text}"
        case Note():
            words = f"{event.actor}: {event.text}"
    return plain(words)


def severity_of(event: Event) -> Severity:
    """How much an event should stand out."""
    match event:
        case Anomaly() | RankChanged() | NodeChanged():
            return event.severity
        case StateChanged(state="failed" | "lost"):
            return "error"
        case StateChanged(state="stalled" | "preempted") | RolledBack():
            return "warning"
        case StateChanged(state="finished"):
            return "good"
        case CommandUpdate(state="applied"):
            return "good"
        case CommandUpdate(state="failed" | "unknown"):
            return "error"
        case CommandUpdate(state="rejected" | "conflict" | "expired"):
            return "warning"
        case CheckpointSaved():
            return "error" if event.error or event.verified is False else "good"
        case _:
            return "info"


def _state_words(event: StateChanged) -> str:
    words = f"{event.state} at step {event.step}"
    words += f" (attempt {event.attempt})" if event.attempt > 1 else ""
    reason = (event.reason or "").rstrip(": ")  # an exception without words of its own leaves its colon behind
    return f"{words}: {reason}" if reason and reason not in words else words


def _checkpoint_words(event: CheckpointSaved) -> str:
    if event.error:
        return f"checkpoint {event.id} failed: {event.error}"
    parts = [f"checkpoint {event.id}"]
    parts += [{True: "verified", False: "is damaged"}[event.verified]] if event.verified is not None else ["saved"]
    details = [file_size(event.bytes)] if event.bytes else []
    details += [f"stall {event.stall_s * 1000:.0f} ms"] if event.stall_s is not None else []
    details += [f"written in {duration(event.write_s)}"] if event.write_s is not None else []
    details += ["pinned"] if event.pinned else []
    details += [f"“{event.note}”"] if event.note else []
    return ", ".join([" ".join(parts), *details])


def _rollback_words(event: RolledBack) -> str:
    source = f"{event.checkpoint}, from memory" if event.from_memory else event.checkpoint
    words = f"rolled back from step {event.from_step} to {event.step} ({source})"
    words += f", skipped {event.skipped_batches} batches" if event.skipped_batches else ""
    words += f", lr ×{event.lr_scale:g}" if event.lr_scale is not None else ""
    words += f" by {event.actor}" if event.actor else ""
    return f"{words}, incarnation {event.incarnation}"


def arguments(args: Values) -> str:
    """A command's arguments in words, most telling first."""
    return " ".join(
        _argument(name, value)
        for name, value in args.items()
        if value is not None and not (name in _NOT_ASKED_FOR and not value)
    )


def _argument(name: str, value: Scalar) -> str:
    match name, value:
        case "for_s", int() | float():
            return f"for {duration(value)}"
        case "skip_batches", _:
            return f"skipping {scalar(value)} batches"
        case "lr_scale", _:
            return f"lr ×{scalar(value)}"
        case "restore_overrides", _:
            return "with the checkpoint's overrides"
        case "pin", _:
            return "pinned"
        case "now", _:
            return "now"
        case "note", _:
            return f"“{scalar(value)}”"
        case "group", _:
            return f"group {scalar(value)}"
        case _:
            return scalar(value)


def command_text(update: CommandUpdate) -> str:
    """Who, what, how it stands, at which step, before and after."""
    words = " ".join(part for part in (update.command, arguments(update.args)) if part)
    words += f" by {update.actor}" if update.actor else ""
    match update.state:
        case "applied":
            words += f": applied at step {update.step}"
            words += f" on {update.ranks} rank{'s' * (update.ranks != 1)}" if update.ranks else ""
            if update.before is not None:
                words += f", {scalar(update.before)} → {scalar(update.after)}"
            elif update.after is not None:
                words += f", {scalar(update.after)}"
        case "scheduled":
            words += f": scheduled for step {update.step}"
        case state:
            words += f": {state}"
    return f"{words}: {update.reason}" if update.reason else words
