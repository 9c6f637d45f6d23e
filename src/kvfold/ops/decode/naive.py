"""Codes back to vectors in plain PyTorch: the sum of one codeword a stage, float32."""

from __future__ import annotations

import torch
from torch import Tensor


def decode(codes: Tensor, codebooks: Tensor, book: Tensor) -> Tensor:
    """Vectors of codes.

    Args:
        codes: integers `[B, G, T, S, P]`.
        codebooks: float `[M, C, d]`.
        book: integers `[S, G, P]`, which codebook each (stage, head, group) uses.

    Returns:
        float32 `[B, G, T, P, d]`.
    """
    size, dim = codebooks.shape[1:]
    table = codebooks.float().reshape(-1, dim)
    rows = codes.long() + (book.transpose(0, 1) * size)[None, :, None]  # [B, G, T, S, P]
    stages = rows.shape[3]
    vectors = torch.zeros(*rows.shape[:3], rows.shape[4], dim, device=codes.device)
    for stage in range(stages):  # stage by stage, so the sum has the order that encode subtracted in
        vectors += table[rows[:, :, :, stage]]
    return vectors
