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
