"""The error of a gang that lost a rank.

Owns also: how other errors are told in its sentence. Must never import torch: the service answers it.
"""

from __future__ import annotations

from speculator.errors import SpeculatorError


class RankLostError(SpeculatorError):
    """A rank died, stalled or went another way: the gang has ended; go to another server and resume there."""

    status, reason = "UNAVAILABLE", "RANK_LOST"


def sentence(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
