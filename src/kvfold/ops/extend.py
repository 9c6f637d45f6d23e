"""Exact tokens with new ones behind them: what a cache does with the keys and values of a pass before anything else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvfold.errors import non_finite
from kvfold.ops import native

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def extend(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, checked: bool = True) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, G, E + Q, D]`, new tensors: `[B, G, E, D]` with `[B, G, Q, D]` behind them, of one dtype.

    Raises:
        InputError: NaN or Inf among the new ones; not looked for unless `checked`, which has to wait for a device.
    """
    if checked and not finite(new_keys, new_values):
        raise non_finite()
    return torch.cat((keys, new_keys), 2), torch.cat((values, new_values), 2)


def extend_cpu(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, checked: bool = True
) -> tuple[Tensor, Tensor]:
    """As `extend`, in one call that also looks for NaN and Inf (csrc/extend.cpp); what is traced, takes gradients or has other
    types is left to PyTorch."""
    given = keys, values, new_keys, new_values
    plain = checked and new_keys.dtype in _TYPES and all(x.dtype is new_keys.dtype and x.stride(-1) == 1 for x in given)
    if not plain or not native.eager(new_keys) or (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return extend(*given, checked)
    array, results = native.array, (_room(keys, new_keys), _room(values, new_values))
    sides = array(keys), array(new_keys), array(results[0]), array(values), array(new_values), array(results[1])
    if not native.module().extend(*sides, torch.get_num_threads()):
        raise non_finite()
    return results


def _room(held: Tensor, new: Tensor) -> Tensor:
    return new.new_empty((*new.shape[:2], held.shape[2] + new.shape[2], new.shape[3]))


def finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or Inf. Sums tell it sooner, unless they overflow."""
    if math.isfinite(sum(tensor.detach().sum().item() for tensor in tensors)):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
