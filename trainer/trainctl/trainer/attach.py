"""Everything that happens once, when a script attaches: identity, capabilities, threads, resume."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from trainctl.trainer import steering
from trainctl.trainer.actions import Actions, refusal
from trainctl.trainer.agents import NodeAgent
from trainctl.trainer.agreement import in_two_phases
from trainctl.trainer.boundary import Boundary
from trainctl.trainer.buffer import RowBuffer
from trainctl.trainer.checkpoint import (
    MEMORY_CHECKPOINTS,
    Accessor,
    Checkpointer,
    Retention,
    State,
)
from trainctl.trainer.checkpoint.rng import capture_rng, restore_rng
from trainctl.trainer.checkpoint.script_files import ScriptFiles
from trainctl.trainer.control import Control
from trainctl.trainer.core import Callbacks, Core
from trainctl.trainer.descriptors import OwnSockets
from trainctl.trainer.device import Accelerator, Pools
from trainctl.trainer.exchange import Exchange
from trainctl.trainer.feed import Feed
from trainctl.trainer.figures import gpu_uuid
from trainctl.trainer.flops import FlopMeter
from trainctl.trainer.identity import RunIdentity, job_id, rank_identity, share_run
from trainctl.trainer.leader import Leader, Prepared
from trainctl.trainer.link import HubProcess, Link, keep_bytes
from trainctl.trainer.meeting import Connection, Meeting, StoreSilent
from trainctl.trainer.on_the_way import cannot_be_meant
from trainctl.trainer.overrides import Overrides
from trainctl.trainer.phases import Phases
from trainctl.trainer.preemption import Preemption, Signalled, gone_of
from trainctl.trainer.reach import Reach
from trainctl.trainer.rollback_target import none_such, target_of
from trainctl.trainer.saves_first import SavesFirst
from trainctl.trainer.sender import Sender
from trainctl.trainer.tunables import Tunables
from trainctl.wire.commands import Command, Rollback, SetTunable, option_off, spec_of
from trainctl.wire.endings import is_ended
from trainctl.wire.messages import CommandUpdate, LinkHello, RankPlace, RunInfo, Scalar
from trainctl.wire.places import Place, own_started, write_place
from trainctl.wire.rundir import RunDir

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Script:
    """What the script gave to `Run.attach`."""

    name: str
    models: Sequence[nn.Module] = ()
    optimizers: Sequence[Optimizer] = ()
    schedulers: Sequence[Any] = ()
    scaler: Any = None
    loader: Any = None
    config: Mapping[str, Any] = field(default_factory=dict)
    total_steps: int | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    crosses_boundaries: bool = False
    flops_per_step: float | None = None
    peak_flops: float | None = None
    sinks: Sequence[str] = ()
    keep: Retention | None = None
    files: ScriptFiles | None = None
    memory_checkpoints: int = MEMORY_CHECKPOINTS
    memory_budget: int | None = None
    signalled: Signalled | None = None


@dataclass(kw_only=True)
class Parts:
    """A rank's run, up and running."""

    core: Core
    actions: Actions | None
    control: Control | None
    leader: Leader | None
    sender: Sender
    place_file: Path | None
    tracked: dict[str, Any]
    preemption: Preemption
    group: Any = None
    sockets: OwnSockets = field(default_factory=OwnSockets)


def start(script: Script) -> Parts:
    """Attach this rank. A collective: every rank of the job calls it."""
    place, sockets = rank_identity(), OwnSockets()
    with sockets.opening():
        group = _own_group(place.world_size)
        identity, secret = share_run(script.name, place, group)  # gloo may connect only when it is first used
    pools, device = Pools(), _device()
    pools.prepare()
    core = Core(
        place=place,
        identity=identity,
        total_steps=script.total_steps,
        boundary=Boundary(),
        buffer=RowBuffer(pools=pools),
        phases=Phases(Accelerator(device, slots=0, timing=True) if device is not None else None),
        tunables=Tunables(),
        callbacks=script.callbacks,
        models=script.models,
        incarnation=identity.incarnation,
        retention=script.keep,
    )
    if script.optimizers:
        core.overrides = Overrides(script.optimizers, phase=core.phases.get("optimizer"))
        core.overrides.log_on_device = lambda metric, rate: core.log(core.row_step, {metric: rate})
    core.tunables.complain = lambda text: core.complain("tunable", text)
    core.flops = _flop_meter(script, core, device)
    if script.loader is not None:
        core.feed = Feed(script.loader, capture_rng=capture_rng, restore_rng=restore_rng, world_size=place.world_size)
    core.rank_places = gather_places(core, group)
    tracked: dict[str, Any] = {}
    alone_or_grouped = place.world_size == 1 or group is not None
    if identity.problem is None and alone_or_grouped and (script.models or script.optimizers or script.files):
        core.checkpointer = _checkpointer(script, core, group, tracked)
    with sockets.opening():
        connections, agreement_problem = _connections(
            place.world_size, group, identity, secret, sockets, leads=place.leads
        )
    core.capabilities = capabilities(script, core, agreement_problem)
    parts = _threads(script, core, connections, tracked)
    parts.group, parts.sockets = group, sockets
    return parts


def _device() -> torch.device | None:
    """The CUDA device that this rank trains on, if it has made use of one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return None


def _flop_meter(script: Script, core: Core, device: torch.device | None) -> FlopMeter:
    compiled = any(_is_compiled(part) for model in script.models for part in model.modules())
    parameter = next((p for model in script.models for p in model.parameters()), None)
    given = script.flops_per_step
    return FlopMeter(
        per_step=given / core.place.world_size if given is not None else None,
        peak=script.peak_flops,
        device=torch.cuda.get_device_name(device) if device is not None else None,
        dtype=parameter.dtype if parameter is not None else torch.float32,
        complain=lambda text: core.complain("mfu", text) if core.place.leads else None,
        unable="the model is compiled, and counting would run it uncompiled" if compiled else None,
    )


def _is_compiled(module: nn.Module) -> bool:
    # By name: importing torch._dynamo to ask takes seconds.
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _own_group(world_size: int) -> Any:
    """A gloo group for our own exchanges at attach and for checkpoints, apart from the script's collectives."""
    if world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return None
    try:
        return dist.new_group(backend="gloo")
    except RuntimeError as error:
        log.warning("trainctl: no gloo group between the ranks, so neither commands nor checkpoints: %s", error)
        return None


def _checkpointer(script: Script, core: Core, group: Any, tracked: dict[str, Any]) -> Checkpointer:
    ours = script.files is None  # else the script saves and loads these by itself
    state = State(
        models=script.models if ours else (),
        optimizers=script.optimizers if ours else (),
        schedulers=script.schedulers if ours else (),
        scaler=script.scaler if ours else None,
        loader=core.feed,
        tracked=tracked,
        overrides=core.overrides,
        tunables=Accessor(get=core.tunables.values, set=core.tunables.restore),
        trials=core.reverts,
        counters=core.counters,
        script=script.files,
    )
    return Checkpointer(
        directory=RunDir(core.identity.directory).checkpoints,
        run_id=core.identity.id,
        rank=core.place.rank,
        world_size=core.place.world_size,
        group=group,
        state=state,
        memory_checkpoints=script.memory_checkpoints,
        memory_budget=script.memory_budget,
        best_by=core.best_by,
        local_ranks=sum(place.node == core.place.node for place in core.rank_places),
    )


@dataclass(frozen=True, kw_only=True)
class Connections:
    """Each waits or talks for one thread only."""

    waiting: Connection
    talking: Connection
    leading: Connection | None
    reading: Connection | None


def _connections(
    world_size: int, group: Any, identity: RunIdentity, secret: bytes, sockets: OwnSockets, *, leads: bool
) -> tuple[Connections | None, str | None]:
    if world_size > 1 and group is None:
        return None, "there is no process group: call torch.distributed.init_process_group before Run.attach"
    meeting = Meeting(
        world_size=world_size, run_id=identity.id, attempt=identity.attempt, secret=secret, sockets=sockets
    )
    problem, made = None, None
    try:
        made = Connections(
            waiting=meeting.connect(),
            talking=meeting.connect(),
            leading=meeting.connect() if leads else None,
            reading=meeting.connect() if leads else None,
        )
    except StoreSilent as error:
        problem = f"the ranks cannot agree: {error}"
    if group is not None:
        problems: list[Any] = [None] * world_size
        dist.all_gather_object(problems, problem, group=group)
        problem = next((told for told in problems if told), None)
    return (made, None) if problem is None else (None, problem)


def capabilities(script: Script, core: Core, agreement_problem: str | None) -> dict[str, bool | str]:
    """What this script lets an operator do, or why not."""
    problem = agreement_problem
    if problem is None and script.crosses_boundaries:
        problem = "the script's communication crosses boundaries (attach(max_skew=…)): ranks have no common step"
    names = ("pause", "lr", "set", "checkpoint", "rollback", "skip", "eval", "stop")
    able: dict[str, bool | str] = dict.fromkeys(names, problem or True)
    if problem is not None:
        return able
    if core.overrides is None:
        able["lr"] = "no optimizer was given to Run.attach"
    if core.checkpointer is None:
        able["checkpoint"] = core.identity.problem or "no model, optimizer or save= was given to Run.attach"
        able["rollback"] = able["checkpoint"]
    elif core.feed is None and core.callbacks.on_rollback is None:
        able["rollback"] = "the script owns its data iterator: give on_rollback= or loader= to Run.attach"
    if core.feed is None:
        able["skip"] = "the script owns its data iterator, so it is for the script to leave out batches"
    if core.callbacks.on_eval is None:
        able["eval"] = "no on_eval= was given to Run.attach"
    return able


def _threads(script: Script, core: Core, connections: Connections | None, tracked: dict[str, Any]) -> Parts:
    place, identity = core.place, core.identity
    control, leader, link, actions = None, None, None, None
    signalled = script.signalled or Signalled()
    signalled.by_operator = lambda: is_ended(identity.directory, identity.attempt)
    signalled.a_rank_is_gone = gone_of(core)
    if connections is not None:
        control = Control(
            rank=place.rank,
            ranks=place.world_size,
            boundary=core.boundary,
            waiting=connections.waiting,
            talking=connections.talking,
            refusal=lambda proposal: refusal(core, proposal),
        )
        actions = Actions(core, control, signalled)
    if place.leads:
        hub = HubProcess(run_id=identity.id, name=identity.name, directory=identity.directory)
        with _telling("the run is not shown"):
            link = Link(run_id=identity.id, hub=hub, hello=lambda: _hello(script, core), keep_bytes=keep_bytes())
    if connections is not None and connections.leading is not None:
        saves_first = SavesFirst(core)

        def told(update: CommandUpdate) -> None:
            core.event(update)
            saves_first.hear(update)

        leader = Leader(
            world_size=place.world_size,
            boundary=core.boundary,
            connection=connections.leading,
            prepare=lambda command: prepare(core, command),
            later=saves_first,
            ending=lambda: core.ending is not None and not core.boundary.closed,
            tell=told,
            incarnation=lambda: core.incarnation,
        )
    agent = None
    with _telling("this node's GPUs are not shown"):
        agent = NodeAgent(job=job_id() or identity.id, node=place.node) if place.local_rank == 0 else None
    exchange = Exchange(core, control, connections.reading if connections else None)
    preemption = Preemption(
        core,
        control=control,
        reading=exchange,
        leader=leader,
        signalled=signalled,
    )
    sender = Sender(
        core,
        exchange=exchange,
        reach=Reach(core, leader, exchange, control),
        agent=agent,
        link=link,
        leader=leader,
        info=lambda: run_info(script, core),
        preemption=preemption,
    )
    return Parts(
        core=core,
        actions=actions,
        control=control,
        leader=leader,
        sender=sender,
        place_file=_announce(core),
        tracked=tracked,
        preemption=preemption,
    )


@contextlib.contextmanager
def _telling(consequence: str) -> Iterator[None]:
    """What this machine does not allow costs a part of trainctl, said in the log, and never the training."""
    try:
        yield
    except OSError as error:
        log.warning("trainctl: %s: %s", consequence, error)


def launch(parts: Parts) -> None:
    """Start the threads, once everything that belongs to the state is known."""
    for thread in (parts.control, parts.leader, parts.sender):
        if thread is not None:
            thread.start()


def _announce(core: Core) -> Path | None:
    """Tell the node's agent which process this rank is."""
    path: list[Path] = []
    with _telling("the node's agent does not see this rank"):
        place = Place(
            run_id=core.identity.id,
            run=core.identity.name,
            rank=core.place.rank,
            local_rank=core.place.local_rank,
            pid=os.getpid(),
            started=own_started(),
            attempt=core.identity.attempt,
            gpu_uuid=gpu_uuid(),
        )
        path.append(write_place(place))
    return path[0] if path else None


def prepare(core: Core, command: Command) -> Prepared | str:
    """Resolve on rank 0 what a proposal needs, or say why the command is rejected."""
    action = command.action
    if (able := core.capabilities.get(str(spec_of(action).capability), True)) is not True:
        return str(able)
    if core.boundary.closed or core.ending is not None:
        return "the run is ending: there is no further boundary"
    if (off := option_off(action, core.capabilities)) is not None:
        return off
    if isinstance(action, Rollback) and (slip := cannot_be_meant(core, action)) is not None:
        return slip
    if not isinstance(action, Rollback):
        tried = isinstance(action, SetTunable) and core.tunables.may_raise(action.name)
        return Prepared(two_phase=in_two_phases(command) or tried)  # what may fail, too
    if (target := target_of(core, command.id, action)) is None:
        return none_such(core, action)
    try:
        incarnation = RunDir(core.identity.directory).allocate("incarnation")
    except OSError as error:
        return f"no new incarnation can be recorded: {error.strerror or error}"
    return Prepared(two_phase=in_two_phases(command), checkpoint=target, incarnation=incarnation)


def run_info(script: Script, core: Core) -> RunInfo:
    identity = core.identity
    return RunInfo(
        run=identity.name,
        id=identity.id,
        dir=str(identity.directory),
        host=core.place.node,
        created=identity.created,
        world_size=core.place.world_size,
        started=core.started,
        attempt=identity.attempt,
        job_id=job_id(),
        total_steps=core.total_steps,
        config=_plain(script.config),
        capabilities={
            name: core.unreachable or able if able is True else able for name, able in core.capabilities.items()
        },
        tunables=steering.tunables(core),
        ranks=core.rank_places,
        authenticated_ranks=identity.authenticated,
        sinks=list(script.sinks),
        best_by=core.best_by,
    )


def _hello(script: Script, core: Core) -> LinkHello:
    return LinkHello(
        info=run_info(script, core),
        incarnation=core.incarnation,
        step=core.boundary.completed,
        pid=os.getpid(),
        parent=core.parent,
    )


def gather_places(core: Core, group: Any) -> list[RankPlace]:
    """Where every rank is. A collective."""
    mine = RankPlace(
        rank=core.place.rank,
        node=core.place.node,
        pid=os.getpid(),
        local_rank=core.place.local_rank,
        gpu_uuid=gpu_uuid(),
    )
    if group is None:
        return [mine]
    everybody: list[Any] = [None] * core.place.world_size
    dist.all_gather_object(everybody, mine, group=group)
    return everybody


def _plain(config: Mapping[str, Any]) -> dict[str, Scalar]:
    """The config as it can be shown: scalars as they are, everything else as text, within limits."""
    shown: dict[str, Scalar] = {}
    try:
        names = list(config)[:200]
    except Exception as error:  # noqa: BLE001 - a config of somebody else's class may raise anything
        log.warning("trainctl: the config cannot be shown, its names cannot be read: %s", type(error).__name__)
        return shown
    for name in names:
        try:
            value = config[name]
        except Exception as error:  # noqa: BLE001 - such as a value that OmegaConf cannot resolve
            value = f"(cannot be read: {type(error).__name__})"
        # Exact types: a numpy float is a float, and no message takes it; nor an int of more than 64 bits.
        plain = value is None or type(value) in {bool, float} or (type(value) is int and abs(value) < 2**63)
        shown[_text(name)[:100]] = value if plain else _text(value)[:500]
    return shown


def _text(value: object) -> str:
    try:
        return str(value).encode("utf-8", "replace").decode()
    except Exception as error:  # noqa: BLE001 - the __str__ of somebody else's class may raise anything
        return f"({type(value).__name__}, cannot be shown: {type(error).__name__})"
