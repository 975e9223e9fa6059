"""A peer outside: vLLM on the same shape, with dummy weights and synthetic acceptance, in a process of its own.

Owns: the program that the other process runs and reading what it prints. Must never import vLLM here, nor be compared
by anything but the time of a round. Needs vLLM 0.26 or later, importable or in a folder that `site` names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

MARK = "PEER "
SAFE_PATH = "-P"  # the modules beside this file must not shadow packages of the other side
LIMIT_S = 900.0
SHORT, LONG, TURNS = 64, 320, 3
MODELS = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
QUIET = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1",
         "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}  # fmt: skip


def vllm_rounds(
    raw: Mapping[str, Any], draft_vocab: int, job: Mapping[str, Any], folder: Path | None
) -> list[dict[str, Any]]:
    """Rounds of vLLM, or one entry with the reason why there are none.

    `job` has `batches`, `contexts`, `depth` (0 is plain decoding) and `accept`, the tokens that a round is forced to
    commit. `folder` is one with a vLLM inside: itself on the path, or with `site` below it; None: as Python finds it.
    """
    with tempfile.TemporaryDirectory() as place:
        _write_models(Path(place), raw, draft_vocab)
        command = [sys.executable, SAFE_PATH, __file__, json.dumps({**job, "models": place})]
        try:
            run = subprocess.run(command, env=_environment(folder), capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return [{"error": f"vLLM took more than {LIMIT_S:.0f} s"}]
    found = [json.loads(line[len(MARK) :]) for line in run.stdout.splitlines() if line.startswith(MARK)]
    if run.returncode and not found:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        return [{"error": f"vLLM ended with {run.returncode}: {lines[-1] if lines else 'no word'}"}]
    return found


def _environment(folder: Path | None) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | QUIET
    if folder is not None:
        inner = folder / "site"
        found["PYTHONPATH"] = str(inner if inner.is_dir() else folder)
    return found


def _write_models(place: Path, raw: Mapping[str, Any], draft_vocab: int) -> None:
    kind = MODELS[raw["architectures"][0]]
    base = {**raw, "model_type": kind, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
            "max_position_embeddings": 8192}  # fmt: skip
    base.setdefault("tie_word_embeddings", False)
    head = {**base, "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
            "draft_vocab_size": draft_vocab, "tie_word_embeddings": False}  # fmt: skip
    for name, config in (("target", base), ("head", head)):
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(config))


# ---- what the other process runs


def serve(job: Mapping[str, Any]) -> None:
    """Print one line a setting: milliseconds of a round, which commits `accept` tokens of every row."""
    vllm: Any = import_module("vllm")
    models, depth, accept = Path(job["models"]), job["depth"], job["accept"]
    drafting = {
        "method": "eagle3",
        "model": str(models / "head"),
        "num_speculative_tokens": depth,
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_length": accept,
    }
    engine = vllm.LLM(
        model=str(models / "target"),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(job["contexts"]) + LONG + 64,
        max_num_seqs=max(job["batches"]),
        gpu_memory_utilization=0.7,
        enable_prefix_caching=False,
        disable_log_stats=True,
        speculative_config=drafting if depth else None,
    )
    for context in job["contexts"]:
        for batch in job["batches"]:
            token = _token_seconds(vllm, engine, batch, context)
            made = {"peer": f"vLLM {vllm.__version__}", "depth": depth, "rows": batch, "context": context}
            print(MARK + json.dumps({**made, "ms": round(1e3 * token * (accept if depth else 1), 4)}), flush=True)


def _token_seconds(vllm: Any, engine: Any, batch: int, context: int) -> float:
    """Seconds of a token of every sequence: two lengths, so that the prompts cancel out."""
    prompts = [{"prompt_token_ids": [(17 * i + 31 * t) % 30000 + 5 for t in range(context)]} for i in range(batch)]
    _seconds(vllm, engine, prompts, SHORT)
    short, long = (min(_seconds(vllm, engine, prompts, n) for _ in range(TURNS)) for n in (SHORT, LONG))
    return (long - short) / (LONG - SHORT)


def _seconds(vllm: Any, engine: Any, prompts: Sequence[Any], tokens: int) -> float:
    params = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    engine.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begin


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
