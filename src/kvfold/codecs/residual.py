"""Residual vector quantization of keys and values (A. Kumar, arXiv 2410.15704, section 3).

A head's vector is divided by its standard deviation over the channels, its channels are cut into groups of `group`
(strided for keys: group `p` takes channels p, p + P, p + 2P, ...; contiguous for values), and every group goes through
the same `stages` of `codebook_size` codewords, each stage coding what the stages before left over. Stored: `stages`
codes a group, packed, and one float16 scale a vector:

    bits per element = (stages * log2(codebook_size)) / group + 16 / D.

Keys are coded before RoPE by default. Differences from the paper: a vector of zeros is stored with scale 0, so it
decodes to exactly zero; codewords may be searched with a beam (`beam=1` is the paper's greedy search).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kvfold import ops
from kvfold.codecs.base import Codec
from kvfold.codecs.kmeans import kmeans
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.ops.encode.naive import nearest
from kvfold.packing import pack, packed_bytes, unpack

_GROUPINGS = ("strided", "contiguous")
_CONSTANT = 1024  # a vector so many times larger than its spread would leave float16 if divided by it


@dataclass(frozen=True)
class ResidualSettings:
    """Settings of one side (keys or values).

    Attributes:
        group: channels coded together, `d`; divides the head dim.
        codebook_size: codewords a stage, `C`, 2 to 65536.
        stages: stages of residual quantization, `S`.
        beam: partial codes kept while encoding; 1 is greedy.
        grouping: "strided" or "contiguous" channels in a group.
        pre_rope: keys are coded before RoPE.
        iterations: k-means iterations a stage.
        max_vectors: group vectors k-means sees at most.
    """

    group: int = 32
    codebook_size: int = 256
    stages: int = 8
    beam: int = 1
    grouping: str = "contiguous"
    pre_rope: bool = False
    iterations: int = 10
    max_vectors: int = 65536

    def __post_init__(self) -> None:
        for name in ("group", "stages", "beam", "iterations", "max_vectors"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of at least 1", str(getattr(self, name)), f"set {name} to a positive number")
        if not 2 <= self.codebook_size <= 65536:
            raise InputError("codebook_size from 2 to 65536", str(self.codebook_size), "choose one in that range")
        if self.grouping not in _GROUPINGS:
            raise InputError(f"grouping among {', '.join(_GROUPINGS)}", repr(self.grouping), "choose one of these")


class ResidualCodec(Codec):
    """Residual VQ of one side. `codebooks [M, C, d]` (float16) and `book [S, G, P]` exist once fitted or restored."""

    kind = "residual"

    def __init__(self, head_dim: int, settings: ResidualSettings) -> None:
        super().__init__(head_dim)
        if head_dim % settings.group:
            divisors = [d for d in (4, 8, 16, 32, 64) if head_dim % d == 0]
            raise InputError(
                f"a group that divides the head dim {head_dim}",
                f"group={settings.group}",
                f"set group to one of {', '.join(map(str, divisors)) or head_dim}",
            )
        self._settings = settings
        self.pre_rope = settings.pre_rope
        self.bits = (settings.codebook_size - 1).bit_length()
        groups = head_dim // settings.group
        order = torch.arange(head_dim)
        strided = settings.grouping == "strided"
        self.channels = order.view(settings.group, groups).T.contiguous() if strided else order.view(groups, settings.group)
        self.codebooks = torch.empty(0, settings.codebook_size, settings.group, dtype=torch.float16)
        self.book = torch.empty(settings.stages, 0, groups, dtype=torch.int64)

    @property
    def groups(self) -> int:
        return self.channels.shape[0]

    @property
    def bits_per_element(self) -> float:
        codes = packed_bytes(self._settings.stages * self.groups, self.bits)
        return (8 * codes + 16) / self.head_dim

    @property
    def fit_steps(self) -> int:
        return self._settings.stages

    def fit(self, x: Tensor, generator: torch.Generator, progress: Callable[[], None] = lambda: None) -> None:
        settings = self._settings
        heads = x.shape[0]
        rows = self.scaled_groups(x)[0].reshape(-1, settings.group)
        if len(rows) > settings.max_vectors:
            rows = rows[torch.randperm(len(rows), generator=generator)[: settings.max_vectors].sort().values]
        tables = []
        for _ in range(settings.stages):
            table = kmeans(rows, settings.codebook_size, generator, settings.iterations).half()
            table_rows = table.float()
            rows = rows - table_rows[nearest(rows, table_rows)]
            tables.append(table)
            progress()
        self._share(torch.stack(tables), heads)

    def _encode(self, x: Tensor) -> Codes:
        self._require_heads(x.shape[1])
        vectors, scale = self.scaled_groups(x)
        codes = ops.encode(vectors, self.codebooks, self.book, self._settings.beam)
        return Codes({"codes": pack(codes.flatten(-2), self.bits), "scale": scale})

    def decode(self, codes: Codes) -> Tensor:
        coded = self.coded(codes)
        return ops.decode_tile(coded, 0, codes.tokens)

    def indices(self, codes: Codes) -> Tensor:
        """The integers themselves, int32 `[B, G, T, S, P]`."""
        stages = self._settings.stages
        return unpack(codes.fields["codes"], self.bits, stages * self.groups).unflatten(-1, (stages, self.groups))

    def coded(self, codes: Codes) -> ops.Coded:
        fields = codes.fields
        self._require_heads(fields["codes"].shape[1])
        return ops.Coded(fields["codes"], fields["scale"], self.codebooks, self.book, self.channels, self.bits)

    def scaled_groups(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the codebooks see of `x [..., D]`: float32 group vectors `[..., P, d]`, and the float16 scales `[..., 1]`."""
        x = x.float()
        scale = self._scale(x)
        return (x / _divisor(scale))[..., self.channels], scale

    def stage_tables(self) -> Tensor:
        """Codebooks by stage, float32 `[S, C, d]`.

        Raises:
            InputError: heads or groups have codebooks of their own.
        """
        first = self.book[:, :1, :1]
        if not self.book.numel() or bool((self.book != first).any()):
            raise InputError("codebooks that all heads and groups share", "a codec with other ones", "choose another codec")
        return self.codebooks[first.flatten()].float()

    def with_tables(self, tables: Tensor, heads: int) -> Self:
        """The same settings with codebooks `[S, C, d]`, one a stage, shared by all of `heads` KV heads and groups."""
        made = type(self)(self.head_dim, self._settings)
        made.channels = made.channels.to(tables.device)
        made._share(tables.half(), heads)
        return made

    def _share(self, codebooks: Tensor, heads: int) -> None:
        stage = torch.arange(len(codebooks), device=codebooks.device)
        self.codebooks, self.book = codebooks, stage[:, None, None].expand(-1, heads, self.groups).contiguous()

    def with_beam(self, beam: int) -> Self:
        """The same codebooks, encoded with another beam."""
        return type(self).restore(self.head_dim, {**self.settings(), "beam": beam}, self.tensors())

    def with_stages(self, stages: int) -> Self:
        """The first `stages` stages; their greedy codes are a prefix of the whole codec's.

        Raises:
            InputError: fewer than 1, or more than there are.
        """
        if not 1 <= stages <= self._settings.stages:
            raise InputError(f"1 to {self._settings.stages} stages", str(stages), "choose a number in that range")
        book = self.book[:stages]
        used = torch.unique(book)  # sorted; codebooks of dropped stages are dropped
        tensors = {"codebooks": self.codebooks[used], "book": torch.searchsorted(used, book)}
        return type(self).restore(self.head_dim, {**self.settings(), "stages": stages}, tensors)

    def settings(self) -> dict[str, Any]:
        return asdict(self._settings)

    def tensors(self) -> dict[str, Tensor]:
        return {"codebooks": self.codebooks, "book": self.book}

    @property
    def codebook_bytes(self) -> int:
        return self.codebooks.numel() * self.codebooks.element_size()

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        codec = cls(head_dim, ResidualSettings(**settings))
        codebooks, book = tensors["codebooks"], tensors["book"]
        wanted = (codec.codebooks.shape[1:], (codec.book.shape[0], codec.book.shape[2]))
        came = (codebooks.shape[1:], (book.shape[0], book.shape[2]) if book.ndim == 3 else tuple(book.shape))
        if wanted != came or (book.numel() and not 0 <= int(book.min()) <= int(book.max()) < len(codebooks)):
            raise InputError(
                f"codebooks [M, {tuple(wanted[0])}] and book {wanted[1]}",
                f"{came}",
                "the codec file is damaged: calibrate again",
            )
        codec.codebooks, codec.book = codebooks, book
        codec.channels = codec.channels.to(codebooks.device)
        return codec

    def _scale(self, x: Tensor) -> Tensor:
        """Standard deviation over the channels (N - 1 in the divisor, as the paper's code), float16 `[..., 1]`.

        The largest magnitude for a vector that is constant but for rounding, 0 for one of zeros.
        """
        spread, peak = x.std(-1, keepdim=True), x.abs().amax(-1, keepdim=True)
        scale = torch.where(spread * _CONSTANT < peak, peak, spread)
        return scale.clamp_max(torch.finfo(torch.float16).max).half()

    def _require_heads(self, heads: int) -> None:
        if self.book.shape[1] != heads:
            fitted = self.book.shape[1]
            if not fitted:
                raise InputError("a fitted codec", "one without codebooks", "call fit, or kvfold.calibrate, first")
            raise InputError(f"{fitted} KV heads", f"{heads}", "use the codec with the model it was calibrated for")


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale)).float()
