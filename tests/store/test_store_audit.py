"""The audit log shows whether anybody touched it."""

import json
from pathlib import Path

import pytest

from trainctl.store.audit import AuditLog, NotTheWriter, verify_audit
from trainctl.wire.rundir import RunDir


def written(path: Path, count: int = 5) -> AuditLog:
    log = AuditLog(path)
    for number in range(count):
        log.append({"time": 1.0, "id": f"c{number}", "state": "accepted", "before": float("nan")})
    return log


def test_lines_are_chained_and_a_new_writer_goes_on_from_the_last(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    assert verify_audit(path) is None, "a log that does not exist yet is fine"
    head = written(path).head
    again = AuditLog(path)
    again.append({"id": "next"})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1]["prev"] == head == lines[-2]["hash"]
    assert lines[0]["before"] == "nan"
    assert verify_audit(path) is None
    assert len(again.lines(3)) == 3
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("tamper", "line"),
    [
        (lambda lines: [*lines[:2], lines[2].replace("c2", "c9"), *lines[3:]], 3),
        (lambda lines: [*lines[:2], *lines[3:]], 3),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 4),
        (lambda lines: [*lines[:4], "[1]"], 5),
        (lambda lines: [*lines[:4], "{"], 5),
        (lambda lines: [*lines[:2], '{"id":"c9",' + lines[2][1:], *lines[3:]], 3),
        (lambda lines: [*lines[:2], lines[2].replace(",", ", "), *lines[3:]], 3),
        (lambda lines: [*lines[:4], lines[4].replace('"nan"', "NaN")], 5),
    ],
    ids=["changed", "removed", "swapped", "repeated", "no object", "no json", "a name twice", "spaces", "NaN"],
)
def test_the_first_line_that_was_touched_is_named(tmp_path: Path, tamper: object, line: int) -> None:
    path = tmp_path / "audit.jsonl"
    written(path)
    lines = tamper(path.read_text().splitlines())  # type: ignore[operator]
    path.write_text("\n".join(lines) + "\n")
    problem = verify_audit(path)
    assert problem is not None
    assert problem.line == line


def test_a_line_that_a_crash_tore_was_never_accepted_and_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path, 2)
    with path.open("a") as file:
        file.write('{"id": "c2", "ha')
    AuditLog(path).append({"id": "c3"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["c0", "c1", "c3"]
    assert verify_audit(path) is None


def test_a_log_that_cannot_be_written_raises_and_keeps_its_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = written(path, 1)
    head = log.head
    path.rename(tmp_path / "kept")
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        log.append({"id": "lost"})
    assert log.head == head
    path.rmdir()
    (tmp_path / "kept").rename(path)
    log.append({"id": "c1"})
    assert verify_audit(path) is None


def test_of_two_writers_each_goes_on_from_what_the_other_wrote(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    one, other = written(path, 2), AuditLog(path)
    for number, log in enumerate((other, one, one, other, other, one)):
        log.append({"id": f"next-{number}"})
    assert verify_audit(path) is None
    assert len(one.lines(100)) == 8


def test_whoever_may_write_no_more_leaves_the_log_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    answers = [True, True, True, False, True, False]
    log = AuditLog(path, lambda: answers.pop(0))
    log.append({"id": "c0"})  # asked twice, because it read the log in between
    log.append({"id": "c1"})
    with pytest.raises(NotTheWriter):
        log.append({"id": "c2"})
    AuditLog(path).append({"id": "of the one that took over"})
    with pytest.raises(NotTheWriter):
        log.append({"id": "c3"})
    assert [json.loads(line)["id"] for line in log.lines(9)] == ["c0", "c1", "of the one that took over"]


@pytest.mark.parametrize("left", [0, 3], ids=["written anew", "cut"])
def test_a_log_that_is_cut_under_its_writer_is_found_by_the_next_line(tmp_path: Path, left: int) -> None:
    path = tmp_path / "audit.jsonl"
    log = written(path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:left]))
    forger = AuditLog(path)
    for number in range(9):
        forger.append({"id": f"forged-{number}"})
    log.append({"id": "next"})
    problem = verify_audit(path)
    assert problem is not None
    assert problem.line == left + 10


def test_a_tail_that_was_cut_is_found_by_the_hash_that_a_checkpoint_keeps(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.audit_head() is None
    log = written(run.audit_file)
    kept = {str(run.audit_head()): "step-20"}
    assert run.audit_head() == log.head
    assert verify_audit(run.audit_file, kept) is None
    lines = run.audit_file.read_text().splitlines(keepends=True)
    run.audit_file.write_text("".join(lines[:3]))
    assert verify_audit(run.audit_file) is None, "the chain alone cannot tell"
    problem = verify_audit(run.audit_file, kept)
    assert problem is not None
    assert (problem.line, "step-20" in str(problem)) == (4, True)


def test_a_log_that_was_written_anew_does_not_hold_the_hash_that_a_checkpoint_keeps(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    written(run.audit_file)
    kept = {str(run.audit_head()): "step-20"}
    run.audit_file.unlink()
    written(run.audit_file, 4)
    assert verify_audit(run.audit_file) is None
    assert verify_audit(run.audit_file, kept) is not None
