"""What operators have set in a run: the overrides, the tunables and the changes on trial, kept apart from checkpoints.

A restart goes back to a checkpoint, and what an operator set after it was saved must not be lost with the steps: rank 0
writes it to `overrides.json` in the run's directory before the operator hears that it is applied, and a later attempt
takes it from there. Asked to restore the checkpoint's (`--restore-overrides`), it takes those instead.
"""

from pathlib import Path
from typing import Any

import msgspec

from trainctl.trainer.core import Core
from trainctl.trainer.override_rules import FIELDS, names_in
from trainctl.wire.commands import SetTunable
from trainctl.wire.messages import Tunable
from trainctl.wire.rundir import RunDir, write_atomic


class Steering(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `overrides.json`; `rules` and `trials` as `Overrides` and `Reverts` give them."""

    step: int
    incarnation: int
    rules: list[list[str | int | float | None]]
    tunables: dict[str, bool | int | float | str]
    trials: list[Any]


def file_of(core: Core) -> Path:
    return RunDir(core.identity.directory).path / "overrides.json"


def steering(core: Core) -> Steering:
    """What is set now, with what still waits for the script to register it."""
    waiting = {name: value for name, value in core.waiting_tunables.items() if name not in core.tunables}
    return Steering(
        step=core.boundary.completed,
        incarnation=core.incarnation,
        rules=core.overrides.state_dict()["rules"] if core.overrides is not None else [],
        tunables=waiting | core.tunables.steered(),
        trials=core.reverts.state_dict()["trials"],
    )


def keep(core: Core) -> None:
    """Write it down if it changed; for rank 0's sender thread. A directory that takes no file is told once."""
    if not core.steering_changed.is_set():
        return
    core.steering_changed.clear()  # first, so that a change while this writes is written next
    if not core.place.leads or core.identity.problem is not None:
        return
    try:
        write_atomic(file_of(core), msgspec.json.format(msgspec.json.encode(steering(core)), indent=1))
    except OSError as error:
        core.complain("overrides", f"a restart will not know what was set: {file_of(core)}: {error.strerror or error}")


def kept(core: Core) -> Steering | None:
    """What an earlier attempt wrote down, None where there is nothing that can be read."""
    try:
        return msgspec.json.decode(file_of(core).read_bytes(), type=Steering)
    except FileNotFoundError:
        return None  # killed before it was written for the first time
    except (OSError, msgspec.MsgspecError) as error:
        core.complain("overrides", f"{file_of(core)} cannot be read, the checkpoint's overrides are used: {error}")
        return None


def put(core: Core, newest: Steering) -> None:
    """Set what an earlier attempt had; tunables that the script has not registered yet wait for it."""
    if core.overrides is not None:
        core.overrides.load_state_dict({"rules": newest.rules})
    core.reverts.load_state_dict({"trials": newest.trials})
    core.tunables.restore(newest.tunables, steered=True)
    core.resumed_tunables = core.waiting_tunables = dict(newest.tunables)


# --- what operators may set, and what they have set


def is_field(core: Core, name: str) -> bool:
    """Whether `set NAME` is for the optimizers; a script's own tunable of that name comes first."""
    return name in FIELDS and core.overrides is not None and name not in core.tunables


def tunables(core: Core) -> list[Tunable]:
    """The script's tunables, then the fields of its optimizers, with the value that the next step uses."""
    listed = core.tunables.messages()
    if core.overrides is not None:
        listed += [
            Tunable(
                name=name,
                value=value,
                kind="float",
                minimum=0.0,
                maximum=None if name == "weight_decay" else 1.0,
                optimizer=True,
            )
            for name, value in core.overrides.fields().items()
            if name not in core.tunables
        ]
    return listed


def problem_with(core: Core, action: SetTunable) -> str | None:
    """Why a tunable or a field cannot be set so on this rank, or None."""
    if names_in(action) and action.name not in core.tunables:
        if core.overrides is None:
            return f"{action.name} is the optimizer's, and none was given to Run.attach: pass optimizer="
        return core.overrides.check(action, boundary=core.boundary.completed)
    if action.group is not None:
        return f"{action.name} is no field of an optimizer: leave the group out"
    return core.tunables.problem_with(action.name, action.value)


def in_words(core: Core) -> dict[str, str]:
    """Everything that differs from the script by an operator's will: `{"lr": "× 0.5", "clip": "= 0.5"}`."""
    words = core.overrides.describe() if core.overrides is not None else {}
    for name, value in core.tunables.steered().items():
        words[name] = f"= {value:g}" if isinstance(value, float) else f"= {value}"
    return words
