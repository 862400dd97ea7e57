"""A node's reading as Prometheus gauges: one set of names for the agent's own exporter and for the run's.

Base units and names follow Prometheus' conventions: ratios from 0 to 1, bytes, watts, seconds. A gauge whose value is
None is to be left out: an absent series is how Prometheus says "not measured".
"""

from collections.abc import Iterator
from typing import TypeAlias

from trainctl.wire.messages import GpuReading, NodeReading

Labels: TypeAlias = dict[str, str]
Gauge: TypeAlias = tuple[str, str, Labels, float | None]  # name, help, labels, value


def node_gauges(reading: NodeReading, labels: Labels) -> Iterator[Gauge]:
    """The node itself and each of its GPUs. `labels` name the node."""
    yield "trainctl_node_cpu_ratio", "CPU time used, of all cores", labels, ratio(reading.cpu)
    yield "trainctl_node_load1", "Load average over a minute", labels, reading.load
    yield "trainctl_node_memory_used_bytes", "Memory in use", labels, reading.memory_used_bytes
    yield "trainctl_node_memory_total_bytes", "Memory there is, or its limit", labels, reading.memory_total_bytes
    for gpu in reading.gpus:
        yield from _gpu(gpu, {**labels, "gpu": str(gpu.index), "uuid": gpu.uuid or "", "name": gpu.name})


def _gpu(gpu: GpuReading, labels: Labels) -> Iterator[Gauge]:
    clock_hz = None if gpu.sm_clock_mhz is None else gpu.sm_clock_mhz * 1e6
    throttled = None if gpu.throttle is None else float(bool(gpu.throttle))
    busy = "Share of the sample period in which any kernel ran"
    yield "trainctl_gpu_utilization_ratio", busy, labels, ratio(gpu.utilization)
    yield "trainctl_gpu_memory_used_bytes", "GPU memory in use", labels, gpu.memory_used_bytes
    yield "trainctl_gpu_memory_total_bytes", "GPU memory there is", labels, gpu.memory_total_bytes
    yield "trainctl_gpu_temperature_celsius", "GPU temperature", labels, gpu.temperature_c
    yield "trainctl_gpu_power_watts", "Power drawn", labels, gpu.power_w
    yield "trainctl_gpu_power_limit_watts", "Power limit in force", labels, gpu.power_limit_w
    yield "trainctl_gpu_sm_clock_hertz", "Clock of the multiprocessors", labels, clock_hz
    yield "trainctl_gpu_throttled", "1 while something holds the clocks down", labels, throttled


def ratio(percent: float | None) -> float | None:
    return None if percent is None else percent / 100
