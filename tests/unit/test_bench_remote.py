"""Rounds recorded over gRPC: those of a run in process, refusals in a sentence, and a run that its server leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from bench_server import Loopback, serving
from bench_toys import GREEDY, SAMPLED, Letters, lucky_engine, run, toy_prompts

from speculator import __version__
from speculator.bench.clock import spent
from speculator.bench.counterfactual import recorded
from speculator.bench.figures import as_recorded, figures
from speculator.bench.forced import Found, draft_everywhere
from speculator.bench.measure import Bench, Wishes
from speculator.bench.ngram import lookup
from speculator.bench.outcomes import outcomes
from speculator.bench.recording import Answer, Recording, read_recording
from speculator.bench.remote import RemotePlayer
from speculator.bench.rounds import Plan, play
from speculator.bench.served import check_limits, identity, reach, tokenizer_of
from speculator.bench.together import together
from speculator.client import Client, ServerInfo
from speculator.engine import Engine
from speculator.errors import ConfigError, SpeculatorError
from speculator.types import Draft, DraftShape, Rule, SamplingParams
from tests.unit.test_recorded import record

CHAIN, TREE, STATIC = DraftShape(4), DraftShape(4, 12, 3), DraftShape(2, parents=(-1, -1, 0))
DRAWN = SamplingParams(temperature=0.9, seed=5, rule=Rule.REJECTION)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return lucky_engine()


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    with serving(lucky_engine()) as made:
        yield made


@pytest.fixture
def player(server: Loopback) -> Iterator[RemotePlayer]:
    with reach(server.address) as client, client.draft_stream() as steps:
        yield RemotePlayer(steps, client.server_info().limits.context)


def ask(player: RemotePlayer, params: SamplingParams, shape: DraftShape | None, **more: Any) -> list[Answer]:
    plan = Plan(params, shape, **{"tokens": 40, "rows": 4, **more})
    return sorted(player.play(Letters(), toy_prompts(4), plan, {}), key=lambda a: a.key)


def here(engine: Engine, params: SamplingParams, shape: DraftShape | None, **more: Any) -> list[Answer]:
    return run(engine, params, shape, 4, **{"tokens": 40, **more})


def rounds_of(answer: Answer) -> list[tuple[object, ...]]:
    """What a round was, without its clock and what lies past the end."""
    return [(r.base, r.tokens, r.parents, r.logq, r.accepted[: answer.end - r.base]) for r in answer.rounds]


def same(ours: list[Answer], theirs: list[Answer]) -> bool:
    assert [replace(a, rounds=()) for a in ours] == [replace(a, rounds=()) for a in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert outcomes(one) == outcomes(other)
        for mine, remote in zip(rounds_of(one), rounds_of(other), strict=True):
            assert mine[:3] == remote[:3] and mine[4] == remote[4]
            assert remote[3] == pytest.approx(mine[3], abs=1e-2)  # other batches round differently
    return True


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        (GREEDY, CHAIN),
        (SAMPLED, CHAIN),
        (GREEDY, TREE),
        (SAMPLED, TREE),
        (GREEDY, STATIC),
        (DRAWN, CHAIN),
        (GREEDY, None),
    ],
)
def test_rounds_over_grpc_are_those_in_process(
    engine: Engine, player: RemotePlayer, params: SamplingParams, shape: DraftShape | None
) -> None:
    ours, theirs = here(engine, params, shape), ask(player, params, shape)
    assert same(ours, theirs) and sum(len(a.rounds) for a in theirs) > 50


def test_tau_is_the_same_in_process_over_grpc_and_with_graphs(engine: Engine, player: RemotePlayer) -> None:
    replaying = lucky_engine(rows=2)
    passes = record(replaying, CHAIN, rows=2, prompt_tokens=16)
    with serving(replaying) as there, reach(there.address) as client, client.draft_stream() as steps:
        answers = [here(engine, GREEDY, CHAIN, rows=2), ask(player, GREEDY, CHAIN)]
        answers.append(ask(RemotePlayer(steps, 512), GREEDY, CHAIN, rows=2))
    answers.append(here(replaying, GREEDY, CHAIN, rows=2))
    first, *others = [figures(as_recorded(found), 4, resamples=0) for found in answers]
    assert first.rounds > 50 and all(found == first for found in others)
    assert passes.counts["target verify"].replayed > 50


def test_drafts_of_the_callers_own_travel_too(engine: Engine, player: RemotePlayer) -> None:
    def drafter(tokens: Any) -> Draft:
        return lookup(tokens, 4)

    same(here(engine, GREEDY, CHAIN, drafter=drafter), ask(player, GREEDY, CHAIN, drafter=drafter))


def test_answers_end_at_the_servers_end_mark() -> None:
    first = here(lucky_engine(), GREEDY, CHAIN)[0]
    mark = frozenset({first.tokens[20]})
    ending = lucky_engine()
    ending.info = replace(ending.info, eos_token_ids=tuple(mark))
    with serving(ending) as there, reach(there.address) as client, client.draft_stream() as steps:
        theirs = ask(RemotePlayer(steps, 512), GREEDY, CHAIN, ends=mark)
    assert same(here(lucky_engine(), GREEDY, CHAIN, ends=mark), theirs)
    assert theirs[0].stopped and theirs[0].tokens == first.tokens[: first.tokens.index(first.tokens[20]) + 1]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_drafts_at_every_position_are_those_in_process(
    engine: Engine, player: RemotePlayer, params: SamplingParams
) -> None:
    answers = run(engine, params, CHAIN, count=2, tokens=20)
    shapes = [CHAIN, TREE]

    def have(answer: Answer) -> Found:
        return {CHAIN: recorded(answer)}

    theirs = {a.key: found for a, found in player.draft_everywhere(answers, shapes, params, 4, have)}
    for answer, found in draft_everywhere(engine, answers, shapes, params, 4, have):
        for shape in shapes:
            mine, remote = found[shape], theirs[answer.key][shape]
            assert mine.keys() == remote.keys() and len(mine) == len(answer.tokens) - 1
            assert all((remote[b].tokens, remote[b].parents) == (mine[b].tokens, mine[b].parents) for b in mine)


def test_the_clock_of_a_round_has_the_servers_parts_and_the_way(player: RemotePlayer) -> None:
    (answer,) = player.play(Letters(), toy_prompts(1), Plan(GREEDY, CHAIN, 30, 1), {})
    ats = [r.at for r in answer.rounds]
    assert ats == sorted(ats)
    for one in answer.rounds:
        assert min(one.verify, one.draft, one.commit, one.host, one.rpc) > 0
        assert one.alone and one.sessions == 1
    for before, one in pairwise(answer.rounds):  # the parts are the whole: nothing is left out or counted twice
        assert spent(one) == pytest.approx(one.at - before.at, abs=1e-5)


def test_the_clock_in_process_leaves_nothing_out_either(engine: Engine) -> None:
    (answer,) = play(engine, Letters(), toy_prompts(1), Plan(GREEDY, CHAIN, 30, 1), {})
    for before, one in pairwise(answer.rounds):
        assert spent(one) == pytest.approx(one.at - before.at, abs=0.01) and one.rpc == 0 < one.commit


def test_a_full_server_is_waited_for(server: Loopback, player: RemotePlayer) -> None:
    with Client(server.address) as other:
        held = [other.create([1, 2, 3]).session.session_id for _ in range(4)]
        freeing = threading.Timer(0.3, lambda: [other.delete(name) for name in held])
        freeing.start()
        assert len(list(player.play(Letters(), toy_prompts(1), Plan(GREEDY, CHAIN, 8, 1), {}))) == 1
        freeing.join()


def bench(player: RemotePlayer) -> Bench:
    return Bench(player, Letters(), toy_prompts(), Wishes(), lambda answers, total, label: answers)


def test_a_run_that_its_server_leaves_is_gone_on_with(player: RemotePlayer, tmp_path: Path) -> None:
    path, plan = tmp_path / "run.jsonl", Plan(GREEDY, CHAIN, 40, 2)
    whole = bench(player).run(plan)
    leaving = Loopback(lucky_engine())
    client = Client(leaving.address, patience=0.5)
    with client, client.draft_stream() as steps, Recording(path, {}) as recording:
        broken = bench(RemotePlayer(steps, 512))
        broken.progress = lambda answers, total, label: _closing_after(answers, 3, leaving)
        with pytest.raises(SpeculatorError):
            broken.run(plan, recording)
    kept = len(read_recording(path)[1])
    assert 3 <= kept < len(whole)
    with Recording(path, {}) as recording:
        again = bench(player).run(plan, recording)
    assert [outcomes(a) for a in again] == [outcomes(a) for a in whole]
    assert [a.tokens for a in again] == [a.tokens for a in whole]


def _closing_after(answers: Any, count: int, server: Loopback) -> Iterator[Answer]:
    for number, answer in enumerate(answers, 1):
        yield answer
        if number == count:
            server.close()


# ---- refusals


def info(server: Loopback) -> ServerInfo:
    with reach(server.address) as client:
        return client.server_info()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": "9.9.0"}, f"runs speculator 9.9.0, this is {__version__}"),
        ({"version": ""}, "runs speculator \\(unknown\\)"),
        ({"schema_revision": 1}, "speaks revision 1 of the contract, a recording needs 2"),
        ({"draft_method": "none"}, "has no draft head"),
    ],
)
def test_a_server_that_will_not_do_is_refused(server: Loopback, changes: dict[str, Any], told: str) -> None:
    class Told:
        def server_info(self, timeout: float) -> ServerInfo:
            return info(server)._replace(**changes)

    with pytest.raises(ConfigError, match=told):
        identity(Told(), "host:1")  # type: ignore[arg-type]


def test_wishes_beyond_the_servers_limits_are_refused(server: Loopback) -> None:
    there = info(server)
    check_limits(there, [CHAIN, TREE], 4)
    with pytest.raises(ConfigError, match="17 levels of a draft"):
        check_limits(there, [DraftShape(17)], 1)
    with pytest.raises(ConfigError, match="64 nodes"):
        check_limits(there, [DraftShape(4, 64, 8)], 1)
    with pytest.raises(ConfigError, match="--batch"):
        check_limits(there, [CHAIN], 5)


def test_nobody_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speculator.bench.served.REACH", 0.2)
    with pytest.raises(ConfigError, match="no server at 127.0.0.1:1 after .* start it"):
        reach("127.0.0.1:1")


def test_another_service_is_no_speculator_server() -> None:
    other = grpc.server(__import__("concurrent.futures").futures.ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with reach(f"127.0.0.1:{port}") as client, pytest.raises(ConfigError, match="is no speculator server"):
        identity(client, f"127.0.0.1:{port}")
    other.stop(None)


def test_a_foreign_tokenizer_is_refused(server: Loopback, tmp_path: Path) -> None:
    bundled = Path(__file__).resolve().parents[2] / "deploy" / "models" / "nano-en" / "target"
    other = info(server)._replace(tokenizer_sha256="ab" * 32)
    with pytest.raises(ConfigError, match="is not that of the server's"):
        tokenizer_of(other, bundled)
    with pytest.raises(ConfigError, match="name its model folder with --target"):
        tokenizer_of(other, None)


def test_a_server_without_log_probabilities_cannot_be_recorded(player: RemotePlayer) -> None:
    class Silent:
        patience = 1.0

        def __getattr__(self, name: str) -> Any:
            return getattr(player.steps, name)

        def propose(self, *given: Any) -> Any:
            found = player.steps.propose(*given)
            return found._replace(draft=replace(found.draft, logprobs=()))

    with pytest.raises(ConfigError, match="no log-probabilities"):
        ask(RemotePlayer(Silent(), 512), GREEDY, CHAIN)  # type: ignore[arg-type]


def test_another_rule_than_asked_for_is_noticed(player: RemotePlayer) -> None:
    class Stubborn:
        patience = 1.0

        def __getattr__(self, name: str) -> Any:
            return getattr(player.steps, name)

        def verify(self, *given: Any) -> Any:
            return player.steps.verify(*given)._replace(rule=Rule.BLOCK)

    with pytest.raises(ConfigError, match="verified by block where coupled was asked for"):
        ask(RemotePlayer(Stubborn(), 512), GREEDY, CHAIN)  # type: ignore[arg-type]


# ---- threads


def test_work_is_shared_out_and_everything_arrives() -> None:
    def work(item: int, stop: threading.Event) -> Iterator[int]:
        yield from (item, item)

    assert sorted(together(range(1, 9), work, 3)) == sorted([*range(1, 9)] * 2)
    assert list(together([], work, 3)) == []


def test_the_first_error_ends_all_after_what_came_before() -> None:
    def work(item: int, stop: threading.Event) -> Iterator[int]:
        yield item
        if item == 2:
            raise IndexError("two")

    found = []
    with pytest.raises(IndexError, match="two"):
        for value in together([1, 2, 3, 4], work, 1):
            found.append(value)
    assert found == [1, 2]


def test_leaving_early_ends_the_threads() -> None:
    ended = []

    def work(item: int, stop: threading.Event) -> Iterator[int]:
        yield item
        stop.wait(30)
        ended.append(stop.is_set())

    values = together([1, 2], work, 2)
    next(values)
    values.close()  # type: ignore[attr-defined]
    assert ended == [True, True]


def test_local_and_remote_can_be_resumed_from_one_another(engine: Engine, player: RemotePlayer) -> None:
    """What is in `have` is not asked again, wherever it came from."""
    plan, have = Plan(GREEDY, CHAIN, 40, 2), {}
    for answer in play(engine, Letters(), toy_prompts(3), plan, {}):
        have[answer.key] = replace(answer, rounds=())
    asked = list(player.play(Letters(), toy_prompts(), plan, dict(have)))
    assert {a.id for a in asked} == {"3", "4", "5"}
