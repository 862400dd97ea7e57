"""NVML in one process: every GPU read in turn by one thread, because the driver serialises callers anyway.

Fast fields at every reading, slow ones each five seconds: a monitor that asked for everything often held the driver's
lock for two thirds of the time and blocked kernels from being submitted.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import pynvml

from trainctl.agent.backoff import Backoff
from trainctl.agent.gpu_fields import EVERY_NAME, FAST, SLOW, Field, Unusable, Values, mig_is_on
from trainctl.wire.messages import GpuReading

SLOW_INTERVAL_S: Final = 5.0
_MIG_REASON: Final = "MIG is on: NVML gives no utilization of the whole GPU"

_REASONS: Final = {
    pynvml.NVML_ERROR_NOT_SUPPORTED: "not supported by this GPU",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "not known to this driver",
    pynvml.NVML_ERROR_NO_PERMISSION: "not permitted",
    pynvml.NVML_ERROR_GPU_IS_LOST: "GPU is lost: it fell off the bus, reset it or reboot the node",
    pynvml.NVML_ERROR_RESET_REQUIRED: "GPU must be reset",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "driver not loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "driver and library versions differ: reboot, or reload the driver",
}
_ALL_DOWN: Final = (
    pynvml.NVMLError_Uninitialized,
    pynvml.NVMLError_DriverNotLoaded,
    pynvml.NVMLError_LibRmVersionMismatch,
)
_LOST: Final = (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired, pynvml.NVMLError_GpuNotFound)


class NvmlDown(Exception):
    """NVML as a whole does not work; the text says why."""


def reason_of(error: Any) -> str:
    """An NVML error in words."""
    return _REASONS.get(error.value) or f"NVML: {error}"


class Nvml:
    """The GPUs of this machine. Use it from one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._devices: list[_Device] = []

    def open(self) -> None:
        """Load the library and find the GPUs. Raises `NvmlDown`."""
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            raise NvmlDown(reason_of(error)) from None
        self._devices = [_Device(index) for index in range(count)]

    def read(self) -> tuple[str, list[GpuReading]]:
        """The state in words ("ok", "none", or which GPU is lost) and a reading of each GPU. Raises `NvmlDown`."""
        try:
            gpus = [device.read(self._clock()) for device in self._devices]
        except _ALL_DOWN as error:
            raise NvmlDown(reason_of(error)) from None
        if not gpus:
            return "none", []
        lost = [f"GPU {device.index}: {device.lost}" for device in self._devices if device.lost]
        return "; ".join(lost) or "ok", gpus


class _Device:
    def __init__(self, index: int) -> None:
        self.index = index
        self.lost = ""  # why, while it is lost
        self._handle: Any = None
        self._name = f"GPU {index}"
        self._uuid: str | None = None
        self._retry = Backoff(first_s=SLOW_INTERVAL_S, limit_s=60.0)
        self._slow_at: float | None = None
        self._slow: tuple[Values, dict[str, str]] = ({}, {})
        self._mig = False

    def read(self, now: float) -> GpuReading:
        if self.lost and not self._retry.due(now):
            return self._absent()
        try:
            self._identify()
            reading = self._read(now)
        except _LOST as error:
            self.lost, self._handle, self._slow_at = reason_of(error), None, None
            self._retry.failed(now)
            return self._absent()
        self.lost = ""
        self._retry.worked()
        return reading

    def _identify(self) -> None:
        if self._handle is None:
            handle = pynvml.nvmlDeviceGetHandleByIndex(self.index)
            self._name, self._uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
            self._handle = handle

    def _read(self, now: float) -> GpuReading:
        if self._slow_at is None or now - self._slow_at >= SLOW_INTERVAL_S:
            self._mig = mig_is_on(self._handle)
            self._slow, self._slow_at = self._ask(SLOW), now
        values, missing = self._ask(FAST)
        if self._mig:  # drivers answer with an error, with 0 or with 9.2e18: none of them is a utilization
            values.pop("utilization", None)
            missing["utilization"] = _MIG_REASON
        return GpuReading(
            index=self.index,
            name=self._name,
            uuid=self._uuid,
            missing=missing | self._slow[1],
            **values,
            **self._slow[0],
        )

    def _ask(self, fields: Sequence[Field]) -> tuple[Values, dict[str, str]]:
        values: Values = {}
        missing: dict[str, str] = {}
        for ask, names in fields:
            try:
                values |= ask(self._handle)
            except (*_ALL_DOWN, *_LOST):
                raise
            except pynvml.NVMLError as error:
                missing |= dict.fromkeys(names, reason_of(error))
            except Unusable as error:
                missing |= dict.fromkeys(names, str(error))
        return values, missing

    def _absent(self) -> GpuReading:
        reasons = dict.fromkeys(EVERY_NAME, self.lost)
        return GpuReading(index=self.index, name=self._name, uuid=self._uuid, missing=reasons)
