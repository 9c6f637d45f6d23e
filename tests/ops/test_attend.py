"""Laws of attention on codes, for every backend, against softmax attention in float64 on the decoded vectors."""

from __future__ import annotations

import pytest
import reference
import torch
from coded import scattered
from torch import Tensor

from kvfold import ops
from kvfold.ops.attend import naive
from kvfold.ops.interpreter import interpreted

RELATIVE_ERROR = 1e-5  # of the largest element of the output; lse: absolute


def masks(kind: str, batch: int, queries: int, tokens: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "causal":
        return (torch.arange(tokens) <= torch.arange(queries)[:, None] + tokens - queries)[None, None]
    mask = torch.rand(batch, 1, queries, tokens) < 0.3
    mask[:, :, ::3] = False
    mask[0, :, :, : tokens // 2] = False
    return mask


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], error: float = RELATIVE_ERROR) -> None:
    (out, lse), (right, right_lse) = got, expected
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert out.shape == right.shape
    assert float((out - right).abs().max()) <= error * float(right.abs().max())
    blind = right_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, blind)
    assert not out[blind].any()
    assert torch.allclose(lse[~blind].double(), right_lse[~blind], rtol=0, atol=error)


@pytest.mark.parametrize("kind", ["none", "causal", "random"])
@pytest.mark.parametrize("queries", [1, 5, 600])
@pytest.mark.parametrize("tokens", [1, 63, 1000, 1500])
def test_attention_is_softmax_over_the_decoded_keys(backend: str, tokens: int, queries: int, kind: str) -> None:
    batch = 1 if queries > 5 else 2
    if backend == "gpu" and interpreted():  # of 600 as of 40: one block, too many for tables; and a program joins each row
        queries = min(queries, 40)
    query, key, value = torch.randn(batch, 2, queries, 16), scattered(batch, 2, tokens), scattered(batch, 2, tokens)
    mask = masks(kind, batch, queries, tokens)
    got = ops.attend(query, key, value, None, mask, 0.25, backend=backend)
    check(got, reference.attention(query, reference.decoded(key), reference.decoded(value), mask, 0.25))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("kind", ["none", "random"])
def test_query_heads_share_the_keys_of_their_kv_head(backend: str, heads: int, kv_heads: int, kind: str) -> None:
    query, key, value = torch.randn(2, heads, 5, 16), scattered(2, kv_heads, 63), scattered(2, kv_heads, 63, group=4, size=300)
    mask = masks(kind, 2, 5, 63)
    got = ops.attend(query, key, value, None, mask, 0.3, backend=backend)
    check(got, reference.attention(query, reference.decoded(key), reference.decoded(value), mask, 0.3))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [16, 6])
@pytest.mark.parametrize("rows", [1, 2])
def test_keys_before_rope_are_rotated_to_their_own_positions(backend: str, rotary: int, rows: int, interleaved: bool) -> None:
    tokens = 1100
    query, key, value = torch.randn(2, 2, 5, 16), scattered(2, 2, tokens), scattered(2, 2, tokens)
    positions = (torch.arange(tokens) - torch.tensor([[0], [7]])[:rows]).clamp_min(0)
    rotation = ops.Rotation(positions, 100.0 ** -torch.linspace(0, 1, rotary // 2), 1.3, interleaved)
    got = ops.attend(query, key, value, rotation, None, 0.25, backend=backend)
    keys = reference.rotated(reference.decoded(key), *rotation)
    right, right_lse = reference.attention(query, keys, reference.decoded(value), None, 0.25)
    assert float((got[0] - right).abs().max()) <= 1e-3 * float(right.abs().max())  # angles up to 1100 in float32
    assert torch.allclose(got[1].double(), right_lse, rtol=0, atol=1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_center_is_rotated_and_added_to_what_is_decoded(backend: str, queries: int, interleaved: bool) -> None:
    tokens, center = 700, torch.randn(2, 16)
    query, key, value = torch.randn(2, 2, queries, 16), scattered(2, 2, tokens), scattered(2, 2, tokens)
    rotation = ops.Rotation(torch.randint(900, (2, tokens)), 100.0 ** -torch.linspace(0, 1, 6), 1.3, interleaved)
    got = ops.attend(query, key._replace(center=center), value, rotation, None, 0.25, backend=backend)
    moved = reference.rotated(center[None, :, None].expand(2, -1, tokens, -1).double(), *rotation)
    right, right_lse = reference.attention(query, reference.decoded(key) + moved, reference.decoded(value), None, 0.25)
    assert float((got[0] - right).abs().max()) <= 1e-3 * float(right.abs().max())  # angles up to 900 in float32
    assert torch.allclose(got[1].double(), right_lse, rtol=0, atol=1e-3)


@pytest.mark.parametrize("softcap", [2.0, 50.0])
@pytest.mark.parametrize("kind", ["none", "random"])
def test_scores_are_capped_before_the_mask(backend: str, softcap: float, kind: str) -> None:
    query, key, value = torch.randn(2, 2, 5, 16) * 3, scattered(2, 2, 63), scattered(2, 2, 63)
    mask = masks(kind, 2, 5, 63)
    got = ops.attend(query, key, value, None, mask, 0.5, softcap, backend)
    check(got, reference.attention(query, reference.decoded(key), reference.decoded(value), mask, 0.5, softcap))


@pytest.mark.parametrize("kind", ["none", "random"])
@pytest.mark.parametrize(("queries", "tokens", "exact"), [(1, 63, 90), (1, 1500, 1), (5, 700, 70), (40, 300, 9), (1, 300, 0)])
def test_coded_and_exact_tokens_are_attended_together(backend: str, queries: int, tokens: int, exact: int, kind: str) -> None:
    query, key, value = torch.randn(2, 4, queries, 16), scattered(2, 2, tokens), scattered(2, 2, tokens)
    keys, values, mask = torch.randn(2, 2, exact, 16), torch.randn(2, 2, exact, 16), masks(kind, 2, queries, tokens + exact)
    coded_mask, exact_mask = (None, None) if mask is None else (mask[..., :tokens], mask[..., tokens:])
    too = ops.Exact(keys, values, exact_mask)
    got = ops.attend_both(query, ops.Past(key, value), coded_mask, too, 0.25, backend=backend)
    whole = (torch.cat((reference.decoded(side), own), 2) for side, own in ((key, keys), (value, values)))
    check(got, reference.attention(query, *whole, mask, 0.25))


@pytest.mark.parametrize("visible", [True, False])
def test_values_may_have_another_dim_than_keys(backend: str, visible: bool) -> None:
    query, key, value = torch.randn(2, 2, 5, 16), scattered(2, 2, 30), scattered(2, 2, 30, dim=24)
    mask = torch.full((1, 1, 5, 30), visible)
    got = ops.attend(query, key, value, None, mask, 0.25, backend=backend)
    check(got, reference.attention(query, reference.decoded(key), reference.decoded(value), mask, 0.25))


@pytest.mark.parametrize("tokens", [0, 3, 1500])
def test_who_sees_nothing_gets_zero_and_minus_infinity(backend: str, tokens: int) -> None:
    query, key, value = torch.randn(2, 4, 3, 16), scattered(2, 2, tokens), scattered(2, 2, tokens)
    out, lse = ops.attend(query, key, value, None, torch.zeros(2, 1, 3, tokens, dtype=torch.bool), 0.25, backend=backend)
    assert torch.equal(out, torch.zeros(2, 4, 3, 16))
    assert torch.equal(lse, torch.full((2, 4, 3), -torch.inf))


def test_large_scores_do_not_overflow(backend: str) -> None:
    query, key, value = torch.randn(1, 1, 2, 16) * 1e3, scattered(1, 1, 1100), scattered(1, 1, 1100)
    out, lse = ops.attend(query, key, value, None, None, 10.0, backend=backend)
    keys, values = reference.decoded(key), reference.decoded(value)
    right, right_lse = reference.attention(query, keys, values, None, 10.0)
    assert torch.allclose(out.double(), right, atol=1e-4)
    assert torch.allclose(lse.double(), right_lse, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries_are_attended_in_float32(backend: str, dtype: torch.dtype) -> None:
    """Tensor cores take such queries with keys, shares and values of 11 bits."""
    query, key, value = torch.randn(1, 2, 5, 16).to(dtype), scattered(1, 2, 63), scattered(1, 2, 63)
    got = ops.attend(query, key, value, None, None, 0.25, backend=backend)
    right = reference.attention(query, reference.decoded(key), reference.decoded(value), None, 0.25)
    check(got, right, 2e-3 if backend == "gpu" else RELATIVE_ERROR)


@pytest.mark.parametrize("queries", [1, 5, 70])
@pytest.mark.parametrize("tokens", [1, 64, 1100])
def test_spans_are_masks(backend: str, tokens: int, queries: int) -> None:
    """Also those that are empty, reversed, lie behind the keys or overlap; some queries see nothing."""
    bounds = torch.randint(-20, 2 * tokens + 40, (queries, 3, 2), dtype=torch.int32)
    bounds[2::3] = bounds[2::3].sort(-1, descending=True).values
    bounds[-1] = torch.tensor([0, tokens])
    spans = ops.Spans(bounds)
    mask = spans.mask(0, tokens)
    assert mask.shape == (1, 1, queries, tokens)
    key_at = torch.arange(tokens)
    for query_bounds, seen in zip(bounds, mask[0, 0], strict=True):
        assert torch.equal(seen, torch.stack([(key_at >= a) & (key_at < b) for a, b in query_bounds.tolist()]).any(0))
    query, key, value = torch.randn(2, 4, queries, 16), scattered(2, 2, tokens), scattered(2, 2, tokens)
    exact = torch.randn(2, 2, tokens, 16)
    for run, given in (
        (ops.attend, (query, key, value, None)),
        (ops.attend_exact, (query, exact, exact)),
    ):
        got, right = (run(*given, seen, 0.25, backend=backend) for seen in (spans, mask))
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


def test_exact_keys_may_be_of_half_precision(backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        query, keys, values = (
            torch.randn(1, 4, 9, 16),
            torch.randn(1, 2, 70, 24).to(dtype)[..., :16],
            torch.randn(1, 2, 70, 16).to(dtype),
        )
        got = ops.attend_exact(query, keys, values, None, 0.25, backend=backend)
        check(got, reference.attention(query, keys.float(), values.float(), None, 0.25))


def test_masked_keys_are_never_looked_at(backend: str) -> None:
    query, key, value = torch.randn(1, 2, 5, 16), scattered(1, 2, 90), scattered(1, 2, 90)
    mask = (torch.arange(90) < 40).expand(1, 1, 5, 90)
    first = [ops.Coded(side.packed[:, :, :40], side.scale[:, :, :40], *side[2:]) for side in (key, value)]
    out, lse = ops.attend(query, key, value, None, mask, 0.25, backend=backend)
    alone, alone_lse = ops.attend(query, *first, None, None, 0.25, backend=backend)
    assert torch.allclose(out, alone, atol=1e-6)
    assert torch.allclose(lse, alone_lse, atol=1e-6)


def test_tiles_that_no_query_may_see_are_not_read() -> None:
    read_at = []

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        read_at.append(start)
        return torch.zeros(1, 1, stop - start, 16), torch.zeros(1, 1, stop - start, 16)

    mask = torch.zeros(1, 1, 2, 5 * naive._KEY_TILE, dtype=torch.bool)
    mask[0, 0, 1, [naive._KEY_TILE, 4 * naive._KEY_TILE - 1]] = True
    ops.attend_tiles(torch.randn(1, 1, 2, 16), read, mask.shape[-1], mask, 1.0)
    assert read_at == [naive._KEY_TILE, 3 * naive._KEY_TILE]


def test_the_tiles_of_the_past_do_not_show(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(2, 2, 9, 16), scattered(2, 2, 40), scattered(2, 2, 40)
    mask = masks("causal", 2, 9, 40)
    whole = ops.attend(query, key, value, None, mask, 0.25, backend=backend)
    monkeypatch.setattr(naive, "_KEY_TILE", 7)
    monkeypatch.setattr(naive, "_QUERY_TILE", 4)
    for got, right in zip(ops.attend(query, key, value, None, mask, 0.25, backend=backend), whole, strict=True):
        assert torch.allclose(got, right, atol=1e-6)
