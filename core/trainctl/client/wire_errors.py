"""From what the wire says to what an operator reads. Apart from `errors`, which must not reach zmq."""

from trainctl.client.errors import BadRequest, ClientError, NotAllowed, NotReachable, OtherVersion, Rejected
from trainctl.wire.peer import KeyRefused, NoAnswer, PeerError, Refused, Unreachable


def from_peer(error: PeerError | ValueError, run: str) -> ClientError:
    """The operator's words for what the wire said about `run`."""
    match error:
        case Unreachable() | NoAnswer():
            return NotReachable(
                f"{run} does not answer ({error}); training may well go on",
                "see `trainctl ls -a`; a hub that died is started again by rank 0 within seconds",
            )
        case KeyRefused():
            return NotAllowed(
                f"{run}: {error}",
                "if this run is yours, copy your keys here (`~/.config/trainctl/keys`, see TRAINCTL_CONFIG), and check "
                "the server key: `trainctl ls --json` beside the run tells it",
            )
        case Refused(code="not_allowed"):
            return NotAllowed(error.message, error.hint)
        case Refused(code="bad_request"):
            return BadRequest(error.message, error.hint)
        case Refused(code="version"):
            return OtherVersion(error.message, error.hint)
        case Refused():
            refused = Rejected(error.message, error.hint)
            refused.code = error.code
            return refused
        case PeerError():
            return ClientError(f"{run}: {error}")
        case _:
            return BadRequest(f"{run}: {error}", "`trainctl keys show` on the other side prints the right key")
