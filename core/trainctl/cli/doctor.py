"""`trainctl doctor`: check this machine, and say what to do."""

from collections.abc import Iterator

import click

from trainctl.cli.checks import CHECKS, Finding, runs
from trainctl.cli.options import json_option
from trainctl.client.figures import plain
from trainctl.client.jsonable import dumps, jsonable

_MARKS = {"ok": "✓ ok     ", "warning": "⚠ warning", "broken": "✕ broken "}


@click.command()
@click.option("--strict", is_flag=True, help="Warnings count as broken.")
@json_option
def doctor(*, strict: bool, as_json: bool) -> int:
    """Check this machine: 0 fine or warnings, 1 broken."""
    findings: list[Finding] = []
    for finding in _findings():
        findings.append(finding)
        if not as_json:
            hint = f"\n             {plain(finding.hint)}" if finding.hint else ""
            click.echo(f"{_MARKS[finding.verdict]}  {finding.name}: {plain(finding.text)}{hint}")
    verdicts = {finding.verdict for finding in findings}
    bad = "broken" in verdicts or (strict and "warning" in verdicts)
    if as_json:
        click.echo(dumps({"ok": not bad, "checks": [jsonable(finding) for finding in findings]}))
    return 1 if bad else 0


def _findings() -> Iterator[Finding]:
    for check in CHECKS:
        try:
            yield check()
        except Exception as error:  # noqa: BLE001 - a check that fails is a finding, and the others still count
            yield Finding(name=check.__name__, verdict="broken", text=f"the check itself failed: {error!r}")
    yield from runs()
