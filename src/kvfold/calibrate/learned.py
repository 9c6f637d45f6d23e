"""One quantizer, the keys' or the values' of a layer, while its codebooks are learned from what passes."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.codecs import Codec
from kvfold.codecs.ema import EmaBooks
from kvfold.codecs.residual import ResidualCodec
from kvfold.errors import InputError

_CANDIDATES = 4096  # vectors of a step that dead codewords may move to


class LearnedSide:
    """One quantizer while it is learned: how it scales vectors, its codebooks, the statistics of the step so far.

    Args:
        name: prefix of its tensors in a checkpoint.
        codec: unfitted; how vectors are scaled, and the shape of its codebooks.
        decay, eps: see `EmaBooks`.
        reseed: a codeword used less than this share of the mean use is dead; 0: none ever is.

    Raises:
        InputError: a codec of another method than residual VQ, or decay or eps out of range.
    """

    _rows: Tensor | None

    def __init__(self, name: str, codec: Codec, decay: float, eps: float, reseed: float) -> None:
        if not isinstance(codec, ResidualCodec) or codec.kind != ResidualCodec.kind:
            raise InputError("a residual method for --ema-steps", f"one of kind {codec.kind!r}", "choose rvq or rvq-paper")
        if codec.settings()["sharing"] != "layer":
            fix = "choose --codec rvq-paper, or --set sharing=layer"
            raise InputError("codebooks that heads share, for --ema-steps", f"sharing={codec.settings()['sharing']}", fix)
        shape = [codec.settings()[setting] for setting in ("stages", "codebook_size", "group")]
        self.name, self.codec, self._reseed = name, codec, reseed
        self.books = EmaBooks(torch.zeros(shape), decay, eps)
        self.forget()

    @property
    def statistics(self) -> list[Tensor]:
        """What is summed over processes: counts `[S, C]`, sums `[S, C, d]`, squared error."""
        return [self._counts, self._sums, self._error]

    def start(self, codec: Codec | None) -> None:
        """Codebooks of a fitted codec."""
        assert isinstance(codec, ResidualCodec)
        self.books = EmaBooks(codec.stage_tables(), self.books.decay, self.books.eps)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Codebooks of a checkpoint."""
        self.books.restore({name: tensors[key] for name in self.books.state() if (key := f"{self.name}.{name}") in tensors})

    def add(self, x: Tensor) -> None:
        """Code vectors `[G, n, D]` as they pass, and gather what `update` needs."""
        if self.books.tables.device != x.device:
            self.books.to(x.device)
            self.codec = self.codec.to(x.device)
            self.forget()
        rows = self.codec.scaled_groups(x)[0].flatten(0, -2)
        _, counts, sums, error = self.books.statistics(rows)
        self._counts += counts
        self._sums += sums
        self._error += error
        if self._reseed and self._rows is None:
            self._rows = rows[:: -(-len(rows) // _CANDIDATES)].clone()

    def update(self) -> float:
        """Move the codebooks; returns the mean squared error of the step's scaled vectors, under the old ones."""
        mean = float(self._error) / (float(self._counts[0].sum()) * self._sums.shape[-1])
        self.books.update(self._counts, self._sums)
        return mean

    def reseed(self, generator: torch.Generator) -> int:
        """Move codewords that are hardly used to vectors of this step; returns how many."""
        assert self._rows is not None
        return self.books.reseed(self._rows, generator, self._reseed * float(self.books.counts.mean()))

    def forget(self) -> None:
        """Start the statistics of a step."""
        tables = self.books.tables
        self._counts = torch.zeros_like(tables[..., 0])
        self._sums = torch.zeros_like(tables)
        self._error = torch.zeros((), device=tables.device)
        self._rows = None

    def finished(self, heads: int) -> ResidualCodec:
        """The codec with the codebooks learned so far, on the CPU."""
        return self.codec.to(torch.device("cpu")).with_tables(self.books.tables.cpu(), heads)
