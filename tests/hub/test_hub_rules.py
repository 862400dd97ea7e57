"""Why a command is rejected before anybody is asked to carry it out."""

from dataclasses import replace

import click
import msgspec
import pytest

from trainctl.cli.main import cli
from trainctl.hub.rules import Situation, allowed_without_audit, rejection
from trainctl.wire.commands import REGISTRY, Abort, Act, Command, Rollback, carrier_of
from trainctl.wire.messages import CheckpointInfo, CommandUpdate, RunInfo, Tunable

GIVEN = {
    "factor": 0.5,
    "value": 0.5,
    "name": "clip",
    "checkpoint": "good",
    "target": "last",
    "text": "t",
    "command": "w",
}


def action_of(name: str) -> Act:
    """One that this run could carry out."""
    kind = REGISTRY[name].action
    return kind(**{field.name: GIVEN[field.name] for field in msgspec.structs.fields(kind) if field.required})


def situation() -> Situation:
    saved = {"time": 1.0, "bytes": 1, "incarnation": 1, "verified": True}
    waiting = {"time": 1.0, "step": 1, "incarnation": 1, "id": "w", "command": "pause", "args": {}, "actor": "mk"}
    able = {spec.capability: True for spec in REGISTRY.values() if spec.capability is not None}
    clip = Tunable(name="clip", value=1.0, kind="float")
    info = {
        "run": "r",
        "id": "r",
        "dir": "/",
        "host": "h",
        "created": 1.0,
        "started": 1.0,
        "world_size": 1,
        "attempt": 1,
    }
    place = {"rank": 0, "node": "n", "pid": 1, "host": "h", "local_rank": 0}
    return Situation(
        info=msgspec.convert(info | {"capabilities": able, "tunables": [clip], "ranks": [place]}, RunInfo),
        state="running",
        linked=True,
        checkpoints=[
            msgspec.convert(saved | {"id": name, "step": step}, CheckpointInfo)
            for step, name in enumerate(("good", "newer"))
        ],
        commands={"w": msgspec.convert(waiting | {"state": "accepted"}, CommandUpdate)},
    )


@pytest.mark.parametrize("name", REGISTRY)
def test_a_condition_is_refused_wherever_no_boundary_decides_it(name: str) -> None:
    actions = [action_of(name), *([Abort(now=True)] if name == "abort" else [])]
    for action in actions:
        assert rejection(Command(id="c", action=action), situation()) is None
        refused = rejection(Command(id="c", action=action, condition="step < 0"), situation())
        if carrier_of(action) == "ranks":
            assert refused is None
        else:
            assert refused is not None
            assert f"{name} is carried out at once, and a condition is decided by rank 0" in refused


@pytest.mark.parametrize(
    ("off", "action", "words"),
    [
        (
            "skip",
            Rollback(target="good", skip_batches=3),
            "rollback --skip-batches: not this script. Roll back without it",
        ),
        ("lr", Rollback(target="good", lr_scale=0.5), "rollback --lr-scale: not this script. Roll back without it"),
    ],
)
def test_an_option_that_a_script_does_not_support_is_refused_and_the_rollback_is_not(
    off: str, action: Rollback, words: str
) -> None:
    able = situation()
    assert rejection(Command(id="c", action=action), able) is None
    info = msgspec.structs.replace(able.info, capabilities=able.info.capabilities | {off: "not this script"})
    there = replace(able, info=info)
    assert rejection(Command(id="c", action=action), there) == words
    assert rejection(Command(id="c", action=Rollback(target="good")), there) is None


@pytest.mark.parametrize("name", REGISTRY)
def test_what_the_command_line_puts_on_trial_is_taken_and_nothing_else(name: str) -> None:
    offered = any(option.name == "revert_after" for option in subcommand(name).params)
    refused = rejection(Command(id="c", action=action_of(name), revert_after=9), situation())
    if offered:
        assert refused is None
    else:
        assert f"{name} cannot revert by itself" in str(refused)


def subcommand(name: str) -> click.Command:
    found: click.Command | None = cli
    for word in name.split():
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), word)
    assert found is not None
    return found


@pytest.mark.parametrize("name", REGISTRY)
def test_without_an_audit_log_a_run_can_be_saved_and_ended_and_nothing_else(name: str) -> None:
    actions = [action_of(name), *([Abort(now=True)] if name == "abort" else [])]
    for action in actions:
        assert allowed_without_audit(Command(id="c", action=action)) is (name in {"checkpoint save", "stop", "abort"})
