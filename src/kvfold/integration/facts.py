"""What codecs may ask of a model beside samples (`Codec.wants`), measured on calibration text or read off its weights.

- `sensitivity`: see `integration/sensitivity.py`.
- `projection`: the weights that make a head's keys or values from the input of its layer's attention. That the product is the
  key, and no norm follows it, is checked on a real pass.
- `demand` of keys: an error `e` of the key at position `n` moves the logit of a later query by `q' R e`, `R` the rotation of
  `n`, so the demand is the second moment of `R' q` over queries of the head's group and keys that they may look at (one is
  drawn a query). Keys that are taken after RoPE have none of the `R`.
- `demand` of values: an error `e` moves what query head `h` adds to the layer's output by `W_h e`, `W_h` its columns of the
  output projection, so the demand is the sum of `W_h' W_h` over the heads that read the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import ops
from kvfold.codecs.base import Facts
from kvfold.config import ModelSpec
from kvfold.errors import UnsupportedModelError
from kvfold.integration.attach import attention_as, hooked
from kvfold.integration.attention import codes_attention
from kvfold.integration.capture import CaptureCache, capturing
from kvfold.integration.models import input_device
from kvfold.integration.sensitivity import sensitivities
from kvfold.integration.spec import attention_modules
from kvfold.integration.stand_in import StandInCache, StandInLayer
from kvfold.progress import Progress

Pair = tuple[Tensor | None, Tensor | None]  # of keys and of values

_CHECKED = 32  # tokens that projections are checked on
_ALIKE = 0.02  # relative error of a product in bfloat16 that was rounded and rotated there and back
_NORMS = ("k_norm", "k_layernorm", "key_layernorm", "qk_norm")


def facts_of(
    model: Any,
    spec: ModelSpec,
    wants: frozenset[str],
    windows: Sequence[Tensor],
    pre_rope: bool,
    generator: torch.Generator,
    quiet: bool,
) -> list[tuple[Facts, Facts]]:
    """The facts that `wants` names, for keys and values of every layer.

    Args:
        windows: token ids, each a sequence `[T]` of its own; none are needed if nothing is wanted.
        pre_rope: keys as they are before RoPE.
        generator: on the CPU.

    Raises:
        UnsupportedModelError: keys or values that are no product of weights with the layer's input, if that is wanted.
    """
    none: list[Pair] = [(None, None)] * len(spec.layers)
    felt: Sequence[Pair] = none
    if "sensitivity" in wants:
        felt = sensitivities(model, spec, windows, pre_rope, generator, quiet)
    made: Sequence[Pair] = projections(model, spec, windows[0]) if "projection" in wants else none
    met: Sequence[Pair] = demands(model, spec, windows, pre_rope, generator, quiet) if "demand" in wants else none
    by_layer = zip(felt, made, met, strict=True)
    return [(Facts(g[0], w[0], q[0]), Facts(g[1], w[1], q[1])) for g, w, q in by_layer]


@torch.no_grad()
def projections(model: Any, spec: ModelSpec, ids: Tensor) -> list[Pair]:
    """Weights `[G, D, N]` float32 of keys (before RoPE) and values a layer, None where a layer stays exact.

    A bias is a last column, whose input is 1.

    Args:
        ids: a sequence `[T]` that the weights are checked on.
    """
    attention = attention_modules(model)
    inputs: dict[int, Tensor] = {}
    cache = CaptureCache(spec, pre_rope=True)
    ids = ids[:_CHECKED]
    cache.choose(torch.arange(len(ids)))
    with ExitStack() as undo:
        for index, module in attention.items():

            def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any], index: int = index) -> None:
                inputs[index] = (args[0] if args else kwargs["hidden_states"]).float().cpu()

            undo.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        undo.enter_context(capturing(model, cache))(ids)
    pairs: list[Pair] = []
    for index, layer in enumerate(spec.layers):
        if not layer.coded:
            pairs.append((None, None))
            continue
        key, value = _key_and_value(attention[index], spec)
        seen = torch.nn.functional.pad(inputs[index][0], (0, 1), value=1.0)  # [T, N + 1]
        for weights, came, word in zip((key, value), cache.samples(index), ("keys", "values"), strict=True):
            error = seen[:, : weights.shape[2]] @ weights.mT - came
            if float(error.norm()) > _ALIKE * float(came.norm()):
                raise _refusal(attention[index], f"its {word} are {_reason(attention[index])}")
        pairs.append((key, value))
    return pairs


def _key_and_value(attention: nn.Module, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """`[G, D, N]` each, or with a bias `[G, D, N + 1]`."""
    heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
    if hasattr(attention, "k_proj") and hasattr(attention, "v_proj"):
        key, value = (_affine(attention, name, kv_heads * dim) for name in ("k_proj", "v_proj"))
    elif hasattr(attention, "qkv_proj"):  # Phi-3: all queries, all keys, all values
        sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        _, key, value = _affine(attention, "qkv_proj", sum(sizes)).split(sizes)
    elif hasattr(attention, "query_key_value") and heads == kv_heads:  # GPT-NeoX: query, key, value, head by head
        _, key, value = _affine(attention, "query_key_value", 3 * heads * dim).view(heads, 3, dim, -1).unbind(1)
    else:
        raise _refusal(attention, "its projections have other names")
    return key.reshape(kv_heads, dim, -1), value.reshape(kv_heads, dim, -1)


def _affine(attention: nn.Module, name: str, rows: int) -> Tensor:
    """Weights `[rows, N]` float32 of a linear layer, its bias as a last column."""
    linear = getattr(attention, name)
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or len(weight) != rows or not weight.is_floating_point():
        raise _refusal(attention, f"its {name} is no plain linear layer of {rows} outputs")
    weight = weight.detach().float().cpu()
    return weight if bias is None else torch.cat((weight, bias.detach().float().cpu()[:, None]), 1)


def _reason(attention: nn.Module) -> str:
    norm = next((name for name in _NORMS if hasattr(attention, name)), None)
    return f"normalised after the projection ({norm})" if norm else "no product of its weights with its input"


class _Layer(StandInLayer):
    """Hands keys and values on, and sums what queries meet them."""

    def __init__(self, cache: StandInCache, spec: ModelSpec, layer: int, pre_rope: bool, generator: torch.Generator) -> None:
        super().__init__(cache, spec.rope(layer) if pre_rope else None)
        self._generator = generator
        self.moment = torch.zeros(spec.kv_heads, spec.head_dim, spec.head_dim)
        self.queries = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def meet(self, query: Tensor, scale: float) -> None:
        """Queries `[1, H, Q, D]` after RoPE."""
        rotation = self.rotation(slice(None), query.device)
        if rotation is not None:
            positions, inv_freq, factor, interleaved = rotation
            share = torch.rand(positions.shape, generator=self._generator).to(query.device)
            opposite = -(share * (positions + 1)).long()
            query = ops.rotate(query, opposite, inv_freq, factor, interleaved)
        heads = query[0].float().unflatten(0, (len(self.moment), -1)).flatten(1, 2) * scale
        self.moment += (heads.mT @ heads).cpu()
        self.queries += query.shape[2]


def demands(
    model: Any, spec: ModelSpec, windows: Sequence[Tensor], pre_rope: bool, generator: torch.Generator, quiet: bool
) -> list[Pair]:
    """What weighs errors of keys and values, `[G, D, D]` float32, a pair a layer; arguments as in `facts_of`."""
    cache = StandInCache([])
    layers = [_Layer(cache, spec, i, pre_rope, generator) for i in range(len(spec.layers))]
    cache.layers = list(layers)

    def record(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling")
        layers[module.layer_idx].meet(query, query.shape[-1] ** -0.5 if scale is None else scale)
        return codes_attention(module, query, *args, **kwargs)

    device, training = input_device(model), model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            attention_as(model, "kvfold-queries", record),
            hooked(model, lambda: cache),
            Progress("measuring queries", len(windows), quiet) as step,
        ):
            for window in windows:
                model(input_ids=window[None].to(device), use_cache=True, logits_to_keep=1)
                step()
    finally:
        model.train(training)
    attention = attention_modules(model)
    pairs: list[Pair] = []
    for index, layer in enumerate(layers):
        known = layer.moment / max(layer.queries, 1), _output_gram(attention[index], spec)
        pairs.append(known if spec.layers[index].coded else (None, None))
    return pairs


def _output_gram(attention: nn.Module, spec: ModelSpec) -> Tensor:
    """`sum_h W_h' W_h` over the query heads of a KV head, `[G, D, D]`."""
    linear = next((getattr(attention, name) for name in ("o_proj", "dense", "out_proj") if hasattr(attention, name)), None)
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != spec.heads * spec.head_dim:
        raise _refusal(attention, "its output projection is no plain linear layer")
    by_head = weight.detach().float().cpu().view(len(weight), spec.kv_heads, -1, spec.head_dim)
    return torch.einsum("nghd,nghe->gde", by_head, by_head)


def _refusal(attention: nn.Module, reason: str) -> UnsupportedModelError:
    expected = "attention whose keys and values are products of weights with its input"
    return UnsupportedModelError(expected, f"{type(attention).__name__}: {reason}", "use another method or model")
