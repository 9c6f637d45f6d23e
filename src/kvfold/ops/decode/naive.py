"""Codes back to vectors in plain PyTorch: the sum of one codeword a stage, float32."""

from __future__ import annotations

import torch.nn.functional as F
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
    offsets = (book.permute(1, 2, 0) * size).to(codes.dtype)  # [G, P, S]
    rows = codes.transpose(-1, -2) + offsets[None, :, None]  # [B, G, T, P, S]
    table = codebooks.float().reshape(-1, dim)
    # A bag is summed in its order, stage by stage, which is the order that encode subtracted in.
    return F.embedding_bag(rows.reshape(-1, rows.shape[-1]), table, mode="sum").view(*rows.shape[:-1], dim)
