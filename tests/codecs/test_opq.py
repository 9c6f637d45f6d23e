"""What is particular to OPQ: levels for a Laplace variable, and widths under one budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from small import DIM, HEADS, fit, samples
from tiny import tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.text import builtin_text
from kvfold.codecs.base import Facts
from kvfold.codecs.levels import laplace_distortion, laplace_levels, nearest_level
from kvfold.codecs.opq import WIDTHS, OpqCodec, allocate, build_opq, settle_opq
from kvfold.errors import InputError


def laplace(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.empty(count).exponential_(generator=draw) * (2 * torch.randint(2, (count,), generator=draw) - 1)


@pytest.mark.parametrize("bits", range(1, 7))
def test_the_expected_distortion_is_that_of_draws(bits: int) -> None:
    x, levels = laplace(1_000_000), laplace_levels(bits)
    error = (levels[nearest_level(x, levels)] - x).square()
    standard_error = float(error.std()) / 1000
    assert laplace_distortion(levels) == pytest.approx(float(error.mean()), abs=4 * standard_error)


def test_the_expected_distortion_of_any_levels_is_that_of_draws() -> None:
    x, levels = laplace(1_000_000), torch.tensor([-3.0, -0.2, 0.1, 0.7, 5.0])
    error = (levels[nearest_level(x, levels)] - x).square()
    assert laplace_distortion(levels) == pytest.approx(float(error.mean()), abs=4e-3 * float(error.std()))


def test_one_and_two_bits_are_the_known_optima() -> None:
    """Uniform and optimal quantizers are one there: distortion 0.5 and 0.1762 of the variance (Jayant and Noll 1984)."""
    assert laplace_distortion(laplace_levels(1)) / 2 == pytest.approx(0.5, abs=1e-4)
    assert laplace_distortion(laplace_levels(2)) / 2 == pytest.approx(0.1762, abs=1e-4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_uniform_beyond_the_threshold_and_cannot_be_bettered(bits: int) -> None:
    levels = laplace_levels(bits).double()
    assert len(levels) == 1 << bits
    zero = bool((levels == 0).any())
    assert zero == (bits >= 3)
    up = levels[levels > 0]
    steps = up.diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps), atol=1e-6)
    place = torch.arange(len(up)) * float(steps.mean() if len(steps) else 0)
    for first, stretch in ((1e-2, 1.0), (-1e-2, 1.0), (0.0, 1.01), (0.0, 0.99)):
        if len(up) == 1 and not first:
            continue
        moved = float(up[0]) + first + place * stretch
        down = -moved.flip(0)
        other = torch.cat((down[1:], torch.zeros(1), moved)) if zero else torch.cat((down, moved))
        assert laplace_distortion(other) > laplace_distortion(levels)


def total(energies: list[float], widths: list[int] | tuple[int, ...]) -> float:
    return sum(e * laplace_distortion(laplace_levels(b)) for e, b in zip(energies, widths, strict=True))


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.25, 3.0, 3.3, 5.75])
def test_no_allocation_within_the_budget_is_better(budget: float) -> None:
    energies = [0.01, 1.0, 3.0, 200.0]
    widths = allocate(energies, [*WIDTHS], budget)
    fitting = [w for w in itertools.product(WIDTHS, repeat=4) if sum(w) <= 4 * budget]
    assert sum(widths) == int(4 * budget)  # whole bits, so all of it is spent
    assert total(energies, widths) == pytest.approx(min(total(energies, w) for w in fitting), rel=1e-12)


def test_the_budget_buys_more_than_equal_widths() -> None:
    energies = [float(e) for e in torch.rand(60, generator=torch.Generator().manual_seed(0)).mul(8).exp()]
    for budget in (2, 3, 4):
        widths = allocate(energies, [*WIDTHS], budget)
        assert sum(widths) == 60 * budget
        assert total(energies, widths) < 0.7 * total(energies, [budget] * 60)


def test_equal_energies_have_equal_widths_and_none_have_any_use() -> None:
    assert allocate([2.0] * 5, [*WIDTHS], 3.0) == [3] * 5
    assert allocate([0.0, 0.0], [*WIDTHS], 8.0) == [8, 8]
    with pytest.raises(InputError, match=r"bits of at least 1; got 0\.5"):
        allocate([1.0], [*WIDTHS], 0.5)


def test_padded_rows_cost_what_they_take() -> None:
    costs = [8.0 * -(-bits * 20 // 8) / 20 for bits in WIDTHS]
    widths = allocate([1.0, 5.0, 25.0], costs, 3.0)
    assert sum(costs[b - 1] for b in widths) <= 9.0


def test_settled_codecs_keep_their_statistics_and_meet_the_budget() -> None:
    def side(side: str, size: float) -> list[OpqCodec | None]:
        codecs = [fit("opq", side, x=samples(seed=i) * size**i) for i in range(3)]
        return [codecs[0], None, codecs[1], codecs[2]]

    keys, values = side("key", 4.0), side("value", 1.5)
    after = [*itertools.chain(*settle_opq(keys, values, {"bits": 3.4, "weight": "none"}))]
    assert [c is None for c in after] == [c is None for c in (*keys, *values)]
    settled = [c for c in after if c is not None]
    assert sum(c.bits_per_element for c in settled) == int(6 * 3.4)
    widths = [c.bits for c in settled]
    assert widths[:3] == sorted(widths[:3])
    assert widths[0] < widths[2]
    for before, codec in zip((c for c in (*keys, *values) if c), settled, strict=True):
        assert all(torch.equal(codec.tensors()[name], tensor) for name, tensor in before.tensors().items())
        assert codec.pre_rope == before.pre_rope


def test_energy_weighs_channels_by_what_the_loss_feels() -> None:
    felt = torch.diag(torch.linspace(0, 3, DIM)).expand(HEADS, DIM, DIM)
    plain, weighed = OpqCodec(DIM, "key"), OpqCodec(DIM, "key")
    plain.fit(samples(), torch.Generator())
    weighed.fit(samples(), torch.Generator(), facts=Facts(sensitivity=felt))
    square = plain.tensors()["scale"].square()
    assert plain.energy == pytest.approx(float(square.sum()), rel=1e-5)
    assert weighed.energy == pytest.approx(float((square * torch.linspace(0, 3, DIM)).sum()), rel=1e-5)
    assert plain.wants == {"sensitivity"}
    unasked = OpqCodec(DIM, "key", weight="none")
    unasked.fit(samples(), torch.Generator(), facts=Facts(sensitivity=felt))
    assert unasked.energy == plain.energy
    assert not unasked.wants


def test_channels_of_laplace_draws_have_the_expected_distortion() -> None:
    x = laplace(DIM * 20_000).view(1, -1, DIM) * torch.linspace(0.1, 9, DIM) + torch.linspace(-5, 5, DIM)
    codec = OpqCodec(DIM, "value", 3)
    codec.fit(x, torch.Generator())
    error = ((codec.decode(codec.encode(x[None]))[0] - x) / codec.tensors()["scale"]).square().mean()
    assert float(error) == pytest.approx(laplace_distortion(laplace_levels(3)), rel=0.03)  # tails are long


@pytest.mark.parametrize("fill", [0.0, 0.25, 1e30])
def test_odd_vectors_are_finite(fill: float) -> None:
    codec = fit("opq", x=torch.full((HEADS, 20, DIM), 0.25))
    decoded = codec.decode(codec.encode(torch.full((1, HEADS, 3, DIM), fill)))
    assert torch.equal(decoded, torch.full_like(decoded, 0.25))  # a channel that never moved


def test_calibrated_codecs_have_widths_of_their_own_within_the_budget() -> None:
    codecs = kvfold.calibrate(
        tiny_model("llama"),
        tiny_tokenizer(),
        builtin_text(),
        "opq",
        tokens=600,
        settings={"bits": 2.5},
        context=100,
        quiet=True,
    )
    widths = [codec.bits for codec in (*codecs.keys, *codecs.values)]
    assert codecs.bits_per_element == 2.5
    assert len(set(widths)) > 1
    for layer, pair in enumerate(codecs.info["distortion"]):  # of the widths that were settled on
        assert codecs.keys[layer].bits < 3 or pair[0] < 0.2


@pytest.mark.parametrize("change", [{"bits": 0}, {"bits": 9}, {"weight": "mass"}, {"side": "query"}])
def test_bad_settings_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        OpqCodec(**{"head_dim": DIM, "side": "key", **change})


@pytest.mark.parametrize("bits", [0.9, 8.1])
def test_a_budget_out_of_range_is_refused(bits: float) -> None:
    with pytest.raises(InputError, match="the mean over layers"):
        build_opq("key", DIM, {"bits": bits, "weight": "none"}, 0)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InputError, match="at least 2 sample tokens; got 1"):
        fit("opq", x=samples(1))
