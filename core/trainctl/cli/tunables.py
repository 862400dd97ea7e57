"""The tunables of the script and the fields of its optimizers: list, get, set."""

import asyncio
import contextlib

import click

from trainctl.cli.acting import act, opened
from trainctl.cli.options import Asked, acting_options, run_options
from trainctl.client.errors import BadRequest
from trainctl.client.figures import plain, scalar
from trainctl.client.jsonable import dumps, jsonable
from trainctl.wire.commands import SetTunable
from trainctl.wire.messages import Tunable

_WORDS: dict[str, bool] = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


def typed(text: str) -> bool | int | float | str:
    """A value as typed: true and false, whole numbers, numbers, else the word itself."""
    if text.lower() in {"true", "false"}:
        return _WORDS[text.lower()]
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def typed_for(tunable: Tunable | None, text: str) -> bool | int | float | str:
    """A value as the tunable wants it, where the text can be read so; what does not fit is the hub's to refuse."""
    value = typed(text)
    if tunable is None:
        return value
    if tunable.kind == "str":
        return text
    if tunable.kind == "bool":
        return _WORDS.get(text.lower(), value)
    if tunable.kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


@click.command(
    "set",
    help="Change a tunable of the script, or an optimizer's weight_decay, momentum, beta1 or beta2, at the next "
    "boundary. VALUE `release` gives a field back to the script.",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("name")
@click.argument("value")
@click.option("--group", type=int, metavar="I", help="Of an optimizer's field: only this parameter group.")
@acting_options(reverts=True)
def set_(asked: Asked, name: str, value: str, group: int | None) -> int:
    found = asyncio.run(_tunables(asked.run, asked.server_key))[1]
    tunable = next((tunable for tunable in found if tunable.name == name), None)
    return act(SetTunable(name=name, value=typed_for(tunable, value), group=group), asked)


@click.command()
@click.argument("name")
@run_options
def get(run: str | None, server_key: str | None, as_json: bool, name: str) -> None:
    """Print one tunable."""
    run_name, found = asyncio.run(_tunables(run, server_key))
    tunable = next((tunable for tunable in found if tunable.name == name), None)
    if tunable is None:
        known = ", ".join(tunable.name for tunable in found) or "none"
        raise BadRequest(f"{run_name} has no tunable {name!r}", f"it has: {known}")
    click.echo(dumps({"run": run_name} | _fields(tunable)) if as_json else scalar(tunable.value))


@click.command()
@run_options
def tunables(run: str | None, server_key: str | None, as_json: bool) -> None:
    """List the script's tunables with their values and bounds."""
    run_name, found = asyncio.run(_tunables(run, server_key))
    if as_json:
        click.echo(dumps({"run": run_name, "tunables": [_fields(tunable) for tunable in found]}))
        return
    if not found:
        click.echo(f"{run_name} registered no tunables; a script does with run.tunable(NAME, VALUE)", err=True)
    width = max((len(tunable.name) for tunable in found), default=0)
    for tunable in found:
        about = [*([_bounds(tunable)] if _bounds(tunable) else []), *(["optimizer"] if tunable.optimizer else [])]
        bounds = f"  ({'; '.join(about)})" if about else ""
        unit = f" {plain(tunable.unit)}" if tunable.unit else ""
        click.echo(f"{plain(tunable.name):{width}}  {scalar(tunable.value)}{unit}{bounds}")


def _bounds(tunable: Tunable) -> str:
    low, high = tunable.minimum, tunable.maximum
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""


def _fields(tunable: Tunable) -> dict[str, object]:
    fields = jsonable(tunable)
    assert isinstance(fields, dict)
    return fields


async def _tunables(run: str | None, server_key: str | None) -> tuple[str, list[Tunable]]:
    async with opened(run, server_key) as session:
        return session.model.name, await session.tunables()
