"""K-means as the paper starts its codebooks with: Lloyd's algorithm from random points, seeded.

Cost of an iteration: 2 N C d multiply-adds. Memory beyond the samples: one block of scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold import ops
from kvfold.errors import InputError


def kmeans(rows: Tensor, size: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Codebook `[size, d]` float32 of `rows [N, d]`.

    Starts from `size` random rows (distinct indices). After every iteration but the last, empty clusters move to the
    rows that are worst served. The squared error never grows from one iteration to the next, and the last step is an
    update of the means, so the codebook never adds to the energy of its residuals.

    Raises:
        InputError: fewer rows than codewords.
    """
    if len(rows) < size:
        raise InputError(
            f"at least {size} sample vectors for {size} codewords",
            f"{len(rows)}",
            "give more text, raise --tokens, or choose a smaller codebook_size",
        )
    codebook = rows[torch.randperm(len(rows), generator=generator)[:size]].clone()
    for iteration in range(iterations):
        index = nearest(rows, codebook)
        counts = torch.bincount(index, minlength=size)
        sums = torch.zeros_like(codebook).index_add_(0, index, rows)
        means = sums / counts.clamp_min(1)[:, None]
        codebook = torch.where(counts[:, None] > 0, means, codebook)
        empty = (counts == 0).nonzero().flatten()
        if len(empty) and iteration < iterations - 1:
            error = (rows - codebook[index]).square().sum(1)
            codebook[empty] = rows[error.topk(len(empty)).indices]
    return codebook


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codeword of `codebook [C, d]` nearest to each of `rows [N, d]`, int64 `[N]`; ties go to the lowest."""
    book = torch.zeros(1, 1, 1, dtype=torch.int64, device=rows.device)
    return ops.encode(rows[None, None, :, None], codebook[None], book)[0, 0, :, 0, 0].long()
