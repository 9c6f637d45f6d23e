from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import DIM, HEADS, SPEC, codec_set, other_spec, samples

from kvfold.codecs import METHODS
from kvfold.codecs.artifact import CodecSet, load
from kvfold.errors import InputError

THREE_PARTS = r"expected .+; got .+; .+\."


@pytest.fixture(scope="module")
def codecs() -> CodecSet:
    return codec_set()


@pytest.fixture
def folder(codecs: CodecSet, tmp_path: Path) -> Path:
    codecs.save(tmp_path / "codecs")
    return tmp_path / "codecs"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_set_is_the_saved_one(name: str, tmp_path: Path) -> None:
    codecs = codec_set(name)
    codecs.save(tmp_path / "codecs")
    again = load(str(tmp_path / "codecs"))
    assert (again.method, again.settings, again.spec, again.info) == (codecs.method, codecs.settings, codecs.spec, codecs.info)
    assert again.fingerprint() == codecs.fingerprint()
    assert (again.bits_per_element, again.codebook_bytes) == (codecs.bits_per_element, codecs.codebook_bytes)
    x = samples()[None]
    for mine, other in zip((*codecs.keys, *codecs.values), (*again.keys, *again.values), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert torch.equal(mine.decode(mine.encode(x)), other.decode(other.encode(x)))
            assert mine.settings() == other.settings()
    assert codecs.keys[1] is None


def test_the_folder_holds_two_files_and_nothing_is_left_beside_it(folder: Path) -> None:
    assert sorted(files(folder)) == ["codecs.json", "codecs.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["codecs"]
    header = json.loads((folder / "codecs.json").read_text())
    assert (header["kind"], header["version"], header["info"]["seed"]) == ("kvfold codecs", 1, 0)
    assert header["model_fingerprint"] == SPEC.fingerprint()


def test_the_same_fit_writes_the_same_bytes(folder: Path) -> None:
    codec_set().save(folder.parent / "again")
    load(folder).save(folder.parent / "resaved")
    codec_set(seed=1).save(folder.parent / "other")
    assert files(folder) == files(folder.parent / "again") == files(folder.parent / "resaved")
    assert files(folder) != files(folder.parent / "other")


def test_an_older_codec_folder_is_replaced_as_a_whole(folder: Path) -> None:
    other = codec_set(seed=1)
    other.save(folder)
    assert load(folder).fingerprint() == other.fingerprint()
    assert [path.name for path in folder.parent.iterdir()] == ["codecs"]


def test_a_folder_with_other_files_is_left_alone(codecs: CodecSet, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=THREE_PARTS):
        codecs.save(tmp_path)
    assert files(tmp_path) == {"thesis.tex": b"years"}


def test_a_file_in_the_way_is_left_alone(codecs: CodecSet, tmp_path: Path) -> None:
    (tmp_path / "codecs").write_text("mine")
    with pytest.raises(InputError, match=THREE_PARTS):
        codecs.save(tmp_path / "codecs")
    assert files(tmp_path) == {"codecs": b"mine"}


def test_a_missing_parent_is_refused(codecs: CodecSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=THREE_PARTS):
        codecs.save(tmp_path / "missing" / "codecs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_a_failed_save_leaves_what_was_there(there: bool, codecs: CodecSet, tmp_path: Path) -> None:
    if there:
        codecs.save(tmp_path / "codecs")
    before = {path.name: files(path) for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        replace(codecs, info={"seed": object()}).save(tmp_path / "codecs")
    assert {path.name: files(path) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_tensors_are_noticed(folder: Path, keep: int) -> None:
    path = folder / "codecs.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=THREE_PARTS):
        load(folder)


@pytest.mark.parametrize("at", [9, 0.5, -1])
def test_one_altered_byte_of_the_tensors_is_noticed(folder: Path, at: float) -> None:
    path = folder / "codecs.safetensors"
    content = bytearray(path.read_bytes())
    content[int(at * len(content)) if isinstance(at, float) else at] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=THREE_PARTS):
        load(folder)


@pytest.mark.parametrize("keep", [0, 1, 0.5, -3])
def test_truncated_json_is_noticed(folder: Path, keep: float) -> None:
    path = folder / "codecs.json"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=THREE_PARTS):
        load(folder)


ALTERATIONS: dict[str, Callable[[dict], object]] = {
    "another model": lambda header: header["model"].update(head_dim=32),
    "a rope frequency": lambda header: header["model"]["ropes"][0]["inv_freq"][0].__setitem__(0, 0.9),
    "a layer less": lambda header: header["model"]["layers"].pop(),
    "a field of the model renamed": lambda header: header["model"].update(colour=3),
    "the fingerprint": lambda header: header.update(model_fingerprint="0" * 64),
    "a codec's kind": lambda header: header["codecs"]["0.key"].update(kind="svd"),
    "a codec missing": lambda header: header["codecs"].pop("0.key"),
    "the stages of a codec": lambda header: header["codecs"]["0.key"]["settings"].update(stages=2),
    "the grouping of a codec": lambda header: header["codecs"]["0.key"]["settings"].update(grouping="contiguous"),
    "when a codec's keys are rotated": lambda header: header["codecs"]["0.key"]["settings"].update(pre_rope=False),
    "a codec's settings gone": lambda header: header["codecs"].update({"0.key": []}),
    "the method": lambda header: header.update(method="identity"),
    "the kind": lambda header: header.update(kind="kvfold cache"),
    "the version": lambda header: header.update(version=99),
    "the tensors' digest": lambda header: header.update(tensors_sha256="0"),
    "no info": lambda header: header.pop("info"),
    "no kind": lambda header: header.pop("kind"),
}


@pytest.mark.parametrize("what", ALTERATIONS)
def test_altered_json_is_noticed(folder: Path, what: str) -> None:
    path = folder / "codecs.json"
    header = json.loads(path.read_text())
    ALTERATIONS[what](header)
    path.write_text(json.dumps(header))
    with pytest.raises(InputError, match=THREE_PARTS):
        load(folder)


@pytest.mark.parametrize("name", ["codecs.json", "codecs.safetensors"])
def test_a_missing_file_is_told(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"nothing at .*{name}"):
        load(folder)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=THREE_PARTS):
        load(tmp_path / "missing")


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"kind": "kvfold codecs"}'])
def test_other_files_of_that_name_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "codecs.json").write_text(content)
    with pytest.raises(InputError, match=THREE_PARTS):
        load(tmp_path)


@pytest.mark.parametrize(
    "change", [{"key_groups": "contiguous"}, {"rope": "post"}, {"stages": 2}, {"codebook_size": 11}], ids=str
)
def test_the_fingerprint_changes_with_what_changes_codes(codecs: CodecSet, change: dict) -> None:
    assert codec_set(**change).fingerprint() != codecs.fingerprint()


def test_the_fingerprint_changes_with_codebooks_model_and_order(codecs: CodecSet) -> None:
    others = [
        codec_set(seed=1),
        replace(codecs, spec=other_spec(model_type="qwen2")),
        replace(codecs, keys=codecs.keys[::-1]),
        replace(codecs, keys=codecs.values, values=codecs.keys),
    ]
    assert len({codecs.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_the_fingerprint_does_not_change_with_the_search_or_the_notes(codecs: CodecSet) -> None:
    assert codecs.with_beam(4).fingerprint() == codecs.fingerprint()
    assert replace(codecs, info={}).fingerprint() == codecs.fingerprint()
    assert codecs.to("cpu").fingerprint() == codecs.fingerprint()


def test_with_beam_changes_the_search_of_every_codec(codecs: CodecSet) -> None:
    wide = codecs.with_beam(16)
    assert wide.settings == {**codecs.settings, "beam": 16}
    assert [None if c is None else c.settings()["beam"] for c in (*wide.keys, *wide.values)] == [16, None, 16, 16, None, 16]
    assert wide.keys[0].distortion(samples()) < codecs.with_beam(1).keys[0].distortion(samples())
    assert codecs.settings["beam"] == 4


@pytest.mark.parametrize(("name", "beam"), [("rvq", 0), ("rvq", -1), ("identity", 2)])
def test_a_beam_that_cannot_be_is_refused(name: str, beam: int) -> None:
    with pytest.raises(InputError, match="beam"):
        codec_set(name).with_beam(beam)


def test_bits_and_bytes_are_told_over_the_coded_layers(codecs: CodecSet) -> None:
    sizes = [codec.encode(torch.randn(1, HEADS, 1, DIM)).nbytes for codec in (*codecs.keys, *codecs.values) if codec]
    assert codecs.bits_per_element == 8 * sum(sizes) / (4 * HEADS * DIM)
    assert codecs.codebook_bytes == 2 * (3 + 4) * HEADS * 12 * 8
