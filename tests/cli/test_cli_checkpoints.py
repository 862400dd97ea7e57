"""`trainctl checkpoint`: listing, progress, deleting and exporting, as operators and scripts see them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_cli_commands import answer, error, invoke

from client.scripted_hub import Script, hub, make_checkpoint, rows, write_journal
from trainctl.cli.checkpoint_list import listed, listing
from trainctl.cli.progress import BytesProgress, bar_line
from trainctl.client.model import RunModel
from trainctl.store.audit import verify_audit
from trainctl.wire.commands import CheckpointRemove
from trainctl.wire.lineage import Branch, record_branch
from trainctl.wire.messages import BestBy, CheckpointInfo, Checkpoints, StateChanged
from trainctl.wire.rundir import RunDir


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_bytes_of_bytes_and_the_rate() -> None:
    assert bar_line("step-1", 0, 4_000_000_000, 0.0) == f"step-1  {'─' * 24}  0 B of 4.0 GB"
    assert bar_line("step-1", 2_000_000_000, 4_000_000_000, 2.0) == (
        f"step-1  {'━' * 12}{'─' * 12}  2.0 GB of 4.0 GB, 1.0 GB/s"
    )
    assert "━" * 24 in bar_line("empty", 0, 0, 1.0)


def test_the_bar_is_for_terminals_and_goes_away_and_others_get_a_line() -> None:
    now = [0.0]
    for stream, expected in ((Terminal(), 3), (io.StringIO(), 0)):
        now[0] = 0.0
        with BytesProgress("verifying a", 1000, stream=stream, clock=lambda: now[0]) as progress:
            for done in (10, 500, 990, 1000):
                now[0] += 0.06  # a terminal over SSH is not sent every chunk
                progress(done, 1000)
        drawn = stream.getvalue()
        assert drawn.count("of 1.0 KB") == expected, drawn
        assert drawn.endswith("\r\x1b[K" if expected else "verifying a: 1.0 KB\n")


def test_verify_says_on_stderr_what_it_reads_and_json_stays_clean() -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-10", 10)
        told = invoke("checkpoint", "verify")
        assert "verifying step-10: 70 B" in told.stderr
        assert told.stdout.startswith("good     step-10  ")
        assert invoke("checkpoint", "verify", "--json").stderr == ""


def test_the_list_shows_step_size_metrics_branch_and_where() -> None:
    with hub(info={"best_by": BestBy(metric="accuracy", mode="max")}) as running:
        make_checkpoint(running.info, "step-10", 10, when=10.0, accuracy=0.9, loss=2.0)
        make_checkpoint(running.info, "step-20", 20, when=20.0, accuracy=0.5, loss=1.0)
        run_dir = RunDir(running.info.dir)
        run_dir.numbers.mkdir(parents=True, exist_ok=True)
        record_branch(run_dir, Branch(incarnation=1))
        record_branch(run_dir, Branch(incarnation=2, parent=1, after_step=10))
        listed = answer("checkpoint", "ls")
        assert listed["best_by"] == {"metric": "accuracy", "mode": "max"}
        assert [info["abandoned"] for info in listed["checkpoints"]] == [False, True]
        head, first, second = invoke("checkpoint", "ls").stdout.splitlines()
        assert head.split() == ["ID", "STEP", "AGE", "SIZE", "METRICS", "BRANCH", "WHERE", "VERIFIED", "PINNED", "NOTE"]
        assert "accuracy 0.9000, loss 2.000" in first
        assert "1 left behind" in second
        assert "left behind" not in first
        assert "disk" in first
        assert answer("rollback", "best", "--dry-run")["checkpoint"] == "step-10"
        assert answer("status")["checkpoints"]["best"] == "step-10"


def test_the_list_says_whether_it_is_on_disk_in_memory_or_both() -> None:
    at = {"time": 1.0, "bytes": 1, "incarnation": 1}
    infos = [
        CheckpointInfo(id="a", step=1, **at),
        CheckpointInfo(id="b", step=2, in_memory=True, verified=True, **at),
        CheckpointInfo(id="c", step=3, in_memory=True, where="memory", **at),
    ]
    _head, *lines = listing(Checkpoints(req=0, checkpoints=infos), RunModel()).splitlines()
    places = [line.split("  1  ")[-1].strip() for line in lines]
    assert [" ".join(place.split()) for place in places] == ["disk not yet", "disk + memory yes", "memory no files"]
    assert [listed(info)["where"] for info in infos] == ["disk", "both", "memory"]
    assert "in_memory" not in listed(infos[0])


def test_lines_of_an_abandoned_branch_are_dim_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    infos = [
        CheckpointInfo(id=f"c{number}", step=number, time=1.0, bytes=1, incarnation=1, abandoned=number == 2)
        for number in (1, 2)
    ]
    found = Checkpoints(req=0, checkpoints=infos)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert [line.startswith("\x1b[2m") for line in listing(found, RunModel()).splitlines()] == [False, False, True]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in listing(found, RunModel())


def test_deleting_asks_first_and_goes_through_the_hub_while_it_lives() -> None:
    script = Script()
    with hub(script=script) as running:
        make_checkpoint(running.info, "step-10", 10, when=10.0)
        make_checkpoint(running.info, "step-20", 20, when=20.0)
        assert "asks first" in error("checkpoint", "rm", "10", code=2)["message"]
        assert script.commands == []
        assert answer("checkpoint", "rm", "10", "--yes")["state"] == "applied"
        assert [command.action for command in script.commands] == [CheckpointRemove(checkpoint="step-10")]
        able = answer("status")["capabilities"]
        assert able["checkpoint rm"] is True
        assert able["checkpoint export"] is True


def test_of_a_recorded_run_a_checkpoint_is_deleted_in_its_directory_with_lines_in_the_audit_log() -> None:
    with hub() as running:
        running.publish(rows(1, 20))
        running.publish(StateChanged(time=9.0, step=20, incarnation=1, state="finished"))
        write_journal(running)
        (RunDir(running.info.dir).info_file).write_bytes(msgspec.json.encode(running.info))
        for step in (10, 20):
            make_checkpoint(running.info, f"step-{step}", step, when=float(step))
    run_dir = Path(running.info.dir)
    run = ["-r", str(run_dir)]
    refused = answer("checkpoint", "rm", "20", "--yes", *run, code=4)
    assert (refused["state"], "last good" in refused["reason"]) == ("rejected", True)
    assert answer("checkpoint", "rm", "10", "--yes", *run)["state"] == "applied"
    assert [path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()] == ["step-20"]
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "audit.jsonl").read_text().splitlines()]
    assert [line["state"] for line in lines] == ["accepted", "rejected", "accepted", "applied"]
    assert verify_audit(run_dir / "audit.jsonl") is None
    assert error("pause", *run, code=4)["code"] == "rejected", "nothing else acts on a recording"
    able = answer("status", str(run_dir))["capabilities"]
    assert "last good" in able["checkpoint rm"]


def test_an_export_says_what_it_needs_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub() as running:
        make_checkpoint(running.info, "step-10", 10)
        taken = tmp_path / "taken"
        taken.touch()
        assert "exists already" in error("checkpoint", "export", "10", str(taken), code=2)["message"]
        assert "no directory" in error("checkpoint", "export", "10", str(tmp_path / "x" / "y"), code=2)["message"]
        absent = {"torch"}
        monkeypatch.setattr("trainctl.cli.checkpoint_export.find_spec", lambda name: None if name in absent else name)
        assert "needs PyTorch" in error("checkpoint", "export", "10", str(tmp_path / "new"), code=1)["message"]
        absent.clear()
        absent.add("safetensors")
        assert "[export]" in error("checkpoint", "export", "10", str(tmp_path / "new"), code=1)["hint"]
        assert not (tmp_path / "new").exists()
