"""The lattice E8 and fixed-rate codes made of it (Conway and Sloane 1982, 1983; NestQuant, arXiv 2502.09720).

E8 are the vectors of 8 integers, or of 8 halves of odd integers, whose sum is even: the densest packing in 8 dimensions. Its
nearest point takes two roundings. The Voronoi code of ratio `q` are the `q^8` points of the shifted lattice E8 + OFFSET that
lie in the Voronoi region of `q E8`. A point's digits are its integer coordinates in the generator modulo `q`; of all points
with the same digits the region holds exactly one.

The region has a border, normal vectors have none. So a block is coded at one of `k` sizes of the region, the one with the
least error; and if it lies outside of one, the points that are tried are those nearest to it after it was drawn inside,
never the one it would wrap around to.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

DIM = 8
_RETREAT = (1.0, 1.15, 1.3, 1.5, 1.8)  # how far a block is drawn towards zero; that of the least error is kept

# Generic, so that no point lies on the border of the region, where rounding would choose between equals.
OFFSET = torch.tensor([0.758, 0.279, 0.403, 0.735, 0.029, 0.800, 0.397, 0.754])


@cache
def generator() -> Tensor:
    """Rows that span E8, float32 `[8, 8]`."""
    rows = torch.eye(DIM) - torch.eye(DIM).roll(-1, 1)
    rows[0], rows[-1] = 2 * torch.eye(DIM)[0], 0.5
    return rows


@cache
def _inverse() -> Tensor:
    return torch.linalg.inv(generator().double()).mul(2).round().div(2).float()  # its elements are halves of integers


def nearest(x: Tensor) -> Tensor:
    """The point of E8 nearest to each row of `x [..., 8]`: of D8 or of D8 + 1/2, whichever is nearer."""
    whole, half = _nearest_d8(x), _nearest_d8(x - 0.5) + 0.5
    return torch.where(_distance(x, whole) <= _distance(x, half), whole, half)


def _nearest_d8(x: Tensor) -> Tensor:
    """The nearest integers with an even sum: where the sum is odd, the worst rounding goes the other way."""
    rounded = x.round()
    error = x - rounded
    worst = error.abs().argmax(-1, keepdim=True)
    step = torch.where(error.gather(-1, worst) < 0, -1.0, 1.0)
    return rounded.scatter_add(-1, worst, step * rounded.sum(-1, keepdim=True).remainder(2))


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum(-1, keepdim=True)


def digits(x: Tensor, q: Tensor) -> Tensor:
    """Digits float32 `[..., 8]`, whole numbers below `q`, of the point of the shifted lattice nearest to `x [..., 8]`."""
    point = nearest(x - OFFSET.to(x.device))
    return (point @ _inverse().to(x.device)).round().remainder(q)


def point(digits: Tensor, q: Tensor) -> Tensor:
    """The code's point with these digits, `[..., 8]`."""
    any_such = digits @ generator().to(digits.device) + OFFSET.to(digits.device)
    return any_such - q * nearest(any_such / q)


@cache
def _spread(k: int) -> tuple[float, ...]:
    """Quantiles of a log-normal distribution, which the norms of blocks have about."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    quantiles = normal.icdf((torch.arange(k, dtype=torch.float64) + 0.5) / k)
    return tuple((3.9 * torch.exp(0.3 * quantiles)).tolist())


def size(index: Tensor | int, q: Tensor, k: int) -> Tensor:
    """The `index`-th of `k` sizes of the region, which is `q` times the lattice's scale, for blocks of unit variance.

    3.9, 0.3 and 0.06 come from a search on normal blocks: for `q` of 2 to 64 and `k` of 2 to 4, sizes of their own for each
    would save at most some percent of the squared error.
    """
    spread = torch.tensor(_spread(k), device=q.device)
    return spread[index] * q**0.06


def width(q: int, k: int) -> int:
    """Bits of a block's number; 0 for `q` of 1, a block that is not coded."""
    return (k * q**DIM - 1).bit_length() if q > 1 else 0


def quantize(x: Tensor, q: Tensor, k: int) -> Tensor:
    """Numbers int64 `[..., 1]` below `k q^8` of blocks `x [..., 8]` of about unit variance; `q`, float32, broadcasts."""
    radix = q.long() ** torch.arange(DIM, device=x.device)
    norm = x.norm(dim=-1, keepdim=True)
    least = torch.full_like(norm, math.inf)
    number = torch.zeros_like(norm, dtype=torch.int64)
    for index in range(k):
        region = size(index, q, k)
        scale, inside = region / q, (norm / region).clamp_min(1)
        for retreat in _RETREAT:
            tried = digits(x / (scale * inside * retreat), q)
            error = _distance(x, scale * point(tried, q))
            better = error < least
            least = torch.where(better, error, least)
            number = torch.where(better, index + k * (tried.long() * radix).sum(-1, keepdim=True), number)
    return torch.where(q > 1, number, 0)


def dequantize(number: Tensor, q: Tensor, k: int) -> Tensor:
    """The blocks float32 `[..., 8]` that numbers `[..., 1]` stand for."""
    whole = q.long()
    read = (number // k // whole ** torch.arange(DIM, device=number.device) % whole).float()
    return torch.where(q > 1, size(number % k, q, k) / q * point(read, q), 0.0)


RATIOS = (*range(1, 17), 18, 20, 23, 26, 29, 32, 37, 43, 50, 57, 64)


@cache
def error(k: int) -> dict[int, float]:
    """Mean squared error an element of normal blocks of unit variance, for each of `RATIOS`; measured on a fixed draw."""
    x = torch.randn(1024, DIM, generator=torch.Generator().manual_seed(0))
    ratios = {q: torch.tensor(float(q)) for q in RATIOS}
    return {q: float((dequantize(quantize(x, r, k), r, k) - x).square().mean()) if q > 1 else 1.0 for q, r in ratios.items()}
