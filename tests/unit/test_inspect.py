"""The report on a folder, and the probe: it finds the reading that fits, and says so only when it is clear."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculator.errors import CheckpointError, ConfigError
from speculator.heads.base import DraftHead
from speculator.heads.exact import ExactPlan, exact_pair
from speculator.heads.mtp import MtpHead
from speculator.heads.mtp_exact import MtpPlan, exact_mtp
from speculator.heads.mtp_save import save_mtp
from speculator.heads.probe import Acceptance, DenseProbe
from speculator.heads.save import save_head
from speculator.heads.taps import IDS
from speculator.inspect import ProbeReport, Verdict, clearly_better, inspect_folder, probe, self_check
from target.save import save_target

PROMPTS = [[(5 * i + 3 * j * j) % 24 for j in range(10)] for i in range(3)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(path: Path, plan: ExactPlan, layout: str = "specforge", **config: Any) -> Path:
    """The exact head's folder with keys of config.json set, or removed by `...`."""
    save_head(exact_pair(plan).head, path, layout, torch.float32)
    file = path / "config.json"
    keys = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({key: value for key, value in keys.items() if value is not ...}))
    return path


def probed(path: Path, plan: ExactPlan, layout: str = "specforge", **config: Any) -> ProbeReport:
    folder = saved(path / "head", plan, layout, **config)
    return probe(exact_pair(plan).target, folder, PROMPTS, new_tokens=24, depth=4)


RESIDUAL = "norm_before_residual"

# the folder lies in one field; the probe must find the truth and leave the other fields alone
LIES: list[tuple[ExactPlan, str, dict[str, Any], dict[str, str]]] = [
    (ExactPlan(), "specforge", {"eagle_config": {IDS: [1, 3, 4]}}, {"boundaries": "1,3,4"}),
    (ExactPlan(), "specforge", {"eagle_config": ..., IDS: [0, 2, 3]}, {"boundaries": "1,3,4"}),
    (ExactPlan(boundaries=(2, 3, 4)), "eagle3", {IDS: [3, 4, 5]}, {"boundaries": "2,3,4"}),
    (ExactPlan(norm_before_residual=True), "speculators", {RESIDUAL: ...}, {RESIDUAL: "true"}),
    (ExactPlan(), "modelopt", {RESIDUAL: True}, {RESIDUAL: "false"}),
    (ExactPlan(), "specforge", {"norm_output": True}, {"norm_output": "false"}),
    (ExactPlan(norm_output=True), "specforge", {"norm_output": ...}, {"norm_output": "true"}),
    (ExactPlan(own_embed=True), "specforge", {"embed_requires_grad": ...}, {"own_embed": "true"}),
    (ExactPlan("eagle", own_embed=True), "eagle", {"embed_requires_grad": ...}, {"own_embed": "true"}),
    (ExactPlan(lag=7), "angelslim", {"rope_theta": 1e6}, {"rope.theta": "10000"}),
    (
        ExactPlan(lag=7, head_theta=500.0, target_theta=500.0),
        "eagle3",
        {"rope_theta": ..., "rope_scaling": ...},
        {"rope.theta": "500"},
    ),
    (
        ExactPlan(norm_output=True),
        "specforge",
        {"norm_output": ..., "eagle_config": {IDS: [1, 3, 4]}},
        {"norm_output": "true", "boundaries": "1,3,4"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "layout", "config", "truth"), LIES)
def test_the_probe_finds_what_fits(
    tmp_path: Path, plan: ExactPlan, layout: str, config: dict[str, Any], truth: dict[str, str]
) -> None:
    report = probed(tmp_path, plan, layout, **config)
    assert report.suggested == truth
    assert report.base.rates[-1] < 0.9 and report.reached.rates == (1.0,) * 4
    better = {f.field for f in report.findings if f.verdict is Verdict.BETTER}
    assert better == set(truth)
    for name, value in truth.items():
        assert f"{name} = " in report.text() and f"clearly better: {value}" in report.text()


def test_the_probe_leaves_a_right_reading_alone(tmp_path: Path) -> None:
    report = probed(tmp_path, ExactPlan(lag=3))
    assert report.suggested == {} and report.base is report.reached
    assert {f.field: f.verdict for f in report.findings} == {
        "boundaries": Verdict.FITS,
        "norm_before_residual": Verdict.FITS,
        "norm_output": Verdict.FITS,
    }
    assert report.text().endswith("no alternative is clearly better")
    assert "accept length 5.000, by position 1.000 1.000 1.000 1.000" in report.text()


def test_a_field_without_effect(tmp_path: Path) -> None:
    """A table that equals the target's, and a theta that a head which looks at itself only cannot feel."""
    plan = ExactPlan()
    folder = saved(tmp_path / "head", plan)
    pair, file = exact_pair(plan), str(folder / "model.safetensors")
    save_file({**load_file(file), "embed_tokens.weight": pair.target.embed.weight.clone()}, file)
    alternatives = {"own_embed": ["true"], "rope.theta": ["500"]}
    report = probe(pair.target, folder, PROMPTS, alternatives, new_tokens=24, depth=4)
    assert [f.verdict for f in report.findings] == [Verdict.NO_EFFECT, Verdict.NO_EFFECT]


def scripted(**lengths: Sequence[int]) -> object:
    """A measure that looks at the record alone: as an engine's probe would be plugged in."""

    def measure(head: DraftHead) -> Acceptance:
        kind = "residual" if head.record.norm_before_residual else "output" if head.record.norm_output else "base"
        return Acceptance(tuple(lengths[kind]), 4)

    return measure


def test_small_differences_are_undecided(tmp_path: Path) -> None:
    plan = ExactPlan()
    folder = saved(tmp_path / "head", plan)
    measure = scripted(base=[1, 2, 3] * 20, residual=[1, 2, 3] * 19 + [2, 2, 4], output=[4] * 60)
    alternatives = {"norm_before_residual": ["true", "false"], "norm_output": ["true"]}
    report = probe(exact_pair(plan).target, folder, [], alternatives, measure=measure)  # type: ignore[arg-type]
    verdicts = {f.field: f.verdict for f in report.findings}
    assert verdicts["norm_output"] is Verdict.BETTER
    assert report.suggested == {"norm_output": "true"} and report.reached.mean == 4.0
    undecided = probe(exact_pair(plan).target, folder, [], {"norm_before_residual": ["true"]}, measure=measure)  # type: ignore[arg-type]
    assert [f.verdict for f in undecided.findings] == [Verdict.UNDECIDED]
    assert "norm_before_residual = false: undecided" in undecided.text()


def test_alternatives_that_cannot_be_loaded_are_reported(tmp_path: Path) -> None:
    plan = ExactPlan()
    folder = saved(tmp_path / "head", plan)
    report = probe(exact_pair(plan).target, folder, PROMPTS, {"qk_norm": ["true"]}, new_tokens=24, depth=4)
    assert "missing tensors" in report.findings[0].failed["true"]
    assert "true           cannot be loaded: " in report.text()


def test_overrides_are_the_starting_point_and_are_not_probed(tmp_path: Path) -> None:
    plan = ExactPlan()
    folder = saved(tmp_path / "head", plan, norm_before_residual=True)
    target, said = exact_pair(plan).target, list[str]()
    given = {"norm_before_residual": "false"}
    report = probe(target, folder, PROMPTS, overrides=given, new_tokens=24, depth=4, progress=said.append)
    assert report.base.rates == (1.0,) * 4
    assert "norm_before_residual" not in {f.field for f in report.findings}
    assert said[0] == "norm_before_residual=false" and len(said) == len(set(said))


def test_clearly_better_needs_size_and_certainty() -> None:
    def acceptance(*lengths: int) -> Acceptance:
        return Acceptance(lengths, 5)

    assert clearly_better(acceptance(*[3] * 50), acceptance(*[2] * 50))
    assert not clearly_better(acceptance(*[2] * 50), acceptance(*[3] * 50))
    assert not clearly_better(acceptance(5, 0, 5), acceptance(0, 5, 0))
    assert not clearly_better(acceptance(*[2] * 999, 3), acceptance(*[2] * 1000))


def test_acceptance_by_position() -> None:
    measured = Acceptance((0, 1, 3, 3), 3)
    assert measured.rates == (0.75, 0.5, 0.5) and measured.mean == 1.75


def test_prompts_that_end_too_soon() -> None:
    with pytest.raises(ConfigError, match="no prompt leads to more than 5 new tokens"):
        DenseProbe(exact_pair().target, PROMPTS, new_tokens=4, depth=5)


def test_self_check_says_that_the_arithmetic_is_right() -> None:
    assert self_check().count("1.000 1.000 1.000 1.000 1.000") == 4


def test_self_check_fails_when_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speculator.heads.eagle3.Eagle3Head.recycle", lambda self, output: output.roll(1, -1))
    with pytest.raises(CheckpointError, match="this installation computes wrongly"):
        self_check()


MTP_TRUTHS: list[tuple[MtpPlan, dict[str, str]]] = [
    (MtpPlan(hidden_first=True), {}),
    (MtpPlan(hidden_first=True, raw_input=True), {"boundaries": "6"}),
    (MtpPlan(hidden_first=True, raw_input=True, norm_output=False), {"boundaries": "6", "norm_output": "false"}),
]


def saved_with_modules(path: Path, plan: MtpPlan) -> Path:
    target, head = exact_mtp(plan)
    assert isinstance(head, MtpHead)
    save_target(target, path, torch.float32)
    save_mtp(head, path, torch.float32)
    return path


@pytest.mark.parametrize(("plan", "truth"), MTP_TRUTHS)
def test_the_probe_finds_what_fits_mtp_modules(tmp_path: Path, plan: MtpPlan, truth: dict[str, str]) -> None:
    """F or B(n), which side of the norm is recycled, and whether row 0 was zeroed (which hardly ever shows)."""
    folder = saved_with_modules(tmp_path, plan)
    report = probe(exact_mtp(plan).target, folder, PROMPTS, new_tokens=24, depth=4)
    assert report.suggested == truth
    assert report.reached.rates == (1.0,) * 4
    verdicts = {finding.field: finding.verdict for finding in report.findings}
    assert set(verdicts) == {"boundaries", "norm_output", "zero_first"}
    if not truth:
        assert (verdicts["boundaries"], verdicts["norm_output"]) == (Verdict.FITS, Verdict.FITS)


# reports


def test_report_on_a_target_with_modules(tmp_path: Path) -> None:
    folder = saved_with_modules(tmp_path, MtpPlan(hidden_first=True))
    text = inspect_folder(folder, folder)
    assert f"{folder}: a target\n" in text and "complete, none unknown" in text
    assert f"{folder}: a head of kind mtp, checked against {folder}\n" in text
    assert "modules       1              tensor names" in text
    assert "hidden_first  true           as in MiMo-7B" in text
    assert "boundaries    none           MTP reads the final state F" in text


def test_report_on_a_target(tmp_path: Path) -> None:
    pair = exact_pair()
    save_target(pair.target, tmp_path)
    text = inspect_folder(tmp_path)
    assert text.startswith(f"{tmp_path}: a target\n")
    assert "num_layers         6" in text and "complete, none unknown" in text
    count = sum(p.numel() for name, p in pair.target.named_parameters() if "norm" not in name)
    assert f"{count / 1e6:,.2f} million" in text


def test_report_on_a_head_names_every_choice_and_its_source(tmp_path: Path) -> None:
    folder = saved(tmp_path / "head", ExactPlan())
    text = inspect_folder(folder)
    assert "a head of kind eagle3, not checked against a target" in text
    assert "boundaries            1,3,4          config eagle_config.eagle_aux_hidden_state_layer_ids" in text
    assert "ambiguous: norm_before_residual = false" in text and "could be true" in text
    assert "not needed: d2t, t2d" in text


def test_report_checks_a_head_against_its_target(tmp_path: Path) -> None:
    folder = saved(tmp_path / "head", ExactPlan(), eagle_config=..., eagle_aux_hidden_state_layer_ids=...)
    assert "open until the target is known" in inspect_folder(folder)
    save_target(exact_pair().target, tmp_path / "target")
    text = inspect_folder(folder, tmp_path / "target", {"norm_output": "true"})
    assert f"checked against {tmp_path / 'target'}" in text
    assert "2,3,3          default (2, n//2, n-3) for n = 6" in text
    assert "norm_output           true           override, the file says false" in text
    save_target(exact_pair(ExactPlan(vocab=30)).target, tmp_path / "other")
    with pytest.raises(CheckpointError, match="made for another target"):
        inspect_folder(folder, tmp_path / "other")


def test_report_on_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither model.safetensors"):
        inspect_folder(tmp_path)
