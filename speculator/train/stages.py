"""The stages of a run, each leaving a folder behind and skipped when it is there.

Owns: the order, the files, and what a stage reads from the one before. Must never know losses.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from speculator.errors import CheckpointError
from speculator.train.answers import choose_prompts, load_written, save_written, write_all
from speculator.train.card import write_cards
from speculator.train.companion import CompanionTrainer
from speculator.train.data import Stream, build_streams, load_streams, sample_texts, save_stream, source_files
from speculator.train.evaluate import evaluate
from speculator.train.experts import prepare_experts
from speculator.train.folders import head_folder, load_trained_head, save_trained_head, target_folder
from speculator.train.head import HeadData, train_head
from speculator.train.model import new_head, new_target, round_weights, target_config, trainable_target
from speculator.train.pretrain import Loss, heldout_losses, make_loss, train_phase
from speculator.train.recipe import Recipe, RecipeError
from speculator.train.refine import refine
from speculator.train.report import read_results, write_json
from speculator.train.tokenizer import ChatTokenizer, load_tokenizer, train_bpe
from target.decoder import Decoder
from target.load import load_target
from target.save import save_target


@dataclass
class Trainee:
    """A target in training with what was compiled for it, which takes a minute on a GPU."""

    model: Decoder
    loss: Loss
    companion: CompanionTrainer | None = None


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
    trainees: list[Trainee] = field(default_factory=list)  # what `target` hands to `refine` in one process

    def result(self, stage: str) -> Path:
        return self.out / "results" / f"{stage}.json"


EARLIER = "the head of an earlier run of this stage"


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
    """All phases of language modelling; saves bfloat16 weights, and the exact ones in the cache."""
    tokenizer, device = load_tokenizer(run.out / "tokenizer"), run.device
    streams = load_streams(run.cache / "tokens", "train")
    model = _first_weights(run, tokenizer).to(device)
    one = Trainee(model, make_loss(model, device))
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "phases": {}}
    for number, phase in enumerate(run.recipe.phases):
        one.companion = one.companion or _companion(run, model, phase.name, streams)
        work = partial(train_phase, model, one.loss, phase, streams, device, run.recipe.seed + number, one.companion)
        result["phases"][phase.name] = _checkpointed(run, model, phase.name, work)
    run.trainees.append(one)
    return result | _save_target(run, model, one.companion, tokenizer)


def refine_target(run: Run) -> dict[str, Any]:
    """Refine the target of the stage before, when the recipe wants it; replaces its weights."""
    recipe, device = run.recipe.refine, run.device
    if recipe is None:
        return {}
    tokenizer, streams = load_tokenizer(run.out / "tokenizer"), load_streams(run.cache / "tokens", "train")
    one = _trainee(run, streams)
    curve = refine(one.model, one.loss, recipe, streams, tokenizer, device, run.recipe.seed + 100, one.companion)
    return {"curve": curve} | _save_target(run, one.model, one.companion, tokenizer)


def _trainee(run: Run, streams: Mapping[str, Stream]) -> Trainee:
    """The target of the stage before with its exact weights, compiled already when that stage ran here."""
    if run.trainees:
        one = run.trainees.pop()
    else:
        model = trainable_target(target_folder(run.out)).to(run.device)
        one = Trainee(model, make_loss(model, run.device))
    if run.recipe.companion is None or "refine" not in run.recipe.companion.phases:
        one.companion = None
    else:
        one.companion = one.companion or _companion(run, one.model, "refine", streams)
    if (run.cache / "target.pt").exists():
        one.model.load_state_dict(torch.load(run.cache / "target.pt", map_location=run.device, weights_only=True))
    if one.companion is not None and (run.cache / "companion.pt").exists():
        one.companion.head.load_state_dict(_companion_weights(run))
    return one


def _save_target(
    run: Run, model: Decoder, companion: CompanionTrainer | None, tokenizer: ChatTokenizer
) -> dict[str, Any]:
    """Write the target, and what a later stage needs; measure what was written."""
    torch.save(model.state_dict(), run.cache / "target.pt")
    if companion is not None:
        torch.save(companion.head.state_dict(), run.cache / "companion.pt")
    round_weights(model)
    losses = heldout_losses(model, load_streams(run.cache / "tokens", "heldout"), 512, run.device)
    print(f"[target] held-out loss {losses}", flush=True)
    save_target(model, target_folder(run.out))
    if run.recipe.head.kind != "mtp":  # a head of the target before fits no longer; modules went with its folder
        shutil.rmtree(head_folder(run.out, run.recipe.head.kind), ignore_errors=True)
    tokenizer.save(target_folder(run.out), run.recipe.target.max_position)
    return {"heldout_loss": losses, "texts": _measure(run, model, tokenizer)}


def _companion_weights(run: Run) -> dict[str, torch.Tensor]:
    return torch.load(run.cache / "companion.pt", map_location=run.device, weights_only=True)  # type: ignore[no-any-return]


def _first_weights(run: Run, tokenizer: ChatTokenizer) -> Decoder:
    if run.start is not None:
        return trainable_target(run.start)
    return new_target(target_config(run.recipe.target, tokenizer.vocab_size), run.recipe.seed)


def _companion(run: Run, model: Decoder, phase: str, streams: Mapping[str, Stream]) -> CompanionTrainer | None:
    """The head that is trained with the target from this phase on, when the recipe wants one."""
    recipe = run.recipe.companion
    if recipe is None or phase not in recipe.phases:
        return None
    head = new_head(model, run.recipe.head, run.recipe.taps, run.recipe.seed)
    shape = replace(run.recipe.head, unroll=recipe.unroll)
    return CompanionTrainer(head, model, recipe, shape, streams, run.recipe.seed)


def _checkpointed(
    run: Run, model: Decoder, name: str, work: Callable[[], list[dict[str, float]]]
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


def _measure(run: Run, model: Decoder, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Repetition of greedy answers, when there are prompts to measure on."""
    if run.prompts is None:
        return {}
    return evaluate(model, None, tokenizer, run.prompts, run.recipe.evaluation)


def write_answers(run: Run) -> dict[str, Any]:
    """Let the finished target answer many prompts; kept in the cache."""
    folder, recipe, seed = target_folder(run.out), run.recipe.answers, run.recipe.seed
    tokenizer = load_tokenizer(folder)
    prompts = choose_prompts(recipe, load_streams(run.cache / "tokens", "train"), tokenizer, seed)
    # on a GPU in bfloat16: the labels are computed again in training, only the choice of words is approximate
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    written = write_all(load_target(folder, dtype, run.device), prompts, recipe, seed)
    save_written(written, run.cache / "answers.npz")
    counts = {"prompts": len(written), "answer_tokens": sum(len(w.answer) for w in written)}
    shown = [{k: tokenizer.decode(v) for k, v in w._asdict().items()} for w in written[:12]]
    return counts | {"samples": shown}


def train_draft_head(run: Run) -> dict[str, Any]:
    """Train the head on the answers, on from one that lies there; saves bfloat16 weights."""
    recipe, model = run.recipe.head, load_target(target_folder(run.out), torch.float32, run.device)
    prepare_experts(model)
    documents = [w.document() for w in load_written(run.cache / "answers.npz")]
    data = HeadData(documents, recipe.length, run.device, run.recipe.seed)
    head = new_head(model, recipe, run.recipe.taps, run.recipe.seed)
    begun, weights = _head_so_far(run, model)
    head.load_state_dict(head.state_dict() if weights is None else weights)
    curve = train_head(head, model, data, recipe)
    save_trained_head(head, model, run.out)
    parameters = sum(p.numel() for p in head.parameters())
    return {"parameters": parameters, "tokens": data.tokens, "began_with": begun, "curve": curve}


def _head_so_far(run: Run, model: Decoder) -> tuple[str, dict[str, torch.Tensor] | None]:
    """A head that was trained by itself before, else the target's companion; and which it is."""
    try:
        return EARLIER, load_trained_head(run.recipe.head.kind, model, run.out).state_dict()
    except CheckpointError:
        there = (run.cache / "companion.pt").exists()
        return ("the target's companion", _companion_weights(run)) if there else ("nothing", None)


def measure(run: Run) -> dict[str, Any]:
    """Accept length of exact greedy chains and repetition, in float32 on the saved weights."""
    if run.prompts is None:
        raise RecipeError("evaluation needs --prompts, a folder with mt_bench.jsonl and the like")
    torch.set_float32_matmul_precision("highest")
    model = load_target(target_folder(run.out), torch.float32, run.device)
    head = load_trained_head(run.recipe.head.kind, model, run.out)
    tokenizer = load_tokenizer(target_folder(run.out))
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
    "refine": refine_target,
    "answers": write_answers,
    "head": train_draft_head,
    "evaluate": measure,
    "card": write_card,
}
HEADS = ("eagle3", "mtp")  # the stage `head`, asked for by the kind of head that the recipe has


def run_stages(run: Run, names: list[str]) -> None:
    """Run stages in order; one whose result file exists is skipped unless forced."""
    names = [_stage(name, run.recipe) for name in names]
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


def _stage(name: str, recipe: Recipe) -> str:
    """The stage of this name; RecipeError where there is none, or the recipe's head is of another kind."""
    if name in HEADS and name != recipe.head.kind:
        raise RecipeError(f"recipe {recipe.name} has a head of kind {recipe.head.kind}, so {name} cannot be trained")
    if name not in (*STAGES, *HEADS):
        raise RecipeError(f"unknown stage {name}; stages are {', '.join((*STAGES, *HEADS))}")
    return "head" if name in HEADS else name


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__}
