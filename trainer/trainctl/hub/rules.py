"""Why a command is rejected before anybody is asked to carry it out. Pure."""

import math
from dataclasses import dataclass

from trainctl.wire.commands import (
    FINAL_COMMAND_STATES,
    Abort,
    Act,
    Cancel,
    CheckpointPin,
    CheckpointRemove,
    CheckpointSave,
    CheckpointUnpin,
    Command,
    EndRanks,
    LrRelease,
    LrScale,
    LrSet,
    Restart,
    Rollback,
    SetTunable,
    Stop,
    carrier_of,
    check,
    option_off,
    spec_of,
)
from trainctl.wire.expressions import ExpressionError, parse
from trainctl.wire.manifest import pick
from trainctl.wire.messages import FINAL_STATES, CheckpointInfo, CommandUpdate, RunInfo, RunStateName, Tunable
from trainctl.wire.removal import why_kept


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the rules look at."""

    info: RunInfo
    state: RunStateName
    linked: bool
    checkpoints: list[CheckpointInfo]
    commands: dict[str, CommandUpdate]
    targets: frozenset[str] = frozenset()  # checkpoints that commands under way go back to
    no_restart: str | None = None  # why nobody would start the next attempt


def allowed_without_audit(command: Command) -> bool:
    """Saving and ending must work on a full disk; nothing else may happen that nobody can look up later.

    Abort too, now or at a boundary: a stop wants its checkpoint, and that is what such a disk refuses.
    """
    return isinstance(command.action, Stop | Abort | CheckpointSave)


def rejection(command: Command, situation: Situation) -> str | None:
    """Why the command cannot be carried out, with what to do about it, or None."""
    return (
        check(command.action)
        or _conditions(command)
        or _possible(command, situation)
        or _target(command, situation)
        or _tunable(command, situation)
    )


def _conditions(command: Command) -> str | None:
    for text in (command.condition, command.unless):
        if text is not None:
            try:
                parse(text)
            except ExpressionError as error:
                return f"the condition cannot be read: {error}"
    if command.revert_after is not None and not isinstance(command.action, LrScale | LrSet | LrRelease | SetTunable):
        return f"{spec_of(command.action).name} cannot revert by itself: only lr and set can"
    if command.unless is not None and command.revert_after is None:
        return "unless says when not to revert: give revert-after with it"
    if command.condition is not None and carrier_of(command.action) != "ranks":
        return (
            f"{spec_of(command.action).name} is carried out at once, and a condition is decided by rank 0 at a "
            "boundary: leave it out"
        )
    if command.expires_s is not None and not math.isfinite(command.expires_s):
        return f"expires is {command.expires_s}: give a finite number of seconds"
    return None


def _possible(command: Command, situation: Situation) -> str | None:
    spec, carrier = spec_of(command.action), carrier_of(command.action)
    if carrier == "hub":
        return None
    if carrier == "agents":
        return _endable(command.action, situation)
    if situation.state in FINAL_STATES:
        return f"the run is {situation.state}: nothing trains that could be told to {spec.name}"
    if not situation.linked:
        return "rank 0 is not connected to the hub at the moment: nothing was changed; try again in a few seconds"
    if spec.capability is None:
        return None
    able = situation.info.capabilities.get(spec.capability)
    if able is True:
        return option_off(command.action, situation.info.capabilities)
    why = able if isinstance(able, str) else "the script gives trainctl nothing to do it with"
    return f"this run cannot {spec.name}: {why}"


def _endable(action: Act, situation: Situation) -> str | None:
    """Ranks can be ended while there are any: those of a lost run too, of which only rank 0 is known to be gone."""
    if isinstance(action, EndRanks):
        return "end ranks is what a hub asks of an agent: use abort --now or restart"
    if situation.state in FINAL_STATES - {"lost"}:
        return f"the run is {situation.state}: there are no ranks to end"
    if not situation.info.ranks:
        return "no rank of this run is known to the hub yet: nothing was done; try again in a few seconds"
    return situation.no_restart if isinstance(action, Restart) else None


def _target(command: Command, situation: Situation) -> str | None:
    action = command.action
    on_disk = [info for info in situation.checkpoints if info.where == "disk"]  # the others end with the ranks
    match action:
        case Rollback(target=target) if pick(situation.checkpoints, target, situation.info.best_by) is None:
            return _no_checkpoint(target, situation.checkpoints)
        case Restart(target=target) if target != "last":
            found_one = pick(on_disk, target, situation.info.best_by)
            if found_one is None:
                return _no_checkpoint(target, on_disk)
            if found_one.verified is False:
                return f"checkpoint {found_one.id} is damaged: nothing could start from it"
        case CheckpointPin(checkpoint=target) | CheckpointUnpin(checkpoint=target):
            if pick(on_disk, target) is None:
                return _no_checkpoint(target, on_disk)
        case CheckpointRemove(checkpoint=target):
            return _kept(target, situation, on_disk)
        case Cancel(command=target):
            found = situation.commands.get(target)
            if found is None:
                return f"no command has the id {target}"
            if found.state in FINAL_COMMAND_STATES:
                return f"{found.command} ({target}) is {found.state} already"
        case _:
            pass
    return None


def _kept(target: str, situation: Situation, on_disk: list[CheckpointInfo]) -> str | None:
    if situation.state == "starting":
        return "the run is starting, and may be restoring it: nothing was done; try again when it trains"
    if any(info.id == target and info.where == "memory" for info in situation.checkpoints):
        return f"{target} is in the ranks' memory only: there are no files to delete, and it goes with a later save"
    return why_kept(on_disk, target, situation.targets)


def _no_checkpoint(target: str, checkpoints: list[CheckpointInfo]) -> str:
    if not checkpoints:
        return f"there is no checkpoint {target}: none was saved yet (trainctl checkpoint save)"
    steps = ", ".join(str(info.step) for info in checkpoints[-5:])
    return f"there is no checkpoint {target}: the newest are of steps {steps} (trainctl checkpoint ls lists all)"


def _tunable(command: Command, situation: Situation) -> str | None:
    action = command.action
    if not isinstance(action, SetTunable):
        return None
    for tunable in situation.info.tunables:
        if tunable.name == action.name:
            if action.group is not None and not tunable.optimizer:
                return f"{tunable.name} is no field of an optimizer: leave the group out"
            if tunable.optimizer and action.value == "release":
                return None
            return _value_problem(tunable, action.value)
    known = ", ".join(sorted(tunable.name for tunable in situation.info.tunables)) or "none"
    return f"{action.name} is no tunable of this run; there are: {known}"


def _value_problem(tunable: Tunable, value: bool | float | str) -> str | None:
    fits = {
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
    }[tunable.kind]
    if not fits:
        return f"{tunable.name} is a {tunable.kind}, and {value!r} is not"
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = tunable.minimum, tunable.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = " and ".join(
                f"{word} {bound:g}" for word, bound in (("at least", low), ("at most", high)) if bound is not None
            )
            return f"{tunable.name} = {value:g} is out of range: it is {bounds}"
    return None
