"""The agent's rules by themselves: no processes, and a clock that the test turns."""

import contextlib
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainctl.agent.backoff import Backoff
from trainctl.agent.gpu_fields import throttle_text
from trainctl.agent.gpu_tick import GpuTick, TickReader, frame
from trainctl.agent.gpu_watch import GpuWatch
from trainctl.agent.lifetime import Lifetime
from trainctl.wire.memory_limit import MemoryLimit
from trainctl.wire.messages import GpuReading

GIB = 2**30
GPU = GpuReading(index=0, name="H100", utilization=90.0)
GOOD = GpuTick(kind="polled", state="ok", gpus=[GPU])


class TestGpuWatch:
    def test_a_first_answer_may_take_as_long_as_a_driver_takes_to_start(self) -> None:
        watch = GpuWatch()
        watch.started(0.0)
        watch.asked(0.0, 0.0)
        assert watch.picture(29.0).state == "starting"
        assert watch.picture(31.0).state == "unresponsive since 00:00:00 UTC"

    def test_later_answers_may_not_and_the_last_good_values_go(self) -> None:
        watch = GpuWatch()
        watch.started(0.0)
        watch.asked(0.0, 0.0)
        watch.answered(GOOD)
        watch.asked(10.0, 3600.0)
        assert watch.picture(12.9).gpus == [GPU]
        assert watch.picture(13.1).gpus == []
        assert watch.picture(13.1).state == "unresponsive since 01:00:00 UTC"

    def test_a_poller_that_hangs_is_neither_asked_nor_started_again(self) -> None:
        watch = GpuWatch()
        watch.started(0.0)
        watch.asked(0.0, 0.0)
        assert watch.waiting
        assert not watch.may_start(1e6)

    def test_a_poller_that_keeps_dying_is_started_ever_more_seldom(self) -> None:
        watch, now, starts = GpuWatch(), 0.0, []
        while now < 200:
            if watch.may_start(now):
                starts.append(now)
                watch.started(now)
                watch.ended(now, "left with code 1")
            now += 1
        assert starts == [0, 1, 3, 7, 15, 31, 63, 123, 183]

    def test_one_that_worked_for_long_is_started_soon(self) -> None:
        watch = GpuWatch()
        for now in (0.0, 100.0, 200.0):
            watch.started(now)
            watch.ended(now, "left with code 1")
        watch.started(300.0)
        watch.ended(400.0, "was ended by SIGKILL")
        assert watch.may_start(401.0)
        assert watch.picture(401.0).state == "the GPU poller was ended by SIGKILL; it is started again"

    def test_a_node_without_gpus_is_asked_seldom(self) -> None:
        watch = GpuWatch()
        watch.started(0.0)
        watch.answered(GpuTick(kind="absent", state="none"))
        watch.ended(0.1, "left with code 0")
        assert watch.picture(1.0).state == "none"
        assert not watch.may_start(59.0)
        assert watch.may_start(60.1)


@given(
    ticks=st.lists(st.builds(GpuTick, kind=st.just("polled"), state=st.text(max_size=50)), max_size=5),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_ticks_come_out_whole_however_the_pipe_cuts_them(ticks: list[GpuTick], cuts: list[int]) -> None:
    data = b"".join(map(frame, ticks))
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    reader = TickReader()
    found = [tick for start, end in itertools.pairwise(edges) for tick in reader.feed(data[start:end])]
    assert found == ticks


@given(st.binary(min_size=8, max_size=64))
def test_what_is_no_tick_is_refused_or_waited_for(data: bytes) -> None:
    reader = TickReader()
    with contextlib.suppress(ValueError):
        assert all(isinstance(tick, GpuTick) for tick in reader.feed(data))


@pytest.mark.parametrize(
    ("reasons", "text"),
    [
        (0x000, ""),
        (0x001, ""),  # idle takes nothing away
        (0x103, ""),
        (0x004, "power cap"),
        (0x008, "hardware slowdown"),
        (0x048, "thermal (hardware)"),
        (0x0A4, "thermal (software), power cap, power brake"),
    ],
)
def test_throttle_reasons_in_words(reasons: int, text: str) -> None:
    assert throttle_text(reasons) == text


def test_backoff_doubles_to_a_limit_and_forgets_on_success() -> None:
    backoff = Backoff(first_s=5, limit_s=15)
    assert backoff.due(0)
    waits = []
    for _ in range(4):
        backoff.failed(0)
        waits.append(next(now for now in range(100) if backoff.due(now)))
    assert waits == [5, 10, 15, 15]
    backoff.worked()
    assert backoff.due(0)


def test_an_agent_waits_for_the_first_rank_and_stays_after_the_last() -> None:
    lifetime = Lifetime(0.0, grace_s=30, linger_s=60)
    assert not lifetime.over(29, 0)
    assert not lifetime.over(29.5, 2)
    assert not lifetime.over(89, 0)
    assert lifetime.over(89.5, 0)
    assert Lifetime(0.0, grace_s=30).over(30, 0)


class TestMemoryLimit:
    def test_the_tightest_of_nested_limits_holds_and_reclaimable_cache_is_not_used_memory(self, tmp_path: Path) -> None:
        job = tmp_path / "slurm" / "job_1"
        task = job / "step_0" / "task_0"
        task.mkdir(parents=True)
        (task / "memory.max").write_text("max\n")
        (task.parent / "memory.max").write_text(f"{100 * GIB}\n")
        (job / "memory.max").write_text(f"{64 * GIB}\n")
        (job / "memory.current").write_text(f"{40 * GIB}\n")
        (job / "memory.stat").write_text(f"anon {30 * GIB}\ninactive_file {8 * GIB}\nactive_file 0\n")
        limit = MemoryLimit.find(512 * GIB, membership="0::/slurm/job_1/step_0/task_0\n", root=tmp_path)
        assert limit is not None
        assert (limit.limit_bytes, limit.used_bytes()) == (64 * GIB, 32 * GIB)

    def test_version_1_and_a_path_that_a_container_cannot_see(self, tmp_path: Path) -> None:
        top = tmp_path / "memory"
        top.mkdir()
        (top / "memory.limit_in_bytes").write_text(f"{8 * GIB}\n")
        (top / "memory.usage_in_bytes").write_text(f"{5 * GIB}\n")
        (top / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {GIB}\n")
        membership = "5:devices:/docker/abc\n4:cpuset,memory:/docker/abc\n0::/\n"
        limit = MemoryLimit.find(512 * GIB, membership=membership, root=tmp_path)
        assert limit is not None
        assert (limit.limit_bytes, limit.used_bytes()) == (8 * GIB, 4 * GIB)

    def test_a_limit_above_what_the_machine_has_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "memory.max").write_text("9223372036854771712\n")
        assert MemoryLimit.find(512 * GIB, membership="0::/\n", root=tmp_path) is None
        assert MemoryLimit.find(512 * GIB, membership="garbage\n", root=tmp_path) is None
