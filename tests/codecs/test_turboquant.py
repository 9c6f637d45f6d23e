"""Rotation and one table for all (`kvfold/codecs/turboquant.py`)."""

from __future__ import annotations

import pytest
import torch

from kvfold.codecs.turboquant import TurboQuantCodec, normal_levels, rotation
from kvfold.errors import InputError


def test_levels_are_those_of_max() -> None:
    """J. Max, Quantizing for minimum distortion, IRE Trans. 1960, table I."""
    for bits, upper in ((1, [0.7980]), (2, [0.4528, 1.510]), (3, [0.2451, 0.7560, 1.344, 2.152])):
        levels = normal_levels(bits)
        assert levels[len(levels) // 2 :].tolist() == pytest.approx(upper, abs=6e-4)
        assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("dim", [1, 16, 64, 80, 128])
def test_the_rotation_is_one(dim: int) -> None:
    matrix = rotation(dim).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_error_is_that_of_the_normal_table_whatever_the_vectors(bits: int, error: float) -> None:
    torch.manual_seed(0)
    codec = TurboQuantCodec(64, bits)
    peaky = torch.randn(1, 2, 3000, 64) * torch.logspace(-1, 1, 64)
    for x in (torch.randn(1, 2, 3000, 64) * 7, peaky):
        decoded = codec.decode(codec.encode(x))
        distortion = ((decoded - x).square().sum(-1) / x.square().sum(-1)).mean()
        assert 0.85 * error < float(distortion) < 1.02 * error  # a unit vector has no long tail


def test_bits_are_stored() -> None:
    for bits, dim, total in ((2, 64, 2.25), (3, 64, 3.25), (4, 128, 4.125)):
        codec, x = TurboQuantCodec(dim, bits), torch.randn(2, 3, 5, dim)
        assert codec.bits_per_element == 8 * codec.encode(x).nbytes / x.numel() == total


def test_zeros_stay_zeros_and_huge_vectors_finite() -> None:
    codec = TurboQuantCodec(16)
    assert not codec.decode(codec.encode(torch.zeros(1, 1, 2, 16))).any()
    assert bool(codec.decode(codec.encode(torch.full((1, 1, 1, 16), 1e30))).isfinite().all())


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match="bits from 1 to 8"):
        TurboQuantCodec(64, bits)
