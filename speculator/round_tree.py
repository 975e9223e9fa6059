"""A round of dynamic trees between its passes as a few kernels: one before the target, two after, two a level.

Owns: the hand-over from passes to launches. Must never know device code or recordings. `round_glue.TorchGlue` is the
oracle.
"""

from __future__ import annotations

from torch import Tensor

from speculator.drafting import Start
from speculator.kernels.chain import launch_settle
from speculator.kernels.tree import launch_begin_tree, launch_hold, launch_judge_tree, launch_move
from speculator.lookback import gather_rows
from speculator.passes import EagerPasses, Verified
from speculator.readout import kept
from speculator.round_glue import Kind, Memory
from speculator.round_state import GREEDY
from speculator.sampling import gumbel_of
from target.batch import Batch
from target.readout import Asked, read_logits


class TreeGlue:
    """`Glue` of dynamic trees, for heads of one module."""

    def __init__(self, memory: Memory, kind: Kind) -> None:
        self.memory, self.kind, rows = memory, kind, memory.rows
        self.state = memory.state.memory | {"cached": rows.cached, "root": rows.root}

    def begin(self, orders: Tensor) -> Batch:
        kind, spare = self.kind, self.memory.state.spare
        noise, depth = kind.mode != GREEDY, kind.drafted.depth
        self.begun, self.shapes = launch_begin_tree(orders, self.state, spare, kind.queries, depth, noise)
        self.batch = self.begun.batch._replace(longest=self.memory.capacity)
        return self.batch._replace(ancestors=self.shapes.ancestors)

    def judge(self, verified: Verified) -> None:
        begun, drafted = self.begun, self.kind.drafted
        self.sampling = self.memory.state.sampling(begun.whole[0, : len(begun.tokens)], self.kind.mode)
        asked = Asked(temperature=begun.temperature, keys=begun.keys, keep=kept(self.sampling, begun.tokens.shape))
        found = verified.read(asked)
        if found is None:
            found = read_logits(verified.logits.flatten(0, 1), asked, gumbel_of)
        state, nodes = self.state, drafted.nodes
        self.judged, path = launch_judge_tree(found, self.begun, self.shapes, state, drafted.depth, nodes)
        launch_move(self.memory.cache, self.begun, self.judged, path)
        self.features = gather_rows(verified.features, path)

    def catch_up(self, passes: EagerPasses) -> None:
        judged = self.judged
        batch = self.batch._replace(tokens=judged.tokens, positions=judged.positions, counts=judged.kept)
        outputs = passes.outputs(batch, self.features, judged.tokens)
        self.output = launch_settle(*outputs, self.begun, judged, self.memory.rows.output)

    def draft(self, passes: EagerPasses) -> None:
        start = Start(
            output=self.output,
            context=self.judged.context,
            pages=self.begun.pages,
            longest=self.memory.capacity,
            sampling=self.sampling,
            coupled=True,
            static=True,
            keys=self.judged.keys,
        )
        launch_hold(passes.draft(start, self.kind.drafted), self.begun, self.judged, self.state)

    def result(self) -> Tensor:
        return self.judged.result
