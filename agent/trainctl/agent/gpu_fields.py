"""One function for each thing asked of a GPU: what NVML says, in our units, or why that cannot be used.

NVML has several ways of not knowing: error codes, a total of 0 for unified memory, all ones as a sentinel, percentages
far over 100 under MIG, a power limit of 0. Each becomes an absent reading with a reason, never a number.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import pynvml

T = TypeVar("T")
Values = dict[str, Any]

_NEWER_THAN_THE_DRIVER: Final = (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_ArgumentVersionMismatch)
_ALL_ONES: Final = frozenset({2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1})

# Bits of "clocks event reasons" that take speed away. Idle, application clocks and display settings do not.
_THROTTLES: Final = (
    (0x020, "thermal (software)"),
    (0x040, "thermal (hardware)"),
    (0x004, "power cap"),
    (0x080, "power brake"),
    (0x010, "sync boost"),
    (0x200, "board limit"),
    (0x400, "reliability"),
)
_HARDWARE_SLOWDOWN: Final = 0x008
_HARDWARE_CAUSES: Final = 0x040 | 0x080


class Unusable(Exception):
    """NVML answered, and what it answered cannot be true or says nothing."""


def first_known(*calls: Callable[[], T]) -> T:
    """The result of the first call that this driver's library has: newest first, the last one must exist."""
    for call in calls[:-1]:
        try:
            return call()
        except _NEWER_THAN_THE_DRIVER:
            continue
    return calls[-1]()


def _plausible(value: int, limit: int, what: str) -> int:
    if value in _ALL_ONES:
        raise Unusable("not available")
    if not 0 <= value <= limit:
        raise Unusable(f"NVML said {value}, which is no {what}")
    return value


def utilization(handle: Any) -> Values:
    return {"utilization": float(_plausible(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu, 100, "percentage"))}


def memory(handle: Any) -> Values:
    info = first_known(
        lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2),
        lambda: pynvml.nvmlDeviceGetMemoryInfo(handle),
    )
    if info.total == 0:
        raise Unusable("unified memory: the GPU has no total of its own")
    total = _plausible(info.total, 2**60, "amount of memory")
    return {"memory_used_bytes": _plausible(info.used, total, "part of that memory"), "memory_total_bytes": total}


def power(handle: Any) -> Values:
    return {"power_w": _plausible(pynvml.nvmlDeviceGetPowerUsage(handle), 100_000_000, "power") / 1000}


def power_limit(handle: Any) -> Values:
    limit = _plausible(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle), 100_000_000, "power limit")
    if limit == 0:
        raise Unusable("no power limit is set")
    return {"power_limit_w": limit / 1000}


def temperature(handle: Any) -> Values:
    sensor = pynvml.NVML_TEMPERATURE_GPU
    degrees = first_known(
        lambda: pynvml.nvmlDeviceGetTemperatureV(handle, sensor),
        lambda: pynvml.nvmlDeviceGetTemperature(handle, sensor),
    )
    if degrees in _ALL_ONES or not -60 <= degrees <= 200:
        raise Unusable(f"NVML said {degrees}, which is no temperature")
    return {"temperature_c": float(degrees)}


def sm_clock(handle: Any) -> Values:
    clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    return {"sm_clock_mhz": _plausible(clock, 100_000, "clock")}


def throttle(handle: Any) -> Values:
    reasons = first_known(
        lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    )
    return {"throttle": throttle_text(_plausible(reasons, 2**62, "set of reasons"))}


def throttle_text(reasons: int) -> str:
    """What holds the clocks down, in words; empty when nothing does."""
    found = [word for bit, word in _THROTTLES if reasons & bit]
    if reasons & _HARDWARE_SLOWDOWN and not reasons & _HARDWARE_CAUSES:
        found.append("hardware slowdown")
    return ", ".join(found)


def mig_is_on(handle: Any) -> bool:
    try:
        current, _pending = pynvml.nvmlDeviceGetMigMode(handle)
    except (pynvml.NVMLError_NotSupported, *_NEWER_THAN_THE_DRIVER):
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


# What is asked, and which fields of a reading are absent when it fails.
Field = tuple[Callable[[Any], Values], tuple[str, ...]]
FAST: Final[tuple[Field, ...]] = (
    (utilization, ("utilization",)),
    (memory, ("memory_used_bytes", "memory_total_bytes")),
    (power, ("power_w",)),
)
SLOW: Final[tuple[Field, ...]] = (
    (power_limit, ("power_limit_w",)),
    (temperature, ("temperature_c",)),
    (sm_clock, ("sm_clock_mhz",)),
    (throttle, ("throttle",)),
)
EVERY_NAME: Final = tuple(name for _, names in (*FAST, *SLOW) for name in names)
