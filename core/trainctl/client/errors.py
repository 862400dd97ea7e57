"""What can go wrong between an operator and a run, with what to do and the exit code that scripts see.

ClientError (1)
 ├── BadRequest (2)      the request makes no sense as it was typed
 ├── AmbiguousRun (2)    several runs could be meant
 ├── RunNotFound (3)     no such run
 ├── NotReachable (3)    the run is known, and nobody answers for it
 │    └── OtherVersion   somebody answers, and speaks another version of the protocol
 ├── NotAllowed (4)      the run answers, and this key may not
 ├── Rejected (4)        the run answers, and will not do it
 └── NoOutcome (6)       it was asked, and what became of it is not known
"""


class ClientError(Exception):
    """Base: `message` says what happened and what still works, `hint` what to do, `code` is stable for scripts."""

    code = "failed"
    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadRequest(ClientError):
    code = "bad_request"
    exit_code = 2


class AmbiguousRun(ClientError):
    """`candidates` are the ids of the runs that could be meant."""

    code = "ambiguous_run"
    exit_code = 2

    def __init__(self, message: str, hint: str = "", candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.candidates = candidates


class RunNotFound(ClientError):
    code = "run_not_found"
    exit_code = 3


class NotReachable(ClientError):
    code = "not_reachable"
    exit_code = 3


class OtherVersion(NotReachable):
    """The hub is there: nothing may be concluded from its silence."""


class NotAllowed(ClientError):
    code = "not_allowed"
    exit_code = 4


class Rejected(ClientError):
    code = "rejected"
    exit_code = 4


class NoOutcome(ClientError):
    code = "unknown"
    exit_code = 6
