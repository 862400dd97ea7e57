"""Saving and rolling back in one process: exact to the bit, and nothing is shared with what was saved."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainctl.trainer.checkpoint import Accessor, Checkpointer, CheckpointError, Loaded, State
from trainctl.trainer.checkpoint.tree import References, decode, encode, keep_inline
from trainctl.trainer.overrides import Overrides


class Training:
    """A small loop in which everything that a checkpoint must hold moves."""

    def __init__(self, directory: Path, *, optimizer: Any = torch.optim.AdamW) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
        self.ema = copy.deepcopy(self.model)
        self.optimizer = optimizer(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, 100)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.overrides = Overrides([self.optimizer])
        self.counters: dict[str, Any] = {"step": 0, "best": float("inf")}
        self.tunables: dict[str, Any] = {"clip": 1.0}
        self.position = 0
        self.history: list[int] = []
        self.checkpointer = Checkpointer(
            directory=directory,
            run_id="test",
            rank=0,
            world_size=1,
            group=None,
            state=State(
                models=[self.model],
                optimizers=[self.optimizer],
                schedulers=[self.scheduler],
                scaler=self.scaler,
                loader=self,
                tracked={"ema": self.ema, "history": Accessor(get=lambda: self.history, set=self._set_history)},
                overrides=self.overrides,
                tunables=self.tunables,
                counters=self.counters,
            ),
        )

    def _set_history(self, values: list[int]) -> None:
        self.history = values

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "generator": torch.tensor([self.position])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["generator"].item() == state["position"]
        self.position = state["position"]

    def step(self) -> tuple[float, ...]:
        """Everything that must come out the same again."""
        self.position += 1
        draws = (random.random(), float(np.random.rand()))  # noqa: NPY002 - the global one is what is tested
        batch = torch.randn(6, 8, generator=torch.Generator().manual_seed(self.position))
        loss = self.model(batch).pow(2).mean() * self.tunables["clip"]
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        with torch.no_grad():
            for average, value in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.lerp_(value, 0.1)
        self.counters["step"] += 1
        self.history.append(self.counters["step"])
        return (loss.item(), *draws, self.overrides.effective_lr(), self.scaler.get_scale(), float(len(self.history)))

    def run(self, steps: int) -> list[tuple[float, ...]]:
        return [self.step() for _ in range(steps)]

    def save(self, checkpoint: str) -> None:
        result = self.checkpointer.begin_save(
            id=checkpoint, step=self.counters["step"], incarnation=1, attempt=1, metrics={"loss": 1.0}, note="why"
        ).result(30)
        assert result.error is None
        assert result.bytes > 0

    def restore(self, checkpoint: str) -> Loaded:
        loaded = self.checkpointer.load(checkpoint)
        self.checkpointer.commit(loaded)
        loaded.restore_rng()
        return loaded

    def bits(self) -> dict[str, Any]:
        live = {f"model.{key}": value.clone() for key, value in self.model.state_dict().items()}
        live |= {f"ema.{key}": value.clone() for key, value in self.ema.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            live |= {f"{index}.{key}": copy.deepcopy(value) for key, value in state.items()}
        return live


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def with_momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=0.9)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, with_momentum])
def test_training_goes_on_to_the_bit_after_a_rollback_twice_over(tmp_path: Path, optimizer: Any) -> None:
    training = Training(tmp_path, optimizer=optimizer)
    training.run(4)
    training.overrides.scale_lr(0.5)
    training.save("mid")
    expected, end = training.run(7), training.bits()
    for _ in range(2):
        loaded = training.restore("mid")
        assert loaded.notes == ()
        assert (loaded.step, loaded.note, loaded.metrics) == (4, "why", {"loss": 1.0})
        assert training.run(7) == expected
        assert same(training.bits(), end)


class OfItsOwn(torch.optim.SGD):
    """Gives a state that only its own load_state_dict understands."""

    def state_dict(self) -> dict[str, Any]:
        return {"mine": super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["mine"])


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.RMSprop,
        torch.optim.Adafactor,
        lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
        lambda parameters: OfItsOwn(parameters, lr=0.1, momentum=0.9),
    ],
    ids=["rmsprop", "adafactor", "lbfgs", "own state_dict"],
)
def test_optimizer_state_of_other_shapes_is_exact_too(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(1)
    model = nn.Linear(8, 4)
    optimizer = make(model.parameters())
    checkpointer = Checkpointer(
        directory=tmp_path,
        run_id="test",
        rank=0,
        world_size=1,
        group=None,
        state=State(models=[model], optimizers=[optimizer]),
    )

    def steps() -> list[float]:
        losses = []
        for _ in range(4):
            batch = torch.randn(3, 8)

            def closure(batch: torch.Tensor = batch) -> torch.Tensor:
                optimizer.zero_grad()
                loss: torch.Tensor = model(batch).pow(2).mean()
                loss.backward()
                losses.append(loss.item())
                return loss

            optimizer.step(closure)
        return losses

    steps()
    save = checkpointer.begin_save(id="mid", step=4, incarnation=1, attempt=1, metrics={})
    assert save.result(30).error is None
    expected = steps()
    for _ in range(2):
        loaded = checkpointer.load("mid")
        checkpointer.commit(loaded)
        loaded.restore_rng()
        assert steps() == expected


def test_a_new_process_resumes_to_the_bit_before_its_optimizer_has_any_state(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.run(3)
    first.save("three")
    expected = first.run(4)
    second = Training(tmp_path)
    second.restore("three")
    assert second.run(4) == expected


def test_rolling_back_before_the_first_step_empties_the_optimizer_again(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save("zero")
    expected = training.run(3)
    training.restore("zero")
    assert training.optimizer.state_dict()["state"] == {}
    assert training.run(3) == expected


def test_what_was_saved_does_not_move_with_training(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.run(2)
    at_save = training.bits()
    pending = training.checkpointer.begin_save(id="two", step=2, incarnation=1, attempt=1, metrics={})
    training.run(5)  # while it is being written
    assert pending.result(30).error is None
    training.restore("two")
    assert same(training.bits(), at_save)


def test_one_load_committed_twice_gives_the_same_twice(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save("zero")
    training.run(3)
    training.save("three")
    for checkpoint in ("zero", "three"):
        loaded = training.checkpointer.load(checkpoint)
        seen = []
        for _ in range(2):
            training.checkpointer.commit(loaded)
            loaded.restore_rng()
            seen.append(training.run(3))
        assert seen[0] == seen[1]


def test_live_tensors_stay_the_same_objects(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.run(2)
    training.save("two")
    before = [*training.model.parameters(), *(s["exp_avg"] for s in training.optimizer.state.values())]
    training.run(1)
    training.restore("two")
    after = [*training.model.parameters(), *(s["exp_avg"] for s in training.optimizer.state.values())]
    assert [id(tensor) for tensor in before] == [id(tensor) for tensor in after]


def test_overrides_and_tunables_of_the_operator_may_stay(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save("zero")
    training.overrides.scale_lr(0.1)
    training.tunables["clip"] = 0.25
    loaded = training.checkpointer.load("zero")
    training.checkpointer.commit(loaded, restore_overrides=False)
    assert training.overrides.describe() == {"lr": "× 0.1"}
    assert (training.tunables, loaded.tunables, loaded.overrides) == ({"clip": 0.25}, {"clip": 1.0}, {"rules": []})
    training.checkpointer.commit(loaded)
    assert training.overrides.describe() == {}
    assert training.tunables == {"clip": 1.0}


def test_a_tensor_rate_is_restored_in_place(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([parameter], lr=rate)
    checkpointer = Checkpointer(
        directory=tmp_path,
        run_id="test",
        rank=0,
        world_size=1,
        group=None,
        state=State(optimizers=[optimizer]),
    )
    assert checkpointer.begin_save(id="a", step=1, incarnation=1, attempt=1, metrics={}).result(30).error is None
    rate.fill_(0.125)
    checkpointer.commit(checkpointer.load("a"))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    values: dict[str, torch.Tensor] = {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "bf16": torch.randn(5).bfloat16(),
        "bool": torch.tensor([True, False]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "strided": torch.arange(12).reshape(3, 4).t(),
        "a.b": torch.ones(1),
    }
    nested: dict[str, Any] = {"x": values, "x.a": {"b": torch.zeros(1)}}
    got: list[Any] = []
    checkpointer = Checkpointer(
        directory=tmp_path,
        run_id="test",
        rank=0,
        world_size=1,
        group=None,
        state=State(tracked={"all": Accessor(get=lambda: nested, set=got.append)}),
    )
    assert checkpointer.begin_save(id="a", step=1, incarnation=1, attempt=1, metrics={}).result(30).error is None
    checkpointer.commit(checkpointer.load("a"))
    assert same(got[0]["x"], values)
    assert all(got[0]["x"][name].dtype == value.dtype for name, value in values.items())
    assert torch.equal(got[0]["x.a"]["b"], torch.zeros(1))


def test_what_is_not_data_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.history.append(object())  # type: ignore[arg-type]
    result = training.checkpointer.begin_save(id="a", step=1, incarnation=1, attempt=1, metrics={}).result(30)
    assert result.error is not None
    assert result.error.startswith("tracked.history.0 holds a builtins.object, which is not data")
    training.history.clear()
    training.save("b")


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save("a")
    other = Training(tmp_path)
    with torch.no_grad():
        other.model[0] = nn.Linear(8, 12)
    before = other.bits()
    with pytest.raises(
        CheckpointError, match=r"model\.0\.0\.bias is \(16,\) torch\.float32 in the checkpoint and \(12,\)"
    ):
        other.checkpointer.load("a")
    assert same(other.bits(), before)


def test_parts_on_one_side_only_are_told(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save("a")
    lean = Checkpointer(
        directory=tmp_path,
        run_id="test",
        rank=0,
        world_size=1,
        group=None,
        state=State(models=[training.model], optimizers=[training.optimizer], tracked={"new": nn.Linear(1, 1)}),
    )
    loaded = lean.load("a")
    lean.commit(loaded)
    notes = "; ".join(loaded.notes)
    assert "tracked.new is not in the checkpoint and stays as it is" in notes
    assert "tracked.ema is in the checkpoint and not tracked now" in notes
    assert "scheduler.0 is in the checkpoint and not in the run" in notes


def test_warming_makes_the_buffers_that_the_save_then_uses(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.run(1)
    training.checkpointer.warm()
    training.checkpointer.warm()
    training.save("a")
    training.checkpointer.drain(30)


@pytest.mark.parametrize("bad", ["", "../x", ".hidden", "a/b", "x" * 60])
def test_an_id_is_a_file_name(tmp_path: Path, bad: str) -> None:
    training = Training(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint id"):
        training.checkpointer.load(bad)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
data = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
        | st.sets(st.integers())
    ),
    max_leaves=20,
)


@given(data)
@settings(max_examples=100, deadline=None)
def test_any_plain_data_comes_back_equal_and_through_a_safe_load(tmp_path_factory: Any, value: Any) -> None:
    file = tmp_path_factory.mktemp("tree") / "tree.pt"
    torch.save(encode(value, "x", keep_inline), file)
    again = decode(torch.load(file, weights_only=True), References())  # type: ignore[arg-type]
    assert again == value
    assert type(again) is type(value)


def test_arrays_and_torch_values_come_back(tmp_path: Path) -> None:
    value = {
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "number": np.float64(0.1),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "tensor": torch.arange(3),
    }
    torch.save(encode(value, "x", keep_inline), tmp_path / "tree.pt")
    again = decode(torch.load(tmp_path / "tree.pt", weights_only=True), References())  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.pop("array"), value.pop("array"))
    assert torch.equal(again.pop("tensor"), value.pop("tensor"))
    assert again == value
