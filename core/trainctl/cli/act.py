"""Commands that act and need no more than their arguments."""

import click

from trainctl.cli.acting import act
from trainctl.cli.ending_plans import plan_abort, plan_restart
from trainctl.cli.options import DURATION, Asked, acting_options
from trainctl.client.commanding import make_command
from trainctl.client.session import Session
from trainctl.wire.commands import (
    REGISTRY,
    Abort,
    AddNote,
    Cancel,
    Evaluate,
    LrRelease,
    LrScale,
    LrSet,
    Pause,
    Restart,
    Resume,
    Stop,
)

# A learning rate of -1 must reach the check that explains it, and not be read as an option.
_NUMBERS = {"ignore_unknown_options": True}


def _help(name: str) -> str:
    summary = REGISTRY[name].summary
    return f"{summary[0].upper()}{summary[1:]}."


@click.command(help=_help("pause"))
@click.option("--for", "for_s", type=DURATION, metavar="DURATION", help="Go on by itself after this time.")
@acting_options()
def pause(asked: Asked, for_s: float | None) -> int:
    return act(Pause(for_s=for_s), asked)


@click.command(help=_help("resume"))
@acting_options()
def resume(asked: Asked) -> int:
    return act(Resume(), asked)


@click.group()
def lr() -> None:
    """Change the learning rate: effective = scheduled × scale, or pinned."""


_group_option = click.option("--group", type=int, metavar="I", help="Only this parameter group.")


@lr.command("scale", help=_help("lr scale"), context_settings=_NUMBERS)
@click.argument("factor", type=float)
@_group_option
@acting_options(reverts=True)
def lr_scale(asked: Asked, factor: float, group: int | None) -> int:
    return act(LrScale(factor=factor, group=group), asked)


@lr.command("set", help=_help("lr set"), context_settings=_NUMBERS)
@click.argument("value", type=float)
@_group_option
@acting_options(reverts=True)
def lr_set(asked: Asked, value: float, group: int | None) -> int:
    return act(LrSet(value=value, group=group), asked)


@lr.command("release", help=_help("lr release"))
@_group_option
@acting_options(reverts=True)
def lr_release(asked: Asked, group: int | None) -> int:
    return act(LrRelease(group=group), asked)


@click.command("eval", help=_help("eval"))
@acting_options()
def evaluate(asked: Asked) -> int:
    return act(Evaluate(), asked)


@click.command(help=_help("stop"))
@acting_options()
def stop(asked: Asked) -> int:
    return act(Stop(), asked)


@click.command(help=_help("abort"))
@click.option("--now", is_flag=True, help="At once, by the nodes' agents: needs no boundary and no rank that listens.")
@acting_options()
def abort(asked: Asked, *, now: bool) -> int:
    return act(Abort(now=now), asked, plan_abort if now else None)


@click.command(help=_help("restart"))
@click.option(
    "--from", "target", default="last", show_default=True, metavar="TARGET", help="last, best, a step or an id."
)
@acting_options()
def restart(asked: Asked, target: str) -> int:
    action = Restart(target=target)
    make_command(action)  # refuses what cannot be meant, before anybody is asked

    async def shown(session: Session) -> str:
        return await plan_restart(session, action)

    return act(action, asked, shown)


@click.command(help=_help("cancel"))
@click.argument("command", metavar="ID")
@acting_options()
def cancel(asked: Asked, command: str) -> int:
    return act(Cancel(command=command), asked)


@click.command(help=_help("note"))
@click.argument("text")
@acting_options()
def note(asked: Asked, text: str) -> int:
    return act(AddNote(text=text), asked)
