"""One tree of errors; each leaf knows its gRPC status and reason.

Owns: what can go wrong, in one clear sentence each. Must never import torch or grpc.
Reasons and the google.rpc details they travel with are the public contract (AIP-193).
"""

from __future__ import annotations

DOMAIN = "speculator.v1"


class SpeculatorError(Exception):
    """Base of all errors that a caller may see.

    `status` is a gRPC code name, `reason` an UPPER_SNAKE word for ErrorInfo, `metadata` its string map.
    """

    status = "INTERNAL"
    reason = "INTERNAL"

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata


class InvalidArgumentError(SpeculatorError):
    """The request is wrong whatever the state of the server; `field` names the culprit."""

    status, reason = "INVALID_ARGUMENT", "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "", **metadata: str) -> None:
        super().__init__(message, **metadata)
        self.field = field


class PromptTooLongError(InvalidArgumentError):
    """Prompt and output do not fit the context."""

    reason = "PROMPT_TOO_LONG"


class InvalidTreeError(InvalidArgumentError):
    """A draft tree with a bad parent, too many nodes, or a q that does not fit it."""

    reason = "INVALID_TREE"


class SessionNotFoundError(SpeculatorError):
    """No such session: never created, deleted, or expired. Resume it with its token ids."""

    status, reason = "NOT_FOUND", "SESSION_NOT_FOUND"


class SessionExistsError(SpeculatorError):
    """The session id is taken by a session with another body."""

    status, reason = "ALREADY_EXISTS", "SESSION_EXISTS"


class PositionMismatchError(SpeculatorError):
    """A stale base_length; metadata holds committed_length."""

    status, reason = "ABORTED", "POSITION_MISMATCH"


class DraftNotFoundError(SpeculatorError):
    """draft_id does not name the session's current draft."""

    status, reason = "FAILED_PRECONDITION", "DRAFT_NOT_FOUND"


class SessionFinishedError(SpeculatorError):
    """The session has stopped; it takes no further step."""

    status, reason = "FAILED_PRECONDITION", "SESSION_FINISHED"


class SpeculationDisabledError(SpeculatorError):
    """The session was opened without speculation, or the server has no head."""

    status, reason = "FAILED_PRECONDITION", "SPECULATION_DISABLED"


class SessionBusyError(SpeculatorError):
    """Another step of the same session is under way."""

    status, reason = "ABORTED", "SESSION_BUSY"


class ServerFullError(SpeculatorError):
    """No room for a session or a step now; `retry_after` is in seconds."""

    status, reason = "RESOURCE_EXHAUSTED", "SERVER_FULL"

    def __init__(self, message: str, *, retry_after: float = 0.5, **metadata: str) -> None:
        super().__init__(message, **metadata)
        self.retry_after = retry_after


class DrainingError(SpeculatorError):
    """The server is shutting down; go elsewhere."""

    status, reason = "UNAVAILABLE", "DRAINING"


class EngineFailedError(SpeculatorError):
    """A step failed inside the engine; nothing was committed by it."""

    status, reason = "INTERNAL", "ENGINE_FAILED"


class NumericalError(SpeculatorError):
    """The target produced NaN or infinite logits; nothing was committed by the step."""

    status, reason = "INTERNAL", "NON_FINITE_LOGITS"


class StepCancelledError(SpeculatorError):
    """The caller went away before the commit; the session is as it was."""

    status, reason = "CANCELLED", "CANCELLED"


class DeadlineExceededError(SpeculatorError):
    """The deadline passed before the commit; the session is as it was."""

    status, reason = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"


class UnauthenticatedError(SpeculatorError):
    """No token, or a wrong one."""

    status, reason = "UNAUTHENTICATED", "UNAUTHENTICATED"


class SessionForbiddenError(SpeculatorError):
    """The session belongs to another caller."""

    status, reason = "PERMISSION_DENIED", "SESSION_OF_ANOTHER_CALLER"


class CheckpointError(SpeculatorError):
    """A model folder that cannot be used; says which file or tensor and what to do."""

    status, reason = "FAILED_PRECONDITION", "BAD_CHECKPOINT"


class ConfigError(SpeculatorError):
    """A configuration that cannot be used."""

    status, reason = "INVALID_ARGUMENT", "BAD_CONFIG"
