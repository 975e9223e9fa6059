"""The target's verify pass as graphs: every row runs its last token and its draft through the large model.

Owns: what its shapes, inputs and outputs are. Must never know which model runs or how drafts are judged.
"""

from __future__ import annotations

from graphs.graph import BuildInputs, BuildState, Decide, Forward, no_decisions
from graphs.manager import GraphManager, plain_factory
from graphs.recorder import Recorder
from graphs.shape import Ladder


class TargetVerifyGraphManager(GraphManager):
    """Shapes: R rows of T = depth + 1 tokens, the variant says chain or tree.

    `forward(state, inputs)` returns what later passes read: final hidden states and taps, [R, T, H] each. Logits and
    the verdict come after the graph. Its `pairs` may be handed to PrefillEagleGraphManager.
    """

    def __init__(
        self,
        recorder: Recorder | None,
        ladder: Ladder,
        forward: Forward,
        build_state: BuildState,
        build_inputs: BuildInputs,
        decide: Decide = no_decisions,
        name: str = "target verify",
    ) -> None:
        super().__init__(name, recorder, ladder, plain_factory(forward, build_state, build_inputs, decide))
