"""The lattice E8, its Voronoi codes, and the codec made of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small import DIM, fit, samples
from torch import Tensor

from kvfold.codecs import e8
from kvfold.codecs.lattice import LatticeCodec
from kvfold.codecs.levels import normal_levels
from kvfold.errors import InputError


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def shell(norm: int) -> Tensor:
    """All points of E8 with this squared norm, from the definition: 240 of norm 2, 2160 of norm 4."""
    whole = itertools.product(range(-2, 3), repeat=8)
    halves = itertools.product((-1.5, -0.5, 0.5, 1.5), repeat=8)
    points = [p for p in itertools.chain(whole, halves) if sum(c * c for c in p) == norm and sum(p) % 2 == 0]
    return torch.tensor(points)


@pytest.fixture(scope="module")
def shells() -> Tensor:
    first, second = shell(2), shell(4)
    assert (len(first), len(second)) == (240, 2160)
    return torch.cat((torch.zeros(1, 8), first, second))


def test_the_generator_spans_e8(shells: Tensor) -> None:
    coordinates = shells.double() @ torch.linalg.inv(e8.generator().double())
    assert torch.equal(coordinates, coordinates.round())
    assert float(torch.linalg.det(e8.generator().double())) == pytest.approx(1)


def test_the_nearest_point_is_the_nearest_of_all_near_zero(shells: Tensor) -> None:
    """Vectors of norm below 1 have their nearest point within 2 of zero, for no vector is further than 1 from the lattice."""
    x = torch.nn.functional.normalize(normal(500), dim=-1) * torch.rand(500, 1, generator=torch.Generator().manual_seed(1))
    got = (x - e8.nearest(x)).norm(dim=-1)
    assert torch.allclose(got, torch.cdist(x, shells).amin(-1), atol=1e-5)


def test_lattice_points_are_their_own_nearest_points_anywhere(shells: Tensor) -> None:
    for moved in (shells, shells + 7 * shells.roll(311, 0)):
        assert torch.equal(e8.nearest(moved), moved)
        assert torch.equal(e8.nearest(moved + 0.2), moved)  # 0.57 off, less than half of the least distance


def test_second_moment_of_the_cell_is_the_published_one() -> None:
    """Conway and Sloane: 929 / 12960 = 0.07168 a dimension, 1 / 12 for scalars. 200,000 draws tell it within 0.1 percent."""
    x = 8 * torch.rand(200_000, 8, generator=torch.Generator().manual_seed(0))  # uniform over whole cells, up to the border
    assert float((x - e8.nearest(x)).square().mean()) == pytest.approx(929 / 12960, rel=3e-3)


@pytest.mark.parametrize("q", [2, 3])
def test_every_number_is_a_point_of_its_own_and_codes_to_itself(q: int) -> None:
    ratio = torch.tensor(float(q))
    digits = torch.tensor(list(itertools.product(range(q), repeat=8)), dtype=torch.float32)
    points = e8.point(digits, ratio)
    assert len(points.unique(dim=0)) == q**8
    assert torch.equal(e8.digits(points, ratio), digits)
    assert float((points - q * e8.nearest(points / q)).sub(points).abs().max()) == 0  # all in the region


@pytest.mark.parametrize("q", [2, 5, 16, 64])
def test_numbers_are_in_range_and_decode_to_what_was_chosen(q: int) -> None:
    x, ratio = normal(300), torch.tensor(float(q))
    numbers = e8.quantize(x, ratio, 4)
    assert int(numbers.min()) >= 0
    assert int(numbers.max()) < 1 << e8.width(q, 4)
    points = e8.dequantize(numbers, ratio, 4)
    assert float((points - x).square().mean()) == pytest.approx(e8.error(4)[q], rel=0.25)  # of another draw


@pytest.mark.parametrize("k", [1, 4])
def test_no_block_wraps_around(k: int) -> None:
    """However far outside, a block's point is on its own side: nearer than zero is."""
    x = torch.nn.functional.normalize(normal(200), dim=-1) * torch.logspace(0.6, 3, 200)[:, None]
    points = e8.dequantize(e8.quantize(x, torch.tensor(8.0), k), torch.tensor(8.0), k)
    assert bool(((x - points).norm(dim=-1) < x.norm(dim=-1)).all())


@pytest.mark.parametrize("q", [4, 8])
def test_it_beats_scalar_levels_at_the_same_bits(q: int) -> None:
    """Normal blocks, one scale in a block as a scalar table has: bits are log2 q either way."""
    x = normal(4000)
    levels = normal_levels(round(math.log2(q)))
    scalar = (x[..., None] - levels).abs().amin(-1).square().mean()
    assert e8.width(q, 1) == 8 * math.log2(q)
    assert e8.error(1)[q] < 0.9 * float(scalar)


def test_more_scales_err_less() -> None:
    assert e8.error(4)[4] < e8.error(2)[4] < e8.error(1)[4]


def test_bits_go_to_the_axes_that_vary() -> None:
    x = samples(600)
    x = x * torch.where(torch.arange(DIM) < 8, 10.0, 1.0)
    codec = fit("lattice", "value", x=x)
    assert codec.ratio is not None
    assert bool((codec.ratio[:, 0] > codec.ratio[:, 1]).all())
    assert codec.distortion(x) < 0.5 * fit("lattice", "value", x=x, transform="hadamard").distortion(x)


@pytest.mark.parametrize("transform", ["pca", "hadamard"])
def test_more_bits_err_less(transform: str) -> None:
    x = samples()
    errors = [fit("lattice", "value", transform=transform, bits=bits).distortion(x) for bits in (1.25, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def test_entropy_is_below_the_bits_stored() -> None:
    """Of samples enough to fill the tables, whose own size is not counted: 16 coordinates of some 20 values and 8 kinds."""
    x = samples(8000)
    codec = fit("lattice", "value", x=x, bits=3)
    entropy = codec.entropy_bits(codec.encode(x[None]))
    assert 1.5 < entropy < codec.bits_per_element


def test_entropy_of_equal_vectors_is_zero() -> None:
    codec = fit("lattice", "value")
    assert codec.entropy_bits(codec.encode(samples(1).expand(-1, 50, -1)[None])) == pytest.approx(0)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30, -1e30, 1e-30])
@pytest.mark.parametrize("transform", ["pca", "hadamard"])
def test_constant_and_huge_vectors_decode_to_finite_ones(value: float, transform: str) -> None:
    x = torch.full((1, 2, 8, DIM), value)
    codec = fit("lattice", "value", transform=transform)
    assert bool(codec.decode(codec.encode(x)).isfinite().all())
    constant = fit("lattice", "value", x=x[0].clamp(-1, 1), transform=transform)
    assert bool(constant.decode(constant.encode(x)).isfinite().all())


def test_a_vector_unlike_the_samples_keeps_its_direction() -> None:
    """The gain is raised until its blocks fit, although the samples hardly vary where it points."""
    x = samples(400) * torch.where(torch.arange(DIM) < 8, 1.0, 0.05)
    codec = fit("lattice", "value", x=x, bits=4)
    strange = torch.zeros(1, 2, 1, DIM)
    strange[..., -1] = 20
    assert float(torch.cosine_similarity(codec.decode(codec.encode(strange)), strange, -1).min()) > 0.9


@pytest.mark.parametrize(
    "settings",
    [{"bits": 0.5}, {"bits": 5}, {"scales": 0}, {"scales": 17}, {"transform": "dct"}, {"scale_bits": 12}, {"bits": math.nan}],
)
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        LatticeCodec(DIM, **settings)


def test_a_head_dim_that_8_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="a head dim that 8 divides; got 20"):
        LatticeCodec(20)


def test_one_sample_is_refused() -> None:
    with pytest.raises(InputError, match="samples of at least 2 tokens; got 1"):
        fit("lattice", x=samples(1))
