"""Codebooks learned by moving average: they get better, an interruption changes nothing, and bad input is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.checkpoint import Checkpoint
from kvfold.calibrate.learned import LearnedSide
from kvfold.calibrate.text import builtin_text
from kvfold.codecs.ema import EmaBooks
from kvfold.codecs.residual import ResidualCodec, ResidualSettings
from kvfold.integration.capture import CaptureCache

SMALL = {"group": 4, "codebook_size": 16, "stages": 2, "iterations": 1}
TEXT = "\n\n".join(builtin_text())[:6000]


def learned(model: Any = None, texts: Any = TEXT, seed: int = 0, codec: str = "rvq-paper", **ema: Any) -> kvfold.CodecSet:
    model = tiny_model("llama") if model is None else model
    ema = {"steps": 4, "batch_tokens": 300, "every": 3, **ema}
    how: dict[str, Any] = {"tokens": 200, "context": 100, "settings": SMALL if codec == "rvq-paper" else {}}
    return kvfold.calibrate(model, tiny_tokenizer(), texts, codec, seed, **how, ema=kvfold.Ema(**ema), quiet=True)


def folder_bytes(codecs: kvfold.CodecSet, folder: Path) -> dict[str, bytes]:
    codecs.save(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ema.jsonl").read_text().splitlines()]


class Crash(BaseException):
    """Not an Exception, as an interrupt is not."""


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The `number`-th sequence that is read from now on stops everything."""
    seen = [0]
    choose = CaptureCache.choose

    def counting(self: CaptureCache, keep: torch.Tensor) -> None:
        seen[0] += self.take is not None
        if seen[0] == number:
            raise Crash
        choose(self, keep)

    monkeypatch.setattr(CaptureCache, "choose", counting)


def crashes(monkeypatch: pytest.MonkeyPatch, number: int, **how: Any) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, number)
        with pytest.raises(Crash):
            learned(**how)


def test_codebooks_get_better_on_text_they_have_not_seen() -> None:
    model, spare = tiny_model("llama"), "\n\n".join(builtin_text())[-1500:]
    before = kvfold.calibrate(model, tiny_tokenizer(), TEXT, "rvq-paper", tokens=200, context=100, settings=SMALL, quiet=True)
    after = learned(model, steps=20, batch_tokens=1000, decay=0.9)
    cache = CaptureCache(after.spec, True)
    ids = tiny_tokenizer()(spare, return_tensors="pt")["input_ids"]
    cache.choose(torch.arange(300))
    with torch.no_grad(), kvfold.integration.attach.hooked(model, lambda: cache):
        model(input_ids=ids[:, :300], use_cache=True)
    for layer in range(3):
        for side, x in zip(("keys", "values"), cache.samples(layer), strict=True):
            old, new = (getattr(codecs, side)[layer].distortion(x) for codecs in (before, after))
            assert new < 0.97 * old, (layer, side)


def test_the_loss_falls_and_the_curve_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    made = learned(steps=12, batch_tokens=2000, decay=0.8, texts=TEXT[:2000], checkpoint=folder)
    records = curve(folder)
    assert [record["step"] for record in records] == list(range(1, 13))
    for side in ("key_mse", "value_mse"):
        assert records[-1][side] < 0.95 * records[0][side]
    assert made.info["ema"]["key_mse"] == records[-1]["key_mse"]
    assert all(record["seconds"] > 0 and record["epoch"] in range(13) for record in records)


def test_what_is_written_tells_how_it_was_made(tmp_path: Path) -> None:
    made = learned(seed=3, reseed=0.1)
    made.save(tmp_path / "c")
    info = kvfold.load(tmp_path / "c").info
    assert {name: info[name] for name in ("seed", "tokens", "text")} == {"seed": 3, "tokens": 200, "text": "given"}
    told = {name: info["ema"][name] for name in ("steps", "tokens", "decay", "eps", "reseed", "context", "sequences")}
    assert told == {"steps": 4, "tokens": 1200, "decay": 0.99, "eps": 1e-5, "reseed": 0.1, "context": 100, "sequences": 3}
    assert all(0 < error < 1 for pair in info["distortion"] for error in pair)


def test_padding_does_not_count(tmp_path: Path) -> None:
    text = TEXT[:250]  # three sequences of 100 tokens, the last with 50
    learned(texts=text, steps=2, checkpoint=tmp_path / "run")
    assert [record["tokens"] for record in curve(tmp_path / "run")] == [250, 500]
    assert [record["epoch"] for record in curve(tmp_path / "run")] == [0, 1]


def test_the_statistics_are_those_of_all_vectors_that_pass() -> None:
    codec = ResidualCodec(16, ResidualSettings(group=4, codebook_size=16, stages=2, grouping="strided"))
    x = torch.randn(2, 60, 16)
    codec.fit(x, torch.Generator().manual_seed(0))
    side = LearnedSide("0.key", codec, 0.9, 1e-5, 0.0)
    side.start(codec)
    for part in x.split(25, dim=1):
        side.add(part)
    books = EmaBooks(codec.codebooks.float(), 0.9)
    rows = codec.scaled_groups(x)[0].reshape(-1, 4)
    _, counts, sums, error = books.statistics(rows)
    assert float(counts[0].sum()) == 2 * 60 * 4
    mse = side.update()
    books.update(counts, sums)
    assert mse == pytest.approx(float(error) / rows.numel(), rel=1e-5)
    torch.testing.assert_close(side.books.tables, books.tables, rtol=1e-5, atol=1e-6)
    assert torch.equal(side.finished(2).codebooks, side.books.tables.half())


@pytest.mark.parametrize("reseed", [0.0, 0.3])
@pytest.mark.parametrize("sequence", [1, 4, 8, 13])
def test_an_interrupted_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequence: int, reseed: float
) -> None:
    whole = folder_bytes(learned(steps=5, reseed=reseed, checkpoint=tmp_path / "a"), tmp_path / "whole")
    crashes(monkeypatch, sequence, steps=5, reseed=reseed, checkpoint=tmp_path / "b")
    assert Checkpoint(tmp_path / "b").header()["step"] == (sequence - 1) // 3
    resumed = learned(steps=5, reseed=reseed, checkpoint=tmp_path / "b", resume=True)
    assert folder_bytes(resumed, tmp_path / "resumed") == whole
    without_time = [[{k: v for k, v in r.items() if k != "seconds"} for r in curve(tmp_path / run)] for run in "ab"]
    assert without_time[0] == without_time[1]
    if reseed:
        assert sum(record["moved"] for record in without_time[0]) > 0


def test_a_run_killed_between_checkpoints_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = folder_bytes(learned(steps=7, checkpoint=tmp_path / "a"), tmp_path / "whole")
    save = Checkpoint.save

    def save_early(self: Checkpoint, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if header["step"] <= 3:
            save(self, header, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_early)  # a killed process writes no checkpoint at the end
        crashes(patch, 17, steps=7, checkpoint=tmp_path / "b")  # in step 6
    assert Checkpoint(tmp_path / "b").header()["step"] == 3
    assert len(curve(tmp_path / "b")) == 5
    with (tmp_path / "b" / "ema.jsonl").open("a") as file:
        file.write('{"step": 6, "tok')  # killed while writing
    resumed = learned(steps=7, checkpoint=tmp_path / "b", resume=True)
    assert folder_bytes(resumed, tmp_path / "resumed") == whole
    assert [record["step"] for record in curve(tmp_path / "b")] == list(range(1, 8))


def test_a_finished_run_may_take_more_steps(tmp_path: Path) -> None:
    learned(steps=3, checkpoint=tmp_path / "run")
    more = learned(steps=6, checkpoint=tmp_path / "run", resume=True)
    assert folder_bytes(more, tmp_path / "c") == folder_bytes(learned(steps=6), tmp_path / "d")
    again = learned(steps=6, checkpoint=tmp_path / "run", resume=True)  # nothing left to do
    assert again.fingerprint() == more.fingerprint()
    with pytest.raises(kvfold.InputError, match="at least 6 steps"):
        learned(steps=5, checkpoint=tmp_path / "run", resume=True)


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    made = learned(steps=2, checkpoint=tmp_path / "run", resume=True)
    assert made.fingerprint() == learned(steps=2).fingerprint()


def test_an_unfinished_checkpoint_is_not_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashes(monkeypatch, 5, checkpoint=tmp_path / "run")
    with pytest.raises(kvfold.InputError, match="add --resume"):
        learned(checkpoint=tmp_path / "run")
    learned(checkpoint=tmp_path / "run", resume=True)
    learned(checkpoint=tmp_path / "run", seed=1)  # a finished one is replaced
    assert len(list((tmp_path / "run").iterdir())) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0"),
        ({"decay": 0.9}, "decay"),
        ({"reseed": 0.5}, "reseed"),
        ({"batch_tokens": 200}, "sequences 3"),
        ({"texts": TEXT + "."}, "sources"),
        ({"model": "qwen3"}, "model"),
    ],
)
def test_another_run_does_not_resume(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    learned(steps=1, checkpoint=tmp_path / "run")
    if "model" in change:
        change = {"model": tiny_model(change["model"])}
    with pytest.raises(kvfold.InputError, match=message):
        learned(**{"steps": 2, "checkpoint": tmp_path / "run", "resume": True, **change})


def test_damaged_checkpoints_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def resume() -> None:
        learned(steps=2, checkpoint=folder, resume=True)

    learned(steps=1, checkpoint=folder)
    file = next(folder.glob("*.safetensors"))
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(kvfold.InputError, match="altered"):
        resume()
    file.write_bytes(good[:100])
    with pytest.raises(kvfold.InputError, match="damaged"):
        resume()
    file.unlink()
    with pytest.raises(kvfold.InputError, match="nothing at"):
        resume()
    header = json.loads((folder / "ema.json").read_text())
    for broken in ({**header, "version": 2}, {k: v for k, v in header.items() if k != "position"}):
        (folder / "ema.json").write_text(json.dumps(broken))
        with pytest.raises(kvfold.InputError, match="checkpoint"):
            resume()


def test_strings_files_and_sources_are_the_same_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    prints = {learned(texts=texts).fingerprint() for texts in (TEXT, [TEXT], file, [file])}
    assert len(prints) == 1
    assert learned(texts=TEXT[3000:]).fingerprint() not in prints
    assert learned(texts=None, steps=1).info["text"] == "builtin"


def test_a_batch_never_holds_more_than_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    start = CaptureCache.__init__

    def remembering(self: CaptureCache, *args: Any) -> None:
        start(self, *args)
        caches.append(self)

    monkeypatch.setattr(CaptureCache, "__init__", remembering)
    learned()
    learning = [cache for cache in caches if cache.take is not None]
    assert len(learning) == 2  # the steps, and the distortion at the end
    for cache in learning:
        assert not any(layer.sampled_keys or layer.sampled_values for layer in cache.layers)


def test_layers_that_stay_exact_are_not_learned() -> None:
    made = learned(tiny_model("gemma3"))
    assert [codec is None for codec in made.keys] == [True, False, False]
    assert [pair is None for pair in made.info["distortion"]] == [True, False, False]


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").train()
    crash_at(monkeypatch, 5)
    with pytest.raises(Crash):
        learned(model)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0}, "steps of at least 1"),
        ({"batch_tokens": 0}, "batch_tokens of at least 1"),
        ({"every": 0}, "every of at least 1"),
        ({"reseed": 1.0}, "reseed"),
        ({"decay": 1.0}, "decay"),
        ({"eps": 0.0}, "eps"),
        ({"resume": True}, "checkpoint folder"),
        ({"codec": "identity"}, "residual method"),
        ({"texts": " "}, "calibration text"),
        ({"texts": Path("/nowhere.txt")}, "nothing at"),
        ({"checkpoint": "/nowhere/at/all"}, "folder for checkpoints"),
    ],
)
def test_bad_input_is_told(how: dict[str, Any], message: str) -> None:
    with pytest.raises(kvfold.InputError, match=message):
        learned(**how)


def test_nan_is_told() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(kvfold.InputError, match="NaN or Inf"):
        learned(model)


def test_short_batches_shorten_the_context() -> None:
    made = learned(batch_tokens=40)
    assert (made.info["ema"]["context"], made.info["ema"]["sequences"]) == (40, 1)
