"""Text of any size as token sequences of equal length, in bounded memory, and resumable at any of them.

Chunks of text (`sources.py`) are tokenized one by one, without special tokens, and their tokens packed one after the other
into sequences, across documents too, as in arXiv 2410.15704, section 4. Neither the size of the pieces read nor an
interruption changes a sequence. The last sequence of the text is padded, and then the text begins again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.calibrate.sources import Source
from kvfold.errors import InputError

_PLACE = ("epoch", "source", "offset", "skip", "sequence")


class Packed(NamedTuple):
    """A sequence: `ids` int64 `[context]`, `mask` bool `[context]`, False where tokens are padding (at the end)."""

    ids: Tensor
    mask: Tensor


@dataclass
class _Chunk:
    """Tokens of a chunk: where it starts and ends in its source, and how many of its tokens are used up."""

    source: int
    offset: int
    end: int
    ids: Tensor
    used: int = 0


class TextStream:
    """Endless sequences of `context` tokens; with several processes, sequence `i` belongs to `i % world`.

    Args:
        tokenizer: from transformers.
        sources: read one after the other.
        context: tokens of a sequence.
        rank, world: number of this process, and how many there are. Every process reads all text.

    Raises:
        InputError: from the sources; when first read, text without a token.
    """

    def __init__(self, tokenizer: Any, sources: Sequence[Source], context: int, rank: int = 0, world: int = 1) -> None:
        self.context, self.rank, self.world = context, rank, world
        self._tokenizer, self._sources = tokenizer, list(sources)
        pad = getattr(tokenizer, "pad_token_id", None)
        self._pad = 0 if pad is None else int(pad)
        self.seek(dict.fromkeys(_PLACE, 0))

    def batch(self, count: int) -> list[Packed]:
        """Those of the next `count` sequences that belong to this process; every process moves on by `count`."""
        return [packed for packed, mine in (self._next() for _ in range(count)) if mine]

    def __iter__(self) -> Iterator[Packed]:
        """The sequences of this process, without end."""
        while True:
            yield from self.batch(1)

    @property
    def epoch(self) -> int:
        """How often the text has begun again."""
        return self._epoch

    def position(self) -> dict[str, int]:
        """Where the next sequence starts, JSON-able, for `seek`; the same in every process."""
        place = self._held[0] if self._held else None
        source, offset, skip = self._after if place is None else (place.source, place.offset, place.used)
        return {"epoch": self._epoch, "source": source, "offset": offset, "skip": skip, "sequence": self._sequence}

    def seek(self, position: dict[str, int]) -> None:
        """Go on from a `position()` of a stream over the same text with the same context.

        Raises:
            InputError: no such position in this text.
        """
        numbers = [position.get(name) for name in _PLACE]
        if any(type(n) is not int or n < 0 for n in numbers) or numbers[1] >= len(self._sources):  # type: ignore[operator]
            raise _misplaced(position)
        self._epoch, source, offset, skip, self._sequence = (int(n) for n in numbers)  # type: ignore[arg-type]
        self._after = (source, offset, 0)
        self._held: deque[_Chunk] = deque()
        self._reader = self._read(source, offset)
        if skip:
            chunk = next(self._reader, None)
            if chunk is None or len(chunk.ids) <= skip:
                raise _misplaced(position)
            chunk.used = skip
            self._held.append(chunk)

    def _next(self) -> tuple[Packed, bool]:
        if not self._fill():
            self._epoch, self._reader = self._epoch + 1, self._read(0, 0)
            if not self._fill():
                raise InputError("calibration text", "none (empty or only white space)", "give text")
        ids = torch.full((self.context,), self._pad)
        mask = torch.zeros(self.context, dtype=torch.bool)
        done = 0
        while self._held and done < self.context:
            chunk = self._held[0]
            part = chunk.ids[chunk.used : chunk.used + self.context - done]
            ids[done : done + len(part)] = part
            done, chunk.used = done + len(part), chunk.used + len(part)
            if chunk.used == len(chunk.ids):
                self._after = (chunk.source, chunk.end, 0)
                self._held.popleft()
        mask[:done] = True
        self._sequence += 1
        return Packed(ids, mask), (self._sequence - 1) % self.world == self.rank

    def _fill(self) -> bool:
        """Read until there are tokens for a sequence, or the text ends; False if there are none at all."""
        tokens = sum(len(chunk.ids) - chunk.used for chunk in self._held)
        while tokens < self.context and (chunk := next(self._reader, None)) is not None:
            self._held.append(chunk)
            tokens += len(chunk.ids)
        return tokens > 0

    def _read(self, source: int, offset: int) -> Iterator[_Chunk]:
        for index in range(source, len(self._sources)):
            start = offset if index == source else 0
            for end, text in self._sources[index].chunks(start):
                ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                if ids:
                    yield _Chunk(index, start, end, torch.tensor(ids))
                start = end


def first_windows(tokenizer: Any, sources: Sequence[Source], tokens: int, context: int) -> list[Tensor]:
    """The first `tokens` tokens of the text in windows of `context`, ids `[n]` each; a window of one token is dropped.

    Raises:
        InputError: fewer than 2 tokens asked for, or in the text.
    """
    if tokens < 2:
        raise InputError("--tokens of at least 2", str(tokens), "raise it")
    stream = TextStream(tokenizer, sources, context)
    windows = []
    while tokens > 0:
        packed = stream.batch(1)[0]
        if stream.epoch:
            break
        window = packed.ids[packed.mask][:tokens]
        tokens -= len(window)
        windows.append(window)
    if len(windows[0]) < 2:
        raise InputError("calibration text of at least 2 tokens", f"{len(windows[0])}", "give more text")
    return [window for window in windows if len(window) > 1]


def _misplaced(position: dict[str, int]) -> InputError:
    return InputError("a position in this text", str(position), "resume with the text and tokenizer it was made with")
