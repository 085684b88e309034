"""The exception tree.

    BatonError
    ├── FieldError
    │   ├── InvalidArgument    the caller's input is at fault
    │   └── Unimplemented      a known option that does not work yet
    ├── Retryable
    │   ├── ResourceExhausted  no room now
    │   └── Unavailable        no process serves the request, or it is gone
    ├── NotFound               no such model, attempt, artifact
    ├── Mismatch               two processes that can't work together
    ├── DeadlineExceeded       a wait reached its deadline
    ├── Cancelled              the caller asked to stop
    ├── Internal               a fault of ours
    ├── ConfigError            a setting, flag or file that a process can't start with
    │   └── ModelFileError     a model file that is missing, truncated, corrupt or of an unknown kind
    └── TransferError          moving KV blocks
        ├── PeerClosed         the peer ended the connection or died
        ├── WriteRefused       the peer does not accept this write (token, generation, block)
        │   └── WriteRevoked   the grant is over or was given up, as after a cancel
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


class InvalidArgument(FieldError): ...


class Unimplemented(FieldError): ...


class NotFound(BatonError): ...


class Mismatch(BatonError):
    """Names the field in which two processes differ, and both values."""

    def __init__(self, field: str, ours: str, theirs: str, message: str = "") -> None:
        super().__init__(message or f"{field} differs: here {ours}, there {theirs}")
        self.field, self.ours, self.theirs = field, ours, theirs


class Retryable(BatonError):
    """May work later. `constraint` names the scarce resource, as in `decode_blocks`."""

    def __init__(self, message: str, retry_after_s: float | None = None, constraint: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.constraint = constraint


class ResourceExhausted(Retryable): ...


class Unavailable(Retryable): ...


class DeadlineExceeded(BatonError): ...


class Cancelled(BatonError): ...


class Internal(BatonError): ...


class ConfigError(BatonError):
    """`str()` is one line."""


class ModelFileError(ConfigError): ...


class TransferError(BatonError): ...


class PeerClosed(TransferError): ...


class WriteRefused(TransferError): ...


class WriteRevoked(WriteRefused): ...


class ChecksumMismatch(TransferError): ...
