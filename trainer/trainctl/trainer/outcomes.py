"""How a rank tells what became of a command."""

import time

from trainctl.trainer.boundary import Boundary
from trainctl.wire.commands import Command, args_of
from trainctl.wire.messages import CommandUpdate


def update_of(
    command: Command,
    actor: str,
    state: str,
    step: int | None,
    boundary: Boundary,
    incarnation: int,
    ranks: int,
    before: object = None,
    after: object = None,
    reason: str | None = None,
) -> CommandUpdate:
    """A command's update, with the time and place of now."""
    return CommandUpdate(
        time=time.time(),
        step=boundary.completed if step is None else step,
        incarnation=incarnation,
        id=command.id,
        command=str(command.action.__struct_config__.tag),
        args=args_of(command.action),
        actor=actor,
        state=state,  # type: ignore[arg-type]
        before=before,  # type: ignore[arg-type]
        after=after,  # type: ignore[arg-type]
        ranks=ranks if state == "applied" else None,
        reason=reason,
    )
