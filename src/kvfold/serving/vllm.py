"""vLLM's attention backend on codes, as a plugin: vLLM loads `register` through the entry point `vllm.general_plugins`.

Written against vLLM 0.32 (V1 engine). On the CPU it stands in for vLLM's own backend, which is the only one that its CPU
platform ever asks for, and hands on to it unless a codec is named; on CUDA it is the backend `CUSTOM`. A codec is named by
`--additional-config '{"kvfold": {"codec": "DIR"}}'`, with `"beam": N` if wanted, or by `KVFOLD_CODEC=DIR`.

vLLM's pages stay vLLM's: it allocates, shares, evicts and lists them, and only what a token takes in them is told through the
cache spec. Keys arrive rotated; positions are a token's place in its row, so models whose positions are others are refused.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfold.codecs.artifact import CodecSet, load
from kvfold.errors import InputError
from kvfold.serving.paged import PagedLayer, PageLayout, Rows

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def register() -> None:
    """What vLLM calls in each of its processes."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.CPUBackend")
    elif current_platform.is_cuda():
        register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.GPUBackend")


@dataclass(frozen=True)
class _Asked:
    """What the configuration says of kvfold."""

    codec: str
    beam: int | None

    @classmethod
    def of(cls, config: VllmConfig) -> _Asked | None:
        """None if no codec is named."""
        more = config.additional_config
        told = more.get("kvfold", {}) if isinstance(more, dict) else {}
        if not isinstance(told, dict) or set(told) - {"codec", "beam"}:
            raise InputError('"kvfold": {"codec": DIR, "beam": N} in the additional configuration', repr(told), "correct it")
        codec = told.get("codec") or os.environ.get("KVFOLD_CODEC")
        return None if not codec else cls(str(codec), told.get("beam"))


@cache
def _codecs(asked: _Asked) -> CodecSet:
    codecs = load(asked.codec)
    return codecs if asked.beam is None else codecs.with_beam(asked.beam)


def codecs_of(config: VllmConfig) -> CodecSet | None:
    """The codecs that the configuration names, None if it names none.

    Raises:
        InputError: no such codec folder, or one made for another model; a model whose positions are not places in its row.
    """
    asked = _Asked.of(config)
    if asked is None:
        return None
    codecs = _codecs(asked)
    spec, model = codecs.spec, config.model_config
    mine = (spec.model_type, len(spec.layers), spec.kv_heads, spec.head_dim)
    other = (
        model.hf_text_config.model_type,
        model.hf_text_config.num_hidden_layers,
        model.get_total_num_kv_heads(),
        model.get_head_size(),
    )
    if mine != other:
        shapes = ["a {} of {} layers, {} KV heads of dim {}".format(*shape) for shape in (mine, other)]
        raise InputError(f"the model this codec was calibrated for ({shapes[0]})", shapes[1], "calibrate a codec on this model")
    if not all(layer.coded for layer in spec.layers) or spec.switch_length is not None or model.uses_mrope:
        came = f"{spec.model_type}, with sliding windows, longrope or positions in several dimensions"
        raise InputError(
            "a model whose layers all attend to the whole past at plain positions", came, "serve it without kvfold"
        )
    _require_frequencies(spec.rope(0), model.hf_text_config)
    return codecs


def _require_frequencies(rope: Any, config: Any) -> None:
    """That a model with plain RoPE has the codec's base; other kinds are not checked."""
    told = getattr(config, "rope_parameters", None) or {}
    theta, kind = told.get("rope_theta"), told.get("rope_type", "default")
    if rope is None or theta is None or kind != "default":
        return
    slowest = rope.inv_freq[0][-1]
    due = float(theta) ** -(1 - 1 / len(rope.inv_freq[0]))
    if abs(slowest - due) > 0.02 * due:
        came = f"rope_theta {theta:g}"
        raise InputError(
            "the RoPE frequencies of the model this codec was calibrated for", came, "calibrate a codec on this model"
        )


def layer_index(name: str) -> int:
    """Of `model.layers.3.self_attn.attn`."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        raise InputError("a layer with a number in its name", repr(name), "serve this model without kvfold")
    return int(found[1])


def _paged_layer(codecs: CodecSet, name: str, kv_heads: int, device: torch.device) -> PagedLayer:
    """The layer called `name`, its KV heads those of this tensor-parallel rank."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    index, total = layer_index(name), codecs.spec.kv_heads
    ranks = max(1, get_tensor_model_parallel_world_size() * kv_heads // total)  # that hold the same heads
    start = get_tensor_model_parallel_rank() // ranks * kv_heads
    pair = []
    for codec in (codecs.keys[index], codecs.values[index]):
        assert codec is not None
        own = codec if kv_heads == total else codec.for_heads(start, start + kv_heads)
        pair.append(own.to(device))
    return PagedLayer(pair[0], pair[1], codecs.spec.rope(index), kv_heads)


def token_bytes(codecs: CodecSet) -> int:
    """Bytes of a token and head in a page: those of the layer that takes most, because vLLM's pages are alike."""
    pairs = zip(codecs.keys, codecs.values, strict=True)
    layouts = [PageLayout(key, value, codecs.spec.kv_heads) for key, value in pairs if key is not None and value is not None]
    return max(layout.bytes for layout in layouts)


class _Coded:
    """What the implementations on CPU and GPU share; comes before vLLM's class of attention."""

    num_kv_heads: int
    head_size: int
    scale: float

    def prepare(self) -> None:
        """Refuse what codes cannot serve, when vLLM makes the layer."""
        codecs = _current_codecs()
        assert codecs is not None
        self._codecs = codecs
        self._layer: PagedLayer | None = None
        refused = {
            "ALiBi": getattr(self, "alibi_slopes", None) is not None,
            "learned sinks": getattr(self, "sinks", None) is not None,
            "a sliding window": getattr(self, "sliding_window", -1) not in (-1, None, (-1, -1)),
            "another kind of attention": str(getattr(self, "attn_type", "decoder")) not in ("decoder", "AttentionType.DECODER"),
        }
        came = [name for name, there in refused.items() if there]
        if came:
            raise InputError("plain causal attention", f"a layer with {' and '.join(came)}", "serve this model without kvfold")

    def _paged(self, layer: Any, device: torch.device) -> PagedLayer:
        if self._layer is None:
            self._layer = _paged_layer(self._codecs, layer.layer_name, self.num_kv_heads, device)
        return self._layer

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Code the pass's keys and values `[T, G, D]` into their slots of the pages."""
        from vllm.model_executor.layers.attention.attention import get_attention_context

        metadata = get_attention_context(layer.layer_name)[0]
        if metadata is None or not kv_cache.numel():  # warming up
            return
        tokens, positions = metadata.num_actual_tokens, _rows(metadata).positions.to(key.device)
        slots = slot_mapping[:tokens].long()
        self._paged(layer, key.device).store(_bytes(kv_cache), slots, key[:tokens], value[:tokens], positions)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the pass's queries `[T, H, D]` over the pages."""
        if output_scale is not None or output_block_scale is not None:
            raise InputError("attention whose output is not quantized", "a fused output scale", "serve without it")
        if attn_metadata is None:  # warming up
            return output
        tokens, rows = attn_metadata.num_actual_tokens, _rows(attn_metadata)
        softcap = float(getattr(self, "logits_soft_cap", 0.0) or 0.0) or None
        paged = self._paged(layer, query.device)
        asked = query[:tokens].view(tokens, -1, self.head_size)
        mixed = paged.attend(_bytes(kv_cache), attn_metadata.block_table, asked, rows, self.scale, softcap)
        output[:tokens] = mixed.to(output.dtype).view(output[:tokens].shape)
        return output


def _rows(metadata: Any) -> Rows:
    """A pass's rows, told once for all layers: each reading of the metadata waits for the device."""
    found = getattr(metadata, "kvfold_rows", None)
    if found is None:
        bounds, told = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        queries = [stop - start for start, stop in pairwise(bounds)]
        found = Rows(queries, [length if asked else 0 for length, asked in zip(told, queries, strict=False)])
        metadata.kvfold_rows = found  # vLLM makes metadata anew for every pass
    return found


def _bytes(kv_cache: Tensor) -> Tensor:
    """vLLM's pages `[N, G, block, ...]` as uint8 `[N, G, block, n]`."""
    return kv_cache.view(torch.uint8)


@dataclass
class _Serving:
    """What this process serves with; kept, because no configuration is current when vLLM asks for cache specs."""

    codecs: CodecSet | None = None
    token_bytes: int = 0  # of a token and head in a page


_serving = _Serving()


def _current_codecs() -> CodecSet | None:
    """Of the configuration that is current while vLLM makes layers."""
    from vllm.config import get_current_vllm_config

    codecs = codecs_of(get_current_vllm_config())
    if codecs is not _serving.codecs:
        _serving.codecs, _serving.token_bytes = codecs, 0 if codecs is None else token_bytes(codecs)
    return codecs


def __getattr__(name: str) -> Any:
    """vLLM's classes exist where vLLM does; ours that derive from them are made when vLLM asks for them by name."""
    makers = {"CPUBackend": _cpu_backend, "GPUBackend": _gpu_backend}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return makers[name]()


@cache
def _cpu_backend() -> type:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    return _with_codes("CPUBackend", CPUAttentionBackend, CPUAttentionBackendImpl)


@cache
def _gpu_backend() -> type:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

    backend = _with_codes("GPUBackend", TritonAttentionBackend, TritonAttentionImpl)
    backend.get_name = staticmethod(lambda: "CUSTOM")  # type: ignore[attr-defined]
    return backend


def _with_codes(name: str, base: type, implementation: type) -> type:
    """vLLM's backend `base`, metadata as it makes them, with codes in its pages if a codec is named."""

    class Impl(_Coded, implementation):
        """Attention on codes by kvfold's ops."""

        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            self.prepare()

    class Backend(base):
        """A backend of vLLM with pages of codes."""

        @staticmethod
        def get_impl_cls() -> type:
            return implementation if _current_codecs() is None else Impl

        @classmethod
        def customize_spec(cls, spec: Any) -> Any:
            if _serving.codecs is None or spec.state_content_bytes is not None:
                return spec
            return replace(spec, state_content_bytes=_serving.token_bytes)

    Backend.__name__ = Backend.__qualname__ = name
    return Backend
