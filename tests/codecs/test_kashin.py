"""Sums of two flat vectors (`kvfold/codecs/kashin.py`)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small import samples
from torch import Tensor

from kvfold.codecs.kashin import KashinCodec, decompose, dequantize, quantize
from kvfold.codecs.levels import normal_levels
from kvfold.codecs.transform import rotation
from kvfold.errors import InputError


def sparse(dim: int, count: int = 500, peaks: int = 3) -> Tensor:
    """Unit vectors of a few peaks."""
    torch.manual_seed(0)
    x = torch.zeros(count, dim).scatter(1, torch.rand(count, dim).argsort(1)[:, :peaks], torch.randn(count, peaks))
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("kind", ["normal", "sparse"])
def test_the_sum_converges_geometrically(dim: int, kind: str) -> None:
    x, rotated = torch.randn(500, dim) if kind == "normal" else sparse(dim), rotation(dim)

    def left(steps: int) -> Tensor:
        u, v = decompose(x.double(), rotated.double(), steps)
        return (x - u - v @ rotated.double()).norm(dim=-1) / x.norm(dim=-1)

    errors = [left(steps) for steps in (0, 4, 8, 12, 16)]
    for before, after in itertools.pairwise(errors):  # a step leaves sqrt(1 - 2 / pi) = 0.60 of a normal vector's norm
        assert float(after.mean()) <= 0.7**4 * float(before.mean())
    assert float(errors[-1].max()) < 0.01


@pytest.mark.parametrize("dim", [64, 256, 1024])
def test_both_parts_of_a_vector_with_peaks_are_flat(dim: int) -> None:
    """Kashin: `max |u_i|` and `max |v_i|` are of the order `1 / sqrt(D)`, where `max |x_i|` is of the order 1."""
    x = sparse(dim)
    u, v = decompose(x, rotation(dim), 30)
    assert float((u + v @ rotation(dim) - x).abs().max()) < 1e-3
    assert float(x.abs().amax(1).mean()) > 0.7
    for part in (u, v):
        assert float(part.abs().amax(1).mean()) < 2.5 / math.sqrt(dim)


def distortion(x: Tensor, **settings: int) -> float:
    codec = KashinCodec(x.shape[-1], **settings)
    return codec.distortion(x[None])


@pytest.mark.parametrize("dim", [64, 256])
def test_one_step_in_each_basis_leaves_the_derived_error(dim: int) -> None:
    """Signs leave `1 - 2 / pi` of a normal vector's square, and what they leave looks normal in the other basis."""
    torch.manual_seed(0)
    x = torch.randn(4000, dim)
    u = (2 / math.pi) ** 0.5 * x.sign()
    rotated = rotation(dim)
    left = (x - u) @ rotated.T
    left = left - left.abs().mean(-1, keepdim=True) * left.sign()
    assert float(left.square().mean()) == pytest.approx((1 - 2 / math.pi) ** 2, rel=0.05)
    coded = distortion(x, bits=1)
    assert 0.75 * (1 - 2 / math.pi) ** 2 < coded < (1 - 2 / math.pi) ** 2  # coding in turn does better than one pass


def test_coding_the_factors_in_turn_is_what_makes_two_bits_of_two_worth_four() -> None:
    """Without it the error is near two independent 2-bit codes of the factors; with it near the scalar bound of 4 bits."""
    torch.manual_seed(0)
    x = torch.randn(4000, 64)
    errors = [distortion(x, refine=refine) for refine in (0, 1, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[1]
    assert errors[2] == pytest.approx(0.009497, rel=0.15)  # Lloyd and Max's 4 bits


def test_peaks_do_no_harm() -> None:
    """What the second basis is for: levels of a vector with peaks alone would be far off."""
    x = sparse(64)
    codes, centres = quantize(x, 2)
    assert float((dequantize(codes, centres) - x).square().mean() / x.square().mean()) > 3 * distortion(x)


def test_centres_are_the_least_squares_ones() -> None:
    torch.manual_seed(0)
    codes, centres = quantize(torch.randn(3, 200_000), 2)
    torch.testing.assert_close(centres.float(), normal_levels(2)[2:].expand(3, 2), rtol=0.01, atol=0)
    assert codes.min() == 0
    assert codes.max() == 3
    x = samples()
    codes, centres = quantize(x, 1)  # one centre: the mean magnitude
    torch.testing.assert_close(centres.float(), x.abs().mean(-1, keepdim=True), rtol=1e-3, atol=0)
    assert torch.equal(dequantize(codes, centres) > 0, x >= 0)


@pytest.mark.parametrize(("bits", "dim", "total"), [(1, 64, 2.5), (2, 64, 5.0), (2, 128, 4.5)])
def test_bits_are_stored(bits: int, dim: int, total: float) -> None:
    codec, x = KashinCodec(dim, bits), torch.randn(2, 3, 5, dim)
    assert codec.bits_per_element == 8 * codec.encode(x).nbytes / x.numel() == total


def test_zeros_stay_zeros_and_huge_vectors_finite() -> None:
    codec = KashinCodec(16)
    assert not codec.decode(codec.encode(torch.zeros(1, 1, 2, 16))).any()
    for x in (torch.full((1, 1, 1, 16), 3e38), torch.full((1, 1, 1, 16), -1e5), 1e30 * torch.eye(16)[None, None]):
        assert bool(codec.decode(codec.encode(x)).isfinite().all())


@pytest.mark.parametrize("changes", [{"bits": 3}, {"bits": 0}, {"steps": 0}, {"refine": -1}])
def test_bad_settings_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        KashinCodec(64, **changes)
