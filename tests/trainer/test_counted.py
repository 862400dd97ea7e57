"""What a rank counts: NaN and infinities, clipped steps, lost telemetry, the data of each step, FLOPs."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.drops import CALM_S, DropWatch
from trainctl.trainer.feed import Feed
from trainctl.trainer.flops import FlopMeter
from trainctl.trainer.peaks import number_format, peak_flops
from trainctl.trainer.ranges import DataRanges
from trainctl.trainer.tally import Tally, clip_of
from trainctl.wire.messages import Column, Rows


def rows(**metrics: list[float]) -> Rows:
    length = len(next(iter(metrics.values())))
    columns = [
        Column(name=name, dtype="f8", data=np.array(values, "<f8").tobytes()) for name, values in metrics.items()
    ]
    return Rows(attempt=1, incarnation=1, steps=list(range(length)), times=[0.0] * length, columns=columns)


class TestTally:
    def test_nan_and_infinities_are_counted_by_metric(self) -> None:
        tally = Tally()
        tally.observe(rows(loss=[1.0, float("nan"), float("inf")], norm=[1.0, 2.0, float("-inf")]), None)
        tally.observe(rows(loss=[float("nan")]), None)
        assert (tally.nans, tally.infs) == ({"loss": 2}, {"loss": 1, "norm": 1})

    def test_the_clipped_share_is_of_gradient_norms_above_the_scripts_limit(self) -> None:
        tally = Tally()
        assert tally.clipped is None
        tally.observe(rows(grad_norm=[0.5, 2.0, float("nan"), 1.0]), clip_of({"clip": 1.0, "eval_every": 10}))
        assert tally.clipped == 0.5

    def test_a_script_that_says_itself_what_was_clipped_knows_best(self) -> None:
        tally = Tally()
        tally.observe(rows(grad_norm=[9.0, 9.0], clipped=[0.0, 1.0]), 1.0)
        assert tally.clipped == 0.5

    @pytest.mark.parametrize("tunables", [{}, {"clip": True}, {"clip": "often"}, {"eval_every": 3}])
    def test_without_a_limit_nothing_is_said_to_be_clipped(self, tunables: dict[str, object]) -> None:
        tally = Tally()
        tally.observe(rows(grad_norm=[9.0]), clip_of(tunables))
        assert tally.clipped is None

    def test_names_are_bounded(self) -> None:
        tally = Tally()
        for number in range(500):
            tally.observe(rows(**{f"m{number}": [float("nan")]}), None)
        assert len(tally.nans) == 50


class TestDropWatch:
    def test_an_episode_is_told_when_it_begins_and_when_it_is_over(self) -> None:
        watch = DropWatch()
        assert watch.observe({"link": 0}, 0.0) == []
        (begin,) = watch.observe({"link": 5}, 1.0)
        assert (begin.reason, begin.severity) == ("link", "warning")
        assert "did not take them for over a minute" in begin.text
        assert watch.observe({"link": 50}, 2.0) == []
        assert watch.observe({"link": 50}, 2.0 + CALM_S / 2) == []
        (end,) = watch.observe({"link": 50}, 2.0 + CALM_S)
        assert "50 values or rows are missing" in end.text
        assert (end.reason, end.severity) == ("link", "good")
        (again,) = watch.observe({"link": 51}, 100.0)
        assert "is being lost" in again.text

    def test_memory_that_is_full_is_told_as_that(self) -> None:
        told = DropWatch().observe({"link": 0, "link-memory": 3, "buffer-memory": 1}, 0.0)
        assert ["fills its memory" in one.text and "over a minute" not in one.text for one in told] == [True, True]

    def test_bad_values_are_told_elsewhere_by_name(self) -> None:
        assert DropWatch().observe({"value": 3, "names": 9}, 0.0) == []


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


def feed() -> Feed:
    torch.manual_seed(5)
    return Feed(DataLoader(Numbers(), batch_size=2, shuffle=True), capture_rng=capture_rng, restore_rng=restore_rng)


def taken(source: Feed, batches: int) -> dict[int, list[int]]:
    """The next batches by their absolute index."""
    seen: dict[int, list[int]] = {}
    for _ in range(batches):
        index = source.index
        seen[index] = source.next().tolist()
    return seen


class TestData:
    def test_a_batch_has_the_same_index_after_a_rollback_and_a_skip(self) -> None:
        source = feed()
        assert list(taken(source, 12)) == list(range(12)), "over the end of an epoch of five"
        state = source.state_dict()
        more = taken(source, 4)

        again = feed()
        again.load_state_dict(state)
        again.reopen()
        assert taken(again, 2) == {number: more[number] for number in (12, 13)}

        skipping = feed()
        skipping.load_state_dict(state)
        skipping.reopen()
        skipping.skip(2)
        assert skipping.index == 14
        assert skipping.next().tolist() == more[14]

    def test_an_epoch_that_begins_among_what_is_skipped_has_the_order_that_it_had(self) -> None:
        source = feed()
        taken(source, 5)
        state, drawn_from = source.state_dict(), capture_rng()
        more = taken(source, 4)
        again = feed()
        again.load_state_dict(state)
        again.reopen()
        restore_rng(drawn_from)
        again.skip(1)
        assert taken(again, 2) == {number: more[number] for number in (6, 7)}

    def test_a_checkpoint_from_before_indices_were_counted_is_taken(self) -> None:
        source = feed()
        source.load_state_dict({"epoch": 0, "batch": 3, "opened": False})
        assert source.index == 3

    def test_a_steps_range_is_what_the_loop_was_handed_since_the_step_before(self) -> None:
        ranges = DataRanges(keep=3)
        for step in range(1, 6):
            ranges.took(2 * step)
            ranges.took(2 * step + 1)
            assert ranges.begun
            assert ranges.close(step) == (2 * step, 2 * step + 1)
            assert not ranges.begun
        assert (ranges.of(5), ranges.of(3), ranges.of(2)) == ((10, 11), (6, 7), None), "a bounded record"
        assert ranges.close(6) is None, "a step of no batch of ours"

    def test_a_rollback_forgets_what_was_abandoned(self) -> None:
        ranges = DataRanges()
        for step in range(1, 6):
            ranges.took(step)
            ranges.close(step)
        ranges.took(99)
        ranges.rewind(2)
        assert (ranges.newest(), ranges.of(4)) == ((2, 2), None)
        ranges.took(50)
        assert ranges.close(3) == (50, 50)


def meter(told: list[str], **given: object) -> FlopMeter:
    made = {"per_step": None, "peak": None, "device": None, "dtype": torch.float32, "complain": told.append} | given
    return FlopMeter(**made)  # type: ignore[arg-type]


def network() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    return model, torch.randn(8, 1, 16)


class TestFlops:
    def test_the_first_micro_batch_is_counted_as_torchs_own_counter_does(self) -> None:
        model, inputs = network()
        told: list[str] = []
        measured = meter(told, peak=1e6)
        with measured:
            model(inputs).sum().backward()
        with FlopCounterMode(display=False) as reference:
            model(inputs).sum().backward()
        assert measured.per_micro_batch == reference.get_total_flops() > 0
        assert measured.step(2.0) == measured.per_micro_batch / (2.0 * 1e6)
        with measured:
            pass
        with measured:
            pass
        assert measured.step(2.0) == 2 * measured.per_micro_batch / (2.0 * 1e6), "two micro-batches a step"
        assert told == []

    def test_what_was_given_is_used_as_it_is(self) -> None:
        told: list[str] = []
        given = meter(told, per_step=5e12, device="NVIDIA H100 80GB HBM3")
        assert given.step(0.1) == pytest.approx(5e12 / (0.1 * 989.5e12))
        assert told == []

    def test_an_unknown_device_is_named_once_and_shows_no_mfu(self) -> None:
        model, inputs = network()
        told: list[str] = []
        measured = meter(told, device="Foo 9000")
        for _ in range(3):
            with measured:
                model(inputs).sum().backward()
        assert measured.step(1.0) is None
        (text,) = told
        assert "Foo 9000" in text
        assert "peak_flops=" in text

    def test_a_cpu_has_no_peak_and_nothing_to_say(self) -> None:
        model, inputs = network()
        told: list[str] = []
        measured = meter(told)
        with measured:
            model(inputs).sum().backward()
        assert (measured.step(1.0), measured.per_micro_batch, told) == (None, None, [])

    def test_a_compiled_model_is_not_counted(self) -> None:
        told: list[str] = []
        measured = meter(told, peak=1e12, unable="the model is compiled")
        with measured:
            pass
        assert measured.step(1.0) is None
        assert "the model is compiled" in told[0]

    def test_a_formula_that_stumbles_costs_the_mfu_and_not_the_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from trainctl.trainer import flops

        def stumbling(*args: object, **kwargs: object) -> int:
            raise IndexError("no such shape")

        monkeypatch.setitem(flops.flop_registry, torch.ops.aten.addmm, stumbling)
        model, inputs = network()
        told: list[str] = []
        measured = meter(told, peak=1e12)
        with measured:
            model(inputs).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert measured.step(1.0) is None
        assert "no such shape" in told[0]

    def test_an_error_of_the_script_stays_its_own_and_ends_the_counting(self) -> None:
        measured = meter([], peak=1e12)
        with pytest.raises(KeyError), measured:
            raise KeyError
        model, inputs = network()
        with measured:
            model(inputs)
        assert measured.per_micro_batch is None

    @pytest.mark.parametrize(
        ("name", "known_as", "peak"),
        [
            ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
            ("NVIDIA H100 PCIe", "bf16", 756.5e12),
            ("NVIDIA H100 NVL", "bf16", 835.5e12),
            ("NVIDIA H200", "bf16", 989.5e12),
            ("NVIDIA B200", "bf16", 2250e12),
            ("NVIDIA L4", "bf16", 121e12),
            ("NVIDIA L40S", "bf16", 362.05e12),
            ("NVIDIA A10", "bf16", 125e12),
            ("Tesla V100-SXM2-32GB", "fp16", 125e12),
            ("Tesla V100-PCIE-16GB", "fp16", 112e12),
            ("Tesla V100-SXM2-32GB", "bf16", None),
            ("Tesla T4", "fp16", 65e12),
            ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
            ("NVIDIA GeForce RTX 3090", "bf16", 71e12),
            ("AMD Instinct MI300X", "bf16", 1307.4e12),
            ("NVIDIA A10G", "bf16", None),
            ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
            ("NVIDIA L40", "bf16", None),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ],
    )
    def test_peaks_are_those_of_the_very_device(self, name: str, known_as: str, peak: float | None) -> None:
        assert peak_flops(name, known_as) == peak

    def test_float32_is_tf32_where_the_script_allows_it(self) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        try:
            torch.backends.cuda.matmul.allow_tf32 = True
            assert number_format(torch.float32) == "tf32"
            torch.backends.cuda.matmul.allow_tf32 = False
            assert number_format(torch.float32) == "fp32"
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        assert number_format(torch.float64) is None

    @pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has the older setting alone")
    def test_float32_is_tf32_also_where_a_newer_setting_says_so_and_reading_the_older_one_raises(self) -> None:
        script = """
import torch
from trainctl.trainer.flops import FlopMeter

torch.backends.cuda.matmul.fp32_precision = "tf32"
try:
    print("older", torch.backends.cuda.matmul.allow_tf32)
except RuntimeError:
    print("older raises")
told = []
meter = FlopMeter(
    per_step=None, peak=None, device="NVIDIA A100-SXM4-80GB", dtype=torch.float32, complain=told.append
)
with meter:
    torch.ones(8, 8) @ torch.ones(8, 8)
print(meter.step(1.0) * 156e12, told)
torch.backends.cuda.matmul.fp32_precision = "ieee"
meter = FlopMeter(
    per_step=None, peak=None, device="NVIDIA A100-SXM4-80GB", dtype=torch.float32, complain=told.append
)
with meter:
    torch.ones(8, 8) @ torch.ones(8, 8)
print(meter.step(1.0) * 19.5e12, told)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[1:] == ["1024.0 []", "1024.0 []"], done.stdout + done.stderr

    def test_whatever_fails_when_a_micro_batch_was_counted_costs_the_mfu_and_not_the_step(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from trainctl.trainer import flops

        def failing(_dtype: torch.dtype) -> str:
            raise RuntimeError("mix of settings")

        monkeypatch.setattr(flops, "number_format", failing)
        model, inputs = network()
        told: list[str] = []
        measured = meter(told, device="NVIDIA A100-SXM4-80GB")
        with measured:
            model(inputs).sum().backward()
        assert measured.step(1.0) is None
        (text,) = told
        assert "RuntimeError: mix of settings" in text
