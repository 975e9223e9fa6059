"""`speculator invariant`: the certificate that no draft, head, batch or chunk changes a committed token.

Owns: the settings that are played, and the first difference. Everything is compared with plain decoding of each prompt
by itself, through eager passes, in the same process. Must never call equal what it did not compare token by token.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from speculator.bench.pairs import load_pair, read_prompts
from speculator.bench.provenance import provenance
from speculator.drafts import fitted
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.local import LocalSequence
from speculator.recorded import RecordedPasses
from speculator.types import Draft, DraftShape, Feed, SamplingParams, Step

Texts = list[list[int]]  # committed tokens of each prompt


class Setting(NamedTuple):
    """One way to the same tokens."""

    name: str
    shapes: tuple[DraftShape | None, ...] = (None,)  # of the rows in turn; None is plain decoding
    together: int = 1  # prompts at a time
    chunk: int = 0  # longest piece of a prompt; 0 is the engine's
    told: int = 0  # draft so many tokens of the known text in place of the head's, some of them wrong
    branches: int = 0  # wrong siblings of every told token
    recorded: bool = False  # by graphs, where the engine has some


class Difference(NamedTuple):
    """Where a text first leaves plain decoding's."""

    prompt: int
    token: int
    expected: int
    found: int


class Sampled(NamedTuple):
    """How the target samples in a part of the certificate."""

    name: str
    temperature: float
    top_p: float

    def params(self, prompt: int) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, seed=1000 + prompt)


GREEDY, SEEDED = Sampled("greedy", 0.0, 1.0), Sampled("sampled", 0.8, 0.95)
DEPTHS = (1, 3, 7)
TREE = DraftShape(5, 24, 4)


class Line(LocalSequence):
    """A prompt on its way, by a setting."""

    def __init__(self, engine: Engine, row: int, sampling: SamplingParams, setting: Setting, prompt: Sequence[int],
                 text: Sequence[int], seed: int) -> None:  # fmt: skip
        super().__init__(engine, row, sampling, setting.shapes[row % len(setting.shapes)])
        self.tokens, self.prompt, self.setting, self.text = list(prompt), len(prompt), setting, text
        self.limit, self.draw = setting.chunk or engine.info.prefill_chunk, random.Random(seed)

    def next(self) -> Step:
        if self.cached < len(self.tokens) - 1 or len(self.tokens) == self.prompt:
            return self.feed()
        if self.setting.told:
            self.draft = self._told()
        return self.round()

    def feed(self) -> Step:
        chunk = self.tokens[self.cached : self.cached + self.limit]
        end = self.cached + len(chunk)
        following = self.tokens[end] if end < len(self.tokens) else None
        return self._step(feed=Feed(chunk, following), propose=self.shape if following is None else None)

    def _told(self) -> Draft:
        """The known text's next tokens with an error now and then, and siblings that are wrong."""
        done = len(self.tokens) - self.prompt
        tokens, parents, above = list[int](), list[int](), -1
        for token in self.text[done : done + self.setting.told]:
            for _ in range(self.draw.randint(0, self.setting.branches)):
                tokens.append(self.draw.randrange(self.engine.info.vocab_size))
                parents.append(above)
            tokens.append(token if self.draw.random() < 0.8 else self.draw.randrange(self.engine.info.vocab_size))
            parents.append(above)
            above = len(tokens) - 1
        return Draft(tuple(tokens), tuple(parents))

    @property
    def committed(self) -> int:
        return len(self.tokens) - self.prompt


# ---- playing ----


def play(engine: Engine, prompts: Texts, setting: Setting, sampled: Sampled, tokens: int, known: Texts) -> Texts:
    """The first `tokens` committed tokens of every prompt."""
    found: Texts = []
    with passes(engine, setting.recorded):
        for begin in range(0, len(prompts), setting.together):
            group = range(begin, min(begin + setting.together, len(prompts)))
            found += _group(engine, prompts, group, setting, sampled, tokens, known)
    return found


def _group(
    engine: Engine, prompts: Texts, group: range, setting: Setting, sampled: Sampled, tokens: int, known: Texts
) -> Texts:
    """Rows that start one step after the other, so that prompts and rounds of all lengths share steps."""
    lines = [
        Line(engine, row, sampled.params(i), setting, prompts[i], known[i] if known else (), i)
        for row, i in enumerate(group)
    ]
    started = 0
    while started < len(lines) or any(line.committed < tokens for line in lines):
        started = min(started + 1, len(lines))
        live = [line for line in lines[:started] if line.committed < tokens]
        steps = [line.next() for line in live]
        for line, step, result in zip(live, steps, engine.step(steps) if steps else [], strict=True):
            line.take(step, result)
    for line in lines:
        engine.close(line.row)
    return [line.tokens[line.prompt : line.prompt + tokens] for line in lines]


@contextmanager
def passes(engine: Engine, recorded: bool) -> Iterator[None]:
    """Eager passes, or those that the engine recorded."""
    before, rounds = engine.passes, engine.rounds
    if not recorded:
        engine.passes = before.eager if isinstance(before, RecordedPasses) else before
        engine.rounds = None
    try:
        yield
    finally:
        engine.passes, engine.rounds = before, rounds


def first_difference(expected: Texts, found: Texts) -> Difference | None:
    for i, (wanted, text) in enumerate(zip(expected, found, strict=True)):
        for t, (a, b) in enumerate(zip(wanted, text, strict=True)):
            if a != b:
                return Difference(i, t, a, b)
    return None


# ---- the certificate ----


def settings(engine: Engine, rows: int, depths: Sequence[int], tree: DraftShape, chunk: int) -> list[Setting]:
    """Every way that this engine has; drafts of a head only where it has one."""
    default = fitted(engine.info.default_shape, engine.info)
    known = [
        Setting("plain, all together", together=rows),
        Setting(f"plain, prompts in chunks of {chunk}", chunk=chunk),
        *(Setting(f"told chains of {depth}", told=depth) for depth in depths),
        Setting("told chains, all together", told=max(depths), together=rows, chunk=chunk),
        Setting("told trees", told=max(depths), branches=3),
        Setting("told trees, all together", told=max(depths), branches=2, together=rows),
    ]
    own = [
        *(Setting(f"chains of {depth}", (DraftShape(depth),)) for depth in depths),
        Setting("trees", (tree,)),
        Setting("plain, chains and trees together", (default, None, tree, DraftShape(2)), rows, chunk),
    ]
    recorded = [
        Setting("plain, recorded", recorded=True),
        Setting("told chains, recorded", told=default.depth, recorded=True),
        Setting("own drafts, recorded", (default,), recorded=True),
        Setting("own drafts, recorded, all together", (default, default, None), rows, recorded=True),
    ]
    chosen = known + (own if engine.head else [])
    if isinstance(engine.passes, RecordedPasses):
        chosen += recorded if engine.head else recorded[:2]
    trees = engine.info.max_branching > 1
    return [s for s in chosen if trees or not (s.branches or tree in s.shapes)]


def certify(engine: Engine, prompts: Texts, tokens: int, ways: Sequence[Setting], known: dict[str, Texts]) -> list[Any]:
    """A record for every setting, greedy and sampled; `known` keeps plain decoding's texts between engines."""
    records = []
    for sampled in (GREEDY, SEEDED):
        if sampled.name not in known:
            known[sampled.name] = play(engine, prompts, Setting("plain"), sampled, tokens, [])
        for way in ways:
            begin = time.perf_counter()
            found = play(engine, prompts, way, sampled, tokens, known[sampled.name])
            seconds = round(time.perf_counter() - begin, 2)
            difference = first_difference(known[sampled.name], found)
            count = sum(map(len, found))
            record = {"setting": f"{sampled.name}: {way.name}", "tokens": count, "seconds": seconds}
            records.append(record | {"difference": difference and difference._asdict()})
            print(_line(records[-1]), flush=True)
    return records


def _line(record: dict[str, Any]) -> str:
    off = record["difference"]
    said = "no difference" if off is None else "prompt {prompt}, token {token}: {found}, not {expected}".format(**off)
    return f"{record['setting']:55} {record['tokens']:6} tokens {record['seconds']:7.1f} s  {said}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the certificate; 0 where nothing differs, else 1."""
    args = _parser().parse_args(argv)
    report: dict[str, Any] = {"provenance": provenance(), "invariant": not args.fast, "synthetic": args.synthetic}
    print(json.dumps(report["provenance"]), flush=True)
    report["records"] = list(_records(args))
    different = [record for record in report["records"] if record["difference"]]
    compared = sum(record["tokens"] for record in report["records"])
    report |= {"tokens_compared": compared, "settings_that_differ": len(different)}
    print(f"{compared} tokens in {len(report['records'])} settings, {len(different)} of which differ")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if different else 0


def _records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    known: dict[str, Texts] = {}
    for head in args.head or [""]:
        print(f"head {head or 'of the pair'}", flush=True)
        engine, prompts = _loaded(args, head)
        _check_room(engine, prompts, args)
        ways = settings(engine, args.rows, args.depths, TREE, args.chunk)
        for record in certify(engine, prompts, args.tokens, ways, known):
            yield {"head": engine.info.draft_model, **record}
        del engine
        torch.cuda.empty_cache()


def _loaded(args: argparse.Namespace, head: str) -> tuple[Engine, Texts]:
    """The engine and its prompts; random ones for a synthetic target."""
    more: dict[str, object] = {"engine.invariant": str(not args.fast).lower(), "graphs.mode": args.graphs}
    more |= {"model.dtype": args.dtype, "engine.memory_share": args.memory_share}
    more |= {"engine.kv_tokens": args.kv_tokens} if args.kv_tokens else {}
    if args.synthetic:
        from speculator.bench.synthetic import synthetic_engine

        del more["model.dtype"]  # the shape has one
        engine = synthetic_engine(args.synthetic, args.device, args.rows, more)
        return engine, _random_prompts(engine.info.vocab_size, args.limit)
    pair = load_pair(argparse.Namespace(**{**vars(args), "head": head}), args.rows, more)
    texts = read_prompts(args.prompts, args.limit)
    return pair.engine, [list(pair.tokenizer.encode_chat(text)) for text in texts]


def _random_prompts(vocab: int, count: int) -> Texts:
    draw = random.Random(5)
    return [[draw.randrange(vocab) for _ in range(draw.randint(3, 200))] for _ in range(count or 8)]


def _check_room(engine: Engine, prompts: Texts, args: argparse.Namespace) -> None:
    info = engine.info
    need = max(map(len, prompts)) + args.tokens + info.scratch_tokens
    room = min((info.total_pages - 1) // info.max_rows * info.page_size, info.max_context + info.scratch_tokens)
    if need > room:
        raise ConfigError(f"The longest prompt with {args.tokens} tokens takes {need}, and a row has room for {room}.")


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="speculator invariant", description=__doc__.splitlines()[0])
    p.add_argument("--target", help="target folder (default: the bundled pair)")
    p.add_argument("--head", action="append", help="head folder; repeatable, all are held against the same texts")
    p.add_argument("--synthetic", help="a published shape with random weights instead, as `bench graphs` names them")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--threads", type=int, default=0, help="CPU threads, 0 is torch's choice")
    p.add_argument("--graphs", default="auto", help="recorded passes, as `serve` takes them")
    p.add_argument("--prompts", type=Path, help="JSONL with `turns` or `prompt`, or a text file of one a line")
    p.add_argument("--limit", type=int, default=8, help="at most so many prompts")
    p.add_argument("--tokens", type=int, default=64, help="committed tokens of each prompt")
    p.add_argument("--rows", type=int, default=8, help="prompts at a time where they run together")
    p.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))
    p.add_argument("--chunk", type=int, default=17, help="tokens of a prompt's pieces where they are short")
    p.add_argument("--kv-tokens", type=int, default=0, help="size of the KV cache; 0 lets the engine decide")
    p.add_argument("--memory-share", type=float, default=0.9, help="of the GPU that may be in use")
    p.add_argument("--fast", action="store_true", help="without invariant mode: shows what it is for, and its price")
    p.add_argument("--json", type=Path, help="write the certificate there")
    return p


if __name__ == "__main__":
    sys.exit(main())
