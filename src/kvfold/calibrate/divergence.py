"""How far next-token distributions are from those of the exact model, in bounded memory: the loss of distillation, and what
codecs are chosen by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvfold.codecs.artifact import CodecSet
from kvfold.integration.attach import hooked
from kvfold.integration.models import input_device, reduced_precision
from kvfold.integration.straight_through import StraightThroughCache

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


@torch.no_grad()
def divergences(model: Any, candidates: Iterable[CodecSet], ids: Tensor) -> Iterator[float]:
    """Nats a token that the model, in eval mode, says otherwise than the exact one on `ids [T]`, for each set of codecs.

    Every key and value is read as its codes say. The exact model reads the passage once.
    """
    device = input_device(model)
    ids = ids.to(device)[None]
    exact = _logits(model, ids, None)
    for codecs in candidates:
        yield float(Divergence.apply(_logits(model, ids, codecs.to(device)), exact))


def _logits(model: Any, ids: Tensor, codecs: CodecSet | None) -> Tensor:
    if codecs is None:
        with reduced_precision(model):
            return model(input_ids=ids, use_cache=False).logits[0]
    cache = StraightThroughCache(codecs, gathering=False)
    with hooked(model, lambda: cache), reduced_precision(model):
        return model(input_ids=ids, use_cache=True).logits[0]
