"""What can go wrong when a model folder is read or a pass is planned."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model folder that cannot be used; the text names the file, key or tensor and what to do."""


class PlanError(ValueError):
    """A batch that the attention backend cannot run."""
