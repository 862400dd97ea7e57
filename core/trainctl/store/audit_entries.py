"""What the audit log holds of a command: that it was accepted, and what became of it."""

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from trainctl.store.audit import Json
from trainctl.wire.commands import Command, spec_of
from trainctl.wire.messages import CommandUpdate

Entry: TypeAlias = Mapping[str, Json]


def accepted_entry(command: Command, actor: str, accepted: float) -> Entry:
    """What is written down before a command is accepted: all that a later hub needs to take it up."""
    return {
        "time": accepted,
        "id": command.id,
        "command": spec_of(command.action).name,
        "actor": actor,
        "state": "accepted",
        "request": msgspec.json.encode(command).decode(),
    }


def outcome_entry(update: CommandUpdate) -> Entry:
    """What is written down of a command's outcome."""
    return {
        "time": update.time,
        "id": update.id,
        "command": update.command,
        "actor": update.actor,
        "state": update.state,
        "step": update.step,
        "incarnation": update.incarnation,
        "before": update.before,
        "after": update.after,
        "ranks": update.ranks,
        "reason": update.reason,
    }
