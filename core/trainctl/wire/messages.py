"""Every message of the protocol, as typed structs that msgspec writes as MessagePack.

Three conversations use them, drawn in docs/protocol.md:

- *published*: source → subscribers, `Envelope` (sequenced, recorded) and `Beat` (each second, not recorded);
- *requests*: client → source, one of `Request`, answered by one or more `Reply`;
- *the link*: rank 0 ↔ hub, one of `FromRank` and one of `ToRank`, over one AF_UNIX packet each.

Times are UTC Unix seconds, durations seconds, sizes bytes. A field that a decoder does not know is ignored, so
fields may be added; none may change its meaning without a new `PROTOCOL`.

Longer than other modules on purpose: the whole protocol can be read in one place.
"""

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct, field

from trainctl.wire.commands import Command, CommandState

PROTOCOL = 1
BEAT_TOPIC = b"beat"

Scalar: TypeAlias = bool | int | float | str | None
Values: TypeAlias = dict[str, Scalar]
# Steps, incarnations and sequence numbers fit a signed 64-bit column with room for arithmetic.
Number = Annotated[int, Meta(ge=-(2**62), le=2**62)]

RunStateName: TypeAlias = Literal[
    "starting",
    "running",
    "paused",
    "evaluating",
    "checkpointing",
    "finished",
    "stopped",
    "failed",
    "preempted",
    "stalled",
    "lost",
]
FINAL_STATES: frozenset[str] = frozenset({"finished", "stopped", "failed", "preempted", "lost"})
Severity: TypeAlias = Literal["info", "good", "warning", "error"]


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all messages: immutable, fields by name, defaults left out on the wire."""


# --- telemetry


class Column(Message, frozen=True, kw_only=True):
    """One metric over the rows of a `Rows`: little-endian floats, `f4` where that loses nothing."""

    name: str
    dtype: Literal["f4", "f8"]
    data: bytes


class Rows(Message, frozen=True, kw_only=True, tag="rows"):
    """Metrics of consecutive steps; every column has one value for each of `steps` and `times`.

    A metric that was not logged in a row is in another `Rows` without that column: a value is never invented.
    """

    attempt: Number
    incarnation: Number
    steps: list[Number]
    times: list[float]
    columns: list[Column]


class RankFigures(Message, frozen=True, kw_only=True):
    """What one rank did since the last report; `None` is "not measured"."""

    rank: int
    node: str
    pid: int
    state: str
    step: Number
    time: float
    step_time_s: float | None = None
    data_wait_s: float | None = None
    memory_bytes: int | None = None
    gpu_uuid: str | None = None
    phases_s: dict[str, float] = {}
    loss: float | None = None  # this rank's own newest
    data_first: int | None = None  # the micro-batches of its newest step, by absolute index
    data_last: int | None = None
    phase: str | None = None  # the one that it is in at `time`
    phase_since: float | None = None  # when that began, on the same clock as `time`
    checkpoint_memory_bytes: int | None = None  # host memory for staging and keeping states
    eval_batch: int | None = None  # how many batches of the evaluation at hand are done; None outside of its batches


class Ranks(Message, frozen=True, kw_only=True, tag="ranks"):
    """The newest figures of every rank that reported."""

    incarnation: Number
    ranks: list[RankFigures]


class GpuReading(Message, frozen=True, kw_only=True):
    """One GPU as NVML sees it. Absent readings are `None`, with the reason in `missing`."""

    index: int
    name: str
    uuid: str | None = None
    utilization: float | None = None  # percent of the last sample period in which any kernel ran
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    sm_clock_mhz: int | None = None
    throttle: str | None = None
    missing: dict[str, str] = {}


class ProcessReading(Message, frozen=True, kw_only=True):
    """A local process that a run named as one of its ranks."""

    pid: int
    rank: int
    run_id: str
    alive: bool
    cpu: float | None = None  # percent of one core
    memory_bytes: int | None = None
    ended: str | None = None  # how it ended, where the kernel still says so: "killed by SIGKILL", "exited with 1"


class NodeReading(Message, frozen=True, kw_only=True, tag="node"):
    """One tick of an agent."""

    node: str
    time: float
    interval_s: float
    cpu: float | None = None  # percent of all cores
    load: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    gpus: list[GpuReading] = []
    gpu_state: str = "none"  # "ok", "none" or why NVML does not answer
    processes: list[ProcessReading] = []
    state: Literal["alive", "lost"] = "alive"


# --- events: each is one line of the log


class EventBase(Message, frozen=True, kw_only=True):
    time: float
    step: Number
    incarnation: Number


class StateChanged(EventBase, frozen=True, kw_only=True, tag="state"):
    state: RunStateName
    before: RunStateName | None = None
    reason: str | None = None
    attempt: Number = 1
    parent: Number | None = None  # when it starts: the incarnation that it goes on from, 0: from none


class CommandUpdate(EventBase, frozen=True, kw_only=True, tag="command"):
    """Where a command stands. `step` is the boundary it was applied at, once it was."""

    id: str
    command: str
    args: Values
    actor: str
    state: CommandState
    before: Scalar = None
    after: Scalar = None
    ranks: int | None = None
    reason: str | None = None


class CheckpointInfo(Message, frozen=True, kw_only=True):
    """A checkpoint as listed. `verified`: true, false (damaged) or `None` (not checked yet)."""

    id: str
    step: int
    time: float
    bytes: int
    incarnation: int
    metrics: dict[str, float] = {}
    pinned: bool = False
    verified: bool | None = None
    where: Literal["disk", "memory"] = "disk"
    note: str | None = None
    abandoned: bool = False  # on a branch that a rollback left behind
    in_memory: bool = False  # every rank has it in host memory; with `where` "disk" it is in both places
    world_size: int = 0  # how many ranks wrote it; 0: not known


class CheckpointSaved(EventBase, frozen=True, kw_only=True, tag="checkpoint"):
    """A checkpoint became good, failed (`error`) or was verified."""

    id: str
    bytes: int = 0
    stall_s: float | None = None
    write_s: float | None = None
    verified: bool | None = None
    pinned: bool = False
    note: str | None = None
    metrics: dict[str, float] = {}
    error: str | None = None


class CheckpointRemoved(EventBase, frozen=True, kw_only=True, tag="checkpoint-removed"):
    """A checkpoint was deleted. `by` is an operator, or `retention`."""

    id: str
    by: str
    bytes: int = 0


class RolledBack(EventBase, frozen=True, kw_only=True, tag="rollback"):
    """The run left `from_step` for `step`; `incarnation` is the new one."""

    from_step: Number
    from_incarnation: Number
    checkpoint: str
    skipped_batches: Number = 0
    lr_scale: float | None = None
    actor: str = ""
    from_memory: bool = False  # every rank had the state in host memory; else it was read from disk
    parent: Number | None = None  # the incarnation that the checkpoint is of, which the new one goes on from


class Anomaly(EventBase, frozen=True, kw_only=True, tag="anomaly"):
    """Something an operator should know: `what` is a stable word, `text` a sentence. `subject` tells things of one
    `what` apart that begin and end each by itself: which sink, which reason."""

    what: str
    text: str
    severity: Severity = "warning"
    metric: str | None = None
    value: float | None = None
    subject: str | None = None


class RankChanged(EventBase, frozen=True, kw_only=True, tag="rank"):
    rank: int
    node: str
    state: str
    text: str
    severity: Severity = "info"


class NodeChanged(EventBase, frozen=True, kw_only=True, tag="node-event"):
    node: str
    state: str
    text: str
    severity: Severity = "info"


class Output(EventBase, frozen=True, kw_only=True, tag="output"):
    rank: int
    text: str


class Note(EventBase, frozen=True, kw_only=True, tag="note"):
    actor: str
    text: str


Event: TypeAlias = (
    StateChanged
    | CommandUpdate
    | CheckpointSaved
    | CheckpointRemoved
    | RolledBack
    | Anomaly
    | RankChanged
    | NodeChanged
    | Output
    | Note
)
Body: TypeAlias = Rows | Ranks | NodeReading | Event

Stream: TypeAlias = Literal["metrics", "ranks", "nodes", "events"]
STREAMS: tuple[Stream, ...] = ("metrics", "ranks", "nodes", "events")


def stream_of(body: Body) -> Stream:
    """The stream a body is published on."""
    match body:
        case Rows():
            return "metrics"
        case Ranks():
            return "ranks"
        case NodeReading():
            return "nodes"
        case _:
            return "events"


# --- published


class Envelope(Message, frozen=True, kw_only=True):
    """One recorded message: unique by (source, stream, seq), ordered by (epoch, seq), `seq` from 1 without gaps.

    `seq` goes on across epochs: a hub that restarts reads the last one from its journal. `link` is the rank's
    own number of the message, which tells a restarted hub what it already has.
    """

    source: str
    epoch: Number
    stream: Stream
    seq: Number
    time: float
    body: Body
    attempt: Number = 0
    link: Number = 0
    v: int = 1  # the protocol's version; what has none is of the first, for ever


class LrState(Message, frozen=True, kw_only=True):
    """The first group's. `rule`: how what is set makes the one of the other, with `value` as factor or rate."""

    scheduled: float | None = None
    effective: float | None = None
    rule: Literal["free", "scale", "pin"] | None = None  # None: not told
    value: float | None = None


class RunState(Message, frozen=True, kw_only=True):
    """What is true of the run now; goes with every heartbeat."""

    state: RunStateName
    since: float  # when this state began
    step: Number
    step_time: float  # when that step was completed
    total_steps: int | None = None
    incarnation: Number = 1
    attempt: Number = 1
    lr: LrState = LrState()
    steps_per_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    phases: dict[str, float] = {}  # share of the step time, 0 to 1
    by: str | None = None  # who paused or stopped it
    resumes_at: float | None = None
    reason: str | None = None
    dropped: dict[str, int] = {}  # lost telemetry, by reason
    samples_per_s: float | None = None
    clipped: float | None = None  # share of the last steps whose gradient norm was above the limit
    nans: dict[str, int] = {}  # values logged since the attempt began, by metric
    infs: dict[str, int] = {}
    revert_in: dict[str, int] = {}  # commit-confirmed changes: steps left, by command id
    overrides: dict[str, str] = {}  # what operators have set, in words: {"lr": "× 0.5"}
    in_memory: list[CheckpointInfo] = []  # states that every rank has in host memory, oldest first
    paused_since: float | None = None  # when the pause began, which what is done in between does not end


class Beat(Message, frozen=True, kw_only=True, tag="beat"):
    """Each second on topic `beat`: the newest sequence number of every stream, so that a lost tail is noticed."""

    source: str
    epoch: int
    time: float
    heads: dict[str, int]
    run: RunState | None = None
    v: int = 1  # as in `Envelope`


# --- requests and replies


class RequestBase(Message, frozen=True, kw_only=True):
    """`req` is chosen by the client and repeated in every reply."""

    req: int


class Hello(RequestBase, frozen=True, kw_only=True, tag="hello"):
    versions: list[int]
    client: str


class SnapshotRequest(RequestBase, frozen=True, kw_only=True, tag="snapshot"):
    """Everything needed to draw the first picture."""

    events: int = 200


class BackfillRequest(RequestBase, frozen=True, kw_only=True, tag="backfill"):
    """Recorded envelopes `first` to `last`, both included; the answer may stop short and says where."""

    stream: Stream
    first: int
    last: int


class CommandRequest(RequestBase, frozen=True, kw_only=True, tag="do"):
    command: Command


class CommandQuery(RequestBase, frozen=True, kw_only=True, tag="command?"):
    id: str


class HistoryRequest(RequestBase, frozen=True, kw_only=True, tag="history"):
    """Values of `metrics` between two steps (both included); rollups of about `points` buckets if given."""

    metrics: list[str]
    from_step: int | None = None
    to_step: int | None = None
    points: int | None = None
    incarnation: int | None = None  # None: the live branch


class EventPlace(Message, frozen=True, kw_only=True):
    """Where an event stands in its stream: the epoch and the number of its envelope."""

    epoch: Number
    seq: Number


class EventsRequest(RequestBase, frozen=True, kw_only=True, tag="events"):
    """The newest `limit` events that match, oldest first; with `before`, the newest of those that stand before it."""

    limit: int = 200
    since: float | None = None
    from_step: int | None = None
    kinds: list[str] = []
    before: EventPlace | None = None


class CheckpointsRequest(RequestBase, frozen=True, kw_only=True, tag="checkpoints"):
    pass


class VerifyRequest(RequestBase, frozen=True, kw_only=True, tag="verify"):
    """Re-hash the files of a checkpoint against its manifest. `progress`: say meanwhile how far it is."""

    id: str
    progress: bool = False


class TunablesRequest(RequestBase, frozen=True, kw_only=True, tag="tunables"):
    pass


class AuditRequest(RequestBase, frozen=True, kw_only=True, tag="audit"):
    """The newest `limit` lines; with `verify` also whether the whole log is as it was written."""

    limit: int = 1000
    verify: bool = False


class NodesRequest(RequestBase, frozen=True, kw_only=True, tag="nodes"):
    pass


Request: TypeAlias = (
    Hello
    | SnapshotRequest
    | BackfillRequest
    | CommandRequest
    | CommandQuery
    | HistoryRequest
    | EventsRequest
    | CheckpointsRequest
    | VerifyRequest
    | TunablesRequest
    | AuditRequest
    | NodesRequest
)


class ReplyBase(Message, frozen=True, kw_only=True):
    req: int


class Welcome(ReplyBase, frozen=True, kw_only=True, tag="welcome"):
    version: int
    kind: Literal["hub", "agent"]
    source: str
    epoch: int
    publish_port: int
    role: str
    actor: str
    name: str


class ErrorReply(ReplyBase, frozen=True, kw_only=True, tag="error"):
    code: str
    message: str
    hint: str = ""


class Tunable(Message, frozen=True, kw_only=True):
    name: str
    value: Scalar
    kind: Literal["float", "int", "bool", "str"]
    minimum: float | None = None
    maximum: float | None = None
    unit: str | None = None
    optimizer: bool = False  # a field of the optimizers: takes `release` too, and a group


class RankPlace(Message, frozen=True, kw_only=True):
    rank: int
    node: str
    pid: int
    local_rank: int = 0
    gpu_uuid: str | None = None


class BestBy(Message, frozen=True, kw_only=True):
    """What makes a checkpoint the best: the lowest or highest of a metric; without one `val_loss`, else `loss`."""

    metric: str | None = None
    mode: Literal["min", "max"] = "min"


class RunInfo(Message, frozen=True, kw_only=True):
    """What does not change within an attempt."""

    run: str
    id: str
    dir: str
    host: str
    created: float
    world_size: Number
    started: float
    attempt: Number = 1
    job_id: str | None = None
    total_steps: int | None = None
    config: Values = {}
    capabilities: dict[str, bool | str] = {}
    tunables: list[Tunable] = []
    ranks: list[RankPlace] = []
    authenticated_ranks: bool = True
    sinks: list[str] = []  # where the script wants its history copied to, beside the user's own configuration
    best_by: BestBy = BestBy()  # what `best` means for a rollback, a restart and the retention


class LastValue(Message, frozen=True, kw_only=True):
    step: int
    time: float
    value: float
    incarnation: int = 1


class Snapshot(ReplyBase, frozen=True, kw_only=True, tag="snapshot"):
    info: RunInfo
    state: RunState
    heads: dict[str, int]
    metrics: dict[str, LastValue]
    ranks: list[RankFigures]
    nodes: list[NodeReading]
    checkpoints: list[CheckpointInfo]
    events: list[Event]
    commands: list[CommandUpdate]  # accepted and not yet settled
    metrics_left_out: Number = 0  # so that the reply is within its limit
    events_left_out: Number = 0


class Backfill(ReplyBase, frozen=True, kw_only=True, tag="backfill"):
    """Encoded envelopes, oldest first. `gone`: the range is no longer kept, take a snapshot."""

    envelopes: list[bytes]
    gone: bool = False


class CommandReply(ReplyBase, frozen=True, kw_only=True, tag="command"):
    """One for each state the command passes through, the last one with a final state."""

    update: CommandUpdate


class Series(Message, frozen=True, kw_only=True):
    """Parallel little-endian columns, `q` int64 or `d` float64: `step` and `incarnation` q, `time` and `value` d;
    with rollups `min`, `max`, `mean` (of the finite values), `last` d, `count` (of all) and `nonfinite` (of those that
    are NaN or infinite) q in place of `value`, and `step` and `time` are of the bucket's last value."""

    name: str
    columns: dict[str, bytes]


class History(ReplyBase, frozen=True, kw_only=True, tag="history"):
    """`next_step` is set where the answer was cut at the size limit: ask again from there."""

    series: list[Series]
    next_step: int | None = None


class Events(ReplyBase, frozen=True, kw_only=True, tag="events"):
    """`before`: ask again with it for older ones; without it there are none, but for the `missing`, which were
    recorded and are not in the journal any more."""

    events: list[Event]
    before: EventPlace | None = None
    missing: Number = 0


class Checkpoints(ReplyBase, frozen=True, kw_only=True, tag="checkpoints"):
    checkpoints: list[CheckpointInfo]
    last: str | None = None
    best: str | None = None


class Verifying(ReplyBase, frozen=True, kw_only=True, tag="verifying"):
    """How far a verification is, before its `verified`."""

    id: str
    done_bytes: int
    total_bytes: int


class Verified(ReplyBase, frozen=True, kw_only=True, tag="verified"):
    id: str
    ok: bool
    text: str
    readable: bool = True  # false where the disk gave an error: neither good nor damaged


class Tunables(ReplyBase, frozen=True, kw_only=True, tag="tunables"):
    tunables: list[Tunable]


class AuditLines(ReplyBase, frozen=True, kw_only=True, tag="audit"):
    """JSON lines as they stand in the file. If asked for, how many lines were `checked`, and the first `problem`."""

    lines: list[str]
    checked: int | None = None
    problem: str | None = None


class Nodes(ReplyBase, frozen=True, kw_only=True, tag="nodes"):
    nodes: list[NodeReading]


class EndedRank(Message, frozen=True, kw_only=True):
    """What became of one rank: ended by a signal, `gone` before one was sent, or `left` alive for a `reason`."""

    rank: int
    pid: int
    how: Literal["SIGTERM", "SIGKILL", "gone", "left"]
    reason: str | None = None


class RanksEnded(ReplyBase, frozen=True, kw_only=True, tag="ended"):
    """An agent's answer to `end ranks`: every rank of that attempt which it knows on its node."""

    node: str
    ranks: list[EndedRank]


Reply: TypeAlias = (
    Welcome
    | ErrorReply
    | Snapshot
    | Backfill
    | CommandReply
    | History
    | Events
    | Checkpoints
    | Verifying
    | Verified
    | Tunables
    | AuditLines
    | Nodes
    | RanksEnded
)


# --- the link between rank 0 and its hub


class SourceAddress(Message, frozen=True, kw_only=True):
    """Where an agent listens, for the hub to dial."""

    node: str
    addresses: list[str]
    server_key: str
    source: str = ""


class LinkHello(Message, frozen=True, kw_only=True, tag="hello"):
    info: RunInfo
    incarnation: Number
    step: Number
    pid: int
    parent: Number | None = None  # the incarnation that this one goes on from, 0: from none


class LinkInfo(Message, frozen=True, kw_only=True, tag="info"):
    """Sent whenever tunables or capabilities change."""

    info: RunInfo


class LinkRecord(Message, frozen=True, kw_only=True, tag="record"):
    """To be journaled and published. `link` counts from 1 within the attempt."""

    link: Number
    body: Rows | Ranks | Event


class LinkProgress(Message, frozen=True, kw_only=True, tag="progress"):
    """Each tick; replaces the one before."""

    run: RunState


class LinkAgents(Message, frozen=True, kw_only=True, tag="agents"):
    agents: list[SourceAddress]


class LinkBye(Message, frozen=True, kw_only=True, tag="bye"):
    state: RunStateName
    step: Number
    reason: str | None = None


FromRank: TypeAlias = LinkHello | LinkInfo | LinkRecord | LinkProgress | LinkAgents | LinkBye


class LinkWelcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """`have` is the newest `link` of this attempt that the journal holds: the rank resends what follows."""

    epoch: int
    have: int


class LinkAck(Message, frozen=True, kw_only=True, tag="ack"):
    """Everything up to `link` is on disk."""

    link: int


class LinkCommand(Message, frozen=True, kw_only=True, tag="command"):
    command: Command
    actor: str
    accepted: float


class LinkCancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Withdraw a command that is not applied yet. From the actor `hub` it means that it expired."""

    id: str
    actor: str
    superseded_by: str | None = None


class Trouble(Message, frozen=True, kw_only=True):
    """Steps of one incarnation at which a metric was not as it should be; `last` is absent while it goes on."""

    incarnation: Number
    first: Number
    last: Number | None = None


class LinkTrouble(Message, frozen=True, kw_only=True, tag="trouble"):
    """All the trouble that the hub knows of; replaces what was told before."""

    troubles: list[Trouble]


ToRank: TypeAlias = LinkWelcome | LinkAck | LinkCommand | LinkCancel | LinkTrouble


# --- cards


class Card(Message, frozen=True, kw_only=True):
    """How a source is found: a 0600 JSON file under the user's state directory."""

    kind: Literal["hub", "agent"]
    source: str  # run id, or agent id
    name: str  # run name, or node name
    epoch: int
    addresses: list[str]  # ROUTER endpoints, the best first
    server_key: str  # CURVE public key, Z85
    host: str
    pid: int
    started: float
    dir: str | None = None
    job_id: str | None = None
    boot_id: str | None = field(default=None)
    publish_port: int = 0  # so that a source that comes back can take both ports again
