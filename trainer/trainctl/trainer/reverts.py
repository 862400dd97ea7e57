"""Commit-confirmed: a change that undoes itself N steps later unless a condition holds by then.

It lives in the trainer, so it works when the operator's line is cut. Every rank remembers how to undo; when the time
comes rank 0 proposes the undoing like any command, and decides the condition at that boundary, so that all ranks undo
at one step or all keep the change. Changes on trial are plain data and part of every checkpoint.

A trial is N steps of the live branch. A rollback to before the change leaves the change in force and begins its trial
anew there, because what it was on trial for was rolled back; a rollback to a later step trains the rest of the trial
again. A newer change of the same takes the place of one on trial; if it is on trial itself it goes back, in the end, to
what was before both: what nobody confirmed never becomes permanent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import msgspec

from trainctl.trainer.override_rules import LR, Row, group_of, names_in
from trainctl.wire.commands import Act, Command, Rollback, SetTunable
from trainctl.wire.expressions import Value, parse
from trainctl.wire.messages import Scalar

_LEAD = 2  # proposals take effect this many steps ahead
LEAD_LIMIT = 1000
_REMEMBERED = 100  # changes that are on trial no more, and why
_ASK_AGAIN = 100  # steps after which an undoing that found no boundary is proposed once more


@dataclass(frozen=True, kw_only=True)
class TunableWas:
    """A script's tunable before a change; `steered`: an operator had set it."""

    value: Scalar
    steered: bool


Kept: TypeAlias = TunableWas | Sequence[Row]  # the rules of an override, or a tunable


@dataclass(frozen=True, kw_only=True)
class Revert:
    """A change on trial that took effect at the boundary of step `begun`; `before` and `after`: what it changed."""

    command: Command
    actor: str
    begun: int
    before: Kept
    after: Kept

    @property
    def due(self) -> int:
        return self.begun + (self.command.revert_after or 0)

    def words(self) -> str:
        unless = f" unless {self.command.unless}" if self.command.unless is not None else ""
        return f"on trial, undone at step {self.due}{unless}"

    def holds(self, values: Mapping[str, Value]) -> bool:
        """Whether the condition to keep the change holds."""
        return self.command.unless is not None and parse(self.command.unless)(values)


def replaces(newer: Act, older: Act) -> bool:
    """Whether `newer` takes the place of all that `older` changed."""
    if isinstance(newer, Rollback):
        return newer.lr_scale is not None and LR in names_in(older)
    if not (names := names_in(newer)):
        return isinstance(newer, SetTunable) and isinstance(older, SetTunable) and newer.name == older.name
    return names == names_in(older) and (group_of(newer) is None or group_of(newer) == group_of(older))


class Reverts:
    """The changes on trial, by command id; alike on every rank, for they are applied and undone at boundaries."""

    def __init__(self) -> None:
        self._pending: dict[str, Revert] = {}
        self._asked: dict[str, int] = {}  # by command id, the step at which the undoing was last proposed
        self._asks: dict[str, int] = {}  # and how often it was
        self._gone: dict[str, str] = {}  # by command id, why it is on trial no more
        self._looked: int | None = None  # the step at which it was last looked for what is due

    def add(self, revert: Revert) -> None:
        self._pending = {**self._pending, revert.command.id: revert}
        self._asked.pop(revert.command.id, None)

    def replaced_by(self, action: Act, by: str) -> list[Revert]:
        """Those that `action`, of command `by`, takes the place of, the newest first; they are on trial no more."""
        gone = [revert for revert in self._pending.values() if replaces(action, revert.command.action)]
        for revert in gone:
            self.take(revert.command.id, f"{by} took its place")
        return gone[::-1]

    def get(self, command_id: str) -> Revert | None:
        return self._pending.get(command_id)

    def why_gone(self, command_id: str) -> str:
        """Why a change is on trial no more; alike on every rank."""
        return self._gone.get(command_id, "it is on trial no more")

    def take(self, command_id: str, why: str) -> Revert | None:
        """The change is undone or confirmed, as `why` says."""
        found = self._pending.get(command_id)
        self._gone[command_id] = why
        if len(self._gone) > _REMEMBERED:
            del self._gone[next(iter(self._gone))]
        self._pending = {key: revert for key, revert in self._pending.items() if key != command_id}
        return found

    def due(self, completed: int, *, held: bool = False) -> list[tuple[Revert, int]]:
        """For rank 0: those whose undoing is to be proposed now so that it takes effect when it is due.

        Each with how often it was proposed before. `held`: the run is paused, so a proposal takes effect at once. Asked
        again and again; what would be due before the next time, if that comes as late as this one, is due now.
        """
        found = []
        ahead = completed - self._looked if self._looked is not None else 0
        self._looked = completed
        # No earlier than needed: until its step comes, the commands behind it wait.
        lead = 0 if held else min(_LEAD + (2 * ahead if ahead > 1 else 0), LEAD_LIMIT)
        for key, revert in list(self._pending.items()):
            asked = self._asked.get(key)
            waiting = asked is not None and asked <= completed < max(asked, revert.due) + _ASK_AGAIN
            if completed >= revert.due - lead and not waiting:
                found.append((revert, self._asks.get(key, 0)))
                self._asked[key] = completed
                self._asks[key] = self._asks.get(key, 0) + 1
        return found

    def too_early(self, revert: Revert) -> None:
        """Its undoing came to a boundary before its step: let it be proposed again."""
        self._asked.pop(revert.command.id, None)

    def rewound(self, step: int) -> None:
        """The run went back to `step`: what was begun later begins its trial there."""
        self._pending = {key: replace(revert, begun=min(revert.begun, step)) for key, revert in self._pending.items()}
        self._asked.clear()

    def steps_left(self, completed: int) -> dict[str, int]:
        """Steps until each change on trial is judged, by command id."""
        return {key: max(0, found.due - completed) for key, found in list(self._pending.items())}

    # --- keeping

    def state_dict(self) -> dict[str, Any]:
        """What is on trial, as plain lists, numbers and text."""
        rows = [
            [
                msgspec.json.encode(revert.command).decode(),
                revert.actor,
                revert.begun,
                _packed(revert.before),
                _packed(revert.after),
            ]
            for revert in list(self._pending.values())
        ]
        return {"trials": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what was on trial in place of what is. Raises `msgspec.MsgspecError` for what is no state of ours."""
        pending = {}
        for text, actor, begun, before, after in state["trials"]:
            command = msgspec.json.decode(text, type=Command)
            pending[command.id] = Revert(
                command=command,
                actor=str(actor),
                begun=int(begun),
                before=_unpacked(before),
                after=_unpacked(after),
            )
        self._pending = pending
        self._asked.clear()


def _packed(kept: Kept) -> list[Any]:
    return ["tunable", kept.value, kept.steered] if isinstance(kept, TunableWas) else ["rules", list(kept)]


def _unpacked(packed: Sequence[Any]) -> Kept:
    if packed[0] == "tunable":
        return TunableWas(value=packed[1], steered=bool(packed[2]))
    return [list(row) for row in packed[1]]
