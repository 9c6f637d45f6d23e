from __future__ import annotations

import itertools

import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfold import ops


def parts_of(cuts: list[int], mask: Tensor) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Attention over the keys between the cuts, one by one, and over all of them."""
    tokens = mask.shape[-1]
    query, keys, values = torch.randn(2, 2, 3, 4), torch.randn(2, 2, tokens, 4), torch.randn(2, 2, tokens, 4)
    edges = [0, *sorted(cuts), tokens]
    parts = [
        reference.attention(query, keys[:, :, a:b], values[:, :, a:b], mask[..., a:b], 1.0)
        for a, b in itertools.pairwise(edges)
    ]
    return [(out.float(), lse.float()) for out, lse in parts], reference.attention(query, keys, values, mask, 1.0)


@given(cuts=st.lists(st.integers(0, 20), max_size=4), density=st.sampled_from([0.1, 0.5, 1.0]), seed=st.integers(0, 999))
def test_attention_to_the_parts_merges_to_attention_to_the_whole(cuts: list[int], density: float, seed: int) -> None:
    torch.manual_seed(seed)
    parts, (right, right_lse) = parts_of(cuts, torch.rand(2, 1, 3, 20) < density)
    out, lse = ops.merge(parts)
    assert torch.allclose(out.double(), right, atol=1e-5)
    assert torch.allclose(lse.double(), right_lse, atol=1e-5)


@given(order=st.permutations(range(4)))
def test_the_order_of_the_parts_does_not_matter(order: list[int]) -> None:
    torch.manual_seed(0)
    parts, _ = parts_of([3, 9, 10], torch.rand(2, 1, 3, 20) < 0.3)
    for got, right in zip(ops.merge([parts[i] for i in order]), ops.merge(parts), strict=True):
        assert torch.allclose(got, right, atol=1e-6)


def test_a_part_that_saw_nothing_changes_nothing() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for parts in ([(out, lse)], [(out, lse), nothing], [nothing, (out, lse), nothing]):
        merged, merged_lse = ops.merge(parts)
        assert torch.allclose(merged, out)
        assert torch.allclose(merged_lse, lse)


def test_nothing_and_nothing_is_nothing() -> None:
    nothing = torch.zeros(1, 2, 3, 4), torch.full((1, 2, 3), -torch.inf)
    for got, right in zip(ops.merge([nothing, nothing]), nothing, strict=True):
        assert torch.equal(got, right)


def test_large_log_sums_do_not_overflow() -> None:
    out = torch.ones(1, 1, 1, 2)
    merged, lse = ops.merge([(out, torch.full((1, 1, 1), 2e4)), (3 * out, torch.full((1, 1, 1), 2e4))])
    assert torch.allclose(merged, 2 * out, rtol=1e-3)  # float32 near 20,000 is that coarse
    assert torch.allclose(lse, torch.full_like(lse, 2e4 + 0.6931))
