"""What a change of an operator's does to overrides and tunables, and how one on trial is undone: on every rank alike.

All of it happens at a boundary, on the training thread, and is assignment only.
"""

from typing import TypeAlias

from trainctl.trainer.agreement import Outcome, Proposal, kept_by
from trainctl.trainer.core import Core
from trainctl.trainer.newest import newest_metrics
from trainctl.trainer.override_rules import group_of, names_in, rows_of, rules_from, undone
from trainctl.trainer.reverts import Kept, Revert, TunableWas
from trainctl.wire.commands import LrRelease, LrScale, LrSet, SetTunable
from trainctl.wire.expressions import Value
from trainctl.wire.messages import Scalar

Override: TypeAlias = LrScale | LrSet | LrRelease | SetTunable


class Changes:
    """Carries changes out on one rank, and remembers what was before those that are on trial."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def replaced(self, proposal: Proposal) -> list[Revert]:
        """The changes on trial that this one takes the place of; told, because their undoing will not come."""
        core, newer = self._core, proposal.command
        replaced = core.reverts.replaced_by(newer.action, newer.id)
        for revert in replaced:
            core.note(proposal.actor, f"{newer.id} takes the place of {revert.command.id}, which was on trial")
        return replaced

    def set(
        self, action: SetTunable, proposal: Proposal, replaced: list[Revert], *, tried: Scalar = None
    ) -> tuple[Scalar, Scalar]:
        """`tried`: what the value was before it was tried out, where it was."""
        tunables, core = self._core.tunables, self._core
        steered = tunables.is_steered(action.name)
        if tried is None:
            before, after = tunables.apply(action.name, action.value)
        else:
            before, after = tunables.take(action.name, tried)
        was = TunableWas(value=before, steered=steered)
        confirmed = [revert.before for revert in replaced if isinstance(revert.before, TunableWas)]
        self._on_trial(
            proposal, before=confirmed[-1] if confirmed else was, after=TunableWas(value=after, steered=True)
        )
        core.steered()
        return before, after

    def override(self, action: Override, proposal: Proposal, replaced: list[Revert]) -> tuple[Scalar, Scalar]:
        overrides = self._core.overrides
        assert overrides is not None
        names = names_in(action)
        before, confirmed = overrides.effective(names[0], action.group), rules_from(overrides.rows(names))
        overrides.apply(action)
        for revert in replaced:
            if not isinstance(revert.before, TunableWas) and not isinstance(revert.after, TunableWas):
                then, later = rules_from(revert.before), rules_from(revert.after)
                confirmed = undone(confirmed, before=then, after=later)
        self._on_trial(proposal, before=rows_of(confirmed), after=overrides.rows(names))
        self._core.steered()
        return before, overrides.effective(names[0], action.group)

    def _on_trial(self, proposal: Proposal, *, before: Kept, after: Kept) -> None:
        command, begun = proposal.command, self._core.boundary.completed
        if command.revert_after is not None:
            revert = Revert(command=command, actor=proposal.actor, begun=begun, before=before, after=after)
            self._core.reverts.add(revert)

    def undo(self, command_id: str) -> Outcome:
        """Put back what a change on trial had changed."""
        core, step = self._core, self._core.boundary.completed
        if (problem := self.not_due(command_id)) is not None:
            return Outcome(ok=False, step=step, reason=problem, declined=True)
        revert = core.reverts.take(command_id, f"it was undone at step {step}")
        assert revert is not None
        core.steered()
        action, overrides = revert.command.action, core.overrides
        if isinstance(revert.before, TunableWas) and isinstance(action, SetTunable) and action.name in core.tunables:
            was = revert.before
            assert was.value is not None
            before, after = core.tunables.apply(action.name, was.value, steered=was.steered)
            return Outcome(ok=True, step=step, before=before, after=after)
        rows = (revert.before, revert.after)
        if overrides is not None and not isinstance(rows[0], TunableWas) and not isinstance(rows[1], TunableWas):
            name, group = names_in(action)[0], group_of(action)
            if (group or 0) < overrides.groups:
                before = overrides.effective(name, group)
                overrides.undo(before=rows[0], after=rows[1])
                return Outcome(ok=True, step=step, before=before, after=overrides.effective(name, group))
        return Outcome(ok=False, step=step, reason="this script has no such value any more", declined=True)

    def not_due(self, command_id: str) -> str | None:
        """Why nothing is to be undone at this boundary, alike on every rank, or None."""
        reverts, step = self._core.reverts, self._core.boundary.completed
        if (revert := reverts.get(command_id)) is None:
            return reverts.why_gone(command_id)
        if step < revert.due:
            reverts.too_early(revert)
            return f"a rollback began its trial anew: it is undone at step {revert.due}"
        return None

    def stays(self, command_id: str) -> str | None:
        """Why the change is not to be undone though it is time, as rank 0 finds of its condition here and now."""
        core, revert = self._core, self._core.reverts.get(command_id)
        if not core.place.leads or revert is None or not revert.holds(condition_values(core)):
            return None
        return _holds(revert)

    def keep(self, command_id: str, undoing_id: str, verdict: bytes) -> None:
        """Every rank learned that the change is not to be undone: it is confirmed, and told why."""
        core, revert = self._core, self._core.reverts.get(command_id)
        if revert is None:
            return
        by = kept_by(verdict)
        why = _holds(revert) if by is None else f"{undoing_id} was cancelled: the change of command {command_id} stays"
        core.reverts.take(command_id, why)
        core.note(by or revert.actor, why)
        core.steered()


def _holds(revert: Revert) -> str:
    return f"{revert.command.unless} holds: the change of command {revert.command.id} stays"


def condition_values(core: Core) -> dict[str, Value]:
    """What conditions may ask about, as it is now on this rank."""
    values: dict[str, Value] = {**newest_metrics(core), "step": core.boundary.completed}
    values |= {"state": core.state(), "incarnation": core.incarnation}
    if core.overrides is not None:
        values["lr"] = core.overrides.effective_lr()
    return values
