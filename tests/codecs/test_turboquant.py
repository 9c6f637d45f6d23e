"""Rotation and one table for all (`kvfold/codecs/turboquant.py`), and its variant for inner products (`turboquant_prod.py`)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvfold.codecs import build_codec, resolve_settings
from kvfold.codecs.levels import normal_levels
from kvfold.codecs.transform import rotation
from kvfold.codecs.turboquant import TurboQuantCodec
from kvfold.codecs.turboquant_prod import TurboQuantProdCodec
from kvfold.errors import InputError


def test_levels_are_those_of_max() -> None:
    """J. Max, Quantizing for minimum distortion, IRE Trans. 1960, table I."""
    for bits, upper in ((1, [0.7980]), (2, [0.4528, 1.510]), (3, [0.2451, 0.7560, 1.344, 2.152])):
        levels = normal_levels(bits)
        assert levels[len(levels) // 2 :].tolist() == pytest.approx(upper, abs=6e-4)
        assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_levels_leave_the_published_error(bits: int, error: float) -> None:
    """Of centroids: `1 - sum P_i c_i^2`, with the probabilities of their cells."""
    levels = normal_levels(bits).double()
    edges = torch.cat((torch.tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2, torch.tensor([math.inf])))
    cells = torch.special.ndtr(edges).diff()
    assert float(1 - (cells * levels.square()).sum()) == pytest.approx(error, rel=1e-3)


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


def loud(tokens: int, seed: int = 0) -> Tensor:
    """`[2, N, 64]` with eight loud channels, others in each head."""
    torch.manual_seed(seed)
    x = torch.randn(2, tokens, 64)
    x[0, :, 5:13] *= 20
    x[1, :, 40:48] *= 20
    return x


def test_outlier_channels_are_found_and_coded_apart() -> None:
    mixed, plain = TurboQuantCodec(64, 2, outliers=8, outlier_bits=4), TurboQuantCodec(64, 3)
    mixed.fit(loud(500), torch.Generator())
    assert mixed.tensors()["channels"].tolist() == [[*range(5, 13)], [*range(40, 48)]]
    x = loud(2000, 1)
    quiet = torch.ones(2, 1, 64, dtype=torch.bool)
    quiet[0, :, 5:13] = quiet[1, :, 40:48] = False
    for codec, error in ((mixed, 0.1175), (plain, None)):
        off = (codec.decode(codec.encode(x[None]))[0] - x).square() * quiet
        found = float(off.sum() / (x.square() * quiet).sum())
        if error:
            assert 0.85 * error < found < 1.02 * error  # as if there were no loud channels
        else:
            assert found > 1  # with more bits, all of the quiet channels is lost
    assert mixed.distortion(x) == pytest.approx(0.009497, rel=0.25)  # 4 bits, in which 8 channels have a short tail


@pytest.mark.parametrize(
    ("dim", "changes", "bits"),
    [
        (128, {"outliers": 32}, 2.5),
        (64, {"outliers": 16}, 2.75),
        (128, {"bits": 3, "outliers": 64, "outlier_bits": 4}, 3.75),
    ],
)
def test_bits_of_mixed_widths(dim: int, changes: dict[str, int], bits: float) -> None:
    codec = build_codec("turboquant", "key", dim, resolve_settings("turboquant", changes, dim))
    x = torch.randn(3, 20, dim)
    codec.fit(x, torch.Generator())
    assert codec.bits_per_element == 8 * codec.encode(x[None]).nbytes / x.numel() == bits


def test_mixed_widths_want_a_calibration() -> None:
    with pytest.raises(InputError, match="calibrated"):
        TurboQuantCodec(16, outliers=4).encode(torch.randn(1, 1, 1, 16))


@pytest.mark.parametrize("changes", [{"outliers": 16}, {"outliers": -1}, {"outlier_bits": 9}])
def test_bad_outliers_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        TurboQuantCodec(16, **changes)  # type: ignore[arg-type]


def test_inner_products_of_prod_are_unbiased_and_those_of_levels_are_not() -> None:
    torch.manual_seed(0)
    keys = torch.randn(40, 64) * torch.logspace(-1, 1, 64)
    exact = keys.square().sum(-1)  # keys as their own queries, where levels shrink most
    drawn = []
    for seed in range(300):
        codec = TurboQuantProdCodec(64, 2, seed)
        latent = codec.latent(codec.encode(keys[None, None]))[0, 0]
        drawn.append((latent * (keys @ codec.basis.T)).sum(-1) / exact)
    ratio = torch.stack(drawn)
    error = ratio.std(0) / 300**0.5
    assert bool(((ratio.mean(0) - 1).abs() < 4 * error + 2**-10).all())  # and two float16 norms
    assert float(ratio.mean()) == pytest.approx(1, abs=0.005)
    plain = TurboQuantCodec(64, 2)
    levels = plain.decode(plain.encode(keys[None, None]))[0, 0]
    assert float(((levels * keys).sum(-1) / exact).mean()) == pytest.approx(1 - 0.1175, abs=0.03)  # 40 keys


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_signs_give_back_their_share_of_the_residual(bits: int) -> None:
    """A rotation's signs leave `pi / 2 - 1` of the square of what they describe."""
    torch.manual_seed(0)
    x = torch.randn(1, 4000, 64)
    left = TurboQuantCodec(64, bits - 1).distortion(x)
    assert TurboQuantProdCodec(64, bits).distortion(x) == pytest.approx((math.pi / 2 - 1) * left, rel=0.03)


def test_prod_is_for_keys() -> None:
    settings = resolve_settings("turboquant-prod", {"bits": 4}, 64)
    key, value = (build_codec("turboquant-prod", side, 64, settings) for side in ("key", "value"))
    x = torch.randn(2, 3, 5, 64)
    assert key.bits_per_element == 8 * key.encode(x).nbytes / x.numel() == 4.5
    assert (value.kind, value.bits_per_element) == ("turboquant", 4.25)


def test_zeros_of_prod_stay_zeros_and_huge_vectors_finite() -> None:
    codec = TurboQuantProdCodec(16)
    assert not codec.decode(codec.encode(torch.zeros(1, 1, 2, 16))).any()
    for size in (1e30, 3e38):
        assert bool(codec.decode(codec.encode(torch.full((1, 1, 1, 16), size))).isfinite().all())


@pytest.mark.parametrize("bits", [1, 10])
def test_bits_of_prod_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match="bits from 2 to 9"):
        TurboQuantProdCodec(64, bits)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_another_implementation_has_the_same_error(bits: int) -> None:
    """PyPI's tiny-turboquant, if it is there (`pip install --no-deps tiny-turboquant==0.18.0`).

    Its cells are equally probable, which are the best ones at 1 bit only; with our levels its error is ours at 2 and 4.
    """
    other = pytest.importorskip("tiny_turboquant.quantizer").TinyQuantizer(64, bits, device="cpu")
    torch.manual_seed(0)
    x = torch.randn(1, 4000, 64)

    def error() -> float:
        return float((other.dequantize(*other.quantize(x)) - x).square().mean() / x.square().mean())

    ours = TurboQuantCodec(64, bits).distortion(x)
    assert ours < error() * 1.01
    other.codebook = normal_levels(bits) / 8
    assert ours == pytest.approx(error(), rel=0.01)  # 256,000 coordinates in two rotations
