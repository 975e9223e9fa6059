"""Output that no draft changes: the passes behind it on a CPU, what is refused, and the certificate that can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculator import invariant
from speculator.arithmetic import choose_arithmetic
from speculator.config import Config, load
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.fixed_passes import OneByOne, tokens_of
from speculator.invariant import SEEDED, Setting, certify, first_difference, play, settings
from speculator.types import DraftShape
from target.batch import Batch, causal_positions
from target.decoder import Decoder
from target.products import choose_products, in_fixed_order, library, row_by_row
from tests.unit.engines import tiny_engine, tiny_head, tiny_target

CPU = torch.device("cpu")
TREE = DraftShape(3, 8, 3)
PROMPTS = [[1, 2, 3, 4, 5], list(range(20)), [7]]


def config(*sets: str) -> Config:
    return load(None, ["engine.invariant=true", *sets])


def target_of(seed: int = 0, **changes: object) -> Decoder:
    model = tiny_target(seed, **changes)
    choose_products(model, row_by_row)
    return model


def engine_of(kind: str | None = "eagle3") -> Engine:
    target = target_of()
    return tiny_engine(target, tiny_head(target, kind) if kind else None)


# ---- the passes ----


def tree_batch(pages: Tensor) -> Batch:
    """Two rows: a tree of five nodes, and three of a chain padded to five."""
    masks = torch.tensor([[1, 3, 5, 11, 21], [1, 3, 7, 0, 0]])
    depths = torch.tensor([[0, 1, 1, 2, 2], [0, 1, 2, 0, 0]])
    context, tokens = torch.tensor([9, 6]), torch.arange(10).view(2, 5)
    counts = torch.tensor([5, 3])
    return Batch(tokens, context[:, None] + depths, context, counts, pages, masks, longest=14)


def filled(engine: Engine) -> Tensor:
    """Page tables of two rows whose contexts are in the cache."""
    pages = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    tokens, context = torch.arange(20).view(2, 10) % 60, torch.zeros(2, dtype=torch.int64)
    counts = torch.tensor([9, 6])
    engine.passes.feed(Batch(tokens, causal_positions(context, 10), context, counts, pages, longest=9))
    return pages


@torch.inference_mode()
def test_a_target_in_fixed_order_gets_passes_of_one_token() -> None:
    engine, fast = engine_of(), tiny_engine(tiny_target(), None)
    assert isinstance(engine.passes, OneByOne) and not isinstance(fast.passes, OneByOne)
    assert in_fixed_order(engine.model) and not in_fixed_order(fast.model)


@torch.inference_mode()
def test_passes_of_one_token_give_what_the_whole_pass_gives() -> None:
    target = target_of()
    whole = tiny_engine(tiny_target(), tiny_head(tiny_target(), "eagle3"))
    one = tiny_engine(target, tiny_head(target, "eagle3"))
    results = [engine.passes.verify(tree_batch(filled(engine))) for engine in (whole, one)]
    valid = torch.arange(5) < torch.tensor([[5], [3]])
    for a, b in zip(*((r.features, r.logits) for r in results), strict=True):
        torch.testing.assert_close(a[valid], b[valid], rtol=1e-4, atol=1e-4)
        assert not b[~valid].any()


@torch.inference_mode()
def test_a_node_has_the_bits_of_plain_decoding() -> None:
    """Node 3 of the tree, path 0-1-3, against the same three tokens fed one chunk at a time."""
    engine = engine_of(None)
    pages = filled(engine)
    batch = tree_batch(pages)
    in_tree = engine.passes.verify(batch).logits[0]
    path = torch.tensor([0, 1, 3])
    chain = Batch(batch.tokens[:1, path], causal_positions(batch.context[:1], 3), batch.context[:1], torch.tensor([3]),
                  pages[:1], longest=12)  # fmt: skip
    assert torch.equal(engine.passes.verify(chain).logits[0], in_tree[path])
    for i in range(3):
        single = Batch(chain.tokens[:, i : i + 1], chain.positions[:, i : i + 1], chain.context + i, torch.tensor([1]),
                       pages[:1], longest=10 + i)  # fmt: skip
        assert torch.equal(engine.passes.verify(single).logits[0, 0], in_tree[path[i]])


def test_tokens_come_in_order_with_their_own_masks() -> None:
    batch = tree_batch(torch.zeros(2, 5, dtype=torch.int64))
    found = list(tokens_of(batch))
    assert [(r, t) for r, t, _ in found] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2)]
    _, _, last = found[4]
    assert (last.offset, last.longest, last.counts.tolist(), last.ancestors.tolist()) == (4, 14, [1], [[21]])
    assert last.positions.tolist() == [[11]] and last.pages.shape == (1, 5)


# ---- the whole engine ----


@pytest.mark.parametrize("kind", ["eagle3", None])
def test_no_setting_changes_a_token(kind: str | None) -> None:
    engine = engine_of(kind)
    ways = settings(engine, 3, (3,), TREE, 6)
    records = certify(engine, PROMPTS, 6, ways, {})
    assert len(records) == 2 * len(ways) >= 12 and not any(record["difference"] for record in records)


def test_heads_are_held_against_the_same_texts() -> None:
    known: dict[str, list[list[int]]] = {}
    certify(engine_of(None), PROMPTS, 8, [Setting("plain, all together", together=4)], known)
    kept = {name: [list(text) for text in texts] for name, texts in known.items()}
    records = certify(engine_of("eagle"), PROMPTS, 8, [Setting("chains", (DraftShape(3),), 2)], known)
    assert known == kept and set(kept) == {"greedy", "sampled"}
    assert not any(record["difference"] for record in records)


def test_told_drafts_are_accepted_and_wrong_ones_are_not() -> None:
    engine = engine_of(None)
    known = play(engine, PROMPTS, Setting("plain"), SEEDED, 12, [])
    counted = [0, 0]
    plain_step = engine.step

    def step(steps):  # type: ignore[no-untyped-def]
        results = plain_step(steps)
        counted[0] += sum(len(s.draft.tokens) if s.draft else 0 for s in steps)
        counted[1] += sum(len(r.accepted) for r in results)
        return results

    engine.step = step  # type: ignore[method-assign]
    assert play(engine, PROMPTS, Setting("told", told=4, branches=2), SEEDED, 12, known) == known
    assert 0 < counted[1] < counted[0]


# ---- the certificate can fail ----


def wobbly(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rounds by the number of rows, as a library does, only worse."""
    return F.linear(x, weight, bias) * (1 + 0.02 * (x.numel() // x.shape[-1]))


def test_a_product_that_looks_at_the_other_rows_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    target = tiny_target()
    choose_products(target, wobbly)
    engine = tiny_engine(target, None)
    records = certify(engine, PROMPTS, 12, [Setting("told", told=5), Setting("again")], {})
    off = [record["difference"] is not None for record in records]
    assert off == [True, False, True, False]
    assert "not" in capsys.readouterr().out.splitlines()[0]


def test_the_first_difference_is_named() -> None:
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == (1, 1, 4, 5)
    assert first_difference([[1, 2]], [[1, 2]]) is None
    with pytest.raises(ValueError):
        first_difference([[1, 2]], [[1]])


def test_the_command_writes_what_it_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(invariant, "_loaded", lambda args, head: (engine_of(None), PROMPTS[:2]))
    monkeypatch.setattr(invariant, "settings", lambda *_: [Setting("told", told=2)])
    path = tmp_path / "certificate.json"
    assert invariant.main(["--tokens", "4", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["invariant"] and report["tokens_compared"] == 16 and report["settings_that_differ"] == 0
    assert report["provenance"]["commit"] and len(report["records"]) == 2
    monkeypatch.setattr(invariant, "first_difference", lambda a, b: invariant.Difference(0, 1, 2, 3))
    assert invariant.main(["--tokens", "4"]) == 1
    assert "2 of which differ" in capsys.readouterr().out


def test_prompts_that_do_not_fit_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariant, "_loaded", lambda args, head: (engine_of(None), PROMPTS))
    with pytest.raises(ConfigError, match="The longest prompt with 900 tokens takes"):
        invariant.main(["--tokens", "900"])


# ---- what is refused ----


def test_invariant_mode_chooses_fixed_order_for_the_target_alone() -> None:
    target = tiny_target()
    head = tiny_head(target, "eagle3")
    choose_arithmetic(config(), target, head, CPU, "off")
    assert in_fixed_order(target) and target.layers[0].mlp.down.product is row_by_row
    assert head.layers[0].mlp.down.product is F.linear  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    ("sets", "changes", "mode", "words"),
    [
        (("sampling.rule=rejection",), {}, "off", 'needs sampling.rule "coupled": under "rejection" drafts choose'),
        ((), {}, "split", "cannot record: set them off"),
        (("engine.product_table=nowhere.json",), {}, "off", "nowhere.json is no table of products"),
    ],
)
def test_what_has_no_fixed_order_is_refused(
    sets: tuple[str, ...], changes: dict[str, object], mode: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_arithmetic(config(*sets), tiny_target(**changes), None, CPU, mode)


@pytest.mark.parametrize(("field", "words"), [("mla", "latent attention"), ("moe", "routed experts")])
def test_targets_without_a_fixed_order_are_refused(field: str, words: str) -> None:
    target = tiny_target()
    target.config = replace(target.config, **{field: object()})
    with pytest.raises(ConfigError, match=f"dense targets with grouped-query attention, not {words}"):
        choose_arithmetic(config(), target, None, CPU, "off")


def test_torch_multiplies_everything_where_that_is_asked() -> None:
    target = tiny_target()
    choose_arithmetic(load(None, ["engine.products=torch"]), target, None, CPU, "off")
    assert target.product is library and target.layers[0].mlp.gate_up.product is library


def test_without_the_mode_nothing_is_refused_and_torch_multiplies() -> None:
    target = tiny_target()
    choose_arithmetic(load(None, ["sampling.rule=rejection"]), target, None, CPU, "split")
    assert target.product is F.linear and not in_fixed_order(target)
