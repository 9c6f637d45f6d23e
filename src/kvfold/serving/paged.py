"""A layer's cache as a serving engine keeps it: pages of a fixed number of tokens, and a table that lists each row's pages.

A page is bytes `[G, block, n]`; a token's `n` bytes a head are the fields of its key's codes and then of its value's. Every
token is coded as it comes and read as codes from then on, by its own query too (as with `CompressedCache(sinks=0, window=0)`):
pages are shared between rows and handed on when a row ends, so nothing can leave a window later. So a prompt gives the same
result whole, in chunks, or after a prefix that was there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvfold import ops
from kvfold.codecs import Codec
from kvfold.codecs.base import attend
from kvfold.codes import Codes
from kvfold.config import RopeSpec
from kvfold.errors import InputError


@dataclass(frozen=True)
class _Field:
    """Where a field of the codes lies among a token's bytes."""

    name: str
    start: int
    stop: int
    dtype: torch.dtype


class PageLayout:
    """How a token's codes lie in a page.

    Attributes:
        bytes: of a token and head, keys and values.

    Raises:
        InputError: codecs that code several tokens together.
    """

    def __init__(self, key: Codec, value: Codec, kv_heads: int) -> None:
        for codec in (key, value):
            if codec.block != 1:
                came = f"{codec.kind}, which codes {codec.block} tokens together"
                raise InputError("a codec that codes every token by itself", came, "serve with rvq, turboquant or another such")
        at = 0
        sides = []
        for codec in (key, value):
            empty = codec.encode(torch.zeros(1, kv_heads, 1, codec.head_dim, device=_device(codec)))
            fields = []
            for name, tensor in sorted(empty.fields.items()):
                size = tensor[0, 0, 0].numel() * tensor.element_size()
                at = -(-at // tensor.element_size()) * tensor.element_size()  # a view needs its alignment
                fields.append(_Field(name, at, at + size, tensor.dtype))
                at += size
            sides.append(tuple(fields))
        widest = max(field.dtype.itemsize for fields in sides for field in fields)
        self.key_fields, self.value_fields = sides
        self.bytes = -(-at // widest) * widest

    def write(self, pages: Tensor, slots: Tensor, keys: Codes, values: Codes) -> None:
        """Keep codes of tokens, `[1, G, T, ...]`, in uint8 `pages [N, G, block, n]` at `slots [T]` (page * block + place)."""
        page, place = slots // pages.shape[2], slots % pages.shape[2]
        for fields, codes in ((self.key_fields, keys), (self.value_fields, values)):
            for field in fields:
                rows = codes.fields[field.name][0].transpose(0, 1).contiguous().flatten(2)  # [T, G, n]
                pages[page, :, place, field.start : field.stop] = rows.view(torch.uint8)

    def read(self, pages: Tensor, table: Tensor, lengths: Sequence[int]) -> tuple[Codes, Codes]:
        """Codes `[R, G, T, ...]` of keys and values of `R` rows of `lengths`, the longest `T`, whose pages `table [R, n]` lists
        in order; zeros behind the end of a shorter row, never what a page held before."""
        longest = max(lengths)
        count = -(-longest // pages.shape[2])
        gathered = pages[table[:, :count].long().clamp(0, len(pages) - 1)].transpose(1, 2)  # [R, G, count, block, bytes]
        flat = gathered.reshape(len(lengths), pages.shape[1], count * pages.shape[2], -1)[:, :, :longest]
        for row, length in enumerate(lengths):
            flat[row, :, length:] = 0
        key, value = (
            Codes({f.name: flat[..., f.start : f.stop].view(f.dtype) for f in fields})
            for fields in (self.key_fields, self.value_fields)
        )
        return key, value


class PagedLayer:
    """One layer's attention over pages.

    Args:
        key, value: fitted codecs of this layer, for the `kv_heads` heads that the pages hold.
        rope: the layer's RoPE, None in a model without.
    """

    def __init__(self, key: Codec, value: Codec, rope: RopeSpec | None, kv_heads: int) -> None:
        self.layout = PageLayout(key, value, kv_heads)
        self._key, self._value = key, value
        self._rope = rope if key.reads_positions else None

    def _rotation(self, positions: Tensor) -> ops.Rotation | None:
        """Of `positions [1, T]`."""
        if self._rope is None:
            return None
        inv_freq = torch.tensor(self._rope.inv_freq[0], device=positions.device)
        return ops.Rotation(positions.to(torch.int32), inv_freq, self._rope.factor, self._rope.interleaved)

    def store(self, pages: Tensor, slots: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Code keys (after RoPE) and values `[T, G, D]` of tokens at `positions [T]` into `slots [T]`."""
        keys, values = (x.transpose(0, 1)[None].float() for x in (keys, values))
        if self._rope is not None:
            keys = self._key.unplace(keys, self._rotation(positions[None]))
        self.layout.write(pages, slots, self._key.encode(keys), self._value.encode(values))

    def attend(
        self,
        pages: Tensor,
        table: Tensor,
        query: Tensor,
        queries: Sequence[int],
        lengths: Sequence[int],
        softmax_scale: float,
        softcap: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Causal attention of several rows, each over its own pages; the newest queries of a row are its last tokens.

        Args:
            table: integers `[R, n]`, pages of each row in order; what lies behind a row's last page is not looked at.
            query: `[T, H, D]`, after RoPE, one row's queries after the other's.
            queries: of each row; their sum is `T`.
            lengths: tokens of each row, those of its queries counted; 0 for a row that is not there.
            window: newest tokens a query may look at, itself counted; None for all.

        Returns:
            float32 `[T, H, D]`.
        """
        out = torch.zeros(query.shape[0], query.shape[1], self._value.head_dim, device=query.device)
        starts = list(accumulate(queries, initial=0))
        steps = [row for row, asked in enumerate(queries) if asked == 1 and lengths[row]]
        groups = _alike(steps, lengths)  # rows of one query each are attended together
        groups += [[row] for row, asked in enumerate(queries) if asked > 1 and lengths[row]]
        for rows in groups:
            count = queries[rows[0]]
            where = torch.cat([torch.arange(starts[row], starts[row] + count, device=query.device) for row in rows])
            chosen = query[where].view(len(rows), count, *query.shape[1:]).transpose(1, 2)  # [R, H, Q, D]
            ends = [lengths[row] for row in rows]
            keys, values = self.layout.read(pages, table[rows], ends)
            slot = torch.arange(max(ends), device=query.device)
            mask = _mask(slot, ends, count, window)
            rotation = self._rotation(slot[None])
            coded = (self._key, keys), (self._value, values)
            mixed = attend(chosen, *coded, rotation, mask, softmax_scale, softcap)[0]
            out[where] = mixed.transpose(1, 2).flatten(0, 1)
        return out


def _alike(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """`rows` in groups whose longest is at most a quarter longer than the shortest: a group costs its longest for each."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        if groups and 4 * lengths[row] <= 5 * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _mask(slot: Tensor, lengths: Sequence[int], queries: int, window: int | None) -> Tensor | None:
    """Bool `[R, 1, Q, T]`, None where everything is seen."""
    if queries == 1 and window is None and min(lengths) == len(slot):
        return None
    last = torch.tensor(lengths, device=slot.device)[:, None] - queries + torch.arange(queries, device=slot.device)
    seen = slot <= last[..., None]
    if window is not None:
        seen &= slot > last[..., None] - window
    return seen[:, None]


def _device(codec: Codec) -> torch.device:
    return next((tensor.device for tensor in codec.tensors().values()), torch.device("cpu"))
