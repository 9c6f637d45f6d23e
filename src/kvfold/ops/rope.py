"""Rotary position embedding as a plain op, and its exact inverse.

RoPE rotates each channel pair by `position * inv_freq` and multiplies by a constant `factor`, so the inverse is the
rotation by the opposite angle divided by `factor` (Su et al., arXiv 2104.09864, eq. 15; yarn's factor: arXiv 2309.00071).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.ops import native


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float = 1.0, interleaved: bool = False) -> Tensor:
    """Rotate `x [B, G, T, D]` to its positions.

    Args:
        positions: integers `[B, T]` (or `[1, T]`).
        inv_freq: float32 `[n]`, radians per position; channels beyond `2 n` pass through (partial rotary).
        factor: constant on the rotated channels.
        interleaved: pairs (2i, 2i+1) instead of (i, i+n).

    Returns:
        float32 `[B, G, T, D]`.
    """
    return _turn(x, positions, inv_freq, factor, factor, interleaved)


def unrotate(x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float = 1.0, interleaved: bool = False) -> Tensor:
    """Inverse of `rotate`, same arguments."""
    return _turn(x, positions, inv_freq, 1.0 / factor, -1.0 / factor, interleaved)


def unrotate_cpu(x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float = 1.0, interleaved: bool = False) -> Tensor:
    """As `unrotate`, in C++ (csrc/rope.cpp); what is traced or takes gradients is left to PyTorch."""
    if not native.eager(x) or (x.requires_grad and torch.is_grad_enabled()):
        return unrotate(x, positions, inv_freq, factor, interleaved)
    x, array = x.float(), native.array
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32)
    frequencies = inv_freq.float().contiguous()
    places = positions.to(torch.int32).contiguous()
    native.module().unrotate(
        array(x), array(places), array(frequencies), factor, interleaved, torch.get_num_threads(), array(out)
    )
    return out


def _turn(x: Tensor, positions: Tensor, inv_freq: Tensor, cos_by: float, sin_by: float, interleaved: bool) -> Tensor:
    x = x.float()
    angles = positions[:, None, :, None].float() * inv_freq.float()
    cos, sin = angles.cos() * cos_by, angles.sin() * sin_by
    n = inv_freq.shape[0]
    if interleaved:
        first, second = x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    else:
        first, second = x[..., :n], x[..., n : 2 * n]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned if 2 * n == x.shape[-1] else torch.cat((turned, x[..., 2 * n :]), -1)
