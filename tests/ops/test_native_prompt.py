"""The compiled CPU ops on many queries, every instruction set that runs here: rounds, spans, precision."""

from __future__ import annotations

import pytest
import torch
from coded import EXACT_ERROR, both, coded, rotation

from kvfold import ops
from kvfold.ops import native

pytestmark = [pytest.mark.skipif(not native.available_isas(), reason=native.MISSING), pytest.mark.usefixtures("isa")]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_queries_and_keys_than_are_taken_at_a_time(dtype: torch.dtype, masked: bool) -> None:
    """Rounds of 1,024 queries, of 1,024 keys that are decoded together; rows that see nothing, keys that nobody sees."""
    queries, tokens = 1050, 1100
    key, value = coded(2, 1, tokens, 32, stages=2, strided=True), coded(2, 1, tokens, 32, stages=2)
    query = torch.randn(2, 2, queries, 32).to(dtype)
    seen = torch.rand(2, 1, queries, tokens) < 0.5
    seen[0, :, 100:900] = False
    seen[1, :, :, 64:1040] = False
    seen[:, :, :, 1090:] = False
    mask = seen if masked else None
    (out, lse), (right, right_lse) = both(query, key, value, rotation(tokens, 32), mask, 32**-0.5)
    there = right_lse.isfinite()
    assert torch.equal(lse.isfinite(), there)
    assert not out[~there].any()
    difference = (out - right)[there].square().mean().sqrt() / right[there].square().mean().sqrt()
    assert float(difference) <= (1e-2 if dtype is torch.bfloat16 else EXACT_ERROR)
    assert float((lse - right_lse)[there].abs().max()) <= 1e-2


@pytest.mark.parametrize("queries", [3, 1050])
def test_spans_are_read_as_their_mask_is(queries: int) -> None:
    """A prompt's: some coded tokens from the first on, then exact ones up to a query's own behind some that all see."""
    coded_tokens, exact_tokens = 1030, queries + 40
    key, value = coded(1, 1, coded_tokens, 32, stages=2, strided=True), coded(1, 1, coded_tokens, 32, stages=2)
    exact = torch.randn(1, 1, exact_tokens, 32).bfloat16()
    own, zero = torch.arange(queries), torch.zeros(queries, dtype=torch.int64)
    seen = ops.Spans.of(zero, own - 60), ops.Spans.of(zero, zero + 4, (own - 60).clamp_min(4), own + 1)
    masks = seen[0].mask(0, coded_tokens), seen[1].mask(0, exact_tokens)
    query = torch.randn(1, 3, queries, 32)
    for dtype in (torch.float32, torch.bfloat16):
        given = query.to(dtype), ops.Past(key, value, rotation(coded_tokens, 32))
        got, right = (
            ops.attend_both(*given, of_coded, ops.Exact(exact, exact, of_exact), 32**-0.5, backend="cpu")
            for of_coded, of_exact in (seen, masks)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("dim", "rope"), [(64, "pre"), (128, "post"), (32, "post")])
def test_a_prompt_attends_as_the_naive_op(dim: int, rope: str, softcap: float | None, dtype: torch.dtype) -> None:
    tokens, queries = 333, 150
    query, key, value = (
        torch.randn(2, 6, queries, dim).to(dtype),
        coded(2, 2, tokens, dim, strided=True),
        coded(2, 2, tokens, dim),
    )
    mask = (torch.arange(tokens) <= torch.arange(queries)[:, None] + tokens - queries)[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :100] = False
    mask[0, :, 7] = False
    bound = 1e-2 if dtype is torch.bfloat16 else EXACT_ERROR
    turned = rotation(tokens, dim) if rope == "pre" else None
    dense = torch.randn(2, 2, tokens, dim).to(dtype)
    for got, right in (
        both(query, key, value, turned, mask, dim**-0.5, softcap=softcap),
        tuple(ops.attend_exact(query, dense, dense, mask, dim**-0.5, softcap, backend) for backend in ("cpu", "naive")),
    ):
        seen = right[1] > -torch.inf
        assert not got[0][~seen].any()
        assert torch.equal(got[1] > -torch.inf, seen)
        # Over all rows together: four roundings to 2^-9 show in the worst of 1,800 rows more than in the whole.
        difference = (got[0] - right[0])[seen].square().mean().sqrt() / right[0][seen].square().mean().sqrt()
        assert float(difference) <= bound
        assert float((got[1] - right[1])[seen].abs().max()) <= bound
