"""Which errors of keys and values the loss feels: second moments of its gradient, an estimate of the Fisher information.

For a layer, side and head, `M = sum over tokens of g g'` with `g` the gradient of the negative log-likelihood by the token's
key (before RoPE if asked) or value. Next tokens are drawn from the model's own distribution, so `M` is the Fisher information
and not the empirical one (Kunstner et al., arXiv 1905.12558). To second order, an error `e` of that vector moves the output
by `e' M e / 2` nats. The first token of a sequence is left out: attention sinks there, and its gradient outweighs that of all
others.

Cost: a forward and a backward pass over the windows. Memory: the activations of one window, the logits `[context,
vocabulary]` in float32 three times, and `D * D` numbers a layer, side and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold import ops
from kvfold.config import ModelSpec
from kvfold.integration.attach import hooked
from kvfold.integration.models import input_device, reduced_precision
from kvfold.integration.stand_in import StandInCache, StandInLayer
from kvfold.progress import Progress


class _Layer(StandInLayer):
    """Adds zeros to keys and values, and keeps them: their gradient is that of the keys and values."""

    def __init__(self, cache: StandInCache, spec: ModelSpec, layer: int, pre_rope: bool) -> None:
        super().__init__(cache, spec.rope(layer) if pre_rope else None)
        self.moments = torch.zeros(2, spec.kv_heads, spec.head_dim, spec.head_dim)
        self.leaves: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.leaves = [torch.zeros_like(states, requires_grad=True) for states in (key_states, value_states)]
        return key_states + self.leaves[0], value_states + self.leaves[1]

    def add(self, gradients: Sequence[Tensor]) -> None:
        keys, values = (gradient.float() for gradient in gradients)
        rotation = self.rotation(slice(None), keys.device)
        if rotation is not None:  # the rotation's transpose is its inverse, but for the factor, which scales all alike
            keys = ops.unrotate(keys, *rotation)
        for moment, gradient in zip(self.moments, (keys, values), strict=True):
            later = gradient[0, :, 1:]
            moment += (later.mT @ later).cpu()


class _Cache(StandInCache):
    def __init__(self, spec: ModelSpec, pre_rope: bool) -> None:
        self.own_layers = [_Layer(self, spec, i, pre_rope) for i in range(len(spec.layers))]
        super().__init__(layers=list(self.own_layers))


def sensitivities(
    model: Any, spec: ModelSpec, windows: Sequence[Tensor], pre_rope: bool, generator: torch.Generator, quiet: bool
) -> list[tuple[Tensor, Tensor]]:
    """Second moments `[G, D, D]` float32 of the gradient by keys and by values, a pair a layer.

    Args:
        windows: token ids, each a sequence `[T]` of its own.
        pre_rope: keys as they are before RoPE.
        generator: on the CPU, of the next tokens that are drawn.
    """
    cache = _Cache(spec, pre_rope)
    layers = cache.own_layers
    device, training = input_device(model), model.training
    model.eval()
    try:
        with Progress("measuring sensitivity", len(windows), quiet) as step, hooked(model, lambda: cache), torch.enable_grad():
            for window in windows:
                with reduced_precision(model):
                    logits = model(input_ids=window[None].to(device), use_cache=True).logits[0]
                likelihoods = logits.float().log_softmax(-1)
                drawn = torch.multinomial(likelihoods.detach().exp().cpu(), 1, generator=generator).to(likelihoods.device)
                gradients = torch.autograd.grad(
                    -likelihoods.gather(1, drawn).sum(), [leaf for layer in layers for leaf in layer.leaves]
                )
                for index, layer in enumerate(layers):
                    layer.add(gradients[2 * index : 2 * index + 2])
                    layer.leaves = []
                step()
    finally:
        model.train(training)
    return [(layer.moments[0], layer.moments[1]) for layer in layers]
