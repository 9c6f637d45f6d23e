"""Orthogonal transforms that methods share."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def hadamard(dim: int) -> Tensor:
    """Sylvester's Hadamard matrix over `sqrt(dim)`, float32 `[dim, dim]`, symmetric; `dim` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(dim)


def haar(dim: int, generator: torch.Generator) -> Tensor:
    """Orthogonal matrix that is uniformly distributed over all of them, float32 `[dim, dim]`.

    The Q of a normal matrix, with the signs that make it unique (Mezzadri, arXiv math-ph/0609050).
    """
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


@cache
def rotation(dim: int, seed: int = 0) -> Tensor:
    """Random orthogonal matrix, float32 `[dim, dim]`: a Hadamard matrix with random signs where `dim` is a power of two.

    The seed is part of a method, not of a calibration: no codec stores a rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    if dim & (dim - 1):
        return haar(dim, generator)
    return hadamard(dim) * (2.0 * torch.randint(2, (dim,), generator=generator) - 1)
