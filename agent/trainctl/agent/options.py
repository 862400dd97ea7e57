"""What an agent is told on its command line, checked where it is made."""

from dataclasses import dataclass
from typing import Final

from trainctl.agent.lifetime import LINGER_S

# Where clusters tell a process which job it belongs to, in the order in which they are asked.
JOB_VARIABLES: Final = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
SHORTEST_INTERVAL_S: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Options:
    """`job` None: every rank of this user on this node. Raises ValueError where a value cannot be meant."""

    job: str | None = None
    interval_s: float = 1.0
    bind: str = "*"
    prometheus: int | None = None
    while_ranks: bool = False
    linger_s: float = LINGER_S
    gpus: bool = True

    def __post_init__(self) -> None:
        if not SHORTEST_INTERVAL_S <= self.interval_s <= 3600:
            raise ValueError(f"--interval is {self.interval_s}: use seconds from {SHORTEST_INTERVAL_S} to 3600")
        if self.job is not None and (not 0 < len(self.job) <= 100 or "/" in self.job or not self.job.isprintable()):
            raise ValueError(f"--job is {self.job!r}: use the run's id or the cluster's job number")
        if self.prometheus is not None and not 0 < self.prometheus < 65536:
            raise ValueError(f"--prometheus is {self.prometheus}: use a port from 1 to 65535")
        if not self.linger_s > 0:
            raise ValueError(f"--linger is {self.linger_s}: use seconds above 0")

    @property
    def job_name(self) -> str:
        """The job in names of files and sources."""
        return self.job or "node"
