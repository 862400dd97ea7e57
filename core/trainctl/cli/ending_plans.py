"""What `abort --now` and `restart` would do, said before they are confirmed."""

from trainctl.cli.checkpoint import picked
from trainctl.client.errors import Rejected
from trainctl.client.session import Session
from trainctl.wire.commands import Restart
from trainctl.wire.manifest import pick

_HOW = "by its node's agent: SIGTERM, and SIGKILL 10 s later; nothing is saved"


async def plan_abort(session: Session) -> str:
    """Which ranks end, and what is lost."""
    last = pick(session.model.checkpoints, "last")
    kept = f"the last checkpoint is of step {last.step}" if last is not None else "there is no checkpoint of this run"
    return f"{session.model.name}: {_ranks(session)} ended at once at step {_step(session)}, each {_HOW}; {kept}"


async def plan_restart(session: Session, action: Restart) -> str:
    """What the next attempt starts from. Raises `Rejected` when the target is no checkpoint or a damaged one."""
    found = (await session.checkpoints()).checkpoints
    info = pick(found, "last") if action.target == "last" else picked(found, action.target, session.model)
    if info is not None and info.verified is False:
        raise Rejected(f"checkpoint {info.id} is damaged; nothing was done", "trainctl checkpoint ls lists the others")
    begins = f"from {info.id} (step {info.step})" if info is not None else "anew: there is no checkpoint yet"
    return (
        f"{session.model.name}: {_ranks(session)} ended at once at step {_step(session)}, each {_HOW}; then the next "
        f"attempt begins {begins}"
    )


def _ranks(session: Session) -> str:
    count = session.model.info.world_size if session.model.info else 0
    return f"{count} ranks are" if count != 1 else "1 rank is"


def _step(session: Session) -> int:
    return session.model.state.step if session.model.state else 0
