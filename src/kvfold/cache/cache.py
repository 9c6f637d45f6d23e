"""The cache a model is called with: one coded layer an attention layer, sliding-window layers exact, one report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor

from kvfold.cache.layer import CodedLayer
from kvfold.cache.positions import Positions
from kvfold.codecs.artifact import CodecSet
from kvfold.compat import Cache, dense_layers
from kvfold.errors import CacheFullError, InputError, non_finite

SINKS, WINDOW, BLOCK = 4, 64, 16
LOWERED_TOGETHER = 256  # tokens that lose a stage at once


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds, in bytes of live tokens.

    Attributes:
        tokens: tokens a row (slots, padding included); `batch` rows.
        bytes_codes, bytes_scales, bytes_exact: by kind, all layers; `bytes_other` is side information of other methods.
        bytes_cache: their sum. bytes_allocated: with room for growth.
        bytes_codebooks: fixed cost, not in `bytes_cache`.
        bytes_bf16: what the same tokens take in a bfloat16 cache; `ratio` is `bytes_bf16 / bytes_cache`.
        bits_per_element: 8 * bytes_cache over keys' and values' elements alive; `..._with_codebooks` adds the codebooks.
    """

    tokens: int
    batch: int
    bytes_codes: int
    bytes_scales: int
    bytes_exact: int
    bytes_other: int
    bytes_cache: int
    bytes_allocated: int
    bytes_codebooks: int
    bytes_bf16: int
    ratio: float
    bits_per_element: float
    bits_per_element_with_codebooks: float

    def __getitem__(self, name: str) -> int | float:
        return asdict(self)[name]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens x {self.batch}: {_size(self.bytes_cache)} "
            f"(codes {_size(self.bytes_codes)}, scales {_size(self.bytes_scales)}, exact {_size(self.bytes_exact)}"
            + (f", other {_size(self.bytes_other)}" if self.bytes_other else "")
            + f"), {self.bits_per_element:.3f} bits per element, {self.ratio:.2f}x smaller than bf16 "
            f"({_size(self.bytes_bf16)}); codebooks {_size(self.bytes_codebooks)}"
        )


class CompressedCache(Cache):
    """A transformers cache whose past is codes; use it inside `with kvfold.attach(model, codecs):`.

    Args:
        codecs: from `kvfold.calibrate` or `kvfold.load`.
        config: the model's config.
        max_bytes: bytes that the cache may allocate. When they are used up, the oldest tokens give up trailing stages of their
            codes, down to half of them; a pass that would need more even so raises CacheFullError beforehand.
        sinks: first tokens (slots) kept exact.
        window: newest tokens kept exact; with 0 even the token itself is read as codes.
        block: tokens that leave the window together, 1 if the window is 0; otherwise a multiple of it that the codecs can code.

    Attributes:
        input_ids: tokens that `load_cache` found beside a saved cache, or None.

    Raises:
        InputError: codecs made for another model shape, or a negative size.
    """

    layers: list[Any]

    def __init__(
        self,
        codecs: CodecSet,
        config: Any,
        max_bytes: int | None = None,
        *,
        sinks: int = SINKS,
        window: int = WINDOW,
        block: int = BLOCK,
    ) -> None:
        for name, number, least in (("sinks", sinks, 0), ("window", window, 0), ("block", block, 1)):
            if number < least:
                raise InputError(f"{name} of at least {least}", str(number), f"raise {name}")
        self.codecs, self.config, self.max_bytes = codecs, config, max_bytes
        self._unit = math.lcm(*(codec.block for codec in (*codecs.keys, *codecs.values) if codec is not None))
        self.sinks, self.window = sinks, window
        self.block = 1 if block == 1 or not window else math.lcm(block, self._unit)
        self.input_ids: Tensor | None = None
        self.positions = Positions(codecs.spec.switch_length)
        self._sliding_before: list[tuple[Any, dict[str, Any]]] = []
        dense = dense_layers(config)
        spec = codecs.spec
        if len(dense) != len(spec.layers):
            raise InputError(f"a model of {len(spec.layers)} layers", f"{len(dense)}", "use the codec with its own model")
        layers = [self._coded(i) if layer.coded else dense[i] for i, layer in enumerate(spec.layers)]
        super().__init__(layers=layers)

    def _coded(self, index: int) -> CodedLayer:
        keys, values = self.codecs.keys[index], self.codecs.values[index]
        assert keys is not None
        assert values is not None
        spec = self.codecs.spec
        rope = spec.rope(index)
        return CodedLayer(keys, values, rope, self.positions, spec.kv_heads, self.sinks, self.window, self.block)

    @property
    def coded_layers(self) -> list[CodedLayer]:
        return [layer for layer in self.layers if isinstance(layer, CodedLayer)]

    def begin(self, positions: Tensor, batch: int) -> None:
        """A forward pass over tokens at `positions [B or 1, Q]`, `batch` rows, is about to start.

        Raises:
            CacheFullError: it would need more than `max_bytes`.
        """
        self.positions.announce(positions)
        self._sliding_before = [(layer, vars(layer).copy()) for layer in self.layers if not isinstance(layer, CodedLayer)]
        if self.max_bytes is not None:
            self._make_room(self.max_bytes, self.coded_layers[0].length, positions.shape[1], batch)

    def _make_room(self, most: int, length: int, queries: int, batch: int) -> None:
        """Lower the oldest codes until `queries` more tokens fit."""
        coded = max(0, length + queries - self.sinks)
        exact = self._exact_bytes(length + queries, batch)
        sizes = self._token_bytes(batch)
        if exact + coded * sizes[-1] > most:
            least = f", with {len(sizes) - 1} stages fewer" if len(sizes) > 1 else ""
            raise CacheFullError(
                f"at most {_size(most)} of cache (max_bytes)",
                f"{length} tokens and {queries} more, which take {_size(int(exact + coded * sizes[-1]))}{least}",
                "raise max_bytes, shorten the prompt, or use a codec of fewer bits; the cache still holds what it held",
            )
        room = most - exact
        level = next(i for i, size in enumerate(sizes) if i + 1 == len(sizes) or coded * sizes[i + 1] <= room)
        lowered = 0
        if coded * sizes[level] > room:
            lowered = math.ceil((coded * sizes[level] - room) / (sizes[level] - sizes[level + 1]))
            lowered = min(coded, -(-lowered // LOWERED_TOGETHER) * LOWERED_TOGETHER)
        spare = room - lowered * (sizes[level + 1] if lowered else 0) - (coded - lowered) * sizes[level]
        for layer in self.coded_layers:
            layer.past.limit = coded + int(spare / sizes[level])
            layer.past.settle(level, lowered)

    def _token_bytes(self, batch: int) -> list[float]:
        """Bytes of a coded token in all layers, by level."""
        spec = self.codecs.spec
        pairs = [(layer.key_codec, layer.value_codec) for layer in self.coded_layers]
        levels = min(codec.levels for pair in pairs for codec in pair)
        return [
            sum(codec.bits_at(level) for pair in pairs for codec in pair) * (spec.kv_heads * spec.head_dim * batch / 8)
            for level in range(levels + 1)
        ]

    def _exact_bytes(self, tokens: int, batch: int) -> int:
        """Bytes of the tokens that stay exact when there are `tokens`, the window at its largest."""
        spec, total = self.codecs.spec, 0
        element = next((x.dtype.itemsize for layer in self.coded_layers for x in layer.exact.values()), 4)
        for layer in self.layers:
            coded = isinstance(layer, CodedLayer)
            exact = min(
                tokens, self.sinks + self.window + math.lcm(self.block, self._unit) - 1 if coded else dense_window(layer)
            )
            total += 2 * exact * spec.kv_heads * spec.head_dim * element
        return total * batch

    def end(self, failed: bool) -> None:
        """The forward pass is over; if it failed midway, the layers forget what it stored.

        Raises:
            InputError: NaN or Inf in keys or values, where layers did not tell it themselves; it counts as failed.
        """
        flags = [layer.finite for layer in self.coded_layers if layer.finite is not None]
        refused = not failed and bool(flags) and not bool(torch.stack(flags).all())
        self._end(failed or refused)
        if refused:
            raise non_finite()

    def _end(self, failed: bool) -> None:
        for layer in self.coded_layers:
            layer.end_pass(failed)
        if failed:
            for layer, state in self._sliding_before:  # transformers' layers replace their tensors, never write into them
                vars(layer).update(state)
            self.positions.crop(self.coded_layers[0].length)
        self._sliding_before = []
        self.positions.forget()

    # -- verbs that touch the positions too --------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.positions.crop(self.coded_layers[0].length)

    def reset(self) -> None:
        super().reset()
        self.positions.reset()

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_positions(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_positions(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_positions(lambda t: t[indices])

    def _map_positions(self, function: Callable[[Tensor], Tensor]) -> None:
        self.positions.map_batch(function)

    # -- report ------------------------------------------------------------------------------------------------------

    def report(self) -> CacheReport:
        """Bytes by kind, read off the live buffers, and bits per element."""
        kinds: dict[str, int] = {}
        elements = allocated = batch = 0
        spec = self.codecs.spec
        for layer in self.layers:
            if not layer.is_initialized:
                continue
            if isinstance(layer, CodedLayer):
                sizes, tokens, allocation = layer.nbytes(), layer.length, layer.allocated_bytes
                batch = layer.exact["keys"].shape[0]
            else:
                size = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
                sizes, tokens, allocation = {"exact": size}, layer.keys.shape[2], size
                batch = layer.keys.shape[0]
            for name, size in sizes.items():
                kinds[name] = kinds.get(name, 0) + size
            allocated += allocation
            elements += 2 * tokens * batch * spec.kv_heads * spec.head_dim
        total = sum(kinds.values())
        books = self.codecs.codebook_bytes
        known = [kinds.pop(name, 0) for name in ("codes", "scale", "exact")]
        return CacheReport(
            tokens=self.get_seq_length(),
            batch=batch,
            bytes_codes=known[0],
            bytes_scales=known[1],
            bytes_exact=known[2],
            bytes_other=sum(kinds.values()),
            bytes_cache=total,
            bytes_allocated=allocated,
            bytes_codebooks=books,
            bytes_bf16=2 * elements,
            ratio=2 * elements / total if total else 1.0,
            bits_per_element=8 * total / elements if elements else 0.0,
            bits_per_element_with_codebooks=8 * (total + books) / elements if elements else 0.0,
        )

    def save(self, file: Any, input_ids: Tensor | None = None) -> None:
        """Keep the cache on disk, with the tokens it stands for if given; see `kvfold.load_cache`."""
        from kvfold.cache.saved import save_cache  # here, because it needs this class

        save_cache(self, file, input_ids)


def dense_window(layer: Any) -> int:
    """Tokens a sliding layer keeps."""
    return layer.sliding_window - 1


def _size(number: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number} B"
