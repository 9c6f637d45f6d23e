"""The coded tokens of one layer, keys and values side by side; under a memory limit the oldest give up trailing stages.

A code that consists of stages is still a code when trailing ones are dropped. At level `l` a token has lost `l` stages of its
key and `l` of its value (`Codec.lower`); nothing is decoded or coded again. Older tokens never have more than newer ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvfold.cache.store import CodeStore
from kvfold.codecs import Codec
from kvfold.codes import Codes


@dataclass
class Segment:
    """A run of tokens of one level."""

    level: int
    key_codec: Codec
    value_codec: Codec
    keys: CodeStore
    values: CodeStore

    @property
    def stores(self) -> tuple[CodeStore, CodeStore]:
        return self.keys, self.values


class CodedPast:
    """Codes of tokens `0 .. tokens-1` of one layer.

    Args:
        key_codec, value_codec: of level 0.

    Attributes:
        segments: oldest first, levels falling; empty before the first append.
        known: what a reader made of what is stored, to be read again; None once that has changed.
        level, lowered: what `settle` asked for: the first `lowered` tokens at `level + 1`, later ones at `level`.
        limit: tokens that will never be exceeded, so that growing does not allocate past a memory limit; None if unknown.
    """

    def __init__(self, key_codec: Codec, value_codec: Codec, limit: int | None = None) -> None:
        self._codecs = {0: (key_codec, value_codec)}  # by level, of the levels in use
        self.segments: list[Segment] = []
        self.level = self.lowered = 0
        self.limit = limit
        self.known: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "known": None}  # a copy makes its own

    @property
    def tokens(self) -> int:
        return sum(segment.keys.tokens for segment in self.segments)

    def append(self, keys: Codes, values: Codes, level: int = 0) -> None:
        """Add codes of `level` behind those that are there, lowered as `settle` asked for."""
        self.known = None
        start, count = self.tokens, keys.tokens
        first = max(0, min(self.lowered - start, count))
        for part, wanted in ((slice(0, first), self.level + 1), (slice(first, count), self.level)):
            if part.start < part.stop:
                self._add(keys.slice(part.start, part.stop), values.slice(part.start, part.stop), level, max(wanted, level))

    def settle(self, level: int, lowered: int) -> None:
        """From now on the first `lowered` tokens are at `level + 1` at least, all others at `level`."""
        self.level, self.lowered = level, lowered
        start, due = 0, False
        for segment in self.segments:
            due |= segment.level < level or (segment.level == level and start < lowered)
            start += segment.keys.tokens
        if not due:
            return
        self.known = None  # it holds the buffers
        old, self.segments = self.segments, []
        while old:  # one by one, so that no more than one is held twice
            segment = old.pop(0)
            keys, values = segment.keys.codes(), segment.values.codes()
            if keys is not None and values is not None:
                self.append(keys, values, segment.level)
        used = {0, *(segment.level for segment in self.segments)}
        self._codecs = {level: pair for level, pair in self._codecs.items() if level in used}

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens`."""
        self.known = None
        for segment in self.segments:
            for store in segment.stores:
                store.crop(tokens)
            tokens = max(0, tokens - segment.keys.tokens)
        self.segments = [segment for segment in self.segments if segment.keys.tokens] or self.segments[:1]

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace each buffer by `function(buffer)`, which may change its batch axis or device."""
        self.known = None
        for segment in self.segments:
            for store in segment.stores:
                store.map(function)

    @property
    def allocated_bytes(self) -> int:
        return sum(store.allocated_bytes for segment in self.segments for store in segment.stores)

    def _add(self, keys: Codes, values: Codes, level: int, wanted: int) -> None:
        newest = self.segments[-1] if self.segments else None
        if newest is None or (newest.level != wanted and newest.keys.tokens):
            codecs = self._at(wanted)
            newest = Segment(wanted, *codecs, CodeStore(), CodeStore())
            self.segments.append(newest)
        elif newest.level != wanted:
            self.segments[-1] = newest = Segment(wanted, *self._at(wanted), CodeStore(), CodeStore())
        before = self.tokens - newest.keys.tokens
        for store in newest.stores:
            store.limit = None if self.limit is None else max(0, self.limit - before)
            if wanted > self.level:  # grows by no more than is lowered
                store.limit = newest.keys.tokens + keys.tokens
        key_codec, value_codec = self._codecs[0]
        newest.keys.append(key_codec.lower(keys, wanted) if wanted > level else keys)
        newest.values.append(value_codec.lower(values, wanted) if wanted > level else values)

    def _at(self, level: int) -> tuple[Codec, Codec]:
        if level not in self._codecs:
            key, value = self._codecs[0]
            self._codecs[level] = key.at_level(level), value.at_level(level)
        return self._codecs[level]
