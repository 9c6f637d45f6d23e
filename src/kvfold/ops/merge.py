"""Joining attention over disjoint sets of keys: weights by log-sum-exp.

`out = sum_i exp(lse_i - lse) out_i` with `lse = log sum_i exp(lse_i)` (flash-decoding; Milakov & Gimelshein,
arXiv 1805.02867). A query that saw no key in a part has `lse = -inf` there and output 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge `(out [B, H, Q, D], lse [B, H, Q])` float32 pairs (natural log) into one such pair."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:  # the usual case, codes and exact tokens, in fewer steps
        (first, first_lse), (second, second_lse) = parts
        share = torch.sigmoid(second_lse - first_lse).nan_to_num(0.0)  # of the second; nan where neither saw a key
        return torch.lerp(first, second, share[..., None]), torch.logaddexp(first_lse, second_lse)
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, 0)
    weights = torch.softmax(lses, 0).nan_to_num(0.0)  # nan where no part saw a key
    out = sum(weight[..., None] * part for weight, (part, _) in zip(weights, parts, strict=True))
    assert isinstance(out, Tensor)
    return out, lse
