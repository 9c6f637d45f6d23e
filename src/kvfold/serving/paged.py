"""A layer's cache as a serving engine keeps it: pages of a fixed number of tokens, and a table that lists each row's pages.

A page is bytes `[G, block, n]`; a token's `n` bytes a head are the fields of its key's codes and then of its value's. Every
token is coded as it comes and read as codes from then on, by its own query too (as with `CompressedCache(sinks=0, window=0)`):
pages are shared between rows and handed on when a row ends, so nothing can leave a window later. So a prompt gives the same
result whole, in chunks, or after a prefix that was there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from kvfold import ops
from kvfold.codecs import Codec
from kvfold.codecs.base import Reader
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
        parts, end = [], 0
        for fields, codes in ((self.key_fields, keys), (self.value_fields, values)):
            for field in fields:
                part = codes.fields[field.name][0].flatten(2).view(torch.uint8)  # [G, T, n]
                parts += [part.new_zeros((*part.shape[:2], field.start - end)), part] if field.start > end else [part]
                end = field.stop
        pages[slots // pages.shape[2], :, slots % pages.shape[2], :end] = torch.cat(parts, -1).transpose(0, 1)

    def all(self, pages: Tensor) -> tuple[Codes, Codes]:
        """Codes of all `pages`, keys' and values', as views `[N, G, block, ...]`."""
        key, value = (
            Codes({f.name: pages[..., f.start : f.stop].view(f.dtype) for f in fields})
            for fields in (self.key_fields, self.value_fields)
        )
        return key, value

    def read(self, pages: Tensor, table: Tensor, lengths: Sequence[int]) -> tuple[Codes, Codes]:
        """Codes `[R, G, T, ...]` of keys and values of `R` rows of `lengths`, the longest `T`, whose pages `table [R, n]` lists
        in order; zeros behind the end of a shorter row, never what a page held before."""
        longest = max(lengths)
        count = -(-longest // pages.shape[2])
        gathered = pages[table[:, :count].long().clamp(0, len(pages) - 1)].transpose(1, 2)  # [R, G, count, block, bytes]
        flat = gathered.reshape(len(lengths), pages.shape[1], count * pages.shape[2], -1)[:, :, :longest]
        for row, length in enumerate(lengths):
            flat[row, :, length:] = 0
        return self.all(flat)


@dataclass(frozen=True)
class Rows:
    """The rows of a forward pass; the newest queries of a row are its last tokens. Made once for all layers.

    Attributes:
        queries: of each row.
        lengths: tokens of each row, those of its queries counted; 0 for a row that is not there.
    """

    queries: Sequence[int]
    lengths: Sequence[int]

    @cached_property
    def starts(self) -> list[int]:
        """Each row's first query among those of all rows, and their number."""
        return list(accumulate(self.queries, initial=0))

    @cached_property
    def positions(self) -> Tensor:
        """Of all queries in their rows, int32 `[T]`."""
        rows = zip(self.lengths, self.queries, strict=True)
        own = [torch.arange(length - asked, length, dtype=torch.int32) for length, asked in rows if length]
        return torch.cat([torch.arange(0, dtype=torch.int32), *own])

    @cached_property
    def steps(self) -> list[int]:
        """Rows that ask for one token."""
        return [row for row, asked in enumerate(self.queries) if asked == 1 and self.lengths[row]]

    @cached_property
    def prompts(self) -> list[int]:
        """Rows that ask for several."""
        return [row for row, asked in enumerate(self.queries) if asked > 1 and self.lengths[row]]

    def spans(self, row: int, device: torch.device) -> ops.Spans:
        """What the queries of `row` see: all tokens before them, and themselves."""
        if row not in self._spans:
            ends = torch.arange(self.lengths[row] - self.queries[row] + 1, self.lengths[row] + 1, device=device)
            self._spans[row] = ops.Spans.of(torch.zeros_like(ends), ends)
        return self._spans[row]

    @cached_property
    def _spans(self) -> dict[int, ops.Spans]:
        return {}


@dataclass(frozen=True)
class _Fused:
    """Of keys and of values: how they are coded, and the codes of all pages."""

    coders: tuple[ops.Coder, ops.Coder]
    coded: tuple[ops.Coded, ops.Coded]

    @cached_property
    def stored(self) -> tuple[ops.Stored, ops.Stored]:
        key, value = self.coded
        return ops.Stored(key.packed, key.scale), ops.Stored(value.packed, value.scale)


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
        self._inv_freq: Tensor | None = None
        self._known: tuple[tuple, _Fused | None] | None = None

    def _fused(self, pages: Tensor) -> _Fused | None:
        """What the fused ops are told of `pages`, found anew only for other ones: an engine's stay where they are. None if a
        codec has no such ops."""
        place = (pages.data_ptr(), pages.shape, pages.stride(), pages.device)
        if self._known is None or self._known[0] != place:
            codecs, codes = (self._key, self._value), self.layout.all(pages)
            coders = [codec.coder for codec in codecs if codec.coder is not None]
            coded = [own for codec, mine in zip(codecs, codes, strict=True) if (own := codec.coded(mine)) is not None]
            there = len(coders) == len(coded) == 2
            self._known = place, _Fused((coders[0], coders[1]), (coded[0], coded[1])) if there else None
        return self._known[1]

    def _rotation(self, positions: Tensor) -> ops.Rotation | None:
        """Of `positions [1, T]`."""
        if self._rope is None:
            return None
        if self._inv_freq is None:
            self._inv_freq = torch.tensor(self._rope.inv_freq[0], device=positions.device)
        return ops.Rotation(positions, self._inv_freq, self._rope.factor, self._rope.interleaved)

    def store(self, pages: Tensor, slots: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Code keys (after RoPE) and values `[T, G, D]` of tokens at `positions [T]` into `slots [T]`."""
        rotation = self._rotation(positions[None])
        fused = self._fused(pages)
        if fused is not None and not self._key.centers:
            return ops.code_pages(keys, values, slots, rotation, fused.coders, fused.stored)
        keys, values = (x.transpose(0, 1)[None].float() for x in (keys, values))
        if self._rope is not None:
            keys = self._key.unplace(keys, rotation)
        self.layout.write(pages, slots, self._key.encode(keys), self._value.encode(values))

    def attend(
        self, pages: Tensor, table: Tensor, query: Tensor, rows: Rows, softmax_scale: float, softcap: float | None = None
    ) -> Tensor:
        """Causal attention of several rows, each over its own pages.

        Args:
            table: integers `[R, n]`, pages of each row in order; what lies behind a row's last page is not looked at.
            query: `[T, H, D]`, after RoPE, one row's queries after the other's.

        Returns:
            float32 `[T, H, D]`; zeros for a row that is not there.
        """
        if rows.steps and len(rows.steps) == len(query) == len(rows.queries):  # a decode step
            return self._steps(pages, table[: len(query)], query, rows.lengths, softmax_scale, softcap)
        out = torch.zeros(query.shape[0], query.shape[1], self._value.head_dim, device=query.device)
        if rows.steps:
            asked = torch.tensor([rows.starts[row] for row in rows.steps], device=query.device)
            ends = [rows.lengths[row] for row in rows.steps]
            out[asked] = self._steps(pages, table[rows.steps], query[asked], ends, softmax_scale, softcap)
        for row in rows.prompts:
            own = slice(rows.starts[row], rows.starts[row + 1])
            given = query[None, own].transpose(1, 2)  # [1, H, Q, D]
            spans = rows.spans(row, query.device)
            mixed = self._gathered(pages, table[row : row + 1], given, [rows.lengths[row]], spans, softmax_scale, softcap)
            out[own] = mixed[0].transpose(0, 1)
        return out

    def _steps(
        self,
        pages: Tensor,
        table: Tensor,
        query: Tensor,
        lengths: Sequence[int],
        softmax_scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention `[R, H, D]` of rows of one query each, `query [R, H, D]`."""
        fused = self._fused(pages)
        if fused is not None:
            rotation = self._rotation(_places(max(lengths), query.device))
            return ops.attend_pages(query, *fused.coded, table, lengths, rotation, softmax_scale, softcap)
        out = torch.empty(len(query), query.shape[1], self._value.head_dim, device=query.device)
        for rows in ops.alike(lengths):
            ends = torch.tensor([lengths[row] for row in rows], device=query.device)
            mask = (_places(max(lengths), query.device)[:, : int(ends.max())] < ends[:, None])[:, None, None]
            given = query[rows][:, :, None]
            mixed = self._gathered(pages, table[rows], given, ends.tolist(), mask, softmax_scale, softcap)
            out[rows] = mixed[:, :, 0]
        return out

    def _gathered(
        self,
        pages: Tensor,
        table: Tensor,
        query: Tensor,
        lengths: Sequence[int],
        mask: ops.Mask,
        softmax_scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention `[R, H, Q, D]` over codes that are gathered first."""
        keys, values = self.layout.read(pages, table, lengths)
        rotation = self._rotation(_places(max(lengths), query.device))
        return Reader((self._key, keys), (self._value, values), rotation).attend(query, mask, softmax_scale, softcap)[0]


def _places(count: int, device: torch.device) -> Tensor:
    """0 to `count - 1`, int32 `[1, count]`."""
    return _many_places(1 << (count - 1).bit_length(), device)[:, :count]


@lru_cache(maxsize=4)
def _many_places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)[None]


def _device(codec: Codec) -> torch.device:
    return next((tensor.device for tensor in codec.tensors().values()), torch.device("cpu"))
