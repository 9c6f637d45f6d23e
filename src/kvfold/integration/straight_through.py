"""A cache stand-in for training: every key and value of a pass is read as its codes say, gradients pass straight through.

For a key `k` (after RoPE, as the model hands it over) a layer returns

    k + stop_gradient(R(decode(encode(R^-1 k))) - k)

with `R` the rotation of its position, or nothing if the codec takes keys as they come (or `R` adds a rotated center); values
are the same without `R`.
That is the paper's protocol, window 0 and sinks 0, and the straight-through estimator it is finetuned with (A. Kumar, arXiv
2410.15704, section 3; Bengio et al., arXiv 1308.3432). `R` is affine, so it does not matter on which side of it the gradient
is passed on.

The rest of the model is stock, its attention too: run it inside `hooked(model, lambda: cache)` with `use_cache=True`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvfold import ops
from kvfold.codecs.artifact import CodecSet
from kvfold.codecs.base import Codec
from kvfold.codecs.residual import ResidualCodec
from kvfold.config import RopeSpec
from kvfold.integration.spec import decoder_layers
from kvfold.integration.stand_in import StandInCache, StandInLayer
from kvfold.packing import unpack_scale


class CodedSide:
    """Keys or values of one layer: their codec, which may be exchanged between passes, and what passes gathered.

    Attributes:
        codec: codes what comes next.
        counts, sums: `[M, C]` and `[M, C, d]` float32, how many group vectors chose each codeword since `forget`, and the sum
            of what they wanted from it (see `book_statistics`); None before the first pass and for methods without codebooks.
        error, power: float32 scalars since `forget`, summed squared error and summed square of the vectors.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.forget()

    def forget(self) -> None:
        """Start gathering anew."""
        self.counts: Tensor | None = None
        self.sums: Tensor | None = None
        self.error = self.power = torch.zeros(())

    @property
    def distortion(self) -> float:
        """Mean squared error over mean square of what was coded since `forget`."""
        return float(self.error) / max(float(self.power), 1e-30)

    def read(self, x: Tensor, rotation: ops.Rotation | None, gather: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`x [B, G, T, D]` as its codes say, rotated again, in `x`'s dtype; as decoded; and the scales `[B, G, T, 1]`."""
        x = x.detach()
        plain = self.codec.unplace(x.float(), rotation)
        whole = plain.shape[2] // self.codec.block * self.codec.block
        with torch.no_grad():
            codes = self.codec.encode(plain[:, :, :whole])
        decoded = self.codec.decode(codes)  # with a gradient towards the codebooks, if they are being trained
        decoded = torch.cat((decoded, plain[:, :, whole:]), 2) if whole < plain.shape[2] else decoded
        scale = torch.ones((), device=x.device)
        if isinstance(self.codec, ResidualCodec):
            scale = unpack_scale(codes.fields["scale"])
            scale = torch.where(scale > 0, scale, 1.0)
        if gather:
            self.error = self.error.to(x.device) + (plain - decoded).square().sum()
            self.power = self.power.to(x.device) + plain.square().sum()
            if isinstance(self.codec, ResidualCodec):
                vectors = self.codec.scaled_groups(plain)[0]
                found = book_statistics(vectors, self.codec.indices(codes), self.codec.codebooks, self.codec.book)
                self.counts = found[0] if self.counts is None else self.counts + found[0]
                self.sums = found[1] if self.sums is None else self.sums + found[1]
        seen = self.codec.place(decoded, rotation)
        return seen.to(x.dtype), decoded, scale


class StraightThroughLayer(StandInLayer):
    """Hands back coded keys and values with the gradient of exact ones; a layer that stays exact hands them on."""

    def __init__(self, cache: StraightThroughCache, key: Codec | None, value: Codec | None, rope: RopeSpec | None) -> None:
        super().__init__(cache, rope if key is not None and key.reads_positions else None)
        self._through = cache
        self.sides = [] if key is None or value is None else [CodedSide(key), CodedSide(value)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Post-RoPE keys and values `[B, G, Q, D]` of a whole sequence, read through the codec.

        Raises:
            InputError: NaN or Inf, or another shape than the codec's.
        """
        if not self.sides:
            return key_states, value_states
        key, value = self.sides
        rotation = self.rotation(slice(None), key_states.device)
        return self._read(key, key_states, rotation), self._read(value, value_states, None)

    def _read(self, side: CodedSide, x: Tensor, rotation: ops.Rotation | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # codes are those of float32, whatever the model runs in
            seen, decoded, scale = side.read(x, rotation, self._through.running and self._through.gathering)
        if self._through.with_commitment:
            plain = side.codec.unplace(x.float(), rotation)
            error = ((plain - decoded) / scale).square().mean()
            if self._through.running:
                self._through.commitments.append(error)
        return seen + (x - x.detach())  # exactly `seen`: the difference is zero


class StraightThroughCache(StandInCache):
    """Stands in for the cache in training passes; every pass is one whole sequence a row, without padding.

    Args:
        codecs: of any method, on the model's device.
        with_commitment: gather `commitments`.
        gathering: gather what `CodedSide` says; off, codebooks of the codecs may take gradients (`ResidualCodec.trainable`).

    Attributes:
        running: a pass is under way; a layer that is run again by gradient checkpointing gathers nothing.
        commitments: of the last pass, a scalar a coded layer and side: the mean squared error of the scaled vectors, with
            a gradient towards keys and values only (van den Oord et al., arXiv 1711.00937, eq. 3).
    """

    def __init__(self, codecs: CodecSet, with_commitment: bool = False, gathering: bool = True) -> None:
        self.with_commitment, self.gathering, self.running = with_commitment, gathering, False
        self.commitments: list[Tensor] = []
        self._codecs = codecs
        sides = enumerate(zip(codecs.keys, codecs.values, strict=True))
        super().__init__(layers=[StraightThroughLayer(self, key, value, codecs.spec.rope(i)) for i, (key, value) in sides])

    def begin(self, positions: Tensor, batch: int) -> None:
        super().begin(positions, batch)
        self.running, self.commitments = True, []

    def end(self, failed: bool) -> None:
        self.running = False

    def sides(self) -> Iterator[CodedSide]:
        """Keys then values of every coded layer, in order."""
        for layer in self._own_layers():
            yield from layer.sides

    def coded(self) -> tuple[tuple[Codec | None, ...], tuple[Codec | None, ...]]:
        """The codecs of keys and of values as they are now, None for layers that stay exact."""
        pairs: list[list[Codec | None]] = [
            [*(side.codec for side in layer.sides)] or [None, None] for layer in self._own_layers()
        ]
        return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)

    def distortion(self) -> list[list[float] | None]:
        """A pair (keys, values) a layer, as in `CodecSet.info`."""
        return [[side.distortion for side in layer.sides] or None for layer in self._own_layers()]

    def _own_layers(self) -> list[StraightThroughLayer]:
        layers: list[Any] = self.layers
        return layers


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Inside, decoder layers keep only their inputs and run again in the backward pass (Chen et al., arXiv 1604.06174).

    transformers' own gradient checkpointing takes the cache away from the layers, so it cannot be used here.
    """
    layers = list(decoder_layers(model).values())
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def book_statistics(vectors: Tensor, codes: Tensor, codebooks: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """How often each codeword was chosen, and the sum of the residuals that chose it, whatever the sharing of codebooks.

    Args:
        vectors: scaled, float32 `[B, G, T, P, d]`.
        codes: integers `[B, G, T, S, P]`.
        codebooks: `[M, C, d]`.
        book: integers `[S, G, P]`.

    Returns:
        float32 `[M, C]` and `[M, C, d]`, to be given to `EmaBooks.update`.
    """
    books, size, dim = codebooks.shape
    table = codebooks.float().view(-1, dim)
    counts = torch.zeros(books * size, device=vectors.device)
    sums = torch.zeros(books * size, dim, device=vectors.device)
    residual = vectors
    for stage in range(codes.shape[3]):
        rows = codes[:, :, :, stage].long() + book[stage][None, :, None] * size  # [B, G, T, P]
        counts += torch.bincount(rows.flatten(), minlength=books * size)
        sums.index_add_(0, rows.flatten(), residual.reshape(-1, dim))
        residual = residual - table[rows]
    return counts.view(books, size), sums.view(books, size, dim)
