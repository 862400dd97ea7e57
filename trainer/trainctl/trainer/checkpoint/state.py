"""What belongs to the state of a training run: the named parts that a checkpoint captures and restores."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import nn
from torch.optim import Optimizer

from trainctl.trainer.checkpoint.script_files import ScriptFiles
from trainctl.trainer.overrides import Overrides


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives its state and takes it back: schedulers, scalers, loaders, EMA."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Accessor:
    """A tracked value without a state_dict: `get` returns it (numbers, text, tensors, dicts, lists), `set` takes it."""

    get: Callable[[], Any]
    set: Callable[[Any], None]


Tracked: TypeAlias = Stateful | Accessor


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that decides how training goes on. All of it is optional; the containers are read when a save begins.

    Tensors of `models`, `optimizers` and `tracked` go through torch.distributed.checkpoint: sharded ones (DTensor) as
    they are, plain ones as the same on every rank, of which the lowest rank's are kept; buffers and tracked ones that
    are not the same (`apart`) and all else for each rank.
    `tracked`, `tunables` and `counters` may be added to after the state was made. With `script` the script saves and
    loads its models, optimizers, schedulers and scaler by itself, and none of them is given here.
    """

    models: Sequence[nn.Module] = ()
    optimizers: Sequence[Optimizer] = ()
    schedulers: Sequence[Stateful] = ()
    scaler: Stateful | None = None
    loader: Stateful | None = None
    tracked: Mapping[str, Tracked] = field(default_factory=dict)
    overrides: Overrides | None = None
    tunables: MutableMapping[str, Any] | Accessor = field(default_factory=dict)
    trials: Stateful | None = None  # changes that undo themselves
    counters: MutableMapping[str, Any] | Accessor = field(default_factory=dict)
    script: ScriptFiles | None = None
