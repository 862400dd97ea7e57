"""Options that many subcommands share, and the types of their values."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

F = TypeVar("F", bound=Callable[..., Any])

_DURATION = re.compile(r"^(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?\Z")


if TYPE_CHECKING:
    _SecondsType = click.ParamType[float]
else:
    _SecondsType = click.ParamType  # click 8.1 cannot subscript it


class Duration(_SecondsType):
    """Seconds, from `90`, `10s`, `30m`, `1h30m` or `2d`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = _DURATION.match(str(value))
        if match is None or not value:
            self.fail(f"{value!r} is no duration: write 45s, 30m, 1h30m or seconds", param, ctx)
        parts = {unit: float(number) for unit, number in match.groupdict().items() if number}
        seconds = sum(number * {"d": 86400, "h": 3600, "m": 60, "s": 1}[unit] for unit, number in parts.items())
        if seconds <= 0:
            self.fail(f"{value!r} is no time at all", param, ctx)
        return seconds


DURATION = Duration()


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What all acting commands take besides their own arguments."""

    run: str | None
    server_key: str | None
    as_json: bool
    condition: str | None = None
    expires_s: float | None = None
    timeout_s: float = 60.0
    command_id: str | None = None
    revert_after: int | None = None
    unless: str | None = None
    yes: bool = False


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def run_options(command: F) -> F:
    """`-r/--run`, `--server-key` and `--json`."""
    command = json_option(command)
    command = click.option(
        "--server-key", metavar="KEY", help="The hub's public key, with a tcp:// address of somebody else's run."
    )(command)
    return click.option(
        "-r", "--run", "run", metavar="RUN", help="Name, id, tcp://host:port or directory; else TRAINCTL_RUN."
    )(command)


def run_argument(command: F) -> F:
    """RUN as the one argument, for commands that only look."""
    return click.argument("run_argument", metavar="[RUN]", required=False)(command)


def chosen(run: str | None, argument: str | None) -> str | None:
    """The run that was named, by option or as the argument."""
    if run and argument and run != argument:
        raise click.UsageError(f"two runs are named: {argument} and {run}")
    return argument or run


def acting_options(*, reverts: bool = False) -> Callable[[F], Callable[..., Any]]:
    """What acting commands take; they get it as one `asked`. `reverts` adds `--revert-after` and `--unless`."""

    def decorate(command: F) -> Callable[..., Any]:
        def gathered(**given: Any) -> Any:
            fields = {name: given.pop(name) for name in Asked.__struct_fields__ if name in given}
            return command(asked=Asked(**fields), **given)

        gathered.__name__, gathered.__doc__ = command.__name__, command.__doc__
        gathered.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        wrapped: Callable[..., Any] = gathered
        if reverts:
            wrapped = click.option("--unless", metavar="EXPR", help="Keep the change if this holds then.")(wrapped)
            wrapped = click.option(
                "--revert-after", type=click.IntRange(1), metavar="N", help="Undo by itself N steps later."
            )(wrapped)
        wrapped = click.option("--yes", "-y", is_flag=True, help="Do not ask first.")(wrapped)
        wrapped = click.option("--command-id", metavar="ID", help="Repeat safely: the same id acts once.")(wrapped)
        wrapped = click.option(
            "--timeout", "timeout_s", type=DURATION, default="60s", show_default=True, help="How long to wait here."
        )(wrapped)
        wrapped = click.option(
            "--expires", "expires_s", type=DURATION, metavar="DURATION", help="If not applied by then, never."
        )(wrapped)
        wrapped = click.option("--if", "condition", metavar="EXPR", help="Only if this holds at the boundary.")(wrapped)
        return run_options(wrapped)

    return decorate
