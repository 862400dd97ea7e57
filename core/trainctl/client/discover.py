"""Find the user's runs: cards say where hubs listen, directories say what was recorded."""

import asyncio
import contextlib
import os
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import msgspec

from trainctl.client.errors import (
    AmbiguousRun,
    BadRequest,
    ClientError,
    NotAllowed,
    NotReachable,
    OtherVersion,
    RunNotFound,
)
from trainctl.client.wire_errors import from_peer
from trainctl.wire.cards import is_this_machine, read_cards
from trainctl.wire.keys import KeyPair, source_keys, user_keys
from trainctl.wire.messages import FINAL_STATES, Card, RunInfo, Snapshot, SnapshotRequest
from trainctl.wire.paths import UnsafePath, runs_dir
from trainctl.wire.peer import Peer, PeerError
from trainctl.wire.rundir import RunDir

PROBE_TIMEOUT_S = 1.5
HUB_RETURNS_WITHIN_S = 5.0
_JUST_LOST_S = 15.0
_PROBES_AT_ONCE = 32
_LOOK_AGAIN_S = 0.25
_ADDRESS = re.compile(r"^tcp://(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s:/\[\]]+):(?P<port>\d{1,5})\Z")


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One run as `ls` lists it. `reachable`: its hub answers.

    `state` is None where a hub answered and refused us: what the files say may be old. `address` and `server_key` are
    what another machine needs to reach a live run.
    """

    run: str
    id: str
    job_id: str | None = None
    state: str | None = None
    step: int | None = None
    total_steps: int | None = None
    host: str | None = None
    dir: str | None = None
    age_s: float | None = None
    reachable: bool = False
    problem: str | None = None  # why nobody answers, where that is not simply that the hub is gone
    problem_code: str | None = None  # the same for scripts: not_allowed, …
    silent: bool = False  # nobody answers, and training may well go on: the hub is there, or rank 0 may start it again
    address: str | None = None
    server_key: str | None = None

    @property
    def live(self) -> bool:
        """Whether there is training to look at: the hub answers and the run has not ended."""
        return self.reachable and self.state not in FINAL_STATES


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a reference means: where a hub listens (`card`), where its files are (`directory`), or both."""

    label: str
    card: Card | None = None
    directory: Path | None = None


def own_keys() -> KeyPair:
    """This user's keys. Raises `BadRequest` when their file is not private."""
    return _private(user_keys)


def own_source_key() -> str:
    """The public key of this user's own hubs and agents. Raises `BadRequest` like `own_keys`."""
    return _private(source_keys).public


def _private(keys: Callable[[], KeyPair]) -> KeyPair:
    try:
        return keys()
    except UnsafePath as error:
        raise BadRequest(str(error)) from None
    except OSError as error:
        raise BadRequest(f"this user's keys cannot be read or made: {error}", "set TRAINCTL_CONFIG elsewhere") from None


def hub_cards() -> dict[str, Card]:
    """Cards of hubs by run id; of one run the newest."""
    found: dict[str, Card] = {}
    for card in read_cards():
        if card.kind == "hub":
            known = found.get(card.source)
            found[card.source] = card if known is None or card.epoch > known.epoch else known
    return found


def recorded_dirs(cards: Sequence[Card]) -> dict[str, Path]:
    """Run directories by run id: those under the state directory and those that cards name."""
    candidates = [Path(card.dir) for card in cards if card.dir]
    with contextlib.suppress(OSError):  # no run was ever kept there
        # Runs that are kept elsewhere have a link here.
        candidates += [path.resolve() if path.is_symlink() else path for path in sorted(runs_dir().iterdir())]
    found: dict[str, Path] = {}
    for path in candidates:
        if (info := read_info(path)) is not None:
            found.setdefault(info.id, path)
    return found


def read_info(directory: Path) -> RunInfo | None:
    """A directory's run.json, or None where there is none to read."""
    try:
        return msgspec.json.decode(RunDir(directory).info_file.read_bytes(), type=RunInfo)
    except (OSError, msgspec.MsgspecError):
        return None


def surely_gone(card: Card) -> bool:
    """Whether the process of a card is known to be dead without asking the network."""
    if not is_this_machine(card):
        return False
    return not Path(f"/proc/{card.pid}").exists()


def hub_alive(card: Card) -> bool:
    """Whether the hub of a card is known to live on this machine, though it may not answer (it is stopped, or busy)."""
    if not is_this_machine(card):
        return False
    try:
        return b"trainctl.hub" in Path(f"/proc/{card.pid}/cmdline").read_bytes()
    except OSError:
        return False


def may_come_back(info: RunInfo, age_s: float | None) -> bool:
    """Whether a run that is lost by its recording may only have lost its hub, which rank 0 then starts again."""
    if age_s is None or age_s > _JUST_LOST_S:
        return False
    leader = next((place for place in info.ranks if place.rank == 0), None)
    here = leader is not None and info.host == socket.gethostname()
    return not here or leader is None or Path(f"/proc/{leader.pid}").exists()


async def looks(timeout_s: float = HUB_RETURNS_WITHIN_S) -> AsyncGenerator[None, None]:
    """Time to look again, until `timeout_s` is over: for what another process is about to do."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        await asyncio.sleep(_LOOK_AGAIN_S)
        yield


async def probe(card: Card, keys: KeyPair, timeout_s: float = PROBE_TIMEOUT_S) -> Snapshot:
    """Ask a hub for its picture. Raises `ClientError`."""
    if surely_gone(card):
        raise NotReachable(f"the hub of {card.name} (pid {card.pid} on {card.host}) is gone")
    try:
        peer = await Peer.connect(card.addresses, card.server_key, keys, timeout_s=timeout_s, name="trainctl ls")
        try:
            return await peer.ask(SnapshotRequest(req=0, events=0), Snapshot, timeout_s=timeout_s)
        finally:
            peer.close()
    except (PeerError, ValueError) as error:
        raise from_peer(error, card.name) from None


async def find_runs(*, recorded: bool = True, timeout_s: float = PROBE_TIMEOUT_S) -> list[RunSummary]:
    """All runs of this user, live ones first, then the newest. Hubs are asked side by side.

    `recorded=False` leaves out runs whose hub left in good order, which is much quicker where there are many.
    """
    keys = own_keys()
    cards = hub_cards()
    gate = asyncio.Semaphore(_PROBES_AT_ONCE)

    async def ask(card: Card) -> Snapshot | ClientError:
        async with gate:
            try:
                return await probe(card, keys, timeout_s)
            except ClientError as error:
                return error

    answers = dict(zip(cards, await asyncio.gather(*(ask(card) for card in cards.values())), strict=True))
    found: list[tuple[float, RunSummary]] = []
    for source, card in cards.items():
        answer = answers[source]
        if isinstance(answer, Snapshot):
            found.append((card.started, _reachable_summary(card, answer)))
        else:
            summary = await asyncio.to_thread(_recorded_summary, Path(card.dir)) if card.dir else None
            found.append((card.started, _unreachable_summary(card, summary, answer)))
    if recorded:
        for run_id, directory in recorded_dirs(()).items():
            if run_id not in cards:
                summary = await asyncio.to_thread(_recorded_summary, directory)
                info = read_info(directory)
                if summary is not None and info is not None:
                    found.append((info.started, summary))
    return [summary for _, summary in sorted(found, key=lambda pair: (not pair[1].live, -pair[0]))]


def _reachable_summary(card: Card, snapshot: Snapshot) -> RunSummary:
    info, state = snapshot.info, snapshot.state
    live = state.state not in FINAL_STATES
    return RunSummary(
        run=info.run or card.name,
        id=info.id or card.source,
        job_id=info.job_id or card.job_id,
        state=state.state,
        step=state.step,
        total_steps=state.total_steps if state.total_steps is not None else info.total_steps,
        host=info.host or card.host,
        dir=info.dir or card.dir,
        age_s=0.0,
        reachable=True,
        address=far_address(card) if live else None,
        server_key=card.server_key if live else None,
    )


def far_address(card: Card) -> str | None:
    """The address of a card to give to another machine: the first that is not this machine's own loopback."""
    near = ("tcp://127.", "tcp://[::1]", "tcp://localhost:")
    return next(
        (address for address in card.addresses if not address.startswith(near)), next(iter(card.addresses), None)
    )


def _unreachable_summary(card: Card, recorded: RunSummary | None, error: ClientError) -> RunSummary:
    base = recorded or RunSummary(run=card.name, id=card.source, job_id=card.job_id, host=card.host, dir=card.dir)
    if isinstance(error, NotReachable) and not isinstance(error, OtherVersion):
        if hub_alive(card):
            # Its recording ends somewhere in the middle, which would read as lost.
            words = f"its hub (pid {card.pid}) is alive and does not answer"
            return msgspec.structs.replace(base, state=None, silent=True, problem=words, problem_code=error.code)
        info = read_info(Path(card.dir)) if card.dir else None
        return msgspec.structs.replace(
            base, silent=base.state == "lost" and info is not None and may_come_back(info, base.age_s)
        )
    # Somebody answers and refuses us, so the run may be healthy: its recording without a hub would read as lost.
    problem = error.message.removeprefix(f"{card.name}: ")
    return msgspec.structs.replace(base, problem=problem, problem_code=error.code, state=None)


def _recorded_summary(directory: Path) -> RunSummary | None:
    from trainctl.client.recorded import load  # reads journals, which needs numpy

    try:
        snapshot, age_s = load(directory).summary()
    except ClientError:
        return None
    info, state = snapshot.info, snapshot.state
    return RunSummary(
        run=info.run,
        id=info.id,
        job_id=info.job_id,
        state=state.state,
        step=state.step,
        total_steps=state.total_steps if state.total_steps is not None else info.total_steps,
        host=info.host,
        dir=str(directory),
        age_s=age_s,
    )


# --- what a reference means


async def resolve(ref: str | None, *, server_key: str | None = None, timeout_s: float = PROBE_TIMEOUT_S) -> Target:
    """What an operator means by `ref`; see `session.open_session`. Raises `ClientError`."""
    ref = ref or os.environ.get("TRAINCTL_RUN") or None
    if ref is None:
        return await _only_live_run(timeout_s)
    if ref.startswith("tcp://"):
        return Target(label=ref, card=_address_card(ref, server_key))
    if "/" in ref or ref in {".", ".."}:
        return _directory_target(ref)
    return await _named_run(ref, timeout_s)


def check_address(address: str) -> None:
    """Raises `BadRequest` when this is not `tcp://host:port`."""
    match = _ADDRESS.match(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise BadRequest(
            f"{address} is no address: it has to be tcp://host:port", "`trainctl ls --json` tells a live run's address"
        )


def _address_card(address: str, server_key: str | None) -> Card:
    check_address(address)
    # Without a key the run is taken to be our own: hubs of one user share one key.
    key = server_key or own_source_key()
    return Card(
        kind="hub", source="", name=address, epoch=0, addresses=[address], server_key=key, host="", pid=0, started=0.0
    )


def _directory_target(ref: str) -> Target:
    path = Path(ref).expanduser()
    if not path.is_dir():
        raise RunNotFound(f"{path} is no directory", "give a run's directory, its name or its id: `trainctl ls -a`")
    info = read_info(path)
    if info is None:
        raise RunNotFound(f"{path} is no run's directory: it has no readable run.json", "`trainctl ls -a` lists runs")
    card = hub_cards().get(info.id)
    return Target(label=info.run, card=card, directory=path.absolute())


async def _only_live_run(timeout_s: float) -> Target:
    summaries = await find_runs(recorded=False, timeout_s=timeout_s)
    if any(summary.silent and summary.state == "lost" for summary in summaries):
        # A hub that has just died is started again within seconds; meanwhile another run must not be taken for it.
        async for _ in looks():
            summaries = await find_runs(recorded=False, timeout_s=timeout_s)
            if not any(summary.silent and summary.state == "lost" for summary in summaries):
                break
    live = [summary for summary in summaries if summary.live or summary.silent]
    if not live:
        if refusing := [summary for summary in summaries if summary.problem]:
            raise _all_refuse(refusing)
        raise RunNotFound(
            "there is no live run", "start one with `trainctl run` or `trainctl demo`; `trainctl ls -a` lists old ones"
        )
    if len(live) > 1:
        raise _ambiguous("several runs are live", live)
    return _target_of(live[0].id)


def _all_refuse(refusing: list[RunSummary]) -> ClientError:
    """What to say when runs answer and none of them to us; the exit code is that of naming one."""
    words = "; ".join(f"{summary.run} ({summary.id}): {summary.problem}" for summary in refusing)
    if any(summary.problem_code == NotAllowed.code for summary in refusing):
        return NotAllowed(words, "if these runs are yours, their keys are in another directory: see TRAINCTL_CONFIG")
    return NotReachable(words, "`trainctl doctor` looks at each of them")


async def _named_run(ref: str, timeout_s: float) -> Target:
    cards = hub_cards()
    directories = recorded_dirs(list(cards.values()))
    names = {run_id: info.run for run_id, path in directories.items() if (info := read_info(path)) is not None}
    names |= {run_id: card.name for run_id, card in cards.items()}
    if ref in names:
        return _target_of(ref)
    matching = [run_id for run_id, name in names.items() if name == ref]
    matching = matching or [run_id for run_id in names if run_id.startswith(ref)]
    if not matching:
        raise RunNotFound(f"there is no run {ref!r}", "`trainctl ls -a` lists every run by name and id")
    if len(matching) == 1:
        return _target_of(matching[0])
    summaries = [summary for summary in await find_runs(timeout_s=timeout_s) if summary.id in set(matching)]
    live = [summary for summary in summaries if summary.live or summary.silent]
    if len(live) > 1:
        raise _ambiguous(f"{ref!r} is the name of several live runs", live)
    if not summaries:
        raise NotReachable(f"none of the runs called {ref!r} can be read", "`trainctl doctor` says why")
    return _target_of((live or summaries)[0].id)  # of runs that ended, the newest is meant


def _target_of(run_id: str) -> Target:
    card = hub_cards().get(run_id)
    directory = recorded_dirs([card] if card else []).get(run_id)
    label = card.name if card else run_id
    if not card and directory and (info := read_info(directory)):
        label = info.run
    return Target(label=label, card=card, directory=directory)


def _ambiguous(what: str, live: list[RunSummary]) -> AmbiguousRun:
    listed = ", ".join(
        f"{summary.id} ({summary.run}, {'does not answer' if summary.silent else f'step {summary.step}'})"
        for summary in live
    )
    return AmbiguousRun(
        f"{what}: {listed}",
        f"choose one, for example: -r {live[0].id}",
        candidates=tuple(summary.id for summary in live),
    )
