"""Which weights finetuning changes, and how: the projections of every attention layer, or low-rank updates of them.

The tensors that change are the only ones kept twice: their originals make the teacher, and in bfloat16 models float32
masters take the steps, because a bfloat16 weight of 0.05 does not move by 1e-5.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.errors import InputError
from kvfold.integration.spec import attention_modules

KINDS = ("all-attention", "lora")


class Weights:
    """The tensors that are trained, by their names in `model`, with their optimizer (AdamW, constant `lr`, no decay)."""

    def __init__(self, model: nn.Module, live: dict[str, nn.Parameter], lr: float) -> None:
        self._model, self.live = model, live
        self.original = {name: tensor.detach().clone() for name, tensor in live.items()}
        self._masters = [p if p.dtype is torch.float32 else p.detach().float().requires_grad_() for p in live.values()]
        self._optimizer = torch.optim.AdamW(self._masters, lr=lr, weight_decay=0.0)

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for tensor in self.live.values())

    @torch.no_grad()
    def original_model(self, **inputs: Any) -> Any:
        """The model's output with the weights it had before, without gradients."""
        return torch.func.functional_call(self._model, self.original, (), inputs)

    def collect(self) -> None:
        """After a backward pass: add up gradients in float32."""
        for master, live in zip(self._masters, self.live.values(), strict=True):
            if master is not live and live.grad is not None:
                master.grad = live.grad.float() if master.grad is None else master.grad.add_(live.grad)
                live.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step of the optimizer with what was collected since the last."""
        self._optimizer.step()
        self._optimizer.zero_grad()
        for master, live in zip(self._masters, self.live.values(), strict=True):
            if master is not live:
                live.copy_(master)


@contextmanager
def trainable(model: Any, train: str, lr: float, rank: int, seed: int) -> Iterator[Weights]:
    """Inside, the chosen weights and no others want gradients; afterwards everything else is as it was.

    Low-rank updates are merged into the weights when the block ends. If it raises, the weights are what they were.

    Args:
        train: "all-attention", or "lora": `rank` rows and columns a projection, scale 1 (Hu et al., arXiv 2106.09685).
        seed: of the low-rank updates' start.

    Raises:
        InputError: weights that are neither float32 nor bfloat16, or no package peft for "lora".
    """
    projections = attention_projections(model)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted = _adapted(model, list(projections), rank, seed) if train == "lora" else None
    if adapted is not None:
        live = {name: p for name, p in model.named_parameters() if "lora_" in name}
    else:
        live = {f"{name}.{key}": p for name, module in projections.items() for key, p in module.named_parameters(recurse=False)}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in live)
        weights = Weights(model, live, lr)
        try:
            yield weights
        except BaseException:
            with torch.no_grad():
                for name, parameter in live.items():
                    parameter.copy_(weights.original[name])
            raise
    finally:
        if adapted is not None:
            adapted.merge_and_unload()  # what raised put the updates back to zero
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(wanted[name])


def attention_projections(model: nn.Module) -> dict[str, nn.Module]:
    """Name in `model` -> module, for every module with a weight matrix in an attention layer (q, k, v, o; not the norms).

    Raises:
        InputError: a weight that is neither float32 nor bfloat16, or a model on several devices.
    """
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise InputError("a model on one device, to train it", ", ".join(sorted(devices)), "choose one with --device")
    inside = {id(m) for attention in attention_modules(model).values() for m in attention.modules()}
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if id(module) not in inside or not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise InputError("float32 or bfloat16 weights to train", f"{weight.dtype} in {name}", "choose another --dtype")
        found[name] = module
    return found


def _adapted(model: Any, names: list[str], rank: int, seed: int) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise InputError("the package peft, for lora", "no such package", "pip install kvfold[lora], or train all-attention")
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
