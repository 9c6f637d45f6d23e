"""The loss of distillation: how far next-token distributions are from those of the exact model, in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROWS = 64  # tokens whose distributions are compared at a time


class Divergence(torch.autograd.Function):
    """Mean over the rows of logits `[T, V]` of KL(softmax(exact) || softmax(coded)), its gradient made along with it.

    The gradient is `(softmax(coded) - softmax(exact)) / T`. A few rows at a time: float32 copies are never whole.
    """

    @staticmethod
    def forward(ctx: Any, coded: Tensor, exact: Tensor) -> Tensor:
        gradient, total = torch.empty_like(coded), torch.zeros((), device=coded.device)
        for start in range(0, len(coded), _ROWS):
            rows = slice(start, start + _ROWS)
            log_p, log_q = exact[rows].float().log_softmax(-1), coded[rows].float().log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradient[rows] = (log_q.exp_() - p) / len(coded)
        ctx.save_for_backward(gradient)
        return total / len(coded)

    @staticmethod
    def backward(ctx: Any, *by: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * by[0], None
