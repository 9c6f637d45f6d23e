"""Ablations: the paper's rows, and the shortcuts that make them cheap."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small import codec_set, fit, samples
from tiny import tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.finetune import FinetuneSettings
from kvfold.calibrate.text import builtin_text
from kvfold.codecs import METHODS
from kvfold.codecs.identity import IdentityCodec
from kvfold.evaluate.ablate import ABLATIONS, ablate

SMALL = {"group": 4, "stages": 8, "iterations": 2, "codebook_size": 16}


def run(what: str, **how) -> list:
    texts = builtin_text()
    sizes = {"tokens": 3000, "context": 64, "windows": 2, "quiet": True, "codec": "rvq-paper", "settings": SMALL, **how}
    return ablate(tiny_model("llama"), tiny_tokenizer(), what, texts[:40], texts[-1], **sizes)


def test_fewer_stages_are_a_prefix_of_the_codes() -> None:
    whole, x = fit("rvq-paper"), samples(seed=5)[None]
    first = whole.with_stages(2)
    torch.testing.assert_close(first.indices(first.encode(x)), whole.indices(whole.encode(x))[..., :2, :], rtol=0, atol=0)
    assert first.codebook_bytes == whole.codebook_bytes * 2 // 3
    assert codec_set("rvq-paper").with_stages(2).bits_per_element < codec_set("rvq-paper").bits_per_element


@pytest.mark.parametrize("stages", [0, 4])
def test_stages_out_of_range_are_told(stages: int) -> None:
    with pytest.raises(kvfold.InputError, match="1 to 3 stages"):
        codec_set("rvq-paper").with_stages(stages)
    with pytest.raises(kvfold.InputError, match="residual"):
        codec_set("identity").with_stages(1)


@pytest.mark.parametrize("side", ["key", "value"])
def test_one_side_alone_leaves_the_other_exact(side: str) -> None:
    whole = codec_set("rvq-paper")
    alone = whole.only(side)
    kept, other = (alone.keys, alone.values) if side == "key" else (alone.values, alone.keys)
    assert kept == (whole.keys if side == "key" else whole.values)
    assert [type(codec) for codec in other if codec is not None] == [IdentityCodec] * 2
    assert alone.bits_per_element == (whole.bits_per_element + 32) / 2


def test_size_rows_are_the_papers_and_deeper_is_better() -> None:
    rows = run("size", settings={**SMALL, "group": 16})  # 1024 and 2048 codewords
    assert [row.name for row in rows] == ["1024 x 4", "1024 x 6", "1024 x 8", "2048 x 4", "2048 x 6", "2048 x 8"]
    assert [row.rate for row in rows] == [depth * bits / 16 for bits in (10, 11) for depth in (4, 6, 8)]
    kl = [row.evaluation.kl_mean for row in rows]
    assert kl[0] > kl[1] > kl[2]
    assert kl[3] > kl[4] > kl[5]


def test_target_rows_lose_less_than_both_together() -> None:
    keys, values, both = (row.evaluation.kl_mean for row in run("target"))
    assert 0 < keys < both
    assert 0 < values < both


def test_finetuning_rows_start_from_the_models_own_weights_and_leave_them() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = builtin_text()
    sizes = {
        "tokens": 3000,
        "context": 64,
        "windows": 2,
        "quiet": True,
        "codec": "rvq-paper",
        "settings": {**SMALL, "stages": 2},
    }
    settings = FinetuneSettings(steps=3, context=64, tokens_per_step=64, lr=1e-2)
    rows = ablate(model, tiny_tokenizer(), "finetune", texts[:40], texts[-1], finetuning=settings, **sizes)
    exact = [row.evaluation.perplexity_exact for row in rows]
    assert len(set(exact)) == 3
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_rows_are_told_one_by_one_and_carry_what_was_measured() -> None:
    seen: list[str] = []
    rows = run("target", each=lambda row: seen.append(row.name))
    assert seen == [row.name for row in rows]
    data = rows[2].to_json()
    assert data["perplexity_ratio"] == data["perplexity"] / data["perplexity_exact"]
    assert data["settings"]["stages"] == 8


def test_every_ablation_has_its_title_and_rows() -> None:
    for title, variants in ABLATIONS.values():
        assert "paper" in title
        assert len({variant.name for variant in variants}) == len(variants) > 1


def test_an_unknown_ablation_is_told() -> None:
    with pytest.raises(kvfold.InputError, match="grouping"):
        run("depth")


def test_codecs_kept_by_one_ablation_serve_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("target", keep=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 1
    calls = []
    monkeypatch.setattr(sys.modules["kvfold.calibrate.kept"], "calibrate", lambda *given, **named: calls.append(given))
    again = run("target", keep=tmp_path / "kept")
    assert [row.evaluation.perplexity for row in again] == [row.evaluation.perplexity for row in first]
    assert not calls
    monkeypatch.undo()
    run("target", keep=tmp_path / "kept", seed=1)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_the_steps_from_the_papers_codes_to_ours_end_at_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = ABLATIONS["rvq"][1]
    first, last = ({**METHODS["rvq"].defaults, **variant.calibration} for variant in (variants[0], variants[-1]))
    assert last == METHODS["rvq"].defaults
    unchanged = {name: METHODS["rvq"].defaults[name] for name in ("codebook_size", "center")}
    assert first == {**METHODS["rvq-paper"].defaults, **unchanged}
    for variant in variants:  # so that the test is done in a moment
        monkeypatch.setitem(variant.calibration, "distill_steps", min(2, variant.calibration["distill_steps"]))
    rows = run("rvq", codec="rvq", settings={**SMALL, "stages": 4})
    assert rows[-2].evaluation.kl_mean < rows[0].evaluation.kl_mean
    assert [row.settings["beam"] for row in rows] == [1, 1, 1, 1, 4, 4]
