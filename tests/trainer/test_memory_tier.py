"""The memory tier: states that stay in the buffers they were staged into, within a budget."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from one_rank import OneRank
from torch import nn

from trainctl.trainer.checkpoint import Accessor, Checkpointer, CheckpointError, State, checkpointer, memory_tier
from trainctl.trainer.checkpoint.budget import SHARE, free_bytes, shared_budget
from trainctl.trainer.checkpoint.memory_tier import MemoryTier, Slot
from trainctl.trainer.checkpoint.save import Snapshot
from trainctl.trainer.checkpoint.stage import Buffers, bytes_for, layout_of
from trainctl.trainer.run import Run
from trainctl.trainer.tunables import TunableValue
from trainctl.wire.manifest import list_checkpoints
from trainctl.wire.messages import BestBy
from trainctl.wire.removal import remove

METRICS = {"val_loss": 2.0, "accuracy": 0.5, "grad_norm": 1.0}


class Training:
    """A model whose every tensor moves with each step."""

    def __init__(self, directory: Path, **memory: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(32, 32)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.value: Any = torch.zeros(3)
        self.checkpointer = Checkpointer(
            directory=directory,
            run_id="test",
            rank=0,
            world_size=1,
            group=None,
            state=State(
                models=[self.model],
                optimizers=[self.optimizer],
                tracked={"value": Accessor(get=lambda: self.value, set=self._set)},
            ),
            **memory,
        )

    def _set(self, value: Any) -> None:
        self.value = value

    def step(self) -> None:
        self.model(torch.randn(2, 32)).sum().backward()
        self.optimizer.step()
        self.value += 1

    def save(self, name: str, *, may_leave_out: bool = False) -> Any:
        return self.checkpointer.begin_save(
            id=name, step=1, incarnation=1, attempt=1, metrics=METRICS, may_leave_out=may_leave_out
        )

    def bits(self) -> list[torch.Tensor]:
        moments = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [tensor.detach().clone() for tensor in (*self.model.parameters(), *moments, self.value)]

    def restore(self, name: str) -> bool:
        """Whether it was from memory."""
        loaded = self.checkpointer.load(name)
        self.checkpointer.commit(loaded)
        loaded.restore_rng()
        return loaded.from_memory

    @property
    def held(self) -> list[str]:
        return [info.id for info in self.checkpointer.in_memory]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is closed, no write gets anywhere: a disk that hangs."""
    opened, write = threading.Event(), checkpointer.write

    def held(*arguments: Any) -> int:
        opened.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpointer, "write", held)
    yield opened
    opened.set()


def test_a_state_in_memory_survives_its_rollback_the_steps_after_it_and_can_be_rolled_back_to_again(
    tmp_path: Path,
) -> None:
    training = Training(tmp_path)
    training.step()
    assert training.save("a").result(30).error is None
    saved = training.bits()
    remove(tmp_path, "a")
    training.step()
    trained = training.bits()
    for _ in range(3):
        assert training.restore("a"), "there is no file that it could be read from"
        assert same(training.bits(), saved)
        training.step()
        assert not same(training.bits(), saved)
        assert len(trained) == len(saved)


def test_of_a_state_in_memory_the_metrics_are_told_by_which_the_best_is_found(tmp_path: Path) -> None:
    training = Training(tmp_path, best_by=BestBy(metric="accuracy", mode="max"))
    assert training.save("a").result(30).error is None
    assert [info.metrics for info in training.checkpointer.in_memory] == [{"val_loss": 2.0, "accuracy": 0.5}]


def test_what_a_model_keeps_of_the_state_it_is_given_is_a_copy(tmp_path: Path) -> None:
    class Keeping(nn.Linear):
        def get_extra_state(self) -> Any:
            return getattr(self, "kept", torch.zeros(2))

        def set_extra_state(self, state: Any) -> None:
            self.kept = state

    training = Training(tmp_path)
    training.model = training.checkpointer.state.models[0] = Keeping(32, 32)  # type: ignore[index]
    assert training.save("a").result(30).error is None
    for _ in range(2):
        training.restore("a")
        assert training.model.kept.tolist() == [0, 0]  # type: ignore[union-attr, operator]
        training.model.kept += 1  # type: ignore[operator]


def test_the_newest_states_stay_and_the_oldest_gives_its_room_to_the_next(tmp_path: Path) -> None:
    training = Training(tmp_path, memory_checkpoints=2)
    training.step()
    for name in "abc":
        assert training.save(name).result(30).error is None
        training.checkpointer.drain()
    assert training.held == ["b", "c"]
    assert not training.restore("a"), "from disk"
    assert training.restore("b")


def test_with_no_states_to_keep_there_is_one_buffer_and_everything_is_read_from_disk(tmp_path: Path) -> None:
    training = Training(tmp_path, memory_checkpoints=0)
    sizes = set()
    for name in "ab":
        assert training.save(name).result(30).error is None
        training.checkpointer.drain()
        sizes.add(training.checkpointer.memory_bytes)
    assert len(sizes) == 1
    assert training.held == []
    assert not training.restore("b")


def test_a_state_whose_files_could_not_be_written_is_in_memory_only_and_can_be_rolled_back_to(tmp_path: Path) -> None:
    training = Training(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    assert "cannot be begun" in training.save("a").result(30).error
    saved = training.bits()
    training.step()
    assert training.held == ["a"]
    assert training.restore("a")
    assert same([training.model.weight.detach()], [saved[0]])


def test_a_loaded_state_that_a_later_save_overwrote_is_not_committed(tmp_path: Path) -> None:
    training = Training(tmp_path, memory_checkpoints=1)
    training.step()
    training.save("a").result(30)
    loaded = training.checkpointer.load("a")
    training.step()
    training.save("b").result(30)
    before = training.bits()
    with pytest.raises(CheckpointError, match="overwritten in memory"):
        training.checkpointer.commit(loaded)
    assert same(training.bits(), before)


def test_another_model_in_the_place_of_the_saved_one_is_refused_from_memory_too(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save("a").result(30)
    training.checkpointer.state.models[0] = nn.Linear(16, 16)  # type: ignore[index]
    with pytest.raises(CheckpointError, match="of another model"):
        training.checkpointer.load("a")


def test_saves_wait_for_one_another_in_the_background_and_training_does_not(
    tmp_path: Path, gate: threading.Event
) -> None:
    training = Training(tmp_path, memory_checkpoints=2)
    training.step()
    training.checkpointer.warm()
    gate.set()
    assert training.save("a").result(30).error is None
    training.checkpointer.drain()  # by now there is a second buffer
    gate.clear()
    first = training.save("b")
    at_b = training.bits()
    training.step()
    second = training.save("c")  # returns, although b is held up
    left_out = training.save("d", may_leave_out=True)
    assert not any(save.done() for save in (first, second, left_out))
    assert training.checkpointer.full
    gate.set()
    assert (first.result(30).error, second.result(30).error) == (None, None)
    assert str(left_out.result(30).error).startswith("left out: the one before it is still being written")
    assert [info.id for info in list_checkpoints(tmp_path)] == ["a", "b", "c"], "in the order in which they began"
    assert not training.checkpointer.full
    training.checkpointer.drain()
    training.restore("b")
    assert same(training.bits(), at_b), "c was not staged over it"


def test_without_a_buffer_to_spare_a_save_that_was_asked_for_waits_and_loses_nothing(
    tmp_path: Path, gate: threading.Event
) -> None:
    training = Training(tmp_path, memory_checkpoints=0)
    first = training.save("a")
    threading.Timer(0.05, gate.set).start()
    second = training.save("b")
    assert first.done(), "b had to wait for the buffer"
    assert (first.result(30).error, second.result(30).error) == (None, None)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torchs_own_reader_reads_what_was_written(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step()
    assert training.save("a").result(30).error is None
    wanted = {f"model.0.{name}": tensor for name, tensor in training.model.state_dict().items()}
    target = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    dcp.load(target, checkpoint_id=tmp_path / "a", no_dist=True)
    assert all(torch.equal(target[name], wanted[name]) for name in wanted)


def test_the_default_budget_is_a_share_of_what_is_free_and_is_divided_by_the_nodes_ranks(tmp_path: Path) -> None:
    meminfo, membership = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 800 kB\n")
    membership.write_text("")
    assert free_bytes(meminfo, membership) == 800 * 1024
    assert free_bytes(tmp_path / "gone", membership) == 0
    assert free_bytes() > 0
    budget = shared_budget(4, lambda: 4000)
    assert budget(0) == SHARE * 1000
    assert budget(600) == SHARE * 1600, "what is held already is not free any more"


def test_what_was_saved_is_kept_in_memory_as_often_as_memory_checkpoints_says_and_nowhere_else(tmp_path: Path) -> None:
    training = Training(tmp_path, memory_checkpoints=2)
    saves = [training.save(f"kept-{number}") for number in range(8)]  # whoever shows results may keep them
    assert all(save.result(30).error is None for save in saves)
    training.checkpointer.drain()
    gc.collect()
    alive = [found.id for found in gc.get_objects() if type(found) is Snapshot and found.id.startswith("kept-")]
    assert sorted(alive) == ["kept-6", "kept-7"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of all buffers that are made: whether the training thread did it, and so was held up for them."""
    found: list[bool] = []

    class Counted(Buffers):
        def __init__(self, layout: Any, *, pinned: bool) -> None:
            found.append(threading.current_thread() is threading.main_thread())
            super().__init__(layout, pinned=pinned)

    monkeypatch.setattr(memory_tier, "Buffers", Counted)
    return found


def test_a_tracked_tensor_that_grows_does_not_make_a_save_pay_for_new_buffers(tmp_path: Path, made: list[bool]) -> None:
    training = Training(tmp_path, memory_checkpoints=2)
    training.checkpointer.warm()
    training.checkpointer.drain()
    for number in range(20):
        training.value = torch.arange(3.0 + 100 * number)
        assert training.save(f"s{number}").result(30).error is None
        training.checkpointer.drain()
    assert made == [False, False]
    training.value = torch.zeros(1)
    for number in (18, 19):
        assert training.restore(f"s{number}")
        assert torch.equal(training.value, torch.arange(3.0 + 100 * number))


def test_a_save_that_begins_while_the_first_is_written_finds_a_buffer_made_and_the_next_makes_none(
    tmp_path: Path, made: list[bool], gate: threading.Event
) -> None:
    training = Training(tmp_path)
    training.step()
    assert training.checkpointer.warm()
    training.checkpointer.drain()
    saves = [training.save(name, may_leave_out=True) for name in "abc"]
    assert made == [False, False]
    gate.set()
    told = [save.result(30).error for save in saves]
    assert told[:2] == [None, None]
    assert str(told[2]).startswith("left out"), "training does not pay for a third one"
    training.checkpointer.drain()
    assert made == [False, False, False], "made behind the writes"


def test_where_the_first_step_was_skipped_as_many_states_are_kept_and_no_save_pays_for_it(
    tmp_path: Path, made: list[bool]
) -> None:
    training = Training(tmp_path)
    assert not training.checkpointer.warm(), "the optimizer has no state yet"
    assert not training.checkpointer.warm()
    training.checkpointer.drain()
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(200, 200))]})
    training.optimizer.param_groups[1]["params"][0].grad = torch.zeros(200, 200)
    training.step()
    assert training.checkpointer.warm()
    training.checkpointer.drain()
    for name in "abcd":
        training.step()
        assert training.save(name).result(30).error is None
        training.checkpointer.drain()
    assert training.held == ["b", "c", "d"]
    assert not any(made)
    newest = training.checkpointer._tier.find("d")
    assert newest is not None
    assert training.checkpointer.memory_bytes == 3 * newest.buffers.bytes, "nothing of the first, smaller ones is left"


def test_a_run_has_the_buffers_made_when_its_optimizer_has_taken_a_step(tmp_path: Path, made: list[bool]) -> None:
    rank = OneRank(tmp_path)
    weight = nn.Parameter(torch.zeros(200, 200))
    weight.grad = torch.ones(200, 200)
    second = torch.optim.AdamW([weight])
    rank.core.checkpointer.state.optimizers.append(second)  # type: ignore[union-attr, attr-defined]
    run = object.__new__(Run)  # without a hub and threads
    run._core, run._eval_every, run._warm_until = rank.core, None, 100
    run._checkpoint_every = rank.core.tunables.add(TunableValue("checkpoint_every", 4))
    rank.core.boundary.completed = 1  # a step that the scaler skipped
    run._intervals(1)
    for step in range(2, 8):
        rank.train(1)
        second.step()
        run._intervals(step)
    rank.core.checkpointer.drain()  # type: ignore[union-attr]
    assert rank.core.saves[0].pending.result(30).error is None
    assert made
    assert not any(made), "the save of step 4 found them"


def test_after_the_state_grew_for_good_as_many_states_are_kept_as_before(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step()
    for name in "abcdefg":
        if name == "d":
            training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(200, 200))]})
            training.optimizer.param_groups[1]["params"][0].grad = torch.zeros(200, 200)
        training.step()
        assert training.save(name).result(30).error is None
        training.checkpointer.drain()
    assert training.held == ["e", "f", "g"]


LAYOUTS = [layout_of({"x": torch.empty(size)}) for size in (1, 3000, 20000)]


def fill(slot: Slot, name: str, number: int) -> None:
    ((key, shape, dtype),) = slot.buffers.layout
    tensors = slot.buffers.stage({key: torch.full(shape, float(number), dtype=dtype)})
    slot.state = Snapshot(id=name, run_id="r", step=1, incarnation=1, attempt=1, metrics={}, note=None, tensors=tensors)


@settings(max_examples=150, deadline=None)
@given(
    keep=st.integers(0, 4),
    budget=st.integers(0, 900_000),
    moves=st.lists(st.tuples(st.sampled_from(["save", "end", "fail", "grow"]), st.integers(0, 2)), max_size=40),
)
def test_whatever_happens_the_budget_holds_and_every_state_is_what_was_put_in(
    keep: int, budget: int, moves: list[tuple[str, int]]
) -> None:
    tier = MemoryTier(keep=keep, budget=lambda _held: budget)
    writing: list[Slot] = []
    values: dict[str, int] = {}
    largest = 0
    for number, (move, which) in enumerate(moves):
        layout = LAYOUTS[which]
        if move == "save":
            slot = tier.claim(layout, pinned=False, make=False)
            if slot is None:
                assert writing, "only what is being written is in the way"
                continue
            largest = max(largest, slot.buffers.bytes)
            assert slot.buffers.layout == layout
            assert slot not in writing
            fill(slot, f"s{number}", number)
            values[f"s{number}"] = number
            writing.append(slot)
        elif move == "grow":
            before = {name: tier.find(name) for name in tier.ids}
            made = tier.grow(layout, pinned=False)
            largest = max(largest, bytes_for(layout, pinned=False) if made and tier.held_bytes > budget else 0)
            for name in before.keys() - set(tier.ids):
                assert made, "no state is thrown away for nothing"
                assert not before[name].buffers.fits(layout), "nor one that the next save could have had the room of"
        elif writing:
            tier.release(writing.pop(0), keep=move == "end")
        assert tier.held_bytes <= max(budget, largest)
        assert len(tier.ids) <= max(1, keep)
        for name in tier.ids:
            slot = tier.find(name)
            assert slot is not None
            assert slot.state is not None
            (tensor,) = slot.state.tensors.values()
            assert torch.all(tensor == values[name])
    for slot in writing:
        tier.release(slot, keep=True)
    assert keep or not tier.ids


class Quantised(torch.Tensor):
    """As torchao keeps an optimizer's state: codes that pose as float32, and know how to be copied one by one."""

    codes: torch.Tensor

    def __new__(cls, codes: torch.Tensor) -> Self:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes = codes
        return cast(Self, made)

    @classmethod
    def __torch_dispatch__(
        cls, func: object, _types: object, args: tuple[Any, ...] = (), kwargs: object = None
    ) -> torch.Tensor:
        if func is torch.ops.aten.copy_.default:
            return cast(torch.Tensor, args[0].copy_(args[1].codes.float()))
        raise NotImplementedError(func)


def test_a_state_that_can_only_be_copied_tensor_by_tensor_is_saved_like_any_other() -> None:
    tensors = {
        "plain": torch.ones(3),
        "codes": Quantised(torch.tensor([1, 2], dtype=torch.uint8)),
        "more": torch.ones(()),
    }
    staged = Buffers(layout_of(tensors), pinned=False).stage(tensors)
    assert {name: tensor.tolist() for name, tensor in staged.items()} == {
        "plain": [1.0, 1.0, 1.0],
        "codes": [1.0, 2.0],
        "more": 1.0,
    }
