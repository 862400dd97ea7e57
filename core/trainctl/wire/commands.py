"""The registry of commands: one place says what exists, who may, what is asked first and which key it has.

The hub checks against it, the CLI and the palette are built from it, and docs/commands.md is printed from it.
A command that is not here does not exist; a role that is not enough is refused.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

Role: TypeAlias = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = ("viewer", "operator", "admin")

Carrier: TypeAlias = Literal["ranks", "hub", "agents"]

CommandState: TypeAlias = Literal[
    "accepted",
    "scheduled",
    "applied",
    "rejected",
    "conflict",
    "expired",
    "failed",
    "superseded",
    "unknown",
]
FINAL_COMMAND_STATES: frozenset[str] = frozenset(
    {"applied", "rejected", "conflict", "expired", "failed", "superseded", "unknown"}
)

# Of a learning rate, its factor or a weight decay. More is a slip of the hand, and an optimizer that multiplies two of
# them raises where their product is beyond what its tensors hold: that would end the training, and every restart of it.
LARGEST = 1e15

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0)]
Text = Annotated[str, Meta(max_length=2000)]
Ident = Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]


class Act(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of the actions; the tag is the command's name as typed."""


class Pause(Act, frozen=True, kw_only=True, tag="pause"):
    for_s: Positive | None = None


class Resume(Act, frozen=True, kw_only=True, tag="resume"):
    pass


class LrScale(Act, frozen=True, kw_only=True, tag="lr scale"):
    factor: Positive
    group: Count | None = None


class LrSet(Act, frozen=True, kw_only=True, tag="lr set"):
    value: Annotated[float, Meta(ge=0)]
    group: Count | None = None


class LrRelease(Act, frozen=True, kw_only=True, tag="lr release"):
    group: Count | None = None


class SetTunable(Act, frozen=True, kw_only=True, tag="set"):
    name: Text
    value: bool | int | float | Text  # of an optimizer's field also "release": give it back to the script
    group: Count | None = None  # of an optimizer's field: only this parameter group


class CheckpointSave(Act, frozen=True, kw_only=True, tag="checkpoint save"):
    note: Text | None = None
    pin: bool = False


class CheckpointPin(Act, frozen=True, kw_only=True, tag="checkpoint pin"):
    checkpoint: Ident


class CheckpointUnpin(Act, frozen=True, kw_only=True, tag="checkpoint unpin"):
    checkpoint: Ident


class CheckpointRemove(Act, frozen=True, kw_only=True, tag="checkpoint rm"):
    checkpoint: Ident


class Rollback(Act, frozen=True, kw_only=True, tag="rollback"):
    target: Ident  # "last", "best", a step or an id
    skip_batches: Count = 0
    lr_scale: Positive | None = None
    restore_overrides: bool = False


class Evaluate(Act, frozen=True, kw_only=True, tag="eval"):
    pass


class Stop(Act, frozen=True, kw_only=True, tag="stop"):
    preempted: Text | None = None  # why the machine is taken away: the run then ends as preempted


class Abort(Act, frozen=True, kw_only=True, tag="abort"):
    now: bool = False  # at once, by the nodes' agents: needs no boundary


class Restart(Act, frozen=True, kw_only=True, tag="restart"):
    target: Ident = "last"  # "last", "best", a step or an id


class EndRanks(Act, frozen=True, kw_only=True, tag="end ranks"):
    """What a hub asks of a node's agent: SIGTERM to the ranks of one attempt on its node, SIGKILL after `grace_s`."""

    run: Ident
    attempt: Annotated[int, Meta(ge=1, le=2**62)]
    grace_s: Annotated[float, Meta(ge=0, le=600)]


class AddNote(Act, frozen=True, kw_only=True, tag="note"):
    text: Text


class Cancel(Act, frozen=True, kw_only=True, tag="cancel"):
    command: Ident


Action: TypeAlias = (
    Pause
    | Resume
    | LrScale
    | LrSet
    | LrRelease
    | SetTunable
    | CheckpointSave
    | CheckpointPin
    | CheckpointUnpin
    | CheckpointRemove
    | Rollback
    | Evaluate
    | Stop
    | Abort
    | Restart
    | EndRanks
    | AddNote
    | Cancel
)


class Command(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A command as the client sends it. Who sent it is never in here: the hub knows the key."""

    id: Ident
    action: Action
    condition: Text | None = None  # --if
    expires_s: Positive | None = None
    revert_after: Annotated[int, Meta(ge=1)] | None = None
    unless: Text | None = None


class Spec(Struct, frozen=True, kw_only=True):
    """What the registry knows of one command.

    `capability` is the name under which a run says whether it supports the command; `by` is who carries it out:
    all ranks at one boundary, the hub alone, or the nodes' agents at once. `inside`: the boundary may lie between two
    batches of an evaluation; others wait for its end, because the script may have swapped its weights.
    """

    action: type[Act]
    role: Role
    by: Carrier
    capability: str | None
    summary: str
    key: str | None = None
    asks_first: bool = False
    inside: bool = False

    @property
    def name(self) -> str:
        return str(self.action.__struct_config__.tag)


REGISTRY: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(
            action=Pause,
            role="operator",
            by="ranks",
            inside=True,
            capability="pause",
            key="P",
            summary="hold every rank at the next boundary",
        ),
        Spec(
            action=Resume,
            role="operator",
            by="ranks",
            inside=True,
            capability="pause",
            key="P",
            summary="go on after a pause",
        ),
        Spec(
            action=LrScale,
            role="operator",
            by="ranks",
            inside=True,
            capability="lr",
            key="L",
            summary="multiply the scheduled learning rate",
        ),
        Spec(action=LrSet, role="operator", by="ranks", inside=True, capability="lr", summary="pin the learning rate"),
        Spec(
            action=LrRelease,
            role="operator",
            by="ranks",
            inside=True,
            capability="lr",
            summary="give the learning rate back to the schedule",
        ),
        Spec(
            action=SetTunable,
            role="operator",
            by="ranks",
            inside=True,
            capability="set",
            key="T",
            summary="change a tunable of the script, or an optimizer's weight decay, momentum or betas",
        ),
        Spec(
            action=CheckpointSave,
            role="operator",
            by="ranks",
            capability="checkpoint",
            key="C",
            summary="save a checkpoint at the next boundary",
        ),
        Spec(
            action=CheckpointPin,
            role="operator",
            by="hub",
            capability=None,
            summary="keep a checkpoint whatever the retention says",
        ),
        Spec(
            action=CheckpointUnpin,
            role="operator",
            by="hub",
            capability=None,
            summary="leave a checkpoint to the retention again",
        ),
        Spec(
            action=CheckpointRemove,
            role="operator",
            by="hub",
            capability=None,
            asks_first=True,
            summary="delete a checkpoint for good",
        ),
        Spec(
            action=Rollback,
            role="operator",
            by="ranks",
            capability="rollback",
            key="R",
            asks_first=True,
            summary="restore a verified checkpoint on every rank",
        ),
        Spec(
            action=Evaluate,
            role="operator",
            by="ranks",
            capability="eval",
            key="E",
            summary="evaluate at the next boundary",
        ),
        Spec(
            action=Stop,
            role="operator",
            by="ranks",
            inside=True,
            capability="stop",
            key="S",
            asks_first=True,
            summary="save a checkpoint and end the training",
        ),
        Spec(
            action=Abort,
            role="operator",
            by="ranks",
            inside=True,
            capability="stop",
            asks_first=True,
            summary="end the training without saving",
        ),
        Spec(
            action=Restart,
            role="operator",
            by="agents",
            capability=None,
            asks_first=True,
            summary="end every rank at once and start the next attempt from a checkpoint",
        ),
        Spec(action=AddNote, role="operator", by="hub", capability=None, summary="write a note into the log"),
        Spec(
            action=Cancel,
            role="operator",
            by="hub",
            capability=None,
            summary="withdraw a command that is not scheduled yet",
        ),
    )
}

# What sources ask of one another: authorised like any command, and no operator types it.
_BETWEEN_SOURCES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(
            action=EndRanks,
            role="operator",
            by="agents",
            capability=None,
            summary="end the ranks of one attempt on the agent's node",
        ),
    )
}


def spec_of(action: Act) -> Spec:
    """The registry's entry for an action."""
    name = str(action.__struct_config__.tag)
    return REGISTRY.get(name) or _BETWEEN_SOURCES[name]


def option_off(action: Act, capabilities: Mapping[str, bool | str]) -> str | None:
    """Why a script does not support an option of this action, or None; of the command itself `Spec.capability` says it.

    What a script does not mention it is taken to support.
    """
    if not isinstance(action, Rollback):
        return None
    options = {"skip": ("--skip-batches", action.skip_batches > 0), "lr": ("--lr-scale", action.lr_scale is not None)}
    for capability, (option, is_asked) in options.items():
        able = capabilities.get(capability, True)
        if is_asked and able is not True:
            return f"rollback {option}: {able or 'this run does not support it'}. Roll back without it"
    return None


def too_many_to_skip(action: Rollback, total_steps: int, a_step: int) -> str | None:
    """Why so many micro-batches cannot be meant to be left out, or None. `a_step`: how many a step reads on a rank."""
    whole = total_steps * a_step
    if action.skip_batches <= whole:
        return None
    return (
        f"to skip {action.skip_batches} micro-batches is more than the whole run reads on a rank: {total_steps} steps "
        f"of {a_step}, which is {whole}"
    )


def carrier_of(action: Act) -> Carrier:
    """Who carries an action out."""
    return "agents" if isinstance(action, Abort) and action.now else spec_of(action).by


def args_of(action: Act) -> dict[str, bool | int | float | str | None]:
    """The arguments that were given, for display and audit."""
    return {name: value for name in action.__struct_fields__ if (value := getattr(action, name)) is not None}


def check(action: Act) -> str | None:
    """Why an action cannot be meant, or None. Types and bounds are checked by decoding; this adds what they miss."""
    for name in action.__struct_fields__:
        value = getattr(action, name)
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} is {value}: give a finite number"
        if isinstance(value, float) and name in {"factor", "lr_scale", "for_s"} and value <= 0:
            return f"{name} is {value}: give a number above 0"
        if name == "value" and isinstance(action, LrSet) and isinstance(value, float) and value < 0:
            return f"a learning rate of {value} is negative: give 0 or more"
        rate = name in {"factor", "lr_scale"} or (name == "value" and isinstance(action, LrSet))
        if rate and isinstance(value, int | float) and value > LARGEST:
            return f"{name} is {value:g}: give a number up to {LARGEST:g}"
    return None
