"""The exception tree.

    BatonError
    ├── InvalidArgument        the caller's input; names the field
    ├── Unimplemented          a known option that does not work yet; names the field
    ├── NotFound               no such model, attempt, artifact
    ├── Mismatch               two processes that can't work together; names the field and both values
    ├── ResourceExhausted      no room now; may say when to try again
    ├── Unavailable            nobody there to serve it; may say when to try again
    ├── DeadlineExceeded       a wait reached its deadline
    ├── Cancelled              somebody asked to stop
    ├── Internal               our own fault
    ├── ConfigError            a setting, flag or file that a process can't start with
    │   └── ModelFileError     a model file that is missing, truncated, corrupt or of an unknown kind
    └── TransferError          moving KV blocks
        ├── PeerClosed         the peer ended the connection or died
        ├── WriteRefused       the peer does not accept this write (token, generation, block)
        └── ChecksumMismatch   a block arrived with other bytes than were sent

`baton.rpc.status` is the one table between this tree and gRPC status codes.
"""

from __future__ import annotations


class BatonError(Exception):
    """Base of all errors that Baton raises on purpose. `str()` is fit to show to a user."""


class FieldError(BatonError):
    """An error about one field of a request; `field` is its path in the proto, as in `sampling.top_p`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.message = message


class InvalidArgument(FieldError):
    """The caller's input is at fault."""


class Unimplemented(FieldError):
    """A known option that does not work yet."""


class NotFound(BatonError):
    """What was named does not exist."""


class Mismatch(BatonError):
    """Two processes that can't work together."""

    def __init__(self, field: str, ours: str, theirs: str, message: str = "") -> None:
        super().__init__(message or f"{field} differs: here {ours}, there {theirs}")
        self.field, self.ours, self.theirs = field, ours, theirs


class Retryable(BatonError):
    """May work later. `constraint` names what was short, as in `decode_blocks`."""

    def __init__(self, message: str, retry_after_s: float | None = None, constraint: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.constraint = constraint


class ResourceExhausted(Retryable):
    """There is no room at the moment."""


class Unavailable(Retryable):
    """Nobody is there to serve the request, or whoever served it is gone."""


class DeadlineExceeded(BatonError):
    """A wait reached its deadline."""


class Cancelled(BatonError):
    """Somebody asked to stop."""


class Internal(BatonError):
    """A fault of ours."""


class ConfigError(BatonError):
    """A setting, flag or file that a process can't start with; `str()` is one line."""


class ModelFileError(ConfigError):
    """A model file that is missing, truncated, corrupt or of an unknown kind."""


class TransferError(BatonError):
    """Moving KV blocks went wrong."""


class PeerClosed(TransferError):
    """The peer ended the connection, or died."""


class WriteRefused(TransferError):
    """The peer does not accept this write."""


class ChecksumMismatch(TransferError):
    """A block arrived with other bytes than were sent."""
