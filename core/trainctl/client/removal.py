"""Deleting a checkpoint of a run that nobody trains and no hub serves: by its directory, with an audit line."""

import asyncio
import getpass
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from trainctl.client.errors import ClientError, Rejected
from trainctl.store.audit import AuditLog
from trainctl.store.audit_entries import outcome_entry
from trainctl.wire.commands import CheckpointRemove, Command, CommandState, args_of, spec_of
from trainctl.wire.messages import CommandUpdate, RunState
from trainctl.wire.removal import NotRemoved, remove_unless_kept
from trainctl.wire.rundir import RunDir


async def remove(
    run_dir: RunDir, action: CheckpointRemove, command: Command, state: RunState
) -> AsyncGenerator[CommandUpdate, None]:
    """Write it down, do it, and write down what became of it, as a hub would. Raises `ClientError`."""
    actor = getpass.getuser()

    def update(stands: CommandState, reason: str | None = None) -> CommandUpdate:
        return CommandUpdate(
            time=time.time(),
            step=state.step,
            incarnation=state.incarnation,
            id=command.id,
            command=spec_of(action).name,
            args=args_of(action),
            actor=actor,
            state=stands,
            reason=reason,
        )

    if command.condition is not None:
        raise Rejected(
            f"`{spec_of(action).name}` of a recorded run takes no condition: nothing trains that could decide it"
        )
    await asyncio.to_thread(_write_down, run_dir.audit_file, update("accepted"))
    yield update("accepted")
    outcome = await asyncio.to_thread(_remove, run_dir, action.checkpoint)
    final = update(*outcome)
    await asyncio.to_thread(_write_down, run_dir.audit_file, final)
    yield final


def _remove(run_dir: RunDir, checkpoint_id: str) -> tuple[CommandState, str | None]:
    try:
        remove_unless_kept(run_dir.checkpoints, checkpoint_id)
    except NotRemoved as kept:
        return "rejected", str(kept)
    except OSError as error:
        return "failed", f"{error.filename or checkpoint_id}: {error.strerror or error}"
    return "applied", None


def _write_down(audit_file: Path, update: CommandUpdate) -> None:
    """Raises `ClientError`, so that nothing is deleted that nobody can look up later."""
    entry = {**outcome_entry(update), "checkpoint": str(update.args.get("checkpoint"))}
    try:
        AuditLog(audit_file).append(entry)
    except OSError as error:
        raise ClientError(
            f"the audit log cannot be written ({error.strerror or error}), so no checkpoint is deleted",
            f"make {audit_file.parent} writable and leave room there",
        ) from None
