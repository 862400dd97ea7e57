"""The child process that alone calls NVML: a wedged driver leaves its caller unkillable, and the agent must not be.

It reads one byte for each poll from stdin and answers with one tick on stdout. End of file means that the agent is
gone or wants it gone: it leaves by itself, and nobody needs to kill it inside a driver call.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

from trainctl.agent.gpu_tick import GpuTick, frame


def _library_is_there() -> bool:
    # Asked before pynvml is imported: on a machine without GPUs this is all that a retry costs.
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _why_absent() -> GpuTick:
    if Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists():
        return GpuTick(kind="down", state="NVML library not found, although there is an NVIDIA device")
    return GpuTick(kind="absent", state="none")


def _answer(tick: GpuTick) -> None:
    data = frame(tick)
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


def _asked() -> bool:
    return bool(os.read(sys.stdin.fileno(), 1))


def poll_until_closed() -> None:
    """Answer polls until stdin ends or NVML as a whole does not work."""
    if not _asked():
        return
    if not _library_is_there():
        _answer(_why_absent())
        return
    from trainctl.agent.nvml import Nvml, NvmlDown

    nvml = Nvml()
    try:
        nvml.open()
        while True:
            state, gpus = nvml.read()
            _answer(GpuTick(kind="polled", state=state, gpus=gpus))
            if not _asked():
                return
    except NvmlDown as down:
        # A new process loads the library anew, which is what a changed driver needs: leave, and be started again.
        _answer(GpuTick(kind="down", state=str(down)))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the agent is gone, and so is the need for an answer
        poll_until_closed()
