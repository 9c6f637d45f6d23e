"""Training's cache: its forward pass is the compressed cache's, its gradient that of an exact cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CONFIGS, random_ids, tiny_codecs, tiny_model

import kvfold
from kvfold import ops
from kvfold.codecs.ema import EmaBooks
from kvfold.codecs.residual import ResidualCodec
from kvfold.integration.attach import hooked
from kvfold.integration.spec import attention_modules
from kvfold.integration.straight_through import StraightThroughCache, StraightThroughLayer, book_statistics, checkpointed

FAMILIES = list(CONFIGS)
FLIPPED = 1e-3  # see test_families.py


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def key_weight(model: Any) -> torch.nn.Parameter:
    """A weight that makes keys (and, in some families, queries and values too), of the last layer."""
    attention = attention_modules(model)[2]
    names = ("k_proj", "qkv_proj", "query_key_value")
    return next(getattr(attention, name).weight for name in names if hasattr(attention, name))


def gradient(model: Any, cache: StraightThroughCache | None, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    if cache is None:
        logits = model(input_ids=ids, use_cache=False).logits
    else:
        with hooked(model, lambda: cache):
            logits = model(input_ids=ids, use_cache=True).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def layer_of(pre_rope: str, commitment: bool = False) -> tuple[StraightThroughCache, StraightThroughLayer]:
    cache = StraightThroughCache(tiny_codecs("llama-yarn", "rvq-paper", rope=pre_rope), commitment)
    cache.begin(torch.arange(5, 17)[None], 1)
    layer = cache.layers[1]
    assert isinstance(layer, StraightThroughLayer)
    return cache, layer


def states() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 2, 12, 16, requires_grad=True), torch.randn(1, 2, 12, 16, requires_grad=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_logits_are_those_of_the_compressed_cache(family: str, rope: str) -> None:
    """Positions that do not start at 0 tell whether keys are un-rotated by the pass's own."""
    model, codecs, ids = tiny_model(family), tiny_codecs(family, "rvq", rope=rope), random_ids(2, 50)
    positions = torch.arange(3, 53)[None]
    cache = StraightThroughCache(codecs)
    with torch.no_grad():
        exact = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        with kvfold.attach(model, codecs, sinks=0, window=0, block=1):
            want = model(input_ids=ids, position_ids=positions).logits
        with hooked(model, lambda: cache):
            got = model(input_ids=ids, position_ids=positions, use_cache=True).logits
    assert relative(got, want) < FLIPPED
    assert relative(got, exact) > 50 * FLIPPED


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt-neox"])
def test_gradients_reach_the_key_and_value_projections(family: str) -> None:
    model, ids = tiny_model(family), random_ids(1, 40)
    gradient(model, StraightThroughCache(tiny_codecs(family)), ids)
    assert float(key_weight(model).grad.abs().max()) > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_codec_that_loses_nothing_gradients_are_the_stock_models(family: str) -> None:
    model, ids = tiny_model(family), random_ids(1, 40)
    want = gradient(model, None, ids)
    got = gradient(model, StraightThroughCache(tiny_codecs(family, "identity")), ids)
    assert got.keys() == want.keys()
    for name, mine in got.items():
        assert relative(mine, want[name]) < 1e-3, name


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_a_layer_returns_decoded_vectors_and_passes_gradients_on_unchanged(rope: str) -> None:
    cache, layer = layer_of(rope)
    keys, values = states()
    seen = layer.update(keys, values)
    spec, key_codec, value_codec = (
        tiny_codecs("llama-yarn", "rvq-paper").spec.rope(1),
        layer.sides[0].codec,
        layer.sides[1].codec,
    )
    rotation = (cache.current, torch.tensor(spec.inv_freq[0]), spec.factor, spec.interleaved)
    plain = ops.unrotate(keys, *rotation) if rope == "pre" else keys
    decoded = key_codec.decode(key_codec.encode(plain.detach()))
    torch.testing.assert_close(seen[0], ops.rotate(decoded, *rotation) if rope == "pre" else decoded, rtol=0, atol=0)
    torch.testing.assert_close(seen[1], value_codec.decode(value_codec.encode(values.detach())), rtol=0, atol=0)
    weights = torch.randn(2, 1, 2, 12, 16)
    (seen[0] * weights[0] + seen[1] * weights[1]).sum().backward()
    torch.testing.assert_close(keys.grad, weights[0], rtol=0, atol=0)
    torch.testing.assert_close(values.grad, weights[1], rtol=0, atol=0)


def test_a_layer_that_stays_exact_hands_on_what_it_is_given() -> None:
    cache = StraightThroughCache(tiny_codecs("gemma3"))
    keys, values = states()
    seen = cache.layers[0].update(keys, values)
    assert seen[0] is keys
    assert seen[1] is values
    assert cache.distortion()[0] is None
    assert [codec is None for codec in cache.coded()[0]] == [True, False, False]
    assert len(list(cache.sides())) == 4


def test_bfloat16_states_stay_bfloat16() -> None:
    _, layer = layer_of("pre")
    seen = layer.update(*(x.bfloat16() for x in states()))
    assert [x.dtype for x in seen] == [torch.bfloat16] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_told(bad: float) -> None:
    _, layer = layer_of("pre")
    keys, values = (x.detach() for x in states())
    keys[0, 0, 3, 5] = bad
    with pytest.raises(kvfold.InputError, match="NaN or Inf"):
        layer.update(keys, values)


def test_distortion_is_that_of_what_was_coded_since_it_was_forgotten() -> None:
    _, layer = layer_of("post")
    key = layer.sides[0]
    layer.update(*states())
    key.forget()
    assert key.distortion == 0
    seen = [states(), states()]
    for pair in seen:
        layer.update(*pair)
    vectors = torch.cat([pair[0].detach()[0] for pair in seen], 1)
    assert key.distortion == pytest.approx(key.codec.distortion(vectors), rel=1e-5)


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_commitment_pulls_keys_and_values_to_their_codes(rope: str) -> None:
    """Its gradient is 2 (x - decoded) / scale^2 / n: a step against it by n scale^2 / 2 lands on the decoded vectors."""
    cache, layer = layer_of(rope, commitment=True)
    keys, values = states()
    seen = layer.update(keys, values)
    assert len(cache.commitments) == 2
    before = float(cache.commitments[0].detach())
    assert before > 0.01
    sum(cache.commitments).backward()
    for x, decoded, side in zip((keys, values), seen, layer.sides, strict=True):
        plain = x.detach()
        if rope == "pre" and x is keys:
            continue  # with yarn's factor the gradient is that of a scaled rotation: checked by descent below
        scale = side.codec.encode(plain).fields["scale"].float()
        torch.testing.assert_close(plain - x.grad * x.numel() * scale**2 / 2, decoded.detach(), rtol=1e-4, atol=1e-5)
    moved = keys.detach() - 0.1 * keys.grad * keys.numel() / 2
    cache.begin(cache.current, 1)
    layer.update(moved, values.detach())
    assert float(cache.commitments[0]) < before


def test_statistics_are_those_of_ema_books() -> None:
    _, layer = layer_of("pre")
    key = layer.sides[0].codec
    assert isinstance(key, ResidualCodec)
    x = torch.randn(2, 2, 30, 16)
    codes = key.indices(key.encode(x))
    vectors = key.scaled_groups(x)[0]
    counts, sums = book_statistics(vectors, codes, key.codebooks, key.book)
    _, want_counts, want_sums, _ = EmaBooks(key.codebooks).statistics(vectors.flatten(0, 3))
    torch.testing.assert_close(counts, want_counts)
    torch.testing.assert_close(sums, want_sums, rtol=1e-4, atol=1e-4)
    assert counts.sum(1).tolist() == [2 * 2 * 30 * 4] * len(counts)


def test_statistics_of_books_of_ones_own_are_those_of_each_head_alone() -> None:
    _, layer = layer_of("pre")
    shared = layer.sides[0].codec
    assert isinstance(shared, ResidualCodec)
    stages = shared.book.shape[0]
    head = torch.arange(2)[None, :, None] * stages
    books = torch.cat((shared.codebooks, shared.codebooks.flip(1)))
    codec = ResidualCodec.restore(16, shared.settings(), {"codebooks": books, "book": shared.book + head})
    x = torch.randn(1, 2, 30, 16)
    codes = codec.indices(codec.encode(x))
    vectors = codec.scaled_groups(x)[0]
    counts, sums = book_statistics(vectors, codes, codec.codebooks, codec.book)
    for h in (0, 1):
        part = slice(h * stages, (h + 1) * stages)
        _, want_counts, want_sums, _ = EmaBooks(books[part]).statistics(vectors[:, h].flatten(0, 2))
        torch.testing.assert_close(counts[part], want_counts)
        torch.testing.assert_close(sums[part], want_sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("commitment", [False, True])
def test_checkpointing_changes_neither_gradients_nor_statistics(commitment: bool) -> None:
    model, ids = tiny_model("llama"), random_ids(1, 40)
    plain, again = (StraightThroughCache(tiny_codecs("llama", "rvq-paper"), commitment) for _ in range(2))
    want = gradient(model, plain, ids)
    runs = []
    handle = attention_modules(model)[0].register_forward_hook(lambda *_: runs.append(1))
    with checkpointed(model):
        got = gradient(model, again, ids)
    handle.remove()
    assert len(runs) == 2  # once forward, once in the backward pass
    for name, mine in got.items():
        torch.testing.assert_close(mine, want[name], rtol=0, atol=0)
    for mine, other in zip(again.sides(), plain.sides(), strict=True):
        torch.testing.assert_close(mine.counts, other.counts, rtol=0, atol=0)
    assert len(again.commitments) == len(plain.commitments) == (6 if commitment else 0)
    assert not any("forward" in module.__dict__ for module in model.modules())
