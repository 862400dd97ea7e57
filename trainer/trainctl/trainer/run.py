"""`Run`: all that a training script needs of trainctl.

    run = Run.attach("gpt", model=model, optimizer=optimizer, loader=loader, total_steps=10_000)
    for batch in run.batches():
        with run.phase("forward"):
            loss = ...
        run.log(loss=loss)
        run.step_done(tokens=n)

Nothing in here waits for the network, and no error of trainctl's own is raised into the loop, with two exceptions: a
wrong call at attach, and `control.InDoubt`.
"""

import atexit
import contextlib
import dataclasses
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from trainctl.trainer import attach as attaching
from trainctl.trainer import forks
from trainctl.trainer.actions import begin_save
from trainctl.trainer.agreement import Position
from trainctl.trainer.buffer import StepMark, floats_first
from trainctl.trainer.checkpoint import MEMORY_CHECKPOINTS, Accessor, Retention
from trainctl.trainer.checkpoint.script_files import script_files
from trainctl.trainer.control import InDoubt
from trainctl.trainer.core import Callbacks
from trainctl.trainer.evaluation import batches as evaluation_batches
from trainctl.trainer.evaluation import evaluate
from trainctl.trainer.preemption import farewell, listen
from trainctl.trainer.resuming import resume
from trainctl.trainer.tunables import TunableValue, Value
from trainctl.wire.messages import LinkBye, RunStateName
from trainctl.wire.preemption import REQUEUE_EXIT_CODE

log = logging.getLogger(__name__)

_NOTHING = contextlib.nullcontext()
_LEAVE_S = 3.0
# In so many an optimizer is waited for that has no state yet: a GradScaler skips steps until its scale is low enough.
_WARM_STEPS = 100
_perf, _time = time.perf_counter, time.time
_new = tuple.__new__


class Run:
    """One rank's handle on its run. Made by `Run.attach`; use it from the training thread."""

    def __init__(self, parts: attaching.Parts, script: attaching.Script) -> None:
        self._parts = parts
        self._script = script
        self._core = core = parts.core
        self._boundary = core.boundary
        self._actions = parts.actions
        self._buffer = core.buffer
        self._entries = core.buffer.entries
        self._append = core.buffer.entries.append
        self._room = core.buffer.capacity
        self._ranges = core.ranges
        self._flops = core.flops
        self._publishes = core.publishes
        self._closed = False
        self._pid = os.getpid()
        self._last = _perf()
        self._eval_every: TunableValue | None = None
        self._checkpoint_every: TunableValue | None = None
        self._end_fast_log: Callable[[], None] = _do_nothing
        self._told_late = False
        self._warm_until = _WARM_STEPS
        if core.publishes and type(self).log is Run.log:
            self.__dict__["log"], self._end_fast_log = floats_first(core.buffer, core, self._log)

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        config: Mapping[str, Any] | None = None,
        total_steps: int | None = None,
        on_eval: Callable[[], Mapping[str, float] | None] | None = None,
        on_rollback: Callable[[int], None] | None = None,
        eval_every: int | None = None,
        checkpoint_every: int | None = None,
        max_skew: int = 0,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        sinks: Sequence[str] = (),
        keep: Retention | None = None,
        save: Callable[[Path], None] | None = None,
        load: Callable[[Path], None] | None = None,
        memory_checkpoints: int = MEMORY_CHECKPOINTS,
        memory_budget: int | None = None,
        preempt_signal: str | None = None,
    ) -> "Run":
        """Join a run, on every rank, after the process group and everything named here was made.

        What is left out shows as a capability that is off, with the reason. `loader` lets the run own the data's
        iterator (`batches`); a script that owns it gives `on_rollback`, called with the step to go back to.
        `on_eval` evaluates and returns metrics; it runs on every rank, every `eval_every` steps and on command.
        `max_skew` > 0 declares that ranks may be at different steps (local SGD, `Join`): commands are off then.
        `flops_per_step` is what one step costs over all ranks, forward and backward, where the script knows it better
        than `measure_flops` would; `peak_flops` what one device can do, in FLOP/s: both only for showing the MFU.
        `sinks` names where the hub copies the history to besides, such as ["tensorboard"] (docs/sinks.md).
        `keep` says which checkpoints stay, such as Retention(last=3, metric="val_loss"); without it all do.
        `save(directory)` and `load(directory)` take the place of our own saving of models, optimizers, schedulers and
        scaler: every rank calls them at the boundary, to write its files into the checkpoint's directory and to read
        them back once they were verified (docs/retention.md says what is promised then; no state stays in memory).
        `memory_checkpoints` states stay in host memory for a fast rollback, 0 for none, within `memory_budget` bytes on
        each rank; without it within this rank's part of a quarter of what is free on its node (docs/checkpoints.md).
        `preempt_signal`, such as "USR1", becomes one checkpoint and a stop on all ranks, whichever rank gets it; for
        launchers that signal ranks themselves, and only where the script has no handler for it (docs/preemption.md).

        Raises ValueError or TypeError on a wrong call, and `CheckpointError` when a checkpoint that TRAINCTL_RESUME
        names is damaged.
        """
        _check(name, total_steps, eval_every, checkpoint_every)
        _check_memory(memory_checkpoints=memory_checkpoints, memory_budget=memory_budget)
        _check_flops(flops_per_step=flops_per_step, peak_flops=peak_flops)
        if config is not None and not isinstance(config, Mapping):
            raise TypeError(f"config takes a mapping, such as vars(args), not {type(config).__name__}")
        if keep is not None and not isinstance(keep, Retention):
            raise TypeError(f"keep takes a Retention, such as Retention(last=3), not {type(keep).__name__}")
        script = attaching.Script(
            name=name,
            models=_several(model, nn.Module, "model"),
            optimizers=_several(optimizer, Optimizer, "optimizer"),
            schedulers=_schedulers(scheduler),
            scaler=scaler,
            loader=loader,
            config=config or {},
            total_steps=total_steps,
            callbacks=Callbacks(on_eval=on_eval, on_rollback=on_rollback),
            crosses_boundaries=max_skew > 0,
            flops_per_step=flops_per_step,
            peak_flops=peak_flops,
            sinks=_names(sinks),
            keep=keep,
            files=script_files(save, load),
            memory_checkpoints=memory_checkpoints,
            memory_budget=memory_budget,
        )
        if os.environ.get("TRAINCTL", "").lower() == "off":
            from trainctl.trainer.off import OffRun

            return OffRun(script, eval_every=eval_every)
        script = dataclasses.replace(script, signalled=listen(preempt_signal))
        forks.install()
        run = cls(attaching.start(script), script)
        run._register_intervals(eval_every, checkpoint_every)
        run._resume()
        attaching.launch(run._parts)
        atexit.register(run._at_exit)
        os.register_at_fork(after_in_child=run._in_forked_child)
        return run

    # What the run is

    @property
    def step(self) -> int:
        """Completed steps."""
        return self._boundary.completed

    @property
    def incarnation(self) -> int:
        return self._core.incarnation

    @property
    def attempt(self) -> int:
        return self._core.identity.attempt

    @property
    def id(self) -> str:
        return self._core.identity.id

    @property
    def stopping(self) -> bool:
        """An operator asked to stop: leave the loop. `batches` ends by itself."""
        return self._core.ending is not None

    @property
    def preempted(self) -> bool:
        """The machine is taken away: end with exit code 75, so that a scheduler requeues. `trainctl run` does so."""
        return self._core.ending == "preempted"

    # What the loop calls

    def batches(self) -> Iterator[Any]:
        """Micro-batches over as many epochs as `total_steps` needs; a rollback rewinds them."""
        core = self._core
        if core.feed is None:
            raise ValueError("batches() needs the loader: Run.attach(…, loader=loader)")
        self._begin()
        while not self.stopping and (core.total_steps is None or self._boundary.completed < core.total_steps):
            started = _perf()
            batch = core.feed.next()
            core.phases.add("data", _perf() - started)
            core.ranges.took(core.feed.index - 1)
            yield batch
        self._boundary.close()  # no further boundary, though the script may have much to do before it closes the run

    def eval_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Inside `on_eval`: the batches of an evaluation. Between two of them operators may pause or stop the run.

        No collective of the script's own may be under way there on which other ranks wait. When the run is stopped,
        the batches end early, and what `on_eval` then returns, or raises, does not count.
        """
        if self._actions is None:
            return iter(batches)
        return evaluation_batches(self._core, batches, self._meet_inside)

    def _meet_inside(self) -> None:
        if self._actions is not None:
            self._actions.meet(inside=True)

    def phase(self, name: str) -> Any:
        """`with run.phase("forward"): …` times data, forward, backward, optimizer, communication or what you name."""
        return self._core.phases.get(name)

    def log(self, /, **values: Any) -> None:
        """Log numbers of the step in progress: floats, ints, or tensors with one element, which cause no sync.

        What is logged after the last `step_done()`, such as a test's result, belongs to the last completed step; where
        `batches()` gave a batch since, to the step that this began and that never ended, as the loss that stopped it.
        """
        # On the rank that publishes, `floats_first` stands before this.
        self._log(values)

    def _log(self, values: dict[str, Any]) -> None:
        if self._publishes:
            self._buffer.log(self._core.row_step, values)
        elif self._closed:
            self._say_too_late(values)
        else:
            self._keep_own_loss(values)

    def measure_flops(self) -> Any:
        """`with run.measure_flops(): …` around the forward and backward of every micro-batch shows the MFU.

        The FLOPs are counted once, while the first one runs, and cost nothing afterwards. Without it give
        `Run.attach(flops_per_step=…)`. The peak of the device comes from a table of GPUs, or from `peak_flops=`.
        """
        return self._flops if self._flops is not None else _NOTHING

    def data_range(self, step: int) -> tuple[int, int] | None:
        """The absolute indices of the first and last micro-batch that this rank made a recent step of.

        They count from 0 over all epochs, and a batch keeps its index over rollbacks and restarts. None where the
        script owns its data, or the step is long past.
        """
        return self._ranges.of(step)

    def step_done(self, *, tokens: int = 0, samples: int = 0) -> None:
        """The boundary, once after each optimizer step: no collective in flight, no gradient held.

        Commands of the operator take effect in here, on every rank at the same step. `tokens` and `samples` are those
        of this step over all ranks.
        """
        core, boundary, now = self._core, self._boundary, _perf()
        # Here and below without the property `completed`: a call of it is a tenth of what all of this costs.
        step = boundary.position[0] + 1
        boundary.position = _new(Position, (step, 0))
        seconds = now - self._last
        core.steps_s += seconds
        boundary.reached, boundary.step_s = now, seconds
        data = self._ranges.close(step)
        mfu = self._flops.step(seconds) if self._flops is not None else None
        if (overrides := core.overrides) is not None:
            overrides.heal()  # no step is running here: one that seems to is one that raised
        if self._publishes:
            scheduled, effective = (overrides.used_lr if overrides is not None else None) or (None, None)
            # Made as the plain tuple that it is: a NamedTuple's own constructor costs as much as all the rest.
            mark = _new(StepMark, (step, _time(), seconds, tokens, samples, effective, scheduled, data, mfu))
            if len(self._entries) < self._room:
                self._append(mark)
            else:
                self._buffer.refused += 1
        core.row_step = step
        self._intervals(step)
        if boundary.armed is not None and self._actions is not None:
            self._actions.meet()
        core.row_step = boundary.position[0] + 1
        self._last = _perf()

    # What belongs to the run

    def track(self, name: str, value: Any = None, *, get: Callable[[], Any] | None = None, set: Any = None) -> None:  # noqa: A002
        """Make something part of every checkpoint: an object with state_dict, or a `get` and `set` pair.

        After a resume it is given its state at once, where it is tracked before the loop. Ranks need not track the
        same: nothing in here waits for another one. Raises ValueError or TypeError on a wrong call, and
        `CheckpointError` where the checkpoint cannot be read any more.
        """
        if name in self._parts.tracked:
            raise ValueError(f"{name!r} is tracked already: names are given once")
        if get is not None and set is not None:
            self._parts.tracked[name] = Accessor(get=get, set=set)
        elif hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            self._parts.tracked[name] = value
        else:
            raise TypeError(f"track({name!r}, …) takes an object with state_dict and load_state_dict, or get= and set=")
        self._restore_tracked(name)

    def tunable(
        self,
        name: str,
        value: Value,
        *,
        min: float | None = None,  # noqa: A002 - the words a script would use
        max: float | None = None,  # noqa: A002
        unit: str | None = None,
        on_change: Callable[[Value], None] | None = None,
    ) -> TunableValue:
        """Let the operator change a value between bounds: read `.value` where it is used. Changes at boundaries."""
        made = self._core.tunables.add(
            TunableValue(name, value, minimum=min, maximum=max, unit=unit, on_change=on_change)
        )
        resumed = self._core.resumed_tunables.get(name)
        if resumed is not None and made.problem_with(resumed) is None:
            self._core.tunables.apply(name, resumed, steered=resumed != value)
        self._core.tunables_changed.set()
        return made

    def close(self, *, failed: str | None = None) -> None:
        """End this rank's part: running saves are completed, what is left is sent. Called again it does nothing.

        A hub that is frozen or gone holds this up for 3 s, one that is only starting for 10 s at most; what it did not
        take it finds in the run's directory. A device that has not computed what was logged holds it up, too: after 3 s
        in which no value came, those that miss are counted and told.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._publish_no_more()
        core = self._core
        core.boundary.close()
        if self._actions is not None:
            self._actions.leave(_LEAVE_S)
        if core.checkpointer is not None:
            core.checkpointer.drain()  # a save, and the warming: a thread inside torch would abort the exit
        if self._parts.leader is not None:
            self._parts.leader.close()
            self._parts.leader.join(_LEAVE_S)
        if self._parts.control is not None:
            self._parts.control.leave(_LEAVE_S)
        state: RunStateName = "failed" if failed else core.ending or "finished"
        reason = failed or (f"by {core.ended_by}" if core.ended_by else None)
        if state == "preempted":
            reason = farewell(core)
            self._parts.preemption.left(reason)
        self._parts.sender.finish(LinkBye(state=state, step=core.boundary.completed, reason=reason))
        if self._parts.place_file is not None and failed is None:  # else the agent names the rank, once it is gone
            with contextlib.suppress(OSError):  # the agent will see that the process is gone
                self._parts.place_file.unlink(missing_ok=True)
        at_its_end = core.total_steps is not None and core.first_step >= core.total_steps  # where it was resumed
        if core.boundary.completed == core.first_step and core.publishes and not failed and not at_its_end:
            log.warning(
                "trainctl: the script never called run.step_done(): of each metric only the last value is kept, and no "
                "command could take effect. Call it once after each optimizer step"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        well = {None, 0, *([REQUEUE_EXIT_CODE] if self.preempted else [])}
        left_well = error is None or (isinstance(error, SystemExit) and error.code in well)
        self.close(failed=None if left_well else f"{type(error).__name__}: {error}")

    # Inside

    def _register_intervals(self, eval_every: int | None, checkpoint_every: int | None) -> None:
        """Intervals of evaluation and checkpoints are tunables; 0 switches them off."""
        able = self._core.capabilities
        if self._script.callbacks.on_eval is not None:
            self._eval_every = self.tunable("eval_every", eval_every or 0, min=0, unit="steps")
        # Not where ranks have no common step; where only commands are off, saving by the interval still works.
        if self._core.checkpointer is not None and not self._script.crosses_boundaries:
            self._checkpoint_every = self.tunable("checkpoint_every", checkpoint_every or 0, min=0, unit="steps")

        elif checkpoint_every:
            log.warning("trainctl: checkpoint_every=%d has no effect: %s", checkpoint_every, able["checkpoint"])

    def _resume(self) -> None:
        core = self._core
        step = resume(core, self._parts.group)
        core.first_step = core.boundary.completed
        self._warm_until = core.first_step + _WARM_STEPS
        core.row_step = core.boundary.completed + 1
        core.counters.setdefault("step", 0)
        core.steering_changed.set()
        if step is not None and core.publishes:
            log.warning("trainctl: resumed at step %d", step)

    def _restore_tracked(self, name: str) -> None:
        """What is tracked after a resume is restored now: the checkpoint was read before it was known."""
        core = self._core
        if core.resumed is not None:
            core.resumed.restore(name)
        elif core.resumed_from is not None:
            log.warning(
                "trainctl: %s is tracked after training began again and is not restored: track it before the loop", name
            )

    def _begin(self, *, drawn: bool = False) -> None:
        """The loop begins, or a step of it is `drawn` already: what was resumed from is of no more use."""
        if (resumed := self._core.resumed) is not None:
            self._core.resumed = None
            resumed.begin(drawn=drawn)

    def _intervals(self, step: int) -> None:
        if self._core.resumed is not None:
            self._begin(drawn=True)  # in a script that does not take its batches from us
        every, saves = self._eval_every, self._checkpoint_every
        if every is not None and every.value and step % int(every.value) == 0:
            evaluate(self._core, self._meet_inside)
            self._stop_behind_the_evaluation()
        if self._warm_until >= step and saves is not None and saves.value:
            self._warm()
        # A stop inside the evaluation has saved this step already, and an abort wants nothing saved.
        if saves is not None and saves.value and step % int(saves.value) == 0 and self._core.ending is None:
            begin_save(self._core, may_leave_out=step != self._core.total_steps)  # behind the last one nothing waits

    def _stop_behind_the_evaluation(self) -> None:
        core, actions = self._core, self._actions
        if actions is not None and core.last_save is not None:
            actions.settle_stop()
            if core.hold is not None:  # it could not be saved, and was paused inside the evaluation: it still is
                actions.meet()

    def _warm(self) -> None:
        """The optimizer's state exists after the first step: let the first save find its buffers made."""
        done = True
        if self._core.checkpointer is not None:
            try:
                done = self._core.checkpointer.warm()
            except Exception as error:  # noqa: BLE001 - a state_dict of the user's may raise anything
                self._core.complain("checkpoint", f"the state cannot be taken yet, checkpoints will fail: {error}")
        if done:
            self._warm_until = 0

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)
        self.close(failed=f"{type(error).__name__}: {error}" if error is not None else None)

    def _in_forked_child(self) -> None:
        """A DataLoader worker inherits this object: it must not speak, and must not keep a connection of ours open."""
        self._closed = True
        self._publish_no_more()
        self._parts.sender.abandon()
        self._parts.sockets.let_go()

    def _publish_no_more(self) -> None:
        """What is logged from here on would wait for nobody, in memory."""
        self._publishes = False
        self._end_fast_log()  # a script may have kept `log = run.log`
        self.__dict__.pop("log", None)

    def _say_too_late(self, values: dict[str, Any]) -> None:
        if self._told_late or os.getpid() != self._pid or not self._core.publishes:
            return
        self._told_late = True
        log.warning(
            "trainctl: run.log() was called after run.close(): %s and what follows is not recorded. Log it before",
            ", ".join(list(values)[:5]) or "nothing",
        )

    def _keep_own_loss(self, values: dict[str, Any]) -> None:
        """Rank 0 speaks for the run; of the others the operator sees figures, and their own loss among them."""
        if (loss := values.get("loss")) is not None:
            self._buffer.log(self._core.row_step, {"loss": loss})


def _do_nothing() -> None:
    pass


def _check(name: str, total_steps: int | None, eval_every: int | None, checkpoint_every: int | None) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ValueError('Run.attach needs a name: Run.attach("gpt-stdlib", …)')
    numbers = {"total_steps": total_steps, "eval_every": eval_every, "checkpoint_every": checkpoint_every}
    for word, number in numbers.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
            raise ValueError(f"{word} is {number!r}: give a whole number of steps, 0 or more, or leave it out")


def _check_memory(**given: int | None) -> None:
    for word, number in given.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
            raise ValueError(f"{word} is {number!r}: give a whole number, 0 or more, or leave it out")


def _check_flops(**given: float | None) -> None:
    for word, number in given.items():
        if number is not None and not (isinstance(number, int | float) and math.isfinite(number) and number > 0):
            raise ValueError(f"{word} is {number!r}: give a number above 0, or leave it out")


def _names(sinks: Sequence[str]) -> tuple[str, ...]:
    if isinstance(sinks, str) or not all(isinstance(name, str) for name in sinks):
        raise TypeError(f'sinks takes a list of names, such as ["tensorboard"], not {sinks!r}')
    return tuple(sinks)


def _several(given: Any, kind: type, word: str) -> list[Any]:
    if given is None:
        return []
    items = list(given) if isinstance(given, list | tuple) else [given]
    for item in items:
        if not isinstance(item, kind):
            raise TypeError(f"{word} takes a {kind.__name__} or a list of them, not {type(item).__name__}")
    return items


def _schedulers(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


__all__ = ["InDoubt", "Run"]
