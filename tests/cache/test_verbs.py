"""Every verb of a transformers cache layer, against the dense cache: same logits with identity, same tokens with rvq."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import given, padded, random_ids, tiny_codecs, tiny_model
from torch import Tensor

import kvfold
from kvfold.cache import layer as cache_layer
from kvfold.compat import DynamicCache, output_cache

SIZES = {"sinks": 2, "window": 5, "block": 3}
VERBS: dict[str, Callable[[Any], None]] = {
    "crop 0": lambda cache: cache.crop(0),
    "crop inside the window": lambda cache: cache.crop(-2),
    "crop into the codes": lambda cache: cache.crop(-20),
    "crop into the sinks": lambda cache: cache.crop(-39),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "reset": lambda cache: cache.reset(),
    "offload and prefetch": lambda cache: [(layer.offload(), layer.prefetch()) for layer in cache.layers],
    "select, repeat, crop": lambda cache: (
        cache.batch_select_indices(torch.tensor([1])),
        cache.batch_repeat_interleave(3),
        cache.crop(-6),
    ),
}


def prefill(model: Any, cache: Any) -> dict[str, Tensor]:
    inputs = padded([40, 40, 33])
    with torch.no_grad():
        model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp_min(0), **given(model, cache))
    return inputs


def continue_with(model: Any, cache: Any, mask: Tensor, queries: int) -> Tensor:
    ids = random_ids(mask.shape[0], queries, seed=9)
    mask = torch.cat((mask, torch.ones(mask.shape[0], queries, dtype=torch.int64)), 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -queries:]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, **given(model, cache)).logits


def mask_after(verb: str, mask: Tensor) -> Tensor:
    stand_in = DynamicCache()
    stand_in.update(mask[:, None, :, None].float(), mask[:, None, :, None].float(), 0)
    VERBS[verb](stand_in)
    keys = stand_in.layers[0].keys
    return mask[:, :0] if keys is None else keys[:, 0, :, 0].long()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("queries", [1, 9])
def test_identity_equals_the_dense_cache_after(verb: str, queries: int) -> None:
    if verb == "reset" and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("before 5.20 transformers' own reset zeroes the tokens but keeps their number")
    model = tiny_model("llama")
    dense = DynamicCache(config=model.config)
    mask = mask_after(verb, prefill(model, dense)["attention_mask"])
    VERBS[verb](dense)
    want = continue_with(model, dense, mask, queries)
    with kvfold.attach(model, tiny_codecs("llama", "identity"), **SIZES) as attached:
        cache = attached.new_cache()
        prefill(model, cache)
        VERBS[verb](cache)
        assert cache.get_seq_length() == dense.get_seq_length() - queries
        assert cache.get_mask_sizes(queries, 0) == (cache.get_seq_length() + queries, 0)
        got = continue_with(model, cache, mask, queries)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


def contents(cache: kvfold.CompressedCache) -> list[Tensor]:
    """All that is stored, decoded, slot by slot."""
    found = []
    for layer in cache.coded_layers:
        for codec, store, name in (
            (layer.key_codec, layer.past.segments[0].keys, "keys"),
            (layer.value_codec, layer.past.segments[0].values, "values"),
        ):
            codes = store.codes()
            exact = layer.exact[name]
            past = codec.decode(codes) if codes is not None else exact[:, :, :0]
            found.append(torch.cat((exact[:, :, : layer.sinks], past, exact[:, :, layer.sinks :]), 2))
    return found


@pytest.mark.parametrize("method", ["rvq", "kivi"])  # kivi codes keys in blocks of tokens
@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("reset", "crop into the sinks")])
def test_verbs_act_on_codes_without_touching_their_values(verb: str, method: str) -> None:
    model = tiny_model("llama")
    with kvfold.attach(model, tiny_codecs("llama", method), **SIZES) as attached:
        cache = attached.new_cache()
        prefill(model, cache)
    before = contents(cache)
    VERBS[verb](cache)
    for old, new in zip(before, contents(cache), strict=True):
        stand_in = DynamicCache()
        stand_in.update(old, old, 0)
        VERBS[verb](stand_in)
        torch.testing.assert_close(new, stand_in.layers[0].keys, rtol=0, atol=0)


@pytest.mark.parametrize("removed", [1, 7, 13, 20, 33, 38, 40])
def test_a_block_that_is_cut_is_coded_again_when_it_is_full(removed: int) -> None:
    """What is left of it reads as before until then, and the cache goes on."""
    model = tiny_model("llama")
    with kvfold.attach(model, tiny_codecs("llama", "kivi"), **SIZES) as attached:
        cache = attached.new_cache()
        mask = prefill(model, cache)["attention_mask"][:, : 40 - removed]
        cache.crop(-removed)
        for layer in cache.coded_layers:
            assert layer.past.tokens % 4 == 0
            assert layer.length == 40 - removed
            assert layer.past.tokens + layer.exact["keys"].shape[2] == layer.length
        continue_with(model, cache, mask, 30)
        assert all(layer.coded == layer._boundary(70 - removed) for layer in cache.coded_layers)


def test_codes_are_appended_and_never_recoded() -> None:
    model = tiny_model("llama")
    with kvfold.attach(model, tiny_codecs("llama"), **SIZES) as attached:
        cache = attached.new_cache()
        inputs = prefill(model, cache)
        before = [layer.past.segments[0].keys.codes().fields["codes"].clone() for layer in cache.coded_layers]
        continue_with(model, cache, inputs["attention_mask"], 30)
    for old, layer in zip(before, cache.coded_layers, strict=True):
        new = layer.past.segments[0].keys.codes().fields["codes"]
        assert new.shape[2] == old.shape[2] + 30
        torch.testing.assert_close(new[:, :, : old.shape[2]], old, rtol=0, atol=0)


def test_a_recorded_pass_rolls_back_without_a_trace() -> None:
    """Assisted decoding: candidates go in, the rejected ones come out, and the cache is as if they had never been."""
    model = tiny_model("llama")
    with kvfold.attach(model, tiny_codecs("llama"), **SIZES) as attached:
        plain, recorded = attached.new_cache(), attached.new_cache()
        mask = prefill(model, plain)["attention_mask"]
        prefill(model, recorded)
        recorded.activate_past_recording()
        continue_with(model, recorded, mask, 8)
        recorded.crop(-8)
    assert [layer.coded for layer in recorded.coded_layers] == [layer.coded for layer in plain.coded_layers]
    for mine, other in zip(contents(recorded), contents(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_a_deep_copy_is_independent_and_shares_its_codecs() -> None:
    model = tiny_model("llama")
    with kvfold.attach(model, tiny_codecs("llama"), **SIZES) as attached:
        cache = attached.new_cache()
        inputs = prefill(model, cache)
        other = copy.deepcopy(cache)
        first = continue_with(model, cache, inputs["attention_mask"], 4)
        second = continue_with(model, other, inputs["attention_mask"], 4)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert other.layers[0].key_codec is cache.layers[0].key_codec


def test_positive_crop_is_refused_as_in_transformers() -> None:
    model = tiny_model("llama")
    with kvfold.attach(model, tiny_codecs("llama"), **SIZES) as attached:
        cache = attached.new_cache()
        prefill(model, cache)
        with pytest.raises(ValueError, match="minus the number"):
            cache.crop(3)


def test_outside_attach_the_cache_says_so() -> None:
    model = tiny_model("llama")
    cache = kvfold.CompressedCache(tiny_codecs("llama"), model.config)
    with pytest.raises(kvfold.InputError, match=r"kvfold\.attach"):
        model(input_ids=random_ids(1, 5), **given(model, cache))


@pytest.mark.parametrize("late", [False, True])  # True is how a GPU is asked, once a pass
@pytest.mark.parametrize("window", [SIZES["window"], 35])
def test_nan_is_refused_and_the_cache_stays_usable(late: bool, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_layer, "asks_late", lambda tensor: late)
    model = tiny_model("llama")
    with kvfold.attach(model, tiny_codecs("llama"), **{**SIZES, "window": window}) as attached, torch.no_grad():
        cache = attached.new_cache()
        inputs = prefill(model, cache)
        before = contents(cache)
        weight = model.model.layers[2].self_attn.v_proj.weight
        kept = weight.clone()
        weight.fill_(float("nan"))
        with pytest.raises(kvfold.InputError, match="NaN or Inf"):
            continue_with(model, cache, inputs["attention_mask"], 4)
        weight.copy_(kept)
        assert cache.get_seq_length() == 40
        for mine, other in zip(contents(cache), before, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
        again = continue_with(model, cache, inputs["attention_mask"], 4)
        fresh = attached.new_cache()
        prefill(model, fresh)
        torch.testing.assert_close(again, continue_with(model, fresh, inputs["attention_mask"], 4), rtol=1e-5, atol=1e-5)


def test_output_carries_the_cache() -> None:
    model = tiny_model("llama")
    with kvfold.attach(model, tiny_codecs("llama")) as attached, torch.no_grad():
        assert output_cache(model(input_ids=random_ids(1, 5))) is attached.cache
        assert attached.cache.get_seq_length() == 5
