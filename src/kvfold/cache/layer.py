"""One layer of the compressed cache: sinks and a recent window exact, everything between as codes.

How many slots are coded depends only on how many there are: with `n` tokens, `s` sinks, a window of `w` and blocks of
`k`, slots `s .. s + k * floor((n - s - w) / k) - 1`. Every query of a forward pass reads the cache as it would have been
had its tokens come one by one, so a prompt gives the same result whole, in chunks, or token by token. A block is coded
once, when it leaves the window of the pass's last query. Methods that code tokens together (`Codec.block`) make `k` a multiple
of what they need; but with `k = 1`, for evaluation, a query reads as codes every token outside its window that the pass coded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold import ops
from kvfold.cache.past import CodedPast
from kvfold.cache.positions import Positions
from kvfold.cache.view import CacheView, CodedPiece
from kvfold.codecs import Codec
from kvfold.codecs.base import finite
from kvfold.codes import Codes
from kvfold.compat import CacheLayerMixin
from kvfold.config import RopeSpec
from kvfold.errors import InputError, non_finite


class CodedLayer(CacheLayerMixin):
    """A transformers cache layer whose past is codes. `update` returns a `CacheView` as key and as value.

    Args:
        key_codec, value_codec: fitted codecs of this layer.
        rope: this layer's RoPE, needed if the key codec reads positions.
        positions: the cache's positions, shared by its layers.
        kv_heads: `G`.
        sinks: first tokens kept exact.
        window: newest tokens kept exact, at least; up to `block - 1` more wait until a block is full.
        block: tokens that leave the window together: 1, or a multiple of what the codecs code together.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self,
        key_codec: Codec,
        value_codec: Codec,
        rope: RopeSpec | None,
        positions: Positions,
        kv_heads: int,
        sinks: int,
        window: int,
        block: int,
    ) -> None:
        super().__init__()
        self.key_codec, self.value_codec = key_codec, value_codec
        self.sinks, self.window, self.block = sinks, window, block
        self._together = math.lcm(key_codec.block, value_codec.block)  # tokens whose codes cannot be told apart
        self.unit = math.lcm(block, self._together)  # tokens coded at once
        self.kv_heads = kv_heads
        self.rope = rope if key_codec.reads_positions else None
        self._factor = rope.factor if rope else 1.0
        self._interleaved = bool(rope and rope.interleaved)
        self._positions = positions
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.length = 0
        self.past = CodedPast(self.key_codec, self.value_codec)
        self.exact: dict[str, Tensor] = {}  # keys, values [B, G, E, D]: the sinks, then the tail
        self._tail_start = self.sinks  # slot of the first token of the tail
        self._inv_freq: list[Tensor] = []
        self._undo: tuple[int, int, int, dict[str, Tensor]] | None = None
        self.finite: Tensor | None = None  # of this pass, where it is not asked for at once

    # -- what transformers calls -------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        for name, tensor in (("keys", key_states), ("values", value_states)):
            self.exact[name] = tensor[:, :, :0]
        rows = self.rope.inv_freq if self.rope else ()
        self._inv_freq = [torch.tensor(row, dtype=torch.float32, device=self.device) for row in rows]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store post-RoPE keys and values `[B, G, Q, D]`; returns the view for this pass, twice.

        Raises:
            InputError: wrong KV heads or head dim, NaN or Inf, or a call outside `kvfold.attach`.
        """
        batch, heads, queries, dim = key_states.shape
        if (heads, dim) != (self.kv_heads, self.key_codec.head_dim):
            raise InputError(
                f"{self.kv_heads} KV heads of dim {self.key_codec.head_dim}",
                f"{heads} of dim {dim}",
                "use the codec with the model it was calibrated for",
            )
        if asks_late(key_states):
            self.finite = torch.isfinite(key_states).all() & torch.isfinite(value_states).all()
        elif not finite(key_states, value_states):
            raise non_finite()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, before, held = self.length, self.coded, self.exact
        self._positions.commit(old + queries, batch)
        self._undo = (old, before, self._tail_start, held)
        self.length = old + queries
        self.exact = {
            "keys": torch.cat((held["keys"], key_states), 2),
            "values": torch.cat((held["values"], value_states), 2),
        }
        self.encode_until(self._boundary(self.length))
        boundaries = self._boundaries(old, before) if queries > 1 and self.coded > before else None
        if not self.record_past and boundaries is None:
            self._trim()
        view = self._view(boundaries)
        if not self.record_past:
            self._trim()
        return view, view

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """Keep the exact tokens of a pass until `crop`, so that a rollback (assisted decoding) leaves no trace."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens. Tokens that exist only as codes stay codes."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if not self.is_initialized:
            return
        self.length = max(0, self.length + tokens_to_remove)
        kept = self._sinks_held + max(0, self.length - self._tail_start)
        self.exact = {name: tensor[:, :, :kept] for name, tensor in self.exact.items()}
        coded = max(min(self._boundary(self.length), self.coded), min(self._tail_start, self.length))
        coded -= self._reopen(coded)
        self.past.crop(coded - self.sinks)
        self._tail_start = max(self.sinks, min(self._tail_start, self.length))
        self._trim()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_batch(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_batch(lambda t: t[indices])

    def reset(self) -> None:
        self._clear()

    def offload(self) -> None:
        """Move what is stored to the CPU."""
        self.map_batch(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move it back to the device it came from."""
        if self.is_initialized:
            self.map_batch(lambda t: t.to(self.device, non_blocking=True))

    # -- what kvfold calls -------------------------------------------------------------------------------------------

    @property
    def coded(self) -> int:
        """Slots `sinks..coded-1` are codes."""
        return self.sinks + self.past.tokens

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to everything stored; it may change batch axis or device, nothing else."""
        self.past.map(function)
        self.exact = {name: function(tensor) for name, tensor in self.exact.items()}

    def end_pass(self, failed: bool) -> None:
        """The forward pass is over. If it failed, whatever it stored in this layer is taken back."""
        if failed and self._undo is not None:
            self.length, coded, self._tail_start, self.exact = self._undo
            self.past.crop(coded - self.sinks)
        self._undo = self.finite = None

    def nbytes(self) -> dict[str, int]:
        """Bytes of the tokens alive, by kind: the codes' fields, and "exact" for uncompressed tokens."""
        sizes = {"exact": sum(t.numel() * t.element_size() for t in self.exact.values())}
        for codes in (store.codes() for segment in self.past.segments for store in segment.stores):
            for name, tensor in (codes.fields if codes else {}).items():
                sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()
        return sizes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the buffers, room for growth included."""
        exact = sum(t.numel() * t.element_size() for t in self.exact.values())
        return exact + self.past.allocated_bytes

    def load(self, length: int, exact: dict[str, Tensor], segments: list[tuple[int, Codes, Codes]]) -> None:
        """Take over the state of a saved layer (see `CompressedCache.save`); segments are (level, keys, values)."""
        self._clear()
        self.lazy_initialization(exact["keys"], exact["values"])
        self.length, self.exact = length, exact
        for level, keys, values in segments:
            self.past.append(keys, values, level)
        self._tail_start = self.coded

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _sinks_held(self) -> int:
        return min(self.sinks, self.length)

    def _without(self, count: int) -> dict[str, Tensor]:
        """The exact tokens without the first `count` of the tail, copied, so that a pass's large tensors can be let go of."""
        sinks = self._sinks_held
        return {name: torch.cat((x[:, :, :sinks], x[:, :, sinks + count :]), 2) for name, x in self.exact.items()}

    def _boundary(self, length: int) -> int:
        """First slot behind the coded ones when there are `length` tokens; `sinks` if none is coded."""
        return self.sinks + max(0, length - self.sinks - self.window) // self.unit * self.unit

    def _boundaries(self, old: int, before: int) -> Tensor:
        lengths = torch.arange(old + 1, self.length + 1, device=self.device)
        due = self.sinks + (lengths - self.sinks - self.window).clamp_min(0) // self.block * self.block
        return due.clamp(before, self.coded)

    def _reopen(self, coded: int) -> int:
        """Before slots from `coded` on are dropped: the codes of a block that this would cut become exact tokens again, as they
        decode. Returns how many that are; 0 unless tokens are coded together."""
        cut = (coded - self.sinks) % self._together if self.sinks < coded < self.coded else 0
        if cut:
            start, segment = coded - cut - self.sinks, self.past.segments[-1]
            stores = {"keys": (self.key_codec, segment.keys), "values": (self.value_codec, segment.values)}
            for name, (codec, store) in stores.items():
                codes = store.codes()
                assert codes is not None
                decoded = codec.decode(codes.slice(start, start + self._together))[:, :, :cut]
                self.exact[name] = torch.cat((self.exact[name][:, :, : self.sinks], decoded.to(self.dtype)), 2)
            self._tail_start = coded - cut
        return cut

    def encode_until(self, boundary: int) -> None:
        start = self.coded
        if boundary <= start:
            return
        shift = self.sinks - self._tail_start
        chosen = slice(start + shift, boundary + shift)
        keys = self.exact["keys"][:, :, chosen]
        if self.rope:
            pieces = [
                self.key_codec.unplace(keys[:, :, a - start : b - start], self._rotation(a, b, regime))
                for a, b, regime in self._positions.regimes(start, boundary)
            ]
            keys = torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]
        key_codes = self.key_codec.encode(keys)
        self.past.append(key_codes, self.value_codec.encode(self.exact["values"][:, :, chosen]))

    def _trim(self) -> None:
        """Drop exact copies of coded tokens."""
        extra = self.coded - self._tail_start
        if extra > 0:
            self.exact = self._without(extra)
            self._tail_start = self.coded

    def _view(self, boundaries: Tensor | None) -> CacheView:
        skip = 0 if boundaries is not None else self.coded - self._tail_start
        exact = self._without(skip) if skip else self.exact
        start = self._tail_start + skip
        return CacheView(self._pieces(), exact["keys"], exact["values"], self._sinks_held, start, self.length, boundaries)

    def _pieces(self) -> list[CodedPiece]:
        """The past in pieces; in most steps the same as before, for only a full block is coded."""
        if self.past.known is None:
            self.past.known = self._made_pieces()
        return self.past.known

    def _made_pieces(self) -> list[CodedPiece]:
        pieces: list[CodedPiece] = []
        start = self.sinks
        for segment in self.past.segments:
            keys, values = segment.keys.codes(), segment.values.codes()
            if keys is None or values is None or not keys.tokens:
                continue
            stop = start + keys.tokens
            regimes = self._positions.regimes(start, stop) if self.rope else [(start, stop, 0)]
            for a, b, regime in regimes:
                codes = keys.slice(a - start, b - start), values.slice(a - start, b - start)
                rotation = self._rotation(a, b, regime) if self.rope else None
                pieces.append(CodedPiece(a, b, segment.key_codec, segment.value_codec, *codes, rotation))
            start = stop
        return pieces

    def _rotation(self, start: int, stop: int, regime: int) -> ops.Rotation:
        positions = self._positions.slots(start, stop)
        return ops.Rotation(positions, self._inv_freq[regime], self._factor, self._interleaved)


def asks_late(tensor: Tensor) -> bool:
    """Whether looking at a number would make the host wait for a device, so that a pass looks once, at its end."""
    return tensor.is_cuda
