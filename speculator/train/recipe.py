"""Reads a training recipe (TOML) into frozen records.

Owns: every number of a training run. Must never know tensors or models.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be used; the text names the key."""


@dataclass(frozen=True)
class TokenizerRecipe:
    """Byte-level BPE trained on `sample_megabytes` of text drawn by `weights` (passes over each source, default 1)."""

    vocab_size: int
    sample_megabytes: float = 40.0
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MlaRecipe:
    """Sizes of latent attention (arXiv 2405.04434). `q_rank` 0 projects the queries at once."""

    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int = 0


@dataclass(frozen=True)
class MoeRecipe:
    """A mixture of experts as in DeepSeek-V3 (arXiv 2412.19437) in all layers but the first `dense_layers`."""

    experts: int
    top_k: int
    inner_size: int
    shared: int = 1  # experts that every token passes
    dense_layers: int = 1
    scale: float = 1.0  # what the weights of the chosen experts add up to


@dataclass(frozen=True)
class DeltaRecipe:
    """Gated DeltaNet (arXiv 2412.06464) in all layers but every `every`-th, which attends."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int = 4
    every: int = 4


@dataclass(frozen=True)
class TargetRecipe:
    """Sizes of a target with tied embeddings.

    In DeepSeek-V3's layout with `mla` and `moe`, in Qwen3.5's with `delta`, else in Llama's.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int  # of the dense layers
    kv_heads: int = 0  # this and head_dim are Llama's; with `mla` they follow from it
    head_dim: int = 0
    mla: MlaRecipe | None = None
    moe: MoeRecipe | None = None
    delta: DeltaRecipe | None = None
    max_position: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class Learning:
    """Learning rates are peaks; the schedule warms up over `warmup` of the progress and falls linearly to `final`."""

    adam: float = 0.003
    muon: float = 0.02  # 0: AdamW for the matrices too
    warmup: float = 0.02
    final: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    cosine: bool = False
    balance: float = 0.001  # how far a step moves the correction of an expert that is chosen too often or too seldom


@dataclass(frozen=True)
class Phase:
    """A stretch of language modelling: `weights` are passes over each source, `prompt_weight` the loss on questions."""

    name: str
    seconds: float
    steps: int
    rows: int
    length: int
    weights: Mapping[str, float]
    prompt_weight: float = 1.0
    learning: Learning = field(default_factory=Learning)


@dataclass(frozen=True)
class Refine:
    """Rounds of writing answers and learning from them: clean ones are imitated, repeated n-grams made unlikely."""

    seconds: float
    rounds: int
    prompts: int
    new_tokens: int
    steps: int  # per round
    rows: int
    length: int
    weights: Mapping[str, float]  # the ordinary text mixed in
    own_share: float = 0.5  # rows of a batch that are the model's own answers
    sampled_share: float = 0.5  # of the answers; the rest are greedy
    temperature: float = 0.7
    unlikelihood: float = 0.5
    clean_share: float = 0.03  # answers with fewer faults are imitated
    imitate_greedy: bool = True  # clean greedy answers too; else the sampled ones alone
    common_share: float = 1.0  # an 8-gram that more of a round's answers have than this counts as repeated
    companion_share: float = 0.2  # answers with fewer repeated 4-grams teach the companion
    learning: Learning = field(default_factory=Learning)


@dataclass(frozen=True)
class Answers:
    """What the finished target writes for the head to learn from."""

    prompts: int
    new_tokens: int
    max_prompt: int = 256
    rows: int = 4096  # decoded together
    seconds: float = 150.0
    chat_share: float = 0.5  # prompts of the corpora; then pieces of text as questions; the rest is text to go on with
    snippet_share: float = 0.3
    greedy_share: float = 0.5
    temperatures: tuple[float, ...] = (0.7, 1.0)
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """A draft head and its training-time test. Empty `taps` are the default boundaries (2, n // 2, n - 3).

    Sizes and switches are those of an EAGLE-3 head; an MTP module has the target's, and reads its last state only.
    """

    seconds: float
    steps: int
    rows: int
    length: int
    kind: str = "eagle3"  # or "mtp"
    intermediate_size: int = 0
    heads: int = 0
    kv_heads: int = 0
    unroll: int = 7
    decay: float = 0.9  # weight of unrolled step j is decay ** j
    hard: float = 0.3  # share of the loss that is cross-entropy to the target's favourite
    acceptance: float = 0.0  # share of 1 - sum(min(p, q)), from half of the training on
    alive: float = 0.0  # how much a step counts less once an earlier draft of its row was wrong
    outside: float = 0.1  # weight of positions outside answers
    taps: tuple[int, ...] = ()
    fc_norm: bool = False
    norm_output: bool = False
    own_lm_head: bool = True  # else the target's
    learning: Learning = field(default_factory=Learning)


@dataclass(frozen=True)
class Companion:
    """A head trained together with the target in the named `phases` ("refine" too); its loss counts `weight`.

    A `goal` > 0 steers the weight, so that the head agrees with the target that often on the texts. In refinement the
    texts are the target's own answers, with a goal of their own. `labels` is the share of the head's gradient that may
    change what the target predicts, beside what its features say.
    """

    phases: tuple[str, ...]
    weights: Mapping[str, float]
    weight: float = 0.5
    goal: float = 0.0
    refine_goal: float = 0.0
    most: float = 0.5  # the steered weight stays below
    labels: float = 1.0
    refine_labels: float = 1.0
    shared_limit: float = 1.0  # of n-grams that answers share: above it fewer label gradients, below it more
    rows: int = 64
    length: int = 256
    unroll: int = 4
    documents: int = 60000
    learning: Learning = field(default_factory=Learning)


@dataclass(frozen=True)
class Evaluation:
    """Greedy chains on prompts that were never trained on."""

    new_tokens: int = 128
    repetition_tokens: int = 160
    depths: tuple[int, ...] = (3, 5, 7)
    sets: tuple[str, ...] = ("mt_bench", "gsm8k", "humaneval")
    limit: int = 80


@dataclass(frozen=True)
class Recipe:
    """A whole run, from text to a measured pair."""

    name: str
    tokenizer: TokenizerRecipe
    target: TargetRecipe
    phases: tuple[Phase, ...]
    answers: Answers
    head: Head
    refine: Refine | None = None
    companion: Companion | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = 1
    heldout_percent: float = 1.5

    @property
    def taps(self) -> tuple[int, ...]:
        n = self.target.layers
        if self.head.kind == "mtp":
            return ()
        return self.head.taps or (2, n // 2, n - 3)


def scale_time(recipe: Recipe, factor: float) -> Recipe:
    """The same recipe with all time budgets multiplied; schedules still run to their end."""
    return replace(
        recipe,
        phases=tuple(replace(phase, seconds=phase.seconds * factor) for phase in recipe.phases),
        refine=recipe.refine and replace(recipe.refine, seconds=recipe.refine.seconds * factor),
        answers=replace(recipe.answers, seconds=recipe.answers.seconds * factor),
        head=replace(recipe.head, seconds=recipe.head.seconds * factor),
    )


def load_recipe(path: Path) -> Recipe:
    """Read a TOML file; RecipeError names a missing, unknown or misshapen key."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist; recipes of this package are {', '.join(recipe_names())}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    recipe = parse_record(Recipe, raw, str(path))
    if wrong := _mismatch(recipe.target, recipe.head):
        raise RecipeError(f"{path}: {wrong}")
    return recipe


def _mismatch(target: TargetRecipe, head: Head) -> str:
    """What does not go together; empty when all does."""
    if (target.mla is None) != (target.moe is None):
        return "target: mla and moe come together, they make a target of DeepSeek-V3's family"
    if target.mla is None and not (target.kv_heads and target.head_dim):
        return "target: missing keys head_dim, kv_heads; without mla they make a target of Llama's family"
    if target.mla is not None and target.mla.rope_dim % 2:
        return f"target: mla: rope_dim must be even, got {target.mla.rope_dim}"
    if target.moe is not None and not 0 < target.moe.top_k <= target.moe.experts:
        return f"target: moe: top_k {target.moe.top_k} of {target.moe.experts} experts cannot be chosen"
    if target.delta is not None and (wrong := _delta_mismatch(target, target.delta)):
        return f"target: {wrong}"
    if head.kind not in ("eagle3", "mtp"):
        return f"head: kind must be eagle3 or mtp, got {head.kind!r}"
    if head.kind == "mtp" and target.mla is None and target.delta is None:
        return "head: kind mtp needs a target with mla and moe, or with delta, whose family publishes such modules"
    if head.kind == "eagle3" and not (head.intermediate_size and head.heads and head.kv_heads):
        return "head: missing keys heads, intermediate_size, kv_heads, the sizes of an eagle3 head"
    return ""


def _delta_mismatch(target: TargetRecipe, delta: DeltaRecipe) -> str:
    if target.mla is not None:
        return "delta goes with neither mla nor moe: hybrids of this recipe attend by grouped queries"
    if delta.value_heads % delta.key_heads:
        return f"delta: value_heads {delta.value_heads} is no multiple of key_heads {delta.key_heads}"
    if not 1 < delta.every <= target.layers:
        return f"delta: every {delta.every} of {target.layers} layers leaves no layers of both kinds"
    return ""


RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Of the recipes shipped with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def bundled_recipe(name: str) -> Path:
    """The recipe shipped with the package under this name, or the path itself when it is one."""
    here = RECIPES / f"{name}.toml"
    return here if here.exists() else Path(name)


def parse_record(kind: type[T], raw: Mapping[str, Any], where: str) -> T:
    """Build a frozen record from a table, strictly: unknown and missing keys are errors."""
    assert is_dataclass(kind)
    hints, known = get_type_hints(kind), {f.name for f in fields(kind)}
    if unknown := sorted(set(raw) - known):
        raise RecipeError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - set(raw)):
        raise RecipeError(f"{where}: missing keys {', '.join(missing)}")
    return kind(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in raw.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(hint), [a for a in get_args(hint) if a is not type(None)]
    if is_dataclass(hint):
        return parse_record(hint, _table(value, where), where)  # type: ignore[arg-type]
    if origin is tuple:
        return tuple(_value(inner[0], item, where) for item in _list(value, where))
    if origin is not None and issubclass(dict, origin if isinstance(origin, type) else int):
        return {str(k): float(v) for k, v in _table(value, where).items()}
    if inner:  # an optional record
        return _value(inner[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise RecipeError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a table, got {value!r}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise RecipeError(f"{where} must be a list, got {value!r}")
    return value
