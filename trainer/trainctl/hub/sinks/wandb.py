"""Weights & Biases: one W&B run for one run of ours, across restarts.

W&B's own step must not go back, and after a rollback ours does. So every value is drawn over `trainctl/step`, an axis
of its own, and `trainctl/incarnation` tells branches apart: W&B cannot take back what was abandoned.
"""

import os
import re
from typing import Any, ClassVar, Literal

import msgspec

from trainctl.hub.sinks.columns import values_of
from trainctl.hub.sinks.sink import Branching, Start
from trainctl.wire.messages import FINAL_STATES, Body, Rows, RunState, Stream

STEP, INCARNATION = "trainctl/step", "trainctl/incarnation"
# W&B writes its own values under these names, whatever is logged there.
_TAKEN = frozenset({STEP, INCARNATION, "_step", "_runtime", "_timestamp", "_wandb"})
_WELL_ENDED = frozenset({"finished", "stopped"})


class WandbSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`mode` left out is what WANDB_MODE says, or online. Files go to `dir`, or into the run's directory."""

    enabled: bool = True
    project: str = "trainctl"
    entity: str | None = None
    mode: Literal["online", "offline", "shared"] | None = None
    dir: str | None = None


class WandbSink:
    """See `sink.Sink`."""

    streams: ClassVar[frozenset[Stream]] = frozenset({"metrics"})
    history: ClassVar[bool] = True

    def __init__(self, settings: WandbSettings) -> None:
        self._settings = settings
        self._run: Any = None

    def open(self, start: Start) -> dict[str, str]:
        # A training script that uses W&B itself leaves its service's address to the hub that it starts: what the hub
        # sent there would mix with the script's own run, and end with the script.
        os.environ.pop("WANDB_SERVICE", None)
        import wandb

        info = start.picture.info
        run_id = start.notes.get("id") or re.sub(r"[^A-Za-z0-9._-]", "-", info.id)
        self._run = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            id=run_id,
            name=info.run,
            resume="allow",
            config={_key(name): value for name, value in info.config.items()},
            allow_val_change=True,
            dir=self._settings.dir or str(start.directory),
            mode=self._settings.mode,
            reinit="create_new",
            # Output, code and machine of this process are the hub's, and not the training's.
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_disable_stats=True,
                x_disable_meta=True,
                disable_git=True,
                disable_code=True,
            ),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        return {"id": run_id}

    def branch(self, branching: Branching) -> None:
        """Nothing can be taken back: see the module."""

    def write(self, body: Body) -> None:
        if not isinstance(body, Rows):
            return
        columns = {_key(name): values for name, values in values_of(body).items()}
        for at, (step, wall) in enumerate(zip(body.steps, body.times, strict=True)):
            row: dict[str, float] = {name: values[at] for name, values in columns.items()}
            self._run.log(row | {STEP: step, INCARNATION: body.incarnation, "_timestamp": wall})

    def flush(self) -> None:
        """`log` hands each row to W&B's own process, which keeps it; there is nothing to wait for."""

    def close(self, state: RunState) -> None:
        if self._run is not None:
            ended_badly = state.state in FINAL_STATES and state.state not in _WELL_ENDED
            self._run.finish(exit_code=int(ended_badly))


def _key(name: str) -> str:
    return f"{name}_" if name in _TAKEN else name
