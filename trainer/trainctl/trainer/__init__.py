"""What a training script imports: `from trainctl.trainer import Run`.

This package runs inside the training process. It needs PyTorch 2.6 or newer, which a training environment has, and
never loads libzmq: what goes over the network is the hub's business, in a process of its own.
"""

try:
    import torch as _torch
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "trainctl.trainer needs PyTorch 2.6 or newer, and this environment has none. Install torch here; to watch and "
        "steer a run from this machine none is needed: trainctl tui"
    ) from None
del _torch

from trainctl.trainer.checkpoint import Retention  # noqa: E402 - after the check above, whose error says more
from trainctl.trainer.run import Run  # noqa: E402 - after the check above, whose error says more
from trainctl.trainer.tunables import TunableValue  # noqa: E402

__all__ = ["Retention", "Run", "TunableValue"]
