"""`TRAINCTL=off`: the same calls, and nothing behind them but the script's own data and evaluation."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from trainctl.trainer.attach import Script
from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.feed import Feed
from trainctl.trainer.phases import NoPhase
from trainctl.trainer.run import Run
from trainctl.trainer.tunables import TunableValue, Value

_NO_PHASE = NoPhase()


class OffRun(Run):
    """Counts steps and hands out batches; starts no thread, no process, writes nothing."""

    def __init__(self, script: Script, *, eval_every: int | None) -> None:
        self._script = script
        self._every = eval_every or 0
        self._completed = 0
        self._feed = (
            Feed(script.loader, capture_rng=capture_rng, restore_rng=restore_rng) if script.loader is not None else None
        )

    @property
    def step(self) -> int:
        return self._completed

    @property
    def incarnation(self) -> int:
        return 1

    @property
    def attempt(self) -> int:
        return 1

    @property
    def id(self) -> str:
        return "off"

    @property
    def stopping(self) -> bool:
        return False

    @property
    def preempted(self) -> bool:
        return False

    def batches(self) -> Iterator[Any]:
        if self._feed is None:
            raise ValueError("batches() needs the loader: Run.attach(…, loader=loader)")
        while self._script.total_steps is None or self._completed < self._script.total_steps:
            yield self._feed.next()

    def eval_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        return iter(batches)

    def phase(self, name: str) -> Any:  # noqa: ARG002 - the signature is Run's
        return _NO_PHASE

    def measure_flops(self) -> Any:
        return _NO_PHASE

    def data_range(self, step: int) -> None:
        pass

    def log(self, /, **values: Any) -> None:
        pass

    def step_done(self, *, tokens: int = 0, samples: int = 0) -> None:  # noqa: ARG002 - the signature is Run's
        self._completed += 1
        evaluate = self._script.callbacks.on_eval
        if evaluate is not None and self._every and self._completed % self._every == 0:
            evaluate()

    def track(self, name: str, value: Any = None, *, get: Callable[[], Any] | None = None, set: Any = None) -> None:  # noqa: A002
        pass

    def tunable(
        self,
        name: str,
        value: Value,
        *,
        min: float | None = None,  # noqa: A002 - as in Run
        max: float | None = None,  # noqa: A002
        unit: str | None = None,
        on_change: Callable[[Value], None] | None = None,
    ) -> TunableValue:
        return TunableValue(name, value, minimum=min, maximum=max, unit=unit, on_change=on_change)

    def close(self, *, failed: str | None = None) -> None:
        pass
