"""Codes that lose trailing stages under a memory limit (`kvfold/cache/past.py`, `CompressedCache(max_bytes=...)`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import HEADS, fitted, samples
from tiny import bytes_at, random_ids, tiny_codecs, tiny_model
from tiny import given as handed

import kvfold
from kvfold.cache.past import CodedPast

SIZES: dict[str, int] = {"sinks": 2, "window": 8, "block": 4}
DEEP = {"stages": 6, "codebook_size": 32}


def coded(tokens: int, seed: int = 0) -> tuple[Any, Any]:
    x = samples(tokens, seed)[None]
    return fitted("rvq-paper", "key").encode(x), fitted("rvq-paper", "value").encode(x)


def state(past: CodedPast) -> list[tuple[int, int]]:
    return [(segment.level, segment.keys.tokens) for segment in past.segments]


def test_lowered_codes_are_the_first_bytes_and_read_by_a_shallower_codec() -> None:
    codec, x = fitted("rvq-paper"), samples(50)[None]  # 3 stages, 2 groups, 4 bits
    codes = codec.encode(x)
    lower = codec.lower(codes, 1)
    assert codec.levels == 1
    assert lower.fields["codes"].shape[-1] == 2
    assert torch.equal(lower.fields["codes"], codes.fields["codes"][..., :2])
    assert 8 * lower.nbytes / x.numel() == codec.bits_at(1) < codec.bits_at(0) == codec.bits_per_element
    shallow = codec.at_level(1)
    assert torch.equal(shallow.indices(lower), codec.indices(codes)[..., :2, :])
    right, worse = (float((c.decode(y) - x).square().mean()) for c, y in ((codec, codes), (shallow, lower)))
    assert right < worse < float(x.square().mean())


@given(
    verbs=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 300)),
            st.tuples(st.just("settle"), st.integers(0, 500)),
            st.tuples(st.just("crop"), st.integers(0, 500)),
        ),
        max_size=10,
    )
)
def test_whatever_happens_codes_are_cut_and_nothing_else(verbs: list[tuple[str, int]]) -> None:
    past = CodedPast(fitted("rvq-paper", "key"), fitted("rvq-paper", "value"))
    keys, values = coded(3000)
    tokens, lowest = 0, 0  # tokens there are; so many of them have been asked to be low
    for verb, count in verbs:
        if verb == "append":
            past.append(keys.slice(tokens, tokens + count), values.slice(tokens, tokens + count))
            tokens += count
            lowest = max(lowest, min(tokens, past.lowered))
        elif verb == "settle":
            past.settle(0, count)
            lowest = max(lowest, min(tokens, count))
        else:
            past.crop(count)
            tokens = min(tokens, count)
            lowest = min(lowest, tokens)
        assert past.tokens == tokens
        want = [(1, lowest), (0, tokens - lowest)]
        assert [pair for pair in state(past) if pair[1]] == [pair for pair in want if pair[1]]
        start = 0
        for segment in past.segments:
            for store, whole in ((segment.keys, keys), (segment.values, values)):
                got = store.codes()
                assert got is not None
                right = whole.slice(start, start + got.tokens)
                width = got.fields["codes"].shape[-1]
                assert width == 3 - segment.level
                assert torch.equal(got.fields["codes"], right.fields["codes"][..., :width])
                assert torch.equal(got.fields["scale"], right.fields["scale"])
            start += segment.keys.tokens


def test_settling_lets_go_of_memory() -> None:
    past = CodedPast(fitted("rvq-paper", "key"), fitted("rvq-paper", "value"), limit=1000)
    past.append(*coded(1000))
    before = past.allocated_bytes
    past.settle(0, 500)
    assert past.allocated_bytes == before - 500 * 2 * HEADS  # a byte of keys and one of values
    past.settle(1, 0)
    assert past.allocated_bytes == before - 1000 * 2 * HEADS


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
def test_a_full_cache_lowers_the_oldest_codes_and_keeps_the_limit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.cache.cache.LOWERED_TOGETHER", 16)
    model, codecs, ids = tiny_model(family), tiny_codecs(family, "rvq", **DEEP), random_ids(1, 400)
    with torch.no_grad(), kvfold.attach(model, codecs, **SIZES) as attached:
        free = attached.new_cache()
        model(input_ids=ids, **handed(model, free))
    limit = bytes_at(free, 400, level=2)
    assert limit < bytes_at(free, 400)
    with torch.no_grad(), kvfold.attach(model, codecs, max_bytes=limit, **SIZES) as attached:
        cache = attached.new_cache()
        for part in (*ids[:, :300].split(50, 1), *ids[:, 300:].split(1, 1)):
            assert bool(model(input_ids=part, **handed(model, cache)).logits.isfinite().all())
            assert cache.report().bytes_allocated <= limit
    for layer in cache.coded_layers:
        levels = [segment.level for segment in layer.past.segments]
        assert levels == sorted(levels, reverse=True)
        assert levels[0] == 2
    first, whole = cache.coded_layers[0].past, free.coded_layers[0].past.segments[0].keys.codes()
    assert whole is not None
    start = 0
    for segment in first.segments:  # the first coded layer's keys do not depend on what attention read
        if family == "gemma3":
            break
        codes = segment.keys.codes()
        assert codes is not None
        right = whole.fields["codes"][:, :, start : start + codes.tokens, : codes.fields["codes"].shape[-1]]
        assert float((codes.fields["codes"] == right).float().mean()) > 0.99  # sums of other shapes may flip a rounding
        start += codes.tokens


def test_beyond_the_floor_it_refuses_and_keeps_what_it_has() -> None:
    model, codecs = tiny_model("llama"), tiny_codecs("llama", "rvq", **DEEP)
    empty = kvfold.CompressedCache(codecs, model.config, **SIZES)
    floor = bytes_at(empty, 300, level=3)
    with kvfold.attach(model, codecs, max_bytes=floor, **SIZES) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(input_ids=random_ids(1, 300), **handed(model, cache))
        before = cache.report()
        with pytest.raises(kvfold.CacheFullError, match="3 stages fewer"):
            model(input_ids=random_ids(1, 40), **handed(model, cache))
        assert cache.report() == before
        assert [segment.level for segment in cache.coded_layers[0].past.segments] == [3]


def test_more_memory_is_never_worse_than_much_less() -> None:
    model, codecs, ids = tiny_model("llama"), tiny_codecs("llama", "rvq", **DEEP), random_ids(1, 400)
    empty = kvfold.CompressedCache(codecs, model.config, **SIZES)
    with torch.no_grad():
        exact = model(input_ids=ids, use_cache=False).logits[0, -50:].log_softmax(-1)
    lost = []
    for level in (0, 1, 3):
        with kvfold.attach(model, codecs, max_bytes=bytes_at(empty, 400, level), **SIZES) as attached, torch.no_grad():
            cache = attached.new_cache()
            model(input_ids=ids[:, :350], **handed(model, cache))
            coded = model(input_ids=ids[:, 350:], **handed(model, cache)).logits[0].log_softmax(-1)
        lost.append(float((exact.exp() * (exact - coded)).sum(-1).mean()))
    assert lost[0] < lost[1] < lost[2]


def test_lowered_codes_can_be_saved_selected_and_cropped(tmp_path: Path) -> None:
    model, codecs, ids = tiny_model("llama"), tiny_codecs("llama", "rvq", **DEEP), random_ids(2, 400)
    limit = 2 * bytes_at(kvfold.CompressedCache(codecs, model.config, **SIZES), 400, level=1)
    with kvfold.attach(model, codecs, max_bytes=limit, **SIZES) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(input_ids=ids[:, :350], **handed(model, cache))
        model(input_ids=ids[:, 350:399], **handed(model, cache))
        cache.save(tmp_path / "kept")
        again = kvfold.load_cache(tmp_path / "kept", codecs, model.config, max_bytes=limit)
        assert [state(layer.past) for layer in again.coded_layers] == [state(layer.past) for layer in cache.coded_layers]
        want = model(input_ids=ids[:, 399:], **handed(model, cache)).logits
        torch.testing.assert_close(model(input_ids=ids[:, 399:], **handed(model, again)).logits, want, rtol=0, atol=0)
        again.reorder_cache(torch.tensor([1, 0]))
        last = random_ids(2, 1, 9)
        right = model(input_ids=last, **handed(model, cache)).logits
        swapped = model(input_ids=last.flip(0), **handed(model, again)).logits
        torch.testing.assert_close(swapped.flip(0), right, rtol=1e-4, atol=1e-4)
        cache.crop(-300)
        assert cache.report().tokens == 101
        assert bool(model(input_ids=last, **handed(model, cache)).logits.isfinite().all())


def test_a_method_without_stages_has_one_level() -> None:
    model = tiny_model("llama")
    cache = kvfold.CompressedCache(tiny_codecs("llama", "identity"), model.config)
    assert len(cache._token_bytes(1)) == 1
