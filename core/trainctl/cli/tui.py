"""`trainctl tui`: the cockpit."""

import sys

import click

from trainctl.cli.options import chosen, run_argument, run_options


@click.command()
@run_argument
@click.option("--read-only", is_flag=True, help="Look, and act on nothing.")
@click.option("--headless", is_flag=True, help="The same as `trainctl log -f`.")
@run_options
def tui(
    run: str | None,
    run_argument: str | None,
    server_key: str | None,
    *,
    read_only: bool,
    headless: bool,
    as_json: bool,
) -> int:
    """Open the cockpit on a run; a run's directory replays."""
    ref = chosen(run, run_argument)
    if headless or as_json:
        from trainctl.cli.log import Wanted, print_log

        return print_log(ref, server_key, Wanted(follow=True), as_json=as_json)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("the cockpit needs a terminal; without one: `trainctl log -f` or `trainctl status`")
    from trainctl.tui.app import run_cockpit

    run_cockpit(ref, owned=False, read_only=read_only, server_key=server_key)
    return 0
