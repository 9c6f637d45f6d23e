"""What is particular to DecoQuant."""

from __future__ import annotations

import pytest
import torch
from small import DIM, samples
from torch import Tensor

from kvfold.codecs import build_codec, resolve_settings
from kvfold.codecs.decoquant import DecoQuantCodec, join, split
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.packing import unpack


def chunks(tokens: int = 32, block: int = 8) -> Tensor:
    return samples(tokens).unflatten(1, (-1, block))


def with_outliers() -> Tensor:
    """A channel in eight that is twenty times as large, as in keys."""
    return samples(256) * torch.where(torch.arange(DIM) % 8 == 3, 20.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "dim", "expected"),
    [({}, 64, 4.375), ({}, 128, 4.1875), ({"inner": 16}, 64, 4.75), ({"bits": 2}, 64, 2.375)],
)
def test_bits_are_those_of_the_formula(settings: dict, dim: int, expected: float) -> None:
    resolved = resolve_settings("decoquant", settings, dim)
    assert build_codec("decoquant", "key", dim, resolved).bits_per_element == expected


@pytest.mark.parametrize("inner", [2, 4, 8])
def test_without_integers_the_product_is_the_chunk_up_to_float16(inner: int) -> None:
    x = chunks()
    large, small = split(x, inner)
    assert large.shape == x.shape
    assert small.shape == (*x.shape[:-2], inner, inner)
    # A row of the large factor times the rounding of the small one.
    bound = 2**-11 * large.abs().max() * small.float().abs().sum(-2).max() + 1e-5
    assert float((join(large, small) - x).abs().max()) < float(bound)


def test_the_large_factor_has_orthogonal_columns_of_mean_square_one() -> None:
    large, _ = split(chunks(), 4)
    rows = large.flatten(-2).unflatten(-1, (-1, 4))
    assert torch.allclose(rows.mT @ rows / rows.shape[-2], torch.eye(4), atol=1e-4)


def test_outliers_go_into_the_small_factor() -> None:
    x = with_outliers().unflatten(1, (-1, 64))
    large, small = split(x, 8)

    def spread(y: Tensor) -> float:
        return float(y.abs().amax((-2, -1)).mean() / y.square().mean((-2, -1)).sqrt().mean())

    assert spread(large) < 0.7 * spread(x)
    assert float(small.abs().max()) > 10  # the large channel's size


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_it_beats_integers_of_the_vectors_themselves(bits: int) -> None:
    x = with_outliers()
    top = (1 << (bits - 1)) - 1
    scale = x.abs().amax(-1, keepdim=True) / top
    plain = ((x / scale).round() * scale - x).square().mean() / x.square().mean()
    small_channels = torch.arange(DIM) % 8 != 3
    codec = DecoQuantCodec(DIM, bits, 8, 64)
    decoded = codec.decode(codec.encode(x[None]))[0]
    assert codec.distortion(x) < 0.9 * float(plain)
    lost = ((x / scale).round() * scale - x)[..., small_channels].square().mean()
    assert float((decoded - x)[..., small_channels].square().mean()) < 0.3 * float(lost)


def test_an_element_of_the_large_factor_is_off_by_half_a_step_at_most() -> None:
    x = samples(64)
    codec = DecoQuantCodec(DIM, 4, 4, 8)
    codes = codec.encode(x[None])
    large, _ = split(x.unflatten(1, (-1, 8)), 4)
    small = torch.eye(4).half().expand(1, 2, 8, 4, 4)
    decoded = join(_integers(codec, codes).unflatten(2, (-1, 8)), small)[0]
    step = large.abs().amax(-1, keepdim=True) / 7
    assert bool(((decoded - large).abs() <= step * (0.5 + 7 * 2**-10)).all())  # the step is a float16


def _integers(codec: DecoQuantCodec, codes: Codes) -> Tensor:
    return (unpack(codes.fields["codes"], codec.bits, DIM) - 7) * codes.fields["scale"].float()


@pytest.mark.parametrize("value", [0.0, 1e30, -1e30, 1e-30])
def test_constant_zero_and_huge_chunks_decode_to_finite_vectors(value: float) -> None:
    codec = DecoQuantCodec(DIM, 4, 4, 8)
    x = torch.full((1, 2, 8, DIM), value)
    decoded = codec.decode(codec.encode(x))
    assert bool(decoded.isfinite().all())
    expected = x.clamp(-65504, 65504)
    assert torch.allclose(decoded, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1},
        {"bits": 9},
        {"block": 48},
        {"block": 1},
        {"block": 1024},
        {"inner": 3},
        {"inner": 1},
        {"block": 2, "inner": 16},
    ],
)
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        DecoQuantCodec(DIM, **settings)
