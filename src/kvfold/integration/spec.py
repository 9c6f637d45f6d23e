"""Reading a live model: the shape of its KV cache and its RoPE, or a refusal that names the model and the reason.

How a model lays out its rotary pairs stands in no config, so it is found out by experiment: the model's own
`apply_rotary_pos_emb` is run on a few random vectors and compared with both layouts of `ops.rotate`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import ops
from kvfold.compat import dense_layers, layer_kind
from kvfold.config import LayerSpec, ModelSpec, RopeSpec
from kvfold.errors import UnsupportedModelError

_MATCH = 1e-4


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that holds the decoder's layers and makes its RoPE (LlamaModel in LlamaForCausalLM)."""
    get = getattr(model, "get_decoder", None)
    decoder = get() if get is not None else None
    return decoder if isinstance(decoder, nn.Module) else getattr(model, "base_model", model)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Layer index -> its self-attention module."""
    found: dict[int, nn.Module] = {}
    for module in decoder_of(model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__:
            found.setdefault(index, module)
    return found


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Layer index -> the module whose child is its self-attention module."""
    index_of = {id(module): index for index, module in attention_modules(model).items()}
    pairs = ((module, child) for module in decoder_of(model).modules() for child in module.children())
    return {index_of[id(child)]: module for module, child in pairs if id(child) in index_of}


def rotary_module(model: nn.Module) -> nn.Module | None:
    """The module that computes cos and sin of all layers, or None if the model has no RoPE."""
    named = (m for m in decoder_of(model).modules() if type(m).__name__.endswith("RotaryEmbedding"))
    return next(named, None)


def model_spec(model: nn.Module) -> ModelSpec:
    """Shape of `model`'s KV cache.

    Raises:
        UnsupportedModelError: encoder-decoder, latent (MLA) or recurrent cache, multimodal or dynamic RoPE, attention
            sinks as parameters, an attention that cannot be exchanged, or RoPE that is not understood.
    """
    config = _text_config(model)
    name = f"{config.model_type} ({type(model).__name__})"
    _refuse_unsupported(model, config, name)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = [layer_kind(layer) for layer in _dense_layers(model, name)]
    for kind in sorted(set(kinds)):
        if kind not in ("full", "sliding"):
            raise _refusal(name, f"its cache has layers of kind {kind}, which hold something else than keys and values")
    coded = [kind == "full" for kind in kinds]
    if not any(coded):  # every layer slides: then they are coded, with the mask doing the sliding
        coded = [True] * len(kinds)
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * len(kinds)
    rotary = rotary_module(model)
    ropes: list[RopeSpec] = []
    layers = []
    for is_coded, layer_type in zip(coded, layer_types, strict=True):
        rope = None if rotary is None else _rope_spec(model, rotary, layer_type, head_dim, name)
        if rope is not None and rope not in ropes:
            ropes.append(rope)
        layers.append(LayerSpec(is_coded, None if rope is None else ropes.index(rope)))
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30
    return ModelSpec(config.model_type, heads, kv_heads, head_dim, int(positions), tuple(layers), tuple(ropes))


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise _refusal(type(model).__name__, "it is not a transformers model")
    return config.get_text_config(decoder=True)


def _dense_layers(model: nn.Module, name: str) -> list[Any]:
    try:
        return dense_layers(model.config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _refusal(name, f"it has no KV cache of attention layers ({error})") from None


def _refuse_unsupported(model: nn.Module, config: Any, name: str) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refusal(name, "it is an encoder-decoder; only decoder-only models have one growing KV cache")
    if getattr(config, "kv_lora_rank", None):
        raise _refusal(name, "its multi-head latent attention (MLA) caches a latent, not keys and values")
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if any("mrope_section" in part or part.get("rope_type") == "mrope" for part in parts):
        raise _refusal(name, "its multimodal RoPE gives a token several positions")
    if any(part.get("rope_type") == "dynamic" for part in parts):
        raise _refusal(name, "its dynamic RoPE changes the frequencies with the length, so cached keys cannot be rotated back")
    if not getattr(config, "num_attention_heads", None) or not attention_modules(model):
        raise _refusal(name, "it has no KV cache: no attention layers were found")
    if not getattr(model, "_supports_attention_backend", False):
        raise _refusal(name, "transformers cannot exchange its attention function")
    if any(hasattr(module, "sinks") for module in attention_modules(model).values()):
        raise _refusal(name, "its attention has learned sinks, which the codes' attention does not know")


def _rope_spec(model: nn.Module, rotary: nn.Module, layer_type: str, head_dim: int, name: str) -> RopeSpec | None:
    typed = isinstance(getattr(rotary, "rope_type", None), dict)
    if typed and layer_type not in rotary.rope_type:  # type: ignore[operator]
        return None
    prefix = f"{layer_type}_" if typed else ""
    types = (layer_type,) if typed else ()

    def angles(position: int) -> tuple[Tensor, Tensor]:
        device = getattr(rotary, f"{prefix}inv_freq").device
        x = torch.zeros(1, 1, head_dim, device=device)
        return rotary(x, torch.tensor([[position]], device=device), *types)

    rope_type = rotary.rope_type[layer_type] if typed else getattr(rotary, "rope_type", "default")  # type: ignore[index]
    switch = None
    rows = []
    if rope_type == "longrope":
        config = _text_config(model)
        parameters = config.rope_parameters[layer_type] if typed else config.rope_parameters
        switch = int(parameters["original_max_position_embeddings"])
        angles(switch)  # a pass this long makes the module take its long frequencies, the next one its short ones
        rows.append(_row(rotary, prefix))
        angles(0)
    rows.insert(0, _row(rotary, prefix))
    factor = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    apply = _apply_function(model)
    for interleaved in (False, True):
        rope = RopeSpec(tuple(rows), factor, interleaved, switch)
        if apply is not None and _agrees(rope, rotary, types, apply, head_dim):
            return rope
    raise _refusal(name, "its rotary embedding is none that kvfold can undo")


def _row(rotary: nn.Module, prefix: str) -> tuple[float, ...]:
    return tuple(getattr(rotary, f"{prefix}inv_freq").float().tolist())


def _apply_function(model: nn.Module) -> Any:
    attention = next(iter(attention_modules(model).values()))
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


def _agrees(rope: RopeSpec, rotary: nn.Module, types: tuple[str, ...], apply: Any, head_dim: int) -> bool:
    """Whether the model rotates random vectors as `rope` does."""
    inv_freq = torch.tensor(rope.inv_freq[0])
    positions = torch.tensor([[0, 1, 7, 30]])
    x = torch.randn(1, 2, 4, head_dim, generator=torch.Generator().manual_seed(0))
    device = next(rotary.buffers()).device
    cos, sin = rotary(torch.zeros(1, 4, 1, device=device), positions.to(device), *types)
    cos, sin = cos.float().cpu(), sin.float().cpu()
    width = cos.shape[-1]
    for rotated in (slice(None), slice(0, width)):  # some models cut off the unrotated channels before the call
        try:
            turned = x.clone()
            turned[..., rotated] = apply(x[..., rotated], x[..., rotated], cos, sin)[0]
        except (RuntimeError, TypeError):
            continue
        ours = ops.rotate(x, positions, inv_freq, rope.factor, rope.interleaved)
        if float((turned - ours).abs().max()) < _MATCH:
            return True
    return False


def _refusal(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "a decoder-only model with a KV cache of full attention layers", f"{name}: {reason}", "use another model"
    )
