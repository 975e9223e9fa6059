"""What can go wrong when a pass is recorded or replayed.

Owns: the error tree of this package. Must never know models, sessions or the service.
"""

from __future__ import annotations


class GraphError(RuntimeError):
    """Anything this package refuses; the text says what and why."""


class ShapeError(GraphError):
    """A shape or a ladder that cannot be."""


class StateError(GraphError):
    """Values that an attention state cannot take: unknown, missing, too large or of another type."""


class SharedStorageError(GraphError):
    """Two attention states that must be apart share memory or a plan; the text names what."""


class CaptureError(GraphError):
    """A pass that cannot be recorded, or a recording at a time when there must be none."""


class CaptureMemoryError(CaptureError):
    """The device ran out of memory while a pass was recorded."""


class SideEffectError(CaptureError):
    """Something with effects on the host was about to run while a prompt pass is captured."""


class GraphMismatchError(GraphError):
    """A replay that would not do what running the pass would do; run it eager instead."""
