"""Bytes, bits, memory limits and files of the whole cache."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from tiny import bytes_at, given, random_ids, tiny_codecs, tiny_model

import kvfold
from kvfold.cache import saved

SIZES = {"sinks": 2, "window": 5, "block": 3}


def filled(family: str = "llama", method: str = "rvq", tokens: int = 40, **sizes: int) -> kvfold.CompressedCache:
    model = tiny_model(family)
    with kvfold.attach(model, tiny_codecs(family, method), **sizes) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(input_ids=random_ids(2, tokens), **given(model, cache))
    return cache


def test_bits_are_read_off_the_buffers_and_equal_the_formula() -> None:
    cache = filled(sinks=0, window=0)
    report = cache.report()
    # head dim 16, groups of 4, stages of 16: 4 groups * 4 bits = 2 bytes a stage, 2 of keys and 3 of values; a byte of scale
    assert report.bits_per_element == 8 * (4 + 1 + 6 + 1) / 32 == cache.codecs.bits_per_element
    assert report.bytes_codes == 3 * 2 * 2 * 40 * (4 + 6)
    assert report.bytes_scales == 2 * 3 * 2 * 2 * 40
    assert report.bytes_exact == 0
    assert report.bytes_cache == sum(t.nbytes for layer in cache.coded_layers for t in live(layer))


def live(layer) -> list[torch.Tensor]:
    stores = [store.codes().fields.values() for segment in layer.past.segments for store in segment.stores]
    return [t for fields in stores for t in fields] + [tensor for _, tensor in sorted(layer.exact.items())]


def test_exact_tokens_and_codebooks_are_counted() -> None:
    cache = filled(**SIZES)
    report = cache.report()
    exact = 2 * 3 * 2 * 2 * (40 - 33) * 16 * 4  # sides, layers, batch, heads, tokens, dim, float32
    assert report.bytes_exact == exact
    assert report.bytes_cache == exact + 3 * 2 * 2 * 33 * (5 + 7)
    assert report.bytes_bf16 == 2 * 3 * 2 * 2 * 40 * 16 * 2
    assert report["ratio"] == report.bytes_bf16 / report.bytes_cache
    assert report.bytes_codebooks == 3 * (2 + 3) * 2 * 16 * 4  # layers, stages, heads, codewords, channels
    assert report.bits_per_element_with_codebooks > report.bits_per_element
    assert report.bytes_allocated >= report.bytes_cache


def test_identity_in_bfloat16_takes_sixteen_bits() -> None:
    assert filled(method="identity", sinks=0, window=0).report().bits_per_element == 32.0
    codecs = tiny_codecs("llama", "identity", dtype="bfloat16")
    assert codecs.bits_per_element == 16.0


def test_sliding_layers_count_what_they_hold() -> None:
    report = filled("gemma3", "rvq", sinks=0, window=0).report()
    sliding = 2 * 2 * 2 * 11 * 16 * 4  # sides, batch, heads, sliding_window - 1, dim, float32
    assert report.bytes_exact == sliding
    assert report.bytes_bf16 == 2 * (2 * 2 * 2 * 16) * (2 * 40 + 11)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_memory_limit_does_not_change_results_and_is_kept(family: str) -> None:
    model, codecs, ids = tiny_model(family), tiny_codecs(family), random_ids(1, 300)
    with torch.no_grad(), kvfold.attach(model, codecs, **SIZES) as attached:
        free = attached.new_cache()
        want = [model(input_ids=part, **given(model, free)).logits for part in ids.split(60, 1)]
    limit = bytes_at(free, 301)
    assert free.report().bytes_allocated > limit
    with torch.no_grad(), kvfold.attach(model, codecs, max_bytes=limit, **SIZES) as attached:
        cache = attached.new_cache()
        for part, logits in zip(ids.split(60, 1), want, strict=True):
            torch.testing.assert_close(model(input_ids=part, **given(model, cache)).logits, logits, rtol=0, atol=0)
            assert cache.report().bytes_allocated <= limit


def test_a_full_cache_refuses_more_and_keeps_what_it_has() -> None:
    model, codecs = tiny_model("llama"), tiny_codecs("llama")
    with kvfold.attach(model, codecs, max_bytes=40_000, **SIZES) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(input_ids=random_ids(1, 100), **given(model, cache))
        before = cache.report()
        with pytest.raises(kvfold.CacheFullError, match="max_bytes"):
            model(input_ids=random_ids(1, 2000), **given(model, cache))
        assert cache.report() == before
        model(input_ids=random_ids(1, 5), **given(model, cache))
        assert cache.get_seq_length() == 105


@pytest.mark.parametrize("sizes", [{"sinks": -1}, {"window": -1}, {"block": 0}])
def test_negative_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(kvfold.InputError):
        kvfold.CompressedCache(tiny_codecs("llama"), tiny_model("llama").config, **sizes)


def test_codecs_of_another_number_of_layers_are_refused() -> None:
    config = tiny_model("llama").config
    config.num_hidden_layers = 2
    with pytest.raises(kvfold.InputError, match="3 layers"):
        kvfold.CompressedCache(tiny_codecs("llama"), config)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
def test_saving_keeps_every_code(family: str, tmp_path: Path) -> None:
    cache = filled(family, **SIZES)
    cache.save(tmp_path / "cache")
    again = kvfold.load_cache(tmp_path / "cache", tiny_codecs(family), tiny_model(family).config)
    assert again.report().bytes_cache == cache.report().bytes_cache
    assert again.get_seq_length() == 40
    for mine, other in zip(again.coded_layers, cache.coded_layers, strict=True):
        for a, b in zip(live(mine), live(other), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert again.positions.slots(0, 40).tolist() == cache.positions.slots(0, 40).tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def damage_length(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damage_byte(data: bytes) -> bytes:
    return data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]


def damage_header(data: bytes) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["kvfold"] = header["__metadata__"]["kvfold"].replace('"window": 5', '"window": 6')
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + data[8 + size :]


@pytest.mark.parametrize("damage", [damage_length, damage_byte, damage_header, lambda data: b"", lambda data: b"GGUF" + data])
def test_damaged_cache_files_are_noticed(damage, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    filled(**SIZES).save(file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(kvfold.InputError, match="save the cache again"):
        kvfold.load_cache(file, tiny_codecs("llama"), tiny_model("llama").config)


def test_a_file_of_another_version_says_so(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(saved, "_VERSION", 2)
        filled(**SIZES).save(tmp_path / "cache")
    with pytest.raises(kvfold.InputError, match=r"version 2.*save the cache again"):
        kvfold.load_cache(tmp_path / "cache", tiny_codecs("llama"), tiny_model("llama").config)


def test_a_cache_needs_its_own_codecs(tmp_path: Path) -> None:
    filled(**SIZES).save(tmp_path / "cache")
    with pytest.raises(kvfold.InputError, match="codecs"):
        kvfold.load_cache(tmp_path / "cache", tiny_codecs("llama", "rvq", stages=3), tiny_model("llama").config)


def test_nothing_to_save_and_nowhere_to_load(tmp_path: Path) -> None:
    cache = kvfold.CompressedCache(tiny_codecs("llama"), tiny_model("llama").config)
    with pytest.raises(kvfold.InputError, match="empty"):
        cache.save(tmp_path / "cache")
    with pytest.raises(kvfold.InputError, match="nothing at"):
        kvfold.load_cache(tmp_path / "cache", tiny_codecs("llama"), tiny_model("llama").config)
    with pytest.raises(kvfold.InputError, match="existing folder"):
        filled(**SIZES).save(tmp_path / "no" / "cache")
    assert not list(tmp_path.iterdir())
