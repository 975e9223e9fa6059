"""The stages of a run, each leaving a folder behind and skipped when it is there.

Owns: the order, the files, and what a stage reads from the one before. Must never know losses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from speculator.heads.save import save_head
from speculator.train.answers import choose_prompts, load_written, save_written, write_all
from speculator.train.card import write_cards
from speculator.train.companion import CompanionTrainer
from speculator.train.data import Stream, build_streams, load_streams, sample_texts, save_stream, source_files
from speculator.train.eagle3 import HeadData, load_eagle3, new_head, train_head
from speculator.train.evaluate import evaluate
from speculator.train.pretrain import (
    Loss,
    heldout_losses,
    make_loss,
    new_target,
    round_weights,
    target_config,
    train_phase,
)
from speculator.train.recipe import Recipe, RecipeError
from speculator.train.refine import refine
from speculator.train.report import read_results, write_json
from speculator.train.tokenizer import ChatTokenizer, load_tokenizer, train_bpe
from target.llama import Llama
from target.weights import load_llama, save_llama


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes. `out` holds what is kept, `cache` what may be thrown away."""

    recipe: Recipe
    data: Path
    out: Path
    cache: Path
    prompts: Path | None
    device: torch.device
    workers: int = 1
    force: bool = False
    start: Path | None = None  # a target folder to go on from, instead of random weights

    def result(self, stage: str) -> Path:
        return self.out / "results" / f"{stage}.json"


def train_tokenizer(run: Run) -> dict[str, Any]:
    """Learn the byte-level BPE on a sample of the training texts."""
    recipe = run.recipe.tokenizer
    texts = sample_texts(run.data, recipe.sample_megabytes, recipe.weights, run.recipe.heldout_percent)
    tokenizer = train_bpe(texts, recipe.vocab_size)
    tokenizer.save(run.out / "tokenizer", run.recipe.target.max_position)
    return {"vocab_size": tokenizer.vocab_size}


def tokenize(run: Run) -> dict[str, Any]:
    """Turn every source into a training stream and a held-out stream in the cache."""
    files = source_files(run.data)
    job = partial(_tokenize_one, run.out / "tokenizer", run.cache / "tokens", run.recipe.heldout_percent)
    if run.workers == 1:
        return {"tokens": dict(zip(files, map(job, files.items()), strict=True))}
    with ProcessPoolExecutor(run.workers) as pool:
        return {"tokens": dict(zip(files, pool.map(job, files.items()), strict=True))}


def _tokenize_one(tokenizer: Path, cache: Path, percent: float, source: tuple[str, Path]) -> dict[str, int]:
    name, path = source
    train, heldout = build_streams(path, load_tokenizer(tokenizer), percent)
    save_stream(train, cache / f"{name}.train.npz")
    save_stream(heldout, cache / f"{name}.heldout.npz")
    print(f"[tokenize] {name}: {len(train.tokens)} + {len(heldout.tokens)} tokens", flush=True)
    return {"train": len(train.tokens), "heldout": len(heldout.tokens), "documents": len(train.starts)}


def train_target(run: Run) -> dict[str, Any]:
    """All phases of language modelling, then the refinement; saves bfloat16 weights."""
    tokenizer, device = load_tokenizer(run.out / "tokenizer"), run.device
    streams, heldout = (load_streams(run.cache / "tokens", split) for split in ("train", "heldout"))
    model = _first_weights(run, tokenizer).to(device)
    loss = make_loss(model, device)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "phases": {}}
    companion: CompanionTrainer | None = None
    for number, phase in enumerate(run.recipe.phases):
        companion = companion or _companion(run, model, phase.name, streams)
        work = partial(train_phase, model, loss, phase, streams, device, run.recipe.seed + number, companion)
        result["phases"][phase.name] = _checkpointed(run, model, phase.name, work)
    result["before_refine"] = _measure(run, model, tokenizer)
    if run.recipe.refine is not None:
        companion = companion or _companion(run, model, "refine", streams)
        result["phases"]["refine"] = _refined(run, model, loss, tokenizer, companion)
    if companion is not None:
        torch.save(companion.head.state_dict(), run.cache / "companion.pt")
    round_weights(model)
    result["heldout_loss"] = heldout_losses(model, heldout, 512, device)
    print(f"[target] held-out loss {result['heldout_loss']}", flush=True)
    save_llama(model, run.out / "target")
    tokenizer.save(run.out / "target", run.recipe.target.max_position)
    result["texts"] = _measure(run, model, tokenizer)
    return result


def _first_weights(run: Run, tokenizer: ChatTokenizer) -> Llama:
    if run.start is not None:
        return load_llama(run.start, torch.float32).requires_grad_(True).train()
    return new_target(target_config(run.recipe.target, tokenizer.vocab_size), run.recipe.seed)


def _companion(run: Run, model: Llama, phase: str, streams: Mapping[str, Stream]) -> CompanionTrainer | None:
    """The head that is trained with the target from this phase on, when the recipe wants one."""
    recipe = run.recipe.companion
    if recipe is None or phase not in recipe.phases:
        return None
    head = new_head(model, run.recipe.head, run.recipe.taps, run.recipe.seed)
    shape = replace(run.recipe.head, unroll=recipe.unroll)
    return CompanionTrainer(head, model, recipe, shape, streams, run.recipe.seed)


def _refined(
    run: Run, model: Llama, loss: Loss, tokenizer: ChatTokenizer, companion: CompanionTrainer | None
) -> list[dict[str, float]]:
    recipe = run.recipe.refine
    assert recipe is not None
    streams = load_streams(run.cache / "tokens", "train")
    return refine(model, loss, recipe, streams, tokenizer, run.device, run.recipe.seed + 100, companion)


def _checkpointed(
    run: Run, model: Llama, name: str, work: Callable[[], list[dict[str, float]]]
) -> list[dict[str, float]]:
    """Run a phase, or load the weights it left."""
    path = run.cache / f"phase-{name}.pt"
    if path.exists() and not run.force:
        saved = torch.load(path, map_location=run.device, weights_only=True)
        model.load_state_dict(saved["weights"])
        print(f"[{name}] taken from {path}", flush=True)
        return saved["curve"]  # type: ignore[no-any-return]
    curve = work()
    torch.save({"weights": model.state_dict(), "curve": curve}, path)
    return curve


def _measure(run: Run, model: Llama, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Repetition of greedy answers, when there are prompts to measure on."""
    if run.prompts is None:
        return {}
    return evaluate(model, None, tokenizer, run.prompts, run.recipe.evaluation)


def write_answers(run: Run) -> dict[str, Any]:
    """Let the finished target answer many prompts; kept in the cache."""
    tokenizer, recipe, seed = load_tokenizer(run.out / "target"), run.recipe.answers, run.recipe.seed
    prompts = choose_prompts(recipe, load_streams(run.cache / "tokens", "train"), tokenizer, seed)
    # on a GPU in bfloat16: the labels are computed again in training, only the choice of words is approximate
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    written = write_all(load_llama(run.out / "target", dtype, run.device), prompts, recipe, seed)
    save_written(written, run.cache / "answers.npz")
    counts = {"prompts": len(written), "answer_tokens": sum(len(w.answer) for w in written)}
    shown = [{k: tokenizer.decode(v) for k, v in w._asdict().items()} for w in written[:12]]
    return counts | {"samples": shown}


def train_eagle3(run: Run) -> dict[str, Any]:
    """Train the head on the answers; saves bfloat16 weights."""
    recipe, model = run.recipe.head, load_llama(run.out / "target", torch.float32, run.device)
    documents = [w.document() for w in load_written(run.cache / "answers.npz")]
    data = HeadData(documents, recipe.length, run.device, run.recipe.seed)
    head = new_head(model, recipe, run.recipe.taps, run.recipe.seed)
    if (run.cache / "companion.pt").exists():
        head.load_state_dict(torch.load(run.cache / "companion.pt", map_location=run.device, weights_only=True))
    curve = train_head(head, model, data, recipe)
    save_head(head, run.out / "eagle3")
    return {"parameters": sum(p.numel() for p in head.parameters()), "tokens": data.tokens, "curve": curve}


def measure(run: Run) -> dict[str, Any]:
    """Accept length of exact greedy chains and repetition, in float32 on the saved weights."""
    if run.prompts is None:
        raise RecipeError("evaluation needs --prompts, a folder with mt_bench.jsonl and the like")
    torch.set_float32_matmul_precision("highest")
    model = load_llama(run.out / "target", torch.float32, run.device)
    head, tokenizer = load_eagle3(run.out / "eagle3", model), load_tokenizer(run.out / "target")
    result = evaluate(model, head, tokenizer, run.prompts, run.recipe.evaluation)
    print(f"[evaluate] average {result['average']}", flush=True)
    return result


def write_card(run: Run) -> dict[str, Any]:
    results = {stage: read_results(run.result(stage)) for stage in STAGES if run.result(stage).exists()}
    results |= {path.stem: read_results(path) for path in sorted((run.out / "results").glob("acceptance-*.json"))}
    write_cards(run.recipe, results, run.data, run.out)
    return {}


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "tokenizer": train_tokenizer,
    "tokens": tokenize,
    "target": train_target,
    "answers": write_answers,
    "eagle3": train_eagle3,
    "evaluate": measure,
    "card": write_card,
}


def run_stages(run: Run, names: list[str]) -> None:
    """Run stages in order; one whose result file exists is skipped unless forced."""
    if unknown := sorted(set(names) - set(STAGES)):
        raise RecipeError(f"unknown stage {', '.join(unknown)}; stages are {', '.join(STAGES)}")
    run.cache.mkdir(parents=True, exist_ok=True)
    for name in (stage for stage in STAGES if stage in names):
        if run.result(name).exists() and not run.force:
            print(f"[{name}] is there already", flush=True)
            continue
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans every new length anew, 5 ms on the host each time
        begin = time.monotonic()
        result = STAGES[name](run)
        seconds = round(time.monotonic() - begin, 1)
        write_json(run.result(name), {"seconds": seconds, **_machine(run.device), **result})
        print(f"[{name}] done in {seconds} s", flush=True)


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__}
