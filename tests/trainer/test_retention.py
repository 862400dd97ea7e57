"""Which checkpoints may go: the policy as a pure function, and its execution."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainctl.trainer.checkpoint import CheckpointError, Progress, Retention, expired, prune
from trainctl.trainer.checkpoint.retention import known_good
from trainctl.wire.manifest import (
    Manifest,
    ManifestFile,
    hash_file,
    list_checkpoints,
    pick,
    pin,
    ranked,
    write_manifest,
)
from trainctl.wire.messages import BestBy, CheckpointInfo, Trouble
from trainctl.wire.removal import NotRemoved, last_good, remove_unless_kept, why_kept


def info(number: int, **more: Any) -> CheckpointInfo:
    known = {"step": number, "incarnation": 1, "bytes": 1} | more
    return CheckpointInfo(id=f"c{number}", time=float(number), **known)


def gone(listed: list[CheckpointInfo], policy: Retention, **more: Any) -> list[str]:
    return expired(listed, policy, **more)


# --- by example


def test_the_last_the_best_the_pinned_and_a_rollbacks_target_are_kept() -> None:
    loss = {1: 0.5, 2: 0.1}
    listed = [info(number, pinned=number == 3, metrics={"val_loss": loss.get(number, 0.9)}) for number in range(1, 11)]
    assert gone(listed, Retention(last=2), protected={"c5"}) == ["c1", "c4", "c6", "c7", "c8"]
    assert gone(listed, Retention(last=2, best=2), protected={"c5"}) == ["c4", "c6", "c7", "c8"]
    assert gone(listed, Retention(last=2, best=0), protected={"c5"}) == ["c1", "c2", "c4", "c6", "c7", "c8"]
    assert gone(listed[:5], Retention()) == []


def test_the_best_are_those_of_the_policys_own_metric_and_mode() -> None:
    score = {1: 0.2, 2: 0.9, 3: 0.9, 4: 0.1, 5: 0.3, 6: 0.3}
    listed = [info(number, metrics={"accuracy": value, "val_loss": 1.0}) for number, value in score.items()]
    assert gone(listed, Retention(last=1, metric="accuracy", mode="max")) == ["c1", "c3", "c4", "c5"]
    assert gone(listed, Retention(last=1, metric="accuracy")) == ["c1", "c2", "c3", "c5"]
    assert gone(listed, Retention(last=1, metric="bleu")) == ["c1", "c2", "c3", "c4", "c5"], "nothing has that metric"


def test_every_mth_step_is_kept() -> None:
    listed = [info(number, step=number * 50) for number in range(1, 9)]
    assert gone(listed, Retention(last=1, best=0, every=150)) == ["c1", "c2", "c4", "c5", "c7"]


def test_nothing_goes_that_is_not_older_than_the_last_good_one() -> None:
    listed = [info(1), info(2), info(3, verified=False), info(4, verified=False)]
    assert gone(listed, Retention(last=1, best=0)) == ["c1"], "c2 is the last good one, and newer wrecks stay"
    assert gone(listed[2:], Retention(last=1)) == []
    left_behind = [info(1), info(2), info(3, abandoned=True), info(4, abandoned=True), info(5, abandoned=True)]
    assert gone(left_behind, Retention(last=1, best=0)) == ["c1"]
    assert gone([*left_behind, info(6)], Retention(last=1, best=0)) == ["c1", "c2", "c3", "c4", "c5"]
    assert gone(left_behind[2:], Retention(last=1)) == [], "nothing on the live branch could take their place"


def test_the_newest_known_good_one_outlives_a_run_that_went_bad() -> None:
    listed = [info(number, step=number * 10) for number in range(1, 11)]
    policy = Retention(last=2, best=0, healthy_steps=20)
    bad = Progress(step=100, troubles=[Trouble(incarnation=1, first=55)])
    assert [found.id for found in known_good(listed, 20, bad)] == ["c1", "c2", "c3"]
    assert gone(listed, policy, progress=bad) == ["c1", "c2", "c4", "c5", "c6", "c7", "c8"]
    over = Progress(step=100, troubles=[Trouble(incarnation=1, first=55, last=60)])
    assert [found.id for found in known_good(listed, 20, over)] == ["c1", "c2", "c3", "c7", "c8"]
    assert [found.id for found in known_good(listed, 20, Progress(step=55))] == ["c1", "c2", "c3"], "not far enough yet"


def test_trouble_on_a_branch_that_was_left_does_not_count() -> None:
    listed = [info(1, step=10), info(2, step=20)]
    troubles = [Trouble(incarnation=1, first=25)]
    live = {2: math.inf, 1: 20}  # a rollback to step 20, before the trouble
    progress = Progress(step=60, troubles=troubles, live=live)
    assert [found.id for found in known_good(listed, 30, progress)] == ["c1", "c2"]
    still_in_it = Progress(step=60, troubles=troubles, live={2: math.inf, 1: 30})
    assert known_good(listed, 30, still_in_it) == []


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"last": 0}, ValueError, "last=0.*1 or more"),
        ({"last": True}, TypeError, "whole number"),
        ({"best": -1}, ValueError, "0 or more"),
        ({"every": 0}, ValueError, "1 or more"),
        ({"healthy_steps": 2.5}, TypeError, "whole number"),
        ({"metric": ""}, TypeError, "metric's name"),
        ({"metric": "loss", "mode": "lowest"}, ValueError, '"min" or "max"'),
        ({"mode": "max"}, ValueError, "needs the metric"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused_where_it_is_made(
    wrong: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        Retention(**wrong)


# --- for any checkpoints and any policy

CHECKPOINTS = st.lists(
    st.builds(
        dict,
        step=st.integers(1, 12),
        incarnation=st.integers(1, 3),
        pinned=st.booleans(),
        verified=st.sampled_from([True, None, None, False]),
        abandoned=st.booleans(),
        metrics=st.dictionaries(st.sampled_from(["loss", "val_loss", "accuracy"]), st.integers(0, 3).map(float)),
    ),
    max_size=9,
).map(lambda made: [info(number, **fields) for number, fields in enumerate(made)])
TROUBLES = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 14), st.none() | st.integers(0, 4)).map(
        lambda made: Trouble(incarnation=made[0], first=made[1], last=None if made[2] is None else made[1] + made[2])
    ),
    max_size=3,
)
PROGRESS = st.builds(
    Progress,
    step=st.integers(0, 20),
    troubles=TROUBLES,
    live=st.none() | st.dictionaries(st.integers(1, 3), st.integers(0, 14) | st.just(math.inf)),
)


@st.composite
def policies(draw: st.DrawFn) -> Retention:
    metric = draw(st.sampled_from([None, "val_loss", "accuracy"]))
    return Retention(
        last=draw(st.integers(1, 4)),
        best=draw(st.integers(0, 3)),
        metric=metric,
        mode=draw(st.sampled_from(["min", "max"])) if metric is not None else "min",
        every=draw(st.none() | st.integers(1, 5)),
        healthy_steps=draw(st.none() | st.integers(1, 6)),
    )


@given(listed=CHECKPOINTS, policy=policies(), progress=PROGRESS, data=st.data())
def test_whatever_there_is_and_whatever_the_policy_what_must_stay_stays(
    listed: list[CheckpointInfo], policy: Retention, progress: Progress, data: st.DataObject
) -> None:
    protected = data.draw(st.sets(st.sampled_from([found.id for found in listed]))) if listed else set()
    doomed = expired(listed, policy, progress=progress, protected=protected)
    by_id = {found.id: found for found in listed}
    assert sorted(set(doomed), key=lambda one: by_id[one].time) == doomed, "oldest first, each once"
    good = last_good(listed)
    for one in doomed:
        assert good is not None
        assert not good.abandoned
        assert by_id[one].time < good.time, "a newer one that may be good takes its place"
        assert not by_id[one].pinned
        assert one not in protected
        assert why_kept(listed, one, protected) is None, "an operator might delete it too"
    for target in ("last", "best") if policy.best else ("last",):
        meant = pick(listed, target, policy.best_by)
        assert meant is None or meant.id not in doomed, f"rollback {target} has something to go back to"
    left = [found for found in listed if found.id not in doomed]
    assert last_good(left) == good
    assert expired(left, policy, progress=progress, protected=protected) == [], "deleting again finds nothing more"


@given(listed=CHECKPOINTS, policy=policies(), progress=PROGRESS)
def test_a_simple_model_agrees(listed: list[CheckpointInfo], policy: Retention, progress: Progress) -> None:
    assert expired(listed, policy, progress=progress) == model(listed, policy, progress)


def model(listed: list[CheckpointInfo], policy: Retention, progress: Progress) -> list[str]:
    """The same, one checkpoint at a time and one rule after another, as the documentation says it."""

    def good(one: CheckpointInfo) -> bool:
        return one.verified is not False and not one.abandoned

    def newer(one: CheckpointInfo, among: list[CheckpointInfo]) -> int:
        return sum(other.time > one.time for other in among)

    def better(one: CheckpointInfo) -> float:
        names = [policy.metric] if policy.metric else ["val_loss", "loss"]
        having = {name: [c for c in listed if good(c) and name in c.metrics] for name in names}
        name = next((name for name in names if having[name]), None)
        if name is None or one not in having[name]:
            return math.inf
        sign = -1 if policy.mode == "max" else 1
        mine = (sign * one.metrics[name], one.time)
        return sum((sign * other.metrics[name], other.time) < mine for other in having[name])

    def bad_at(step: int) -> bool:
        return any(
            trouble.first <= step
            and (trouble.last is None or step <= trouble.last)
            and (not progress.live or step <= progress.live.get(trouble.incarnation, -1))
            for trouble in progress.troubles
        )

    def healthy(one: CheckpointInfo) -> bool:
        steps = policy.healthy_steps
        if steps is None or not good(one) or progress.step < one.step + steps:
            return False
        return not any(bad_at(step) for step in range(one.step, one.step + steps + 1))

    def kept(one: CheckpointInfo) -> bool:
        return (
            one.pinned
            or newer(one, [c for c in listed if good(c)]) == 0
            or (one.verified is not False and newer(one, [c for c in listed if c.verified is not False]) < policy.last)
            or (good(one) and newer(one, [c for c in listed if good(c)]) < policy.last)
            or better(one) < policy.best
            or (policy.every is not None and good(one) and one.step % policy.every == 0)
            or (healthy(one) and not any(healthy(other) and other.time > one.time for other in listed))
        )

    newest_good = max((one.time for one in listed if good(one)), default=-1.0)
    return [one.id for one in listed if one.time < newest_good and not kept(one)]


# --- by which metric


def test_best_goes_by_the_metric_and_mode_of_the_run_and_of_equals_the_older_is_meant() -> None:
    listed = [info(1, metrics={"val_loss": 1.0, "accuracy": 0.5}), info(2, metrics={"val_loss": 2.0, "accuracy": 0.9})]
    listed += [info(3, metrics={"val_loss": 1.0, "accuracy": 0.9})]
    found = {
        mode: [one.id for one in ranked(listed, BestBy(metric="accuracy", mode=mode))]  # type: ignore[arg-type]
        for mode in ("min", "max")
    }
    assert found == {"min": ["c1", "c2", "c3"], "max": ["c2", "c3", "c1"]}
    assert [one.id for one in ranked(listed)] == ["c1", "c3", "c2"]
    assert pick(listed, "best", BestBy(metric="bleu")) is None


# --- on the disk


def saved(directory: Path, step: int, **more: Any) -> str:
    name = f"step-{step}"
    (directory / name).mkdir(parents=True)
    (directory / name / "model.bin").write_bytes(bytes([step]) * 1000)
    size, digest = hash_file(directory / name / "model.bin")
    file = ManifestFile(name="model.bin", bytes=size, sha256=digest)
    made = Manifest(
        id=name, run="r", step=step, incarnation=1, attempt=1, world_size=1, time=float(step), files=[file], **more
    )
    write_manifest(directory / name, made)
    return name


def names(directory: Path) -> list[str]:
    return [found.id for found in list_checkpoints(directory)]


def test_nothing_is_deleted_before_a_newer_one_was_verified(tmp_path: Path) -> None:
    kept = [saved(tmp_path, step) for step in (1, 2, 3, 4)]
    pin(tmp_path / "step-1", pinned=True)
    newest = tmp_path / "step-4" / "model.bin"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"step-4.*no older checkpoint was deleted"):
        prune(tmp_path, Retention(last=1, best=0))
    assert names(tmp_path) == kept
    assert [found.verified for found in list_checkpoints(tmp_path)] == [None, None, True, False]
    assert [found.id for found in prune(tmp_path, Retention(last=1, best=0))] == ["step-2"]
    assert names(tmp_path) == ["step-1", "step-3", "step-4"]
    assert prune(tmp_path / "not-there") == []


def test_what_is_pinned_while_the_newest_is_verified_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)

    def verify_slowly(directory: Path) -> frozenset[str]:
        pin(directory / "step-1", pinned=True)
        return frozenset()

    monkeypatch.setattr("trainctl.trainer.checkpoint.retention.verify_last_good", verify_slowly)
    assert [found.id for found in prune(tmp_path, Retention(last=1, best=0))] == ["step-2"]


def test_an_operator_cannot_delete_the_last_good_one_nor_a_pinned_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)
    pin(tmp_path / "step-1", pinned=True)
    damaged = tmp_path / "step-3" / "model.bin"
    damaged.write_bytes(damaged.read_bytes()[::-1][:-1] + b"x")
    with pytest.raises(NotRemoved, match="pinned"):
        remove_unless_kept(tmp_path, "step-1")
    with pytest.raises(NotRemoved, match="last good"):
        remove_unless_kept(tmp_path, "step-3")
    with pytest.raises(NotRemoved, match="last good"):
        remove_unless_kept(tmp_path, "step-2")  # because step-3 turns out to be damaged
    with pytest.raises(NotRemoved, match="no checkpoint step-9"):
        remove_unless_kept(tmp_path, "step-9")
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    assert remove_unless_kept(tmp_path, "step-3").bytes == 1000
    pin(tmp_path / "step-1", pinned=False)
    remove_unless_kept(tmp_path, "step-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-2.checked.json"]


def test_a_rollbacks_target_is_not_an_operators_to_delete() -> None:
    listed = [info(1), info(2), msgspec.structs.replace(info(3), verified=True)]
    assert "goes back to" in str(why_kept(listed, "c1", {"c1"}))
    assert why_kept(listed, "c1", {"c2"}) is None
