"""What is particular to KVQuant, and the k-means of its levels."""

from __future__ import annotations

import pytest
import torch
from small import DIM, HEADS, fit, samples

from kvfold.codecs import build_codec, resolve_settings
from kvfold.codecs.base import Facts
from kvfold.codecs.kvquant import KVQuantCodec, normed
from kvfold.codecs.levels import nearest_level, normal_levels, weighted_levels
from kvfold.errors import InputError


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_levels_of_normal_samples_are_lloyd_and_maxs(bits: int, distortion: float) -> None:
    levels = weighted_levels(normal(400_000), torch.ones(400_000), bits)
    fresh = normal(400_000, seed=1)
    error = float((levels[nearest_level(fresh, levels)] - fresh).square().mean())
    assert error == pytest.approx(distortion, rel=0.02)  # two standard errors of 400,000 samples and as many learned from
    assert torch.allclose(levels, normal_levels(bits), atol=0.05)


def test_a_weight_counts_as_that_many_samples() -> None:
    x, weight = normal(500), torch.arange(500) % 4
    assert torch.allclose(weighted_levels(x, weight, 2), weighted_levels(x.repeat_interleave(weight), torch.ones(750), 2))


def test_no_level_can_be_moved_to_the_better() -> None:
    x, weight = normal(3000), normal(3000, seed=1).square()

    def error(levels: torch.Tensor) -> float:
        return float((weight * (levels[nearest_level(x, levels)] - x).square()).double().sum())

    levels = weighted_levels(x, weight, 3)
    for index in range(8):
        for by in (-0.02, 0.02):
            moved = levels.clone()
            moved[index] += by
            assert error(moved) > error(levels)


@pytest.mark.parametrize("x", [torch.zeros(50), torch.tensor([1.0, 2.0]), torch.tensor([-3.0] * 40 + [7.0])])
def test_fewer_different_samples_than_levels_are_met_exactly(x: torch.Tensor) -> None:
    levels = weighted_levels(x, torch.zeros_like(x), 3)
    assert bool(levels.isfinite().all())
    assert torch.equal(levels[nearest_level(x, levels)], x)


def test_q_norm_keeps_mean_and_standard_deviation() -> None:
    x = normal(20_000).exp()
    levels = weighted_levels(x, torch.ones_like(x), 2)
    plain, read = levels[nearest_level(x, levels)], normed(levels, x)[nearest_level(x, levels)]
    assert float(read.mean()) == pytest.approx(float(x.mean()), rel=1e-4)
    assert float(read.std()) == pytest.approx(float(x.std()), rel=1e-4)
    assert float(plain.std()) < 0.97 * float(x.std())  # which is what it repairs


def test_q_norm_of_samples_that_are_all_alike_is_finite() -> None:
    assert torch.equal(normed(torch.tensor([0.0, 1.0]), torch.full((9,), 1.0)), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("bits", [2, 3])
def test_outliers_come_back_in_float16(side: str, bits: int) -> None:
    codec = fit("kvquant", side, bits=bits, outliers=0.125)
    x = samples(40, seed=1)[None]
    x[0, 0, 5, 3], x[0, 0, 5, 9] = 1234.5, -77.77
    codes = codec.encode(x)
    places = codes.fields["places"].long()
    assert codes.fields["exact"].shape == (1, HEADS, 40, 2)
    assert torch.equal(codec.decode(codes).gather(-1, places), x.gather(-1, places).half().float())
    assert set(places[0, 0, 5].tolist()) == {3, 9}


def test_an_outlier_costs_the_other_values_of_its_vector_nothing() -> None:
    x = samples(40)[None].clamp(-2, 2)
    loud = x.clone()
    loud[..., 7] = 500.0
    with_it, without = fit("kvquant", "value"), fit("kvquant", "value", outliers=0.0)
    rest = [c for c in range(DIM) if c != 7]
    error = [float((c.decode(c.encode(loud)) - loud)[..., rest].square().mean()) for c in (with_it, without)]
    assert error[0] < 0.05
    assert error[1] > 10 * error[0]


def test_values_lose_what_leaves_the_narrowest_range() -> None:
    codec = KVQuantCodec(4, "value", outliers=0.5)
    x = torch.tensor([[0.0, 10.0, 1.0, 2.0], [-9.0, 0.0, 1.0, 11.0], [0.0, -8.0, -6.0, 1.0]])
    assert [sorted(row) for row in codec._furthest(x).tolist()] == [[1, 3], [0, 3], [1, 2]]


def test_a_channel_of_its_own_size_costs_other_channels_nothing() -> None:
    """Why keys have their scales by channel."""
    x = samples(304)
    loud = x.clone()
    loud[..., 3] *= 1000
    plain, other = (fit("kvquant", "key", x=y, outliers=0.0) for y in (x, loud))
    kept = [c for c in range(DIM) if c != 3]
    before, after = (
        float((c.decode(c.encode(y[None]))[0] - y)[..., kept].square().mean()) for c, y in ((plain, x), (other, loud))
    )
    assert after < 1.5 * before  # levels are common to all channels, so a little changes


def test_levels_go_where_the_loss_feels_errors() -> None:
    even = torch.rand(1, 4000, 16, generator=torch.Generator().manual_seed(0))
    x = torch.cat((even[..., :8], even[..., 8:].pow(8)), -1)  # channels of two kinds of distribution
    errors = []
    for felt in (torch.ones(16), torch.cat((torch.ones(8) * 1e-3, torch.ones(8)))):
        codec = KVQuantCodec(16, "key", 2, 0.0, 0)
        codec.fit(x, torch.Generator(), facts=Facts(sensitivity=torch.diag(felt)[None]))
        errors.append(float((codec.decode(codec.encode(x[None]))[0] - x)[..., 8:].square().mean()))
    assert errors[1] < 0.92 * errors[0]


@pytest.mark.parametrize(
    ("bits", "dim", "key", "value"), [(3, 64, 3.375, 3.875), (3, 128, 3.1875, 3.4375), (2, 128, 2.1875, 2.4375)]
)
def test_bits_are_codes_outliers_and_scales(bits: int, dim: int, key: float, value: float) -> None:
    settings = resolve_settings("kvquant", {"bits": bits}, dim)
    assert [build_codec("kvquant", side, dim, settings).bits_per_element for side in ("key", "value")] == [key, value]


def test_places_of_a_wide_head_take_two_bytes() -> None:
    codec = KVQuantCodec(320, "value")
    codec.fit(torch.randn(1, 64, 320), torch.Generator())
    x = torch.randn(1, 1, 5, 320)
    x[..., 300] = 99.0
    codes = codec.encode(x)
    assert codes.fields["places"].dtype == torch.int16
    assert codec.bits_per_element == 8 * codes.nbytes / x.numel()
    assert bool((codec.decode(codes)[..., 300] == 99.0).all())


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("fill", [0.0, 0.3, 1e30, -1e-30])
def test_odd_vectors_are_finite(side: str, fill: float) -> None:
    for fitted_on in (samples(), torch.full((HEADS, 20, DIM), 0.25)):
        codec = fit("kvquant", side, x=fitted_on, bits=2)
        assert bool(codec.decode(codec.encode(torch.full((1, HEADS, 3, DIM), fill))).isfinite().all())


@pytest.mark.parametrize("change", [{"bits": 0}, {"bits": 9}, {"outliers": -0.1}, {"outliers": 0.6}, {"side": "query"}])
def test_bad_settings_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        KVQuantCodec(**{"head_dim": DIM, "side": "key", **change})


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InputError, match="at least 2 sample tokens; got 1"):
        fit("kvquant", x=samples(1))
