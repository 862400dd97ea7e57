"""Model FLOPs utilisation (MFU): the share of the device's peak that the step's own arithmetic amounts to.

MFU = FLOPs of the step on this rank / (seconds of the step × peak FLOP/s of this rank's device), after Chowdhery et
al., *PaLM* (2022), appendix B. The FLOPs are given to `Run.attach(flops_per_step=…)`, or counted once, while one
micro-batch runs, with the formulas of `torch.utils.flop_counter`; recomputed activations then count too.
"""

import logging
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainctl.trainer.peaks import number_format, peak_flops

log = logging.getLogger(__name__)


class _Counting(TorchDispatchMode):
    """Adds up the FLOPs of every operator that passes, by the type of its result. Never stands in the way of one."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        untyped: Any = super()
        untyped.__init__()
        self.by_type: dict[torch.dtype, int] = defaultdict(int)
        self.problem: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        try:
            formula = flop_registry.get(getattr(func, "overloadpacket", func))
            if formula is not None:
                counted = int(formula(*args, **(kwargs or {}), out_val=result))
                leaves = tree_leaves((result, args))
                self.by_type[next(leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor))] += counted
        except Exception as error:  # noqa: BLE001 - a formula may stumble over any operator; training must not
            self.problem = self.problem or f"the FLOPs of {func} cannot be counted: {error}"
        return result


class FlopMeter:
    """The FLOPs of this rank's steps, and the MFU that they mean. Used by the training thread.

    As a context manager, `with run.measure_flops():`, it counts the first micro-batch that runs in it; later ones are
    only numbered, so that a step's FLOPs follow the accumulation.

    `per_step`: FLOPs of a step on this rank, when the script gave them. `peak`: FLOP/s of this rank's device, when it
    gave that. `device`: torch's name of the device, None for a CPU. `unable`: why counting would disturb, if it would.
    """

    def __init__(
        self,
        *,
        per_step: float | None,
        peak: float | None,
        device: str | None,
        dtype: torch.dtype,
        complain: Callable[[str], None],
        unable: str | None = None,
    ) -> None:
        self.per_step = per_step
        self.per_micro_batch: float | None = None
        self._peak = peak
        self._device = device
        self._complain = complain
        self._unable = unable
        self._counting: _Counting | None = None
        self._micro_batches = 0
        self._wanted = peak is not None or device is not None
        if per_step is not None:
            self._wanted = False
            if peak is None and device is not None:
                # Mixed precision keeps float32 parameters: the convention is the peak of the half-width formats.
                self._find_peak(torch.bfloat16 if dtype is torch.float32 else dtype)

    def step(self, seconds: float) -> float | None:
        """The MFU of a step that took so long; None while it is not known."""
        micro_batches, self._micro_batches = self._micro_batches, 0
        flops = self.per_step
        if flops is None and self.per_micro_batch is not None:
            flops = self.per_micro_batch * micro_batches
        if not flops or self._peak is None or seconds <= 0.0:
            return None
        return flops / (seconds * self._peak)

    def __enter__(self) -> Self:
        self._micro_batches += 1
        if self._wanted:
            self._wanted = False  # whatever comes of it: it is tried once
            self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._counting is None:
            return
        counting, self._counting = self._counting, None
        untyped: Any = counting
        untyped.__exit__(kind, error, trace)
        if error is not None:
            log.warning(
                "trainctl: the FLOPs of this micro-batch were being counted when it raised %s: if that is the reason, "
                "leave run.measure_flops() out and give Run.attach(flops_per_step=…)",
                type(error).__name__,
            )
            return
        try:
            self._finish(counting)
        except Exception as error:  # noqa: BLE001 - what torch says of types and settings differs by version
            self._complain(f"MFU is not shown: {type(error).__name__}: {error}. Give Run.attach(flops_per_step=…)")

    def _begin(self) -> None:
        if self._unable is not None:
            self._complain(f"MFU is not shown: {self._unable}. Give Run.attach(flops_per_step=…)")
            return
        try:
            counting = _Counting()
            untyped: Any = counting
            untyped.__enter__()
        except Exception as error:  # noqa: BLE001 - what torch says of modes differs by version, and it costs MFU alone
            self._complain(f"MFU is not shown: {error}. Give Run.attach(flops_per_step=…)")
        else:
            self._counting = counting

    def _finish(self, counting: _Counting) -> None:
        total = sum(counting.by_type.values())
        if counting.problem is not None or total == 0:
            why = counting.problem or "no operator of this micro-batch has a known number of FLOPs"
            self._complain(f"MFU is not shown: {why}. Give Run.attach(flops_per_step=…)")
            return
        if self._peak is None:
            self._find_peak(max(counting.by_type, key=lambda dtype: counting.by_type[dtype]))
        self.per_micro_batch = float(total)

    def _find_peak(self, dtype: torch.dtype) -> None:
        assert self._device is not None
        known_as = number_format(dtype)
        if known_as == "bf16" and peak_flops(self._device, known_as) is None:
            known_as = "fp16"
        self._peak = peak_flops(self._device, known_as) if known_as is not None else None
        if self._peak is None:
            self._complain(
                f"MFU is not shown: the peak of {self._device} for {dtype} is not known here. "
                "Give Run.attach(peak_flops=…), in FLOP/s of one device"
            )
