"""What an agent says of GPUs, with the real binding on a driver that does what the test wants."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from agent_process import Agent, agent
from fake_gpus import GIB, FakeGpus, build_library

from trainctl.agent.gpu_fields import EVERY_NAME
from trainctl.wire.messages import GpuReading
from waiting import until

MakeGpus = Callable[[int], FakeGpus]


def poller_of(running: Agent) -> psutil.Process:
    (child,) = psutil.Process(running.process.pid).children()
    return child


def test_every_gpu_is_read_in_full(tmp_path: Path, gpus: MakeGpus) -> None:
    fake = gpus(8)
    fake.gpu(3, throttle=0x20 | 0x04)
    with agent(tmp_path, environment=fake.environment) as running:
        reading = running.reads(lambda reading: reading.gpu_state == "ok")
    assert len(reading.gpus) == 8
    assert reading.gpus[2] == GpuReading(
        index=2,
        name="Fake H102",
        uuid="GPU-00000002",
        utilization=92.0,
        memory_used_bytes=72 * GIB,
        memory_total_bytes=80 * GIB,
        temperature_c=62.0,
        power_w=650.0,
        power_limit_w=700.0,
        sm_clock_mhz=1980,
        throttle="",
    )
    assert reading.gpus[3].throttle == "thermal (software), power cap"


def test_an_old_driver_without_the_newer_symbols_is_read_by_the_older_ones(tmp_path: Path) -> None:
    fake = FakeGpus(tmp_path, build_library(tmp_path, "-DOLD_DRIVER"), 1)
    fake.gpu(0, throttle=0x40)
    with agent(tmp_path, environment=fake.environment) as running:
        (gpu,) = running.reads(lambda reading: reading.gpu_state == "ok").gpus
    assert (gpu.memory_used_bytes, gpu.temperature_c, gpu.throttle) == (70 * GIB, 60.0, "thermal (hardware)")
    assert gpu.missing == {}


# What each GPU of one machine says, which readings that costs, and the reason given.
ODD_ANSWERS: list[tuple[dict[str, int], list[str], str]] = [
    ({"mig": 1, "utilization": 0}, ["utilization"], "MIG is on"),
    ({"utilization": 2**32 - 1}, ["utilization"], "not available"),
    ({"utilization": 180}, ["utilization"], "180, which is no percentage"),
    ({"memory_total": 0}, ["memory_used_bytes", "memory_total_bytes"], "unified memory"),
    ({"memory_total": 2**64 - 1}, ["memory_used_bytes", "memory_total_bytes"], "not available"),
    ({"memory_used": 90 * GIB}, ["memory_used_bytes", "memory_total_bytes"], "no part of that memory"),
    ({"power_mw": 2**32 - 1}, ["power_w"], "not available"),
    ({"power_limit_mw": 0}, ["power_limit_w"], "no power limit"),
    ({"temperature": 2**31 - 1}, ["temperature_c"], "no temperature"),
    ({"error_power": 3}, ["power_w"], "not supported by this GPU"),
    ({"error_clock": 4}, ["sm_clock_mhz"], "not permitted"),
    ({"error_throttle": 999}, ["throttle"], "NVML: Unknown Error"),
]


def test_what_nvml_does_not_know_is_absent_with_a_reason_and_never_a_number(tmp_path: Path, gpus: MakeGpus) -> None:
    fake = gpus(len(ODD_ANSWERS))
    for index, (said, _, _) in enumerate(ODD_ANSWERS):
        fake.gpu(index, **said)
    with agent(tmp_path, environment=fake.environment) as running:
        reading = running.reads(lambda reading: reading.gpu_state == "ok")
    for gpu, (said, absent, why) in zip(reading.gpus, ODD_ANSWERS, strict=True):
        assert sorted(gpu.missing) == sorted(absent), said
        for name in EVERY_NAME:
            assert (getattr(gpu, name) is None) == (name in absent), (said, name)
        assert all(why in reason for reason in gpu.missing.values()), said


def test_a_lost_gpu_is_named_and_the_others_are_read_on(tmp_path: Path, gpus: MakeGpus) -> None:
    fake = gpus(2)
    with agent(tmp_path, environment=fake.environment) as running:
        running.reads(lambda reading: reading.gpu_state == "ok")
        fake.gpu(1, lost=1)
        reading = running.reads(lambda reading: reading.gpu_state != "ok")
        assert reading.gpu_state.startswith("GPU 1: GPU is lost")
        well, lost = reading.gpus
        assert (well.utilization, lost.utilization) == (90.0, None)
        assert (lost.name, lost.uuid, sorted(lost.missing)) == ("Fake H101", "GPU-00000001", sorted(EVERY_NAME))
        fake.gpu(1, lost=0)
        assert running.reads(lambda reading: reading.gpu_state == "ok").gpus[1].utilization == 91.0


def test_a_driver_that_hangs_is_unresponsive_its_last_values_go_and_nobody_kills_the_poller(
    tmp_path: Path, gpus: MakeGpus
) -> None:
    fake = gpus(2)
    with agent(tmp_path, environment=fake.environment) as running:
        running.reads(lambda reading: reading.gpu_state == "ok")
        poller = poller_of(running)
        fake.driver(hang=1)
        reading = running.reads(lambda reading: reading.gpu_state != "ok")
        assert reading.gpu_state.startswith("unresponsive since ")
        assert reading.gpus == []
        assert reading.memory_total_bytes  # the node itself is measured on
        assert poller_of(running) == poller
        fake.driver(hang=0)
        assert len(running.reads(lambda reading: reading.gpu_state == "ok").gpus) == 2
        assert poller_of(running) == poller


def test_an_agent_ends_although_the_driver_hangs(tmp_path: Path, gpus: MakeGpus) -> None:
    fake = gpus(1)
    with agent(tmp_path, environment=fake.environment) as running:
        running.reads(lambda reading: reading.gpu_state == "ok")
        poller = poller_of(running)
        fake.driver(hang=1)
        running.reads(lambda reading: reading.gpu_state != "ok")
        running.process.terminate()
        assert running.wait(5) == 0
        assert poller.is_running()
        fake.driver(hang=0)
        psutil.wait_procs([poller], timeout=5)
        assert not poller.is_running()


def test_a_poller_that_dies_is_started_again(tmp_path: Path, gpus: MakeGpus) -> None:
    fake = gpus(1)
    with agent(tmp_path, environment=fake.environment) as running:
        running.reads(lambda reading: reading.gpu_state == "ok")
        poller = poller_of(running).pid
        reading = running.publishes(
            lambda reading: reading.gpu_state != "ok", after=lambda: os.kill(poller, signal.SIGSEGV)
        )
        assert (reading.gpu_state, reading.gpus) == ("the GPU poller was ended by SIGSEGV; it is started again", [])
        running.reads(lambda reading: reading.gpu_state == "ok")


@pytest.mark.parametrize(
    ("code", "why"),
    [(9, "driver not loaded"), (18, "driver and library versions differ"), (4, "not permitted")],
)
def test_a_driver_that_is_down_is_a_state_and_is_asked_again(
    tmp_path: Path, gpus: MakeGpus, code: int, why: str
) -> None:
    fake = gpus(1)
    fake.driver(down=code)
    with agent(tmp_path, environment=fake.environment) as running:
        reading = running.reads(lambda reading: reading.gpu_state.startswith(why))
        assert reading.gpus == []
        fake.driver(down=0)
        assert running.reads(lambda reading: reading.gpu_state == "ok").gpus


def test_a_node_without_gpus_says_none_and_keeps_no_poller(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    with agent(tmp_path) as running:
        reading = running.reads(lambda reading: reading.gpu_state == "none")
        assert reading.gpus == []
        until(lambda: psutil.Process(running.process.pid).children() == [], what="the poller is gone and reaped")


def test_gpus_can_be_left_alone(tmp_path: Path, gpus: MakeGpus) -> None:
    with agent(tmp_path, "--no-gpus", environment=gpus(1).environment) as running:
        assert running.reads().gpu_state == "not asked (--no-gpus)"
        assert psutil.Process(running.process.pid).children() == []
