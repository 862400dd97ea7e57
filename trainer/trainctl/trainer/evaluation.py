"""Evaluations: run at a boundary, and themselves made of boundaries, one behind each batch.

A long evaluation would otherwise be the one time in which nobody can pause or stop a run. What may be done inside is
little: the script may have swapped its weights, so nothing is saved or restored before the evaluation is over.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from trainctl.trainer.control import InDoubt
from trainctl.trainer.core import Core

log = logging.getLogger(__name__)


def evaluate(core: Core, meet: Callable[[], None]) -> bool:
    """Run the script's evaluation and log what it returns under the step just completed.

    Its end is a boundary too: of the evaluations that only other ranks have, as where rank 0 evaluates for all.

    False where an operator ended the run meanwhile: what a part of the batches gave is not logged then.
    """
    if core.callbacks.on_eval is None:
        return True
    core.doing = "evaluating"
    started = time.perf_counter()
    returned = core.boundary.position.returns()
    core.held_s = 0.0
    # An evaluation may swap weights, as EMA does.
    writing = core.overrides.expected_writes() if core.overrides is not None else contextlib.nullcontext()
    ended_before = core.ending is not None
    try:
        with writing:
            metrics = core.callbacks.on_eval()
    except Exception as error:
        if ended_before or core.ending is None or isinstance(error, InDoubt):
            raise
        # Ours: it got fewer batches than it has ever got, perhaps none.
        log.info("trainctl: the evaluation was left before it was complete: %s: %s", type(error).__name__, error)
        return False
    else:
        core.boundary.position = returned
        _meet(core, meet)
    finally:
        core.doing = None
        core.boundary.position = returned  # where it raised
        core.phases.add("eval", time.perf_counter() - started - core.held_s)
    if core.ending is not None and not ended_before:
        return False
    if metrics is not None:
        numbers = _numbers(core, metrics)
        core.last_metrics.update(numbers)
        core.log(core.boundary.completed, numbers)
    return True


def batches(core: Core, given: Iterable[Any], meet: Callable[[], None]) -> Iterator[Any]:
    """The batches of an evaluation, with a boundary behind each; fewer where an operator ends the run.

    Outside of `evaluate` they are passed on: there a script may be in the middle of a step.
    """
    boundary = core.boundary
    if core.doing != "evaluating":
        yield from given
        return
    boundary.begin_evaluation()
    here = boundary.position.ends()
    try:
        for batch in given:
            if core.ending is not None:
                break
            yield batch
            boundary.next_batch()
            _meet(core, meet)
    except GeneratorExit:  # the script has seen enough
        if core.doing == "evaluating" and boundary.position.ends() == here:
            _meet_at_the_end(core, meet)
        raise
    _meet_at_the_end(core, meet)


def _meet_at_the_end(core: Core, meet: Callable[[], None]) -> None:
    """The end of its batches is a boundary too: of the batches that only other ranks have."""
    core.boundary.end_evaluation()
    _meet(core, meet)


def _meet(core: Core, meet: Callable[[], None]) -> None:
    if core.boundary.armed is not None:
        began = time.perf_counter()
        meet()
        core.held_s += time.perf_counter() - began


def _numbers(core: Core, returned: object) -> dict[str, float]:
    """What an evaluation returned, as far as it is numbers by name; what is not is told of, and raises nothing."""
    numbers: dict[str, float] = {}
    try:
        items = [(str(name), value) for name, value in dict(returned).items()]  # type: ignore[call-overload]
    except Exception:  # noqa: BLE001 - a script may return anything, of a class that raises anything
        what = type(returned).__name__
        core.complain("metric", f"on_eval returned a {what}, no metrics by name: return a dict of floats, or None")
        return numbers
    for name, value in items:
        try:
            numbers[name] = float(value)
        except Exception:  # noqa: BLE001 - the same
            core.complain("metric", f"on_eval returned {name!r} as a {type(value).__name__}: it is no number, left out")
    return numbers
