"""Levels of scalar quantizers that methods share."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


@cache
def normal_levels(bits: int) -> Tensor:
    """The `2^bits` levels with the least squared error for a standard normal variable, ascending (Lloyd 1982, Max 1960)."""
    count = 1 << bits
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(20_000):
        edges = torch.cat((-infinity, (levels[1:] + levels[:-1]) / 2, infinity))
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        centres = (density[:-1] - density[1:]) / normal.cdf(edges).diff()
        if float((centres - levels).abs().max()) < 1e-9:
            break
        levels = centres
    return ((levels - levels.flip(0)) / 2).float()


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Indices int64 of the nearest of `levels [n]`, ascending, for every element of `x`; the lower of two as near."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def weighted_levels(x: Tensor, weight: Tensor, bits: int, iterations: int = 1000) -> Tensor:
    """The `2^bits` levels with the least weighted squared error for samples: k-means in one dimension (Lloyd).

    Starts from quantiles of the weight. Samples are sorted once, so that an iteration costs a binary search a level.

    Args:
        x, weight: `[N]`, weights of at least 0; if all are 0, samples weigh alike.

    Returns:
        float32 `[2^bits]`, ascending.
    """
    count = 1 << bits
    x, order = x.double().sort()
    weight = weight.double()[order]
    if not float(weight.sum()) > 0:
        weight = torch.ones_like(x)
    zero = x.new_zeros(1)
    mass, moment = (torch.cat((zero, t.cumsum(0))) for t in (weight, weight * x))
    share = (torch.arange(count, dtype=x.dtype, device=x.device) + 0.5) / count
    levels = x[torch.searchsorted(mass[1:].contiguous(), share * mass[-1]).clamp_max(len(x) - 1)]
    ends = torch.tensor([0, len(x)], device=x.device)
    for _ in range(iterations):
        inner = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat((ends[:1], inner, ends[1:]))
        own = mass[edges].diff()
        served = own > 1e-12 * mass[-1]  # less is the rounding of sums
        centres = torch.where(served, moment[edges].diff() / torch.where(served, own, 1.0), levels)
        moved = float((centres - levels).abs().max())
        levels = centres
        if moved <= 1e-7 * float(levels.abs().max()):
            break
    return levels.sort().values.float()


def laplace_distortion(levels: Tensor) -> float:
    """Expected squared error of a Laplace variable with density `exp(-|u|) / 2` read as the nearest of `levels [n]`.

    The integral of `(u - c)^2 exp(-u)` is `-((u - c)^2 + 2 (u - c) + 2) exp(-u)`; a negative `u` is a mirrored level's.
    """
    total = 0.0
    for side in (levels.double(), -levels.double().flip(0)):
        edges = torch.cat((side.new_tensor([-math.inf]), (side[1:] + side[:-1]) / 2, side.new_tensor([math.inf]))).clamp_min(0)
        low, high = (_laplace_tail(edge, side) for edge in (edges[:-1], edges[1:]))
        total += float((low - high).sum()) / 2
    return total


def _laplace_tail(edge: Tensor, level: Tensor) -> Tensor:
    """Integral of `(u - level)^2 exp(-u)` from `edge` on."""
    off = torch.where(edge.isfinite(), edge, 0.0) - level
    return torch.where(edge.isfinite(), (off.square() + 2 * off + 2) * torch.exp(-edge), 0.0)


@cache
def laplace_levels(bits: int) -> Tensor:
    """`2^bits` levels for a Laplace variable with mean magnitude 1, ascending, uniform but for their distance from zero.

    Levels are `+-(a + i s)`, or these and zero, which then has one level less on the negative side. `a` (twice the threshold
    below which the zero level prunes) and the step `s` have the least expected squared error, and so has the choice between
    the two: a zero level pays from 3 bits on.
    """
    designs = [_uniform_levels(bits, zero) for zero in (False, True) if not (zero and bits == 1)]
    return min(designs, key=laplace_distortion).float()


def _uniform_levels(bits: int, zero: bool) -> Tensor:
    half = torch.arange(1 << (bits - 1), dtype=torch.float64)

    def levels(first: float, step: float) -> Tensor:
        up = first + step * half
        return torch.cat((-up[:-1].flip(0), up.new_zeros(1), up)) if zero else torch.cat((-up.flip(0), up))

    best, stride = (1.0, 1.0), 0.5
    least = laplace_distortion(levels(*best))
    while stride > 1e-6:  # the error is smooth with one minimum: walk to the best neighbour, then look closer
        around = [(best[0] + i * stride, best[1] + j * stride) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        error, place = min((laplace_distortion(levels(*p)), p) for p in around if min(p) > 0)
        if error < least:
            least, best = error, place
        else:
            stride /= 2
    return levels(*best)
