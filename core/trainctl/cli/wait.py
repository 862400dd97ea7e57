"""`trainctl wait`: until a condition holds."""

import asyncio
import contextlib

import click

from trainctl.cli.acting import EXIT_CODES, opened
from trainctl.cli.options import DURATION, chosen, run_argument, run_options
from trainctl.client.commanding import check_expression
from trainctl.client.jsonable import dumps
from trainctl.client.session import Session
from trainctl.client.watching import watch
from trainctl.wire.expressions import Expression


@click.command()
@run_argument
@click.option("--for", "wanted", metavar="EXPR", required=True, help="For example: 'step >= 1000 and loss < 2.3'.")
@click.option("--timeout", "timeout_s", type=DURATION, metavar="DURATION", help="Give up after this time.")
@run_options
def wait(
    run: str | None,
    run_argument: str | None,
    server_key: str | None,
    wanted: str,
    timeout_s: float | None,
    *,
    as_json: bool,
) -> int:
    """Wait until a condition holds: 0 it does, 1 the run ended without, 5 the time is over."""
    expression = check_expression(wanted)
    try:
        return asyncio.run(_wait(chosen(run, run_argument), server_key, expression, timeout_s, as_json=as_json))
    except KeyboardInterrupt:
        return EXIT_CODES["unknown"]


async def _wait(
    run: str | None, server_key: str | None, expression: Expression, timeout_s: float | None, *, as_json: bool
) -> int:
    async with opened(run, server_key) as session:
        reason: str | None = None
        try:
            async with asyncio.timeout(timeout_s):
                holds = await _until(session, expression)
        except TimeoutError:
            holds, reason = False, f"not within {timeout_s:g} s"
        code = 0 if holds else EXIT_CODES["expired"] if reason else EXIT_CODES["failed"]
        model = session.model
        state, step = (model.state.state, model.state.step) if model.state else (None, None)
        reason = reason or (None if holds else f"the run is {state}")
        if as_json:
            fields = {"run": model.name, "for": expression.text, "holds": holds, "step": step, "state": state}
            click.echo(dumps(fields | {"reason": reason}))
        elif holds:
            click.echo(f"{model.name}: {expression.text} holds at step {step}")
        else:
            click.echo(f"{model.name}: {expression.text} does not hold at step {step}: {reason}", err=True)
        return code


async def _until(session: Session, expression: Expression) -> bool:
    """Whether it came true before the run ended."""
    if expression(session.model.values()):
        return True
    if missing := sorted(expression.names - session.model.values().keys()):
        known = ", ".join(sorted(session.model.values())) or "none"
        click.echo(f"waiting; there is no {', '.join(missing)} yet, only: {known}", err=True)
    async with contextlib.aclosing(watch(session)) as items:
        async for _ in items:
            if expression(session.model.values()):
                return True
    return False
