"""Residual vector quantization of keys and values (A. Kumar, arXiv 2410.15704, section 3).

A head's vector is divided by its standard deviation over the channels, its channels are cut into groups of `group`
(strided for keys: group `p` takes channels p, p + P, p + 2P, ...; contiguous for values), and every group goes through
the same `stages` of `codebook_size` codewords, each stage coding what the stages before left over. Stored: `stages`
codes a group, packed, and one float16 scale a vector:

    bits per element = (stages * log2(codebook_size)) / group + 16 / D.

Keys are coded before RoPE by default. Differences from the paper: a vector of zeros is stored with scale 0, so it
decodes to exactly zero; codewords may be searched with a beam (`beam=1` is the paper's greedy search). Beyond the paper, each
off with the paper's settings:

- Codebooks of a head's own, and codewords in 8-bit floating point (e4m3).
- Keys after RoPE around a center: their mean before RoPE holds most of their energy, and turned to a key's position it is known
  without a bit. What is coded is the key minus the rotated mean.
- A scale of 8 bits (`packing.pack_scale`). It is rounded before vectors are divided by it, so rounding costs no accuracy.
- A search that weighs errors by what they do to the loss. With `M` the second moment of the loss's gradient by a group's
  channels, the expected divergence is `e' M e / 2` to second order (`M` is a block of the Fisher information). The codeword
  nearest under `M^a` is the one nearest in squared distance after a product with `W = M^(a/2)`; decoding does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kvfold import ops
from kvfold.codecs.base import NO_FACTS, Codec, Facts
from kvfold.codecs.kmeans import kmeans, nearest
from kvfold.codes import Codes
from kvfold.errors import InputError
from kvfold.ops.native import version
from kvfold.packing import packed_bytes, unpack

_GROUPINGS = ("strided", "contiguous")
_SHARINGS = ("layer", "head")
_DTYPES = {"float16": torch.float16, "float8": torch.float8_e4m3fn}
_DAMPING = 1e-3  # of the mean eigenvalue, added to all: directions without influence still count a little


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
        sharing: "layer" for codebooks that all heads share, "head" for each head's own; groups of a head always share.
        codebook_dtype: "float16", or "float8" (e4m3).
        scale_bits: of the stored scale, 16 or 8.
        center: keys after RoPE are coded around a center that is rotated to their position; not with `pre_rope`.
        weight_power: `a`, of the weights that errors have in the search; 0 for squared error.
        iterations: k-means iterations a stage.
        max_vectors: group vectors k-means sees at most, all heads together.
    """

    group: int = 32
    codebook_size: int = 256
    stages: int = 8
    beam: int = 1
    grouping: str = "contiguous"
    pre_rope: bool = False
    sharing: str = "layer"
    codebook_dtype: str = "float16"
    scale_bits: int = 16
    center: bool = False
    weight_power: float = 0.0
    iterations: int = 10
    max_vectors: int = 65536

    def __post_init__(self) -> None:
        for name in ("group", "stages", "beam", "iterations", "max_vectors"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of at least 1", str(getattr(self, name)), f"set {name} to a positive number")
        if not 2 <= self.codebook_size <= 65536:
            raise InputError("codebook_size from 2 to 65536", str(self.codebook_size), "choose one in that range")
        known: dict[str, tuple] = {
            "grouping": _GROUPINGS,
            "sharing": _SHARINGS,
            "codebook_dtype": tuple(_DTYPES),
            "scale_bits": (8, 16),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                listed = ", ".join(map(str, choices))
                raise InputError(f"{name} among {listed}", repr(getattr(self, name)), "choose one of these")
        if self.center and self.pre_rope:
            raise InputError("a center with keys after RoPE", "center=1 with keys before RoPE", "set rope=post or center=0")
        if not 0 <= self.weight_power <= 1:
            raise InputError("weight_power from 0 to 1", f"{self.weight_power:g}", "0.5 is the default of rvq")


class ResidualCodec(Codec):
    """Residual VQ of one side. `codebooks [M, C, d]` and `book [S, G, P]` exist once fitted or restored.

    `weights [G, P, d, d]` (float16) are what vectors and codewords are multiplied by for the search, None for squared error.
    """

    kind = "residual"
    settings_type: type[ResidualSettings] = ResidualSettings

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
        self.wants = frozenset({"sensitivity"} if settings.weight_power > 0 else ())
        self.bits = (settings.codebook_size - 1).bit_length()
        groups = head_dim // settings.group
        order = torch.arange(head_dim)
        strided = settings.grouping == "strided"
        self.channels = order.view(settings.group, groups).T.contiguous() if strided else order.view(groups, settings.group)
        self.codebooks = torch.empty(0, settings.codebook_size, settings.group, dtype=_DTYPES[settings.codebook_dtype])
        self.book = torch.empty(settings.stages, 0, groups, dtype=torch.int64)
        self.weights: Tensor | None = None
        self._coder: tuple[Tensor, int, ops.Coder] | None = None

    @property
    def centers(self) -> bool:
        return self._settings.center

    @property
    def groups(self) -> int:
        return self.channels.shape[0]

    @property
    def bits_per_element(self) -> float:
        return self.bits_at(0)

    def bits_at(self, level: int) -> float:
        codes = packed_bytes((self._settings.stages - level) * self.groups, self.bits)
        return (8 * codes + self._settings.scale_bits) / self.head_dim

    @property
    def fit_steps(self) -> int:
        return self._settings.stages

    def fit(
        self,
        x: Tensor,
        generator: torch.Generator,
        progress: Callable[[], None] = lambda: None,
        facts: Facts = NO_FACTS,
    ) -> None:
        settings, heads = self._settings, x.shape[0]
        if settings.center:
            assert facts.place is not None
            self.center = x.mean(1)
            x = facts.place(x - self.center[:, None])
        blocks = None if facts.sensitivity is None or not self.wants else self._blocks(facts.sensitivity)
        self.weights = None if blocks is None else _power(blocks, settings.weight_power / 2).half()
        vectors = self.scaled_groups(x)[0]  # [G, N, P, d]
        sets = [[head] for head in range(heads)] if settings.sharing == "head" else [list(range(heads))]
        rows, maps = [], []  # of each codebook's vectors: weighted, and the weights' matrix with its inverse
        for chosen in sets:
            own = _sample(vectors[chosen].reshape(-1, settings.group), settings.max_vectors // len(sets), generator)
            if blocks is not None:  # heads and groups of one codebook meet in their mean
                mean = blocks[chosen].mean((0, 1))
                maps.append((_power(mean, settings.weight_power / 2), _power(mean, -settings.weight_power / 2)))
                own = own @ maps[-1][0]
            rows.append(own)
        tables = []
        for _ in range(settings.stages):
            for index, own in enumerate(rows):
                table = kmeans(own, settings.codebook_size, generator, settings.iterations)
                stored = self._stored(table @ maps[index][1] if maps else table)
                table = stored.float() @ maps[index][0] if maps else stored.float()
                rows[index] = own - table[nearest(own, table)]
                tables.append(stored)
            progress()
        of_head = torch.arange(heads) if len(sets) > 1 else torch.zeros(heads, dtype=torch.int64)
        book = torch.arange(settings.stages)[:, None, None] * len(sets) + of_head[:, None]
        self.codebooks = torch.stack(tables)
        self.book = book.expand(-1, -1, self.groups).contiguous()

    def _encode(self, x: Tensor) -> Codes:
        self._require_heads(x.shape[1])
        packed, scale = ops.code(x, *self.coder)
        return Codes({"codes": packed, "scale": scale})

    @property
    def coder(self) -> ops.Coder:
        books, now = self.codebooks, version(self.codebooks)
        if self._coder is None or self._coder[0] is not books or self._coder[1] != now:
            settings, weights = self._settings, None if self.weights is None else self.weights.float()
            codebooks, book = self._search(weights)
            beam, scale_bits = settings.beam, settings.scale_bits
            self._coder = books, now, ops.Coder(codebooks, book, self.channels, weights, self.bits, beam, scale_bits)
        return self._coder[2]

    def _search_codes(self, vectors: Tensor) -> Tensor:
        """Codes int32 `[B, G, T, S, P]` of scaled vectors `[B, G, T, P, d]`."""
        coder = self.coder
        if coder.weights is not None:
            vectors = torch.einsum("bgtpd,gpde->bgtpe", vectors, coder.weights)
        return ops.encode(vectors, coder.codebooks, coder.book, coder.beam)

    def _search(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codebooks and book of the search: with weights, every (stage, head, group) has its own, `codewords @ weights`."""
        if weights is None:
            return self.codebooks, self.book
        codewords = self.codebooks.detach().float()[self.book]  # [S, G, P, C, d]
        own = torch.arange(self.book.numel(), device=self.book.device).view(self.book.shape)
        return (codewords @ weights).flatten(0, 2).half(), own

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
        return ops.Coded(fields["codes"], fields["scale"], self.codebooks, self.book, self.channels, self.bits, self.center)

    def scaled_groups(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the codebooks see of `x [..., D]`: float32 group vectors `[..., P, d]`, and the scales `[..., 1]` as stored."""
        return ops.scaled_groups(x, self.channels, self._settings.scale_bits)

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
        stage = torch.arange(len(tables), device=tables.device)
        made.codebooks, made.book = self._stored(tables), stage[:, None, None].expand(-1, heads, self.groups).contiguous()
        return made

    def with_codebooks(self, codebooks: Tensor) -> Self:
        """The same codec with other codewords `[M, C, d]`, rounded to its dtype."""
        return self._with_tensors({**self.tensors(), "codebooks": self._stored(codebooks)})

    def trainable(self) -> Self:
        """The same codec with codebooks in float32 that take gradients: `decode` passes them on."""
        return self._with_tensors({**self.tensors(), "codebooks": self.codebooks.float().requires_grad_()})

    def with_beam(self, beam: int) -> Self:
        """The same codebooks, encoded with another beam."""
        return self._with_tensors(self.tensors(), beam=beam)

    def with_stages(self, stages: int) -> Self:
        """The first `stages` stages; their greedy codes are a prefix of the whole codec's.

        Raises:
            InputError: fewer than 1, or more than there are.
        """
        if not 1 <= stages <= self._settings.stages:
            raise InputError(f"1 to {self._settings.stages} stages", str(stages), "choose a number in that range")
        return self._with_tensors({**self.tensors(), **self._used(self.book[:stages])}, stages=stages)

    def for_heads(self, start: int, stop: int) -> Self:
        own = {name: tensor[start:stop] for name, tensor in self.tensors().items() if name in ("weights", "center")}
        return self._with_tensors({**own, **self._used(self.book[:, start:stop])})

    def _used(self, book: Tensor) -> dict[str, Tensor]:
        """The codebooks that `book` names, without the others, and `book` for these."""
        used = torch.unique(book)  # sorted
        tables = self._stored(self.codebooks.float()[used])
        return {"codebooks": tables, "book": torch.searchsorted(used, book.contiguous())}

    @property
    def levels(self) -> int:
        return self._settings.stages // 2

    def lower(self, codes: Codes, level: int) -> Codes:
        bytes_left = packed_bytes((self._settings.stages - level) * self.groups, self.bits)
        return Codes({**codes.fields, "codes": codes.fields["codes"][..., :bytes_left]})  # the last byte may hold a few more

    def at_level(self, level: int) -> Self:
        return self.with_stages(self._settings.stages - level)

    def _with_tensors(self, tensors: dict[str, Tensor], **settings: Any) -> Self:
        return type(self).restore(self.head_dim, {**self.settings(), **settings}, tensors)

    def settings(self) -> dict[str, Any]:
        return asdict(self._settings)

    def tensors(self) -> dict[str, Tensor]:
        optional = {"weights": self.weights, "center": self.center}
        return {"codebooks": self.codebooks, "book": self.book, **{k: t for k, t in optional.items() if t is not None}}

    @property
    def codebook_bytes(self) -> int:
        tables = (self.codebooks, self.weights, self.center)
        return sum(t.numel() * t.element_size() for t in tables if t is not None)

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        codec = cls(head_dim, cls.settings_type(**settings))
        codebooks, book = tensors["codebooks"], tensors["book"]
        wanted = (codec.codebooks.shape[1:], (codec.book.shape[0], codec.book.shape[2]))
        came = (codebooks.shape[1:], (book.shape[0], book.shape[2]) if book.ndim == 3 else tuple(book.shape))
        if wanted != came or (book.numel() and not 0 <= int(book.min()) <= int(book.max()) < len(codebooks)):
            raise InputError(
                f"codebooks [M, {tuple(wanted[0])}] and book {wanted[1]}",
                f"{came}",
                "the codec file is damaged: calibrate again",
            )
        codec.weights, codec.center = tensors.get("weights"), tensors.get("center")
        due = (book.shape[1], head_dim) if codec.centers and book.numel() else None
        found_center = None if codec.center is None else tuple(codec.center.shape)
        if due != found_center:
            raise InputError(f"center {due}", f"{found_center}", "the codec file is damaged: calibrate again")
        shape = (book.shape[1], book.shape[2], codebooks.shape[2], codebooks.shape[2])
        if codec.weights is not None and codec.weights.shape != shape:
            found = str(tuple(codec.weights.shape))
            raise InputError(f"weights {shape}", found, "the codec file is damaged: calibrate again")
        codec.codebooks, codec.book = codebooks, book
        codec.channels = codec.channels.to(codebooks.device)
        return codec

    def _stored(self, tables: Tensor) -> Tensor:
        """`tables` in the dtype of this codec's codebooks."""
        dtype = _DTYPES[self._settings.codebook_dtype]
        reach = torch.finfo(dtype).max
        return tables.clamp(-reach, reach).to(dtype)

    def _blocks(self, sensitivity: Tensor) -> Tensor:
        """`sensitivity [G, D, D]` within the groups, `[G, P, d, d]`, each with a mean eigenvalue of 1."""
        blocks = torch.stack([sensitivity[:, c][:, :, c] for c in self.channels.cpu()], 1).double()
        mean = blocks.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        unit = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
        return torch.where(mean > 0, blocks / mean.clamp_min(1e-300), unit) + _DAMPING * unit

    def _require_heads(self, heads: int) -> None:
        if self.book.shape[1] != heads:
            fitted = self.book.shape[1]
            if not fitted:
                raise InputError("a fitted codec", "one without codebooks", "call fit, or kvfold.calibrate, first")
            raise InputError(f"{fitted} KV heads", f"{heads}", "use the codec with the model it was calibrated for")


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """`matrix [..., d, d]`, symmetric and positive, to a power; float32."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return ((vectors * values.clamp_min(1e-12)[..., None, :] ** exponent) @ vectors.mT).float()


def _sample(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:count].sort().values]
