"""The entry of `trainctl`: which subcommands there are, and how errors become words and exit codes.

Nothing heavy is imported here: `trainctl --help` answers at once, and a broken part breaks its own subcommand only.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from trainctl.cli.foreign import foreign_packages
from trainctl.client.errors import ClientError
from trainctl.wire.commands import REGISTRY

# name: (module of trainctl.cli, attribute, one line of help)
_COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("demo", "demo", "train a small GPT on this machine and open the cockpit on it"),
    "run": ("run", "run", "start a training script under torchrun"),
    "ls": ("ls", "ls", "list runs: live, lost, finished"),
    "tui": ("tui", "tui", "open the cockpit on a run"),
    "log": ("log", "log", "print a run's log, a line an event"),
    "status": ("status", "status", "one picture of now"),
    "wait": ("wait", "wait", "wait until a condition holds"),
    "history": ("history", "history", "values or rollups of metrics"),
    "export": ("export", "export", "all values, for TensorBoard or as CSV or Parquet"),
    "pause": ("act", "pause", REGISTRY["pause"].summary),
    "resume": ("act", "resume", REGISTRY["resume"].summary),
    "lr": ("act", "lr", "scale, set or release the learning rate"),
    "set": ("tunables", "set_", REGISTRY["set"].summary),
    "get": ("tunables", "get", "print one tunable"),
    "tunables": ("tunables", "tunables", "list the script's tunables"),
    "checkpoint": ("checkpoint", "checkpoint", "save, list, verify, pin, delete and export checkpoints"),
    "rollback": ("rollback", "rollback", REGISTRY["rollback"].summary),
    "eval": ("act", "evaluate", REGISTRY["eval"].summary),
    "stop": ("act", "stop", REGISTRY["stop"].summary),
    "abort": ("act", "abort", REGISTRY["abort"].summary),
    "restart": ("act", "restart", REGISTRY["restart"].summary),
    "cancel": ("act", "cancel", REGISTRY["cancel"].summary),
    "note": ("act", "note", REGISTRY["note"].summary),
    "audit": ("audit", "audit", "who did what, and whether that record is whole"),
    "agent": ("agent", "agent", "run this node's agent"),
    "top": ("top", "top", "nodes and GPUs without a run"),
    "keys": ("keys", "keys", "this user's keys"),
    "doctor": ("doctor", "doctor", "check this machine, and say what to do"),
}


# Options of subcommands that people give before the subcommand, with what they take.
_AFTER_THE_SUBCOMMAND = {"-r": " RUN", "--run": " RUN", "--server-key": " KEY", "--json": ""}


class Trainctl(click.Group):
    """The root: subcommands from the table, errors as one clear line and the exit codes of docs/cli.md."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        found = getattr(importlib.import_module(f"trainctl.cli.{module}"), attribute)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run one command and exit with its code."""
        del standalone_mode
        words = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in words
        try:
            result = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
            sys.exit(result if isinstance(result, int) else 0)
        except ClientError as error:
            fail(error.message, error.hint, error.code, as_json=as_json)
            sys.exit(error.exit_code)
        except click.exceptions.Abort:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except click.NoSuchOption as error:
            later = error.option_name in _AFTER_THE_SUBCOMMAND and (error.ctx is None or error.ctx.parent is None)
            fail(*(_goes_later(error.option_name) if later else _usage(error)), "usage", as_json=as_json)
            sys.exit(2)
        except click.ClickException as error:
            fail(*_usage(error), "usage", as_json=as_json)
            sys.exit(2)
        except BrokenPipeError:
            _swallow_stdout()  # whoever read our output has seen enough
            sys.exit(0)


def _usage(error: click.ClickException) -> tuple[str, str]:
    hint = error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx else ""
    return error.format_message(), hint


def _goes_later(option: str) -> tuple[str, str]:
    value = _AFTER_THE_SUBCOMMAND[option]
    return f"{option} goes after the subcommand", f"for example: trainctl status {option}{value}"


def fail(message: str, hint: str, code: str, *, as_json: bool) -> None:
    """Say what went wrong: words on stderr, and the error object on stdout where scripts asked for JSON."""
    click.echo(f"trainctl: {message}", err=True)
    if hint:
        click.echo(f"  {hint}", err=True)
    if as_json:
        from trainctl.client.jsonable import dumps

        click.echo(dumps({"error": {"code": code, "message": message, "hint": hint}}))


def _swallow_stdout() -> None:
    # The interpreter flushes stdout at exit, which would raise again.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(f"trainctl-cockpit {version('trainctl-cockpit')}")
    ctx.exit()


@click.command(
    cls=Trainctl,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="A run is chosen by -r/--run after the subcommand (trainctl status -r RUN), or by TRAINCTL_RUN: a name, "
    "an id, tcp://host:port or a run's directory.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def cli() -> None:
    """The operator's cockpit for live PyTorch training.

    Watch a training job and act on it from a terminal: pause, change the learning rate, checkpoint, roll back, stop.
    """


def main() -> NoReturn:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a glyph that the terminal's encoding lacks is no reason to fail
    for foreign in foreign_packages():
        click.echo(f"trainctl: another project's package is installed beside this one: {foreign}", err=True)
    cli.main()
