"""Attaching to a model, and undoing all of it.

While attached: the model's attention and mask functions are kvfold's; a pass without a cache, and `generate`, get a
compressed one; hooks tell the cache the positions of each pass's tokens, because `update` is not told them in every
transformers version or model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvfold.cache.cache import BLOCK, SINKS, WINDOW, CompressedCache
from kvfold.codecs.artifact import CodecSet
from kvfold.compat import CACHE_NAMES, Cache, cache_argument, is_plain_cache
from kvfold.errors import InputError
from kvfold.integration.attention import codes_attention, codes_mask
from kvfold.integration.spec import decoder_of, model_spec, rotary_module

_registered: Counter[str] = Counter()
_attached: set[int] = set()


class HookedCache(Protocol):
    """What the hooks need of a cache: to be told of a pass that begins and ends."""

    def begin(self, positions: Tensor, batch: int) -> None: ...

    def end(self, failed: bool) -> None: ...

    def get_seq_length(self) -> int: ...


class Attachment:
    """What `attach` yields.

    Attributes:
        cache: the compressed cache made last, or None; `cache.report()` says what it holds.
    """

    def __init__(self, make: Callable[[], CompressedCache]) -> None:
        self._make = make
        self.cache: CompressedCache | None = None

    def new_cache(self) -> CompressedCache:
        """An empty cache with this attachment's sinks, window and memory limit."""
        self.cache = self._make()
        return self.cache


@contextmanager
def attach(
    model: nn.Module,
    codecs: CodecSet,
    *,
    sinks: int = SINKS,
    window: int = WINDOW,
    block: int = BLOCK,
    max_bytes: int | None = None,
) -> Iterator[Attachment]:
    """Inside `with attach(model, codecs):`, `model.generate(...)` and `model(...)` use a compressed cache.

    Args:
        codecs: made for a model of this shape; moved to the model's device.
        sinks, window, block, max_bytes: of the caches made here; see `CompressedCache`.

    Raises:
        InputError: codecs of another model, or a model that is attached already.
        UnsupportedModelError: a model whose cache cannot be compressed.
    """
    if id(model) in _attached:
        raise InputError("a model that is not attached yet", "one that is", "leave the other `with kvfold.attach` first")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise InputError("a model on one device", f"one on {', '.join(devices)}", "load it without device_map")
    spec = model_spec(model)
    codecs.spec.require_same(spec)
    placed = replace(codecs.to(next(model.parameters()).device), spec=spec)  # its own frequencies, rounded as they are

    def make() -> CompressedCache:
        return CompressedCache(placed, model.config, max_bytes, sinks=sinks, window=window, block=block)

    attachment = Attachment(make)
    attachment.new_cache()  # wrong sizes are told now, not in the first pass
    attachment.cache = None
    with ExitStack() as undo:
        _attached.add(id(model))
        undo.callback(_attached.discard, id(model))
        undo.enter_context(attention_as(model, "kvfold", codes_attention))
        undo.enter_context(hooked(model, attachment.new_cache))
        undo.enter_context(_generate_with(model, attachment.new_cache))
        yield attachment


@contextmanager
def hooked(model: nn.Module, make: Callable[[], Any]) -> Iterator[None]:
    """Passes without a cache get one from `make`; every pass tells its cache the positions of its tokens."""
    decoder = decoder_of(model)
    argument = cache_argument(decoder)
    if argument is None:
        raise InputError("a decoder that takes a cache", type(decoder).__name__, "use another model")
    current: list[HookedCache | None] = [None]

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        name = next((n for n in CACHE_NAMES if kwargs.get(n) is not None), argument)
        cache = kwargs.get(name)
        use = kwargs.get("use_cache")
        if cache is None and (use if use is not None else getattr(decoder.config, "use_cache", True)):
            cache = kwargs[name] = make()
        current[0] = cache if hasattr(cache, "begin") else None
        if current[0] is not None and rotary is None:
            shape = next(x.shape for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
            start = current[0].get_seq_length()
            current[0].begin(torch.arange(start, start + shape[1])[None], shape[0])
        return args, kwargs

    def positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if current[0] is not None:
            hidden = args[0] if args else kwargs["x"]
            given = args[1] if len(args) > 1 else kwargs["position_ids"]
            current[0].begin(given, hidden.shape[0])

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        if current[0] is not None:
            current[0].end(failed=output is None)  # with always_call, torch passes None when forward raised
        current[0] = None

    rotary = rotary_module(model)
    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, always_call=True),
    ]
    if rotary is not None:
        handles.append(rotary.register_forward_pre_hook(positions, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention_as(model: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The model's attention is `function`, with masks as `codes_mask`; `name` is registered as long as any model uses it."""
    # Of modules that take seconds to import: whoever has a model has them already.
    from transformers import AttentionInterface, AttentionMaskInterface

    before = _implementations(model)
    if not _registered[name]:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, codes_mask)
    _registered[name] += 1
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        _registered[name] -= 1
        if not _registered[name]:
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)


def _implementations(model: Any) -> list[tuple[Any, Any]]:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [(c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation_internal")]


@contextmanager
def _generate_with(model: Any, make: Callable[[], Cache]) -> Iterator[None]:
    """`generate` starts with a cache from `make` wherever it would have made a plain one."""
    prepare = getattr(model, "_prepare_cache_for_generation", None)
    if prepare is None:
        yield
        return

    def prepare_compressed(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = {name for name in CACHE_NAMES if model_kwargs.get(name) is not None}
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        for name in CACHE_NAMES:
            cache = model_kwargs.get(name)
            if cache is None or name in given:
                continue
            if not is_plain_cache(cache):
                asked = generation_config.cache_implementation
                raise InputError(
                    "generate() without cache_implementation while kvfold is attached", repr(asked), "leave it out"
                )
            model_kwargs[name] = make()
            if generation_config.is_assistant:
                model_kwargs[name].activate_past_recording()
        return result

    model._prepare_cache_for_generation = prepare_compressed
    try:
        yield
    finally:
        del model._prepare_cache_for_generation
