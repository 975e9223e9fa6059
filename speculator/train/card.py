"""Fills the model cards of a pair from the results of its stages.

Owns: the words of the card. Must never know tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculator.train.recipe import DeltaRecipe, Recipe, TargetRecipe

Results = Mapping[str, Mapping[str, Any]]


def write_cards(recipe: Recipe, results: Results, data: Path, out: Path) -> None:
    """README.md beside the pair and in each of its folders."""
    text = pair_card(recipe, results, data)
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(text, encoding="utf-8")
    inside = " and its MTP module" if recipe.head.kind == "mtp" else ""
    for part, what in (("target", f"the target{inside}"), ("eagle3", "the EAGLE-3 head")):
        if (out / part).exists():
            note = (
                f"# {recipe.name}: {what}\n\nThe card of the pair, with data, licences and figures, is ../README.md.\n"
            )
            (out / part / "README.md").write_text(note, encoding="utf-8")


def pair_card(recipe: Recipe, results: Results, data: Path) -> str:
    parts = [
        _head(recipe, results),
        _figures(results),
        _measured(results),
        _losses(results),
        _commands(recipe, results),
        _sources(recipe, data),
    ]
    return "\n".join(parts)


def _head(recipe: Recipe, results: Results) -> str:
    mtp = recipe.head.kind == "mtp"
    size, head = (results.get(stage, {}).get("parameters", 0) / 1e6 for stage in ("target", "head"))
    return f"""# {recipe.name}

A small English target and its {"MTP module" if mtp else "EAGLE-3 draft head"}, trained from scratch by this project for
demonstrations, tests and benchmarks of speculative decoding. It writes short, often clumsy and wrong text; do not use
it for anything else.

| part | shape | parameters |
|---|---|---|
| target | {_target_shape(recipe)} | {size:.2f} M |
| {"MTP module" if mtp else "eagle3"} | {_mtp_shape(recipe) if mtp else _eagle3_shape(recipe)} | {head:.2f} M |

Weights are bfloat16. The chat format is `<|user|>question<|end|><|assistant|>answer<|end|>`; texts start after
`<|end|>`.
"""


def _target_shape(recipe: Recipe) -> str:
    t, rest = recipe.target, f"vocabulary {recipe.tokenizer.vocab_size}, tied embeddings"
    if t.delta is not None:
        return f"{_hybrid_shape(t, t.delta)}, {rest}"
    if t.mla is None or t.moe is None:
        heads = f"{t.heads} heads and {t.kv_heads} key-value heads of {t.head_dim}"
        return f"Llama layout, {t.layers} layers of width {t.hidden_size}, {heads}, MLP {t.intermediate_size}, {rest}"
    m, e = t.mla, t.moe
    latent = f"{t.heads} heads over latents of {m.rank} + {m.rope_dim}"
    experts = f"{e.top_k} of {e.experts} experts and {e.shared} shared, of {e.inner_size}"
    dense = f"first {e.dense_layers} dense, {t.intermediate_size}"
    return f"DeepSeek-V3 layout, {t.layers} layers of width {t.hidden_size} ({dense}), {latent}, {experts}, {rest}"


def _hybrid_shape(t: TargetRecipe, d: DeltaRecipe) -> str:
    attention = f"{t.heads} heads and {t.kv_heads} key-value heads of {t.head_dim}"
    states = f"{d.value_heads} states of {d.key_dim} x {d.value_dim}"
    each = f"each {d.every}th attends ({attention}), the others are gated DeltaNet ({states})"
    return f"Qwen3.5 layout, {t.layers} layers of width {t.hidden_size}, {each}, MLP {t.intermediate_size}"


def _eagle3_shape(recipe: Recipe) -> str:
    lm_head = "own lm_head" if recipe.head.own_lm_head else "the target's lm_head"
    taps = f"taps at boundaries {list(recipe.taps)}"
    return f"one layer, {taps}, MLP {recipe.head.intermediate_size}, {lm_head} over the whole vocabulary"


def _mtp_shape(recipe: Recipe) -> str:
    where = "mtp" if recipe.target.delta else f"model.layers.{recipe.target.layers}"
    return f"one attending layer of the target's kind, in the target's folder as `{where}.*`; the target's lm_head"


def _figures(results: Results) -> str:
    sets = results.get("evaluate", {}).get("sets", {})
    if not sets:
        return ""
    lines = [
        "## Figures",
        "",
        "Greedy, float32 arithmetic, prompts not trained on. tau is the number of tokens",
    ]
    lines += [
        "committed per target pass with a chain of drafts, bonus token included. Shared 8-grams stand in several",
        "answers of a set.",
    ]
    lines += [""]
    depths = list(next(iter(sets.values())).get("chain", {}))
    lines += [
        "| prompts | "
        + " | ".join(f"tau, depth {d}" for d in depths)
        + " | repeated 4-grams | shared 8-grams | ended | tokens |"
    ]
    lines += ["|---" * (len(depths) + 5) + "|"]
    for name, s in sets.items():
        taus = " | ".join(f"{s['chain'][d]['tau']:.2f}" for d in depths)
        shared = f"{s['shared_8grams']:.1%}" if "shared_8grams" in s else "-"
        rest = f"{s['repeated_4grams']:.1%} | {shared} | {s['ended']:.0%} | {s['mean_tokens']}"
        lines.append(f"| {name} ({s['prompts']}) | {taus} | {rest} |")
    return "\n".join([*lines, "", *_survival(sets), ""])


def _survival(sets: Mapping[str, Any]) -> list[str]:
    lines = ["Share of rounds in which the draft at each position of the deepest chain was accepted:", ""]
    for name, s in sets.items():
        deepest = list(s["chain"].values())[-1]
        lines.append(f"- {name}: {', '.join(f'{x:.2f}' for x in deepest['survival'])}")
    return lines


def _measured(results: Results) -> str:
    """Figures of `speculator bench acceptance --json`, kept as results/acceptance-*.json."""
    rows = [(name, r) for name, r in results.items() if name.startswith("acceptance-")]
    if not rows:
        return ""
    sets = list(rows[0][1]["sets"])
    lines = ["On the serving engine (`speculator bench acceptance`, coupled rule), tau on the same prompts:", ""]
    lines += [f"| draft | temperature | {' | '.join(sets)} | mean |", "|---" * (len(sets) + 3) + "|"]
    for name, r in sorted(rows, key=lambda row: (row[1]["temperature"], row[0])):
        taus = " | ".join(f"{r['sets'][s]['tau']:.2f}" for s in sets)
        lines.append(f"| {name.split('-')[1]} | {r['temperature']:g} | {taus} | {r['mean_tau']:.2f} |")
    return "\n".join([*lines, ""])


def _losses(results: Results) -> str:
    target, refined, head = (results.get(stage, {}) for stage in ("target", "refine", "head"))
    lines = ["## Losses", ""]
    for name, curve in (target.get("phases", {}) | {"refine": refined.get("curve", [])}).items():
        losses = [row["loss"] for row in curve if "loss" in row]
        if losses:
            lines.append(f"- {name}: {losses[0]:.2f} to {losses[-1]:.2f} in {curve[-1]['step']} steps")
    if head.get("curve"):
        curve = head["curve"]
        began = f", begun with {head['began_with']}" if "began_with" in head else ""
        lines.append(f"- head: {curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f} in {curve[-1]['step']} steps{began}")
    if heldout := refined.get("heldout_loss") or target.get("heldout_loss"):
        each = ", ".join(f"{name} {loss:.2f}" for name, loss in heldout.items())
        lines += ["", f"Held-out documents, nats per token: {each}."]
    return "\n".join([*lines, ""])


def _commands(recipe: Recipe, results: Results) -> str:
    times = {stage: result["seconds"] for stage, result in results.items() if "seconds" in result}
    device = results.get("target", {}).get("device", "")
    spent = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in times.items())
    return f"""## How it was made

```
python -m speculator.train {recipe.name} --data CORPORA --prompts PROMPTS --out {recipe.name}
```

on {device}{_again(results)}. Seconds: {spent}.
The recipe holds every number. {recipe.heldout_percent} % of the documents of each source were held out; the
evaluation prompts and texts that share a 13-word sequence with them are not in the data.
"""


def _again(results: Results) -> str:
    """What more was done where the head went on from one that the stage had left before."""
    begun = str(results.get("head", {}).get("began_with", ""))
    return ", then once more with `--stage answers head evaluate card --force`" if "earlier" in begun else ""


def _sources(recipe: Recipe, data: Path) -> str:
    manifest = data / "manifest.json"
    if not manifest.exists():
        return ""
    used = set().union(*(phase.weights for phase in recipe.phases))
    lines = ["## Data and licences", "", "| source | licence | from |", "|---|---|---|"]
    for name, entry in json.loads(manifest.read_text(encoding="utf-8")).items():
        if name in used:
            lines.append(f"| {name} | {entry['license']} | {entry['source'].removesuffix(' (table below)')} |")
    return "\n".join([*lines, "", ATTRIBUTION])


ATTRIBUTION = """OpenStax textbooks: access for free at openstax.org (CC BY 4.0). Open English WordNet and Princeton
WordNet. MedQuAD (Ben Abacha and Demner-Fushman, 2019). African Storybook and Pratham Books stories under CC BY, by
their authors. tldr-pages (CC BY 4.0). MBPP, official training split (CC BY 4.0). GSM8K, training split (MIT).
The weights are released under Apache-2.0; attribute the sources above when you pass them on.
"""
