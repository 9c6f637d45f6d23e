"""The interface of a method: fit, encode, decode, and how many bits it stores. One method is one file beside this one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from kvfold import ops
from kvfold.codes import Codes
from kvfold.errors import InputError, non_finite

Side = Literal["key", "value"]


@dataclass(frozen=True)
class Facts:
    """What `fit` may know of the model beside samples. Each is None unless the codec asks for it by name (`Codec.wants`).

    Attributes:
        sensitivity: float32 `[G, D, D]`, second moment of the loss's gradient by such vectors.
        projection: float32 `[G, D, N]`, the weights that make the vectors from the layer's input of `N` channels (a bias is
            the last, whose input is 1).
        demand: float32 `[G, D, D]`, what weighs an error `e` as `e' demand e`: the second moment of the queries that meet a
            key head, or the Gram matrix of the output projection of the query heads that a value head serves.
        place: rotates keys `[G, N, D]` before RoPE, of the samples' tokens, to their positions. Given to codecs with
            `centers`, whose samples are keys before RoPE.
    """

    sensitivity: Tensor | None = None
    projection: Tensor | None = None
    demand: Tensor | None = None
    place: Callable[[Tensor], Tensor] | None = None


NO_FACTS = Facts()


class Codec(ABC):
    """Codec of one layer's keys or values. Immutable once fitted; shared by every cache that uses it.

    A subclass sets `kind` (its name in codecs.json), and where it differs:

    Attributes:
        pre_rope: keys are handed over before RoPE.
        block: tokens that are coded together. `encode` takes a multiple of them and `Codes` are cut at multiples only. What a
            block has in common is striped over its tokens (`codes.stripe`). Keys of blocks are coded after RoPE.
        wants: names of the `Facts` that `fit` asks for.
        center: float32 `[G, D]`, a key before RoPE that keys after RoPE are coded around once it is rotated to their
            position; None if there is none.
    """

    kind: ClassVar[str]
    pre_rope: bool = False
    block: int = 1
    wants: frozenset[str] = frozenset()
    center: Tensor | None = None

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim

    def encode(self, x: Tensor) -> Codes:
        """Codes of `x [B, G, T, D]`.

        Raises:
            InputError: NaN or Inf in `x` (not asked for on a GPU, which would have to be waited for: the cache asks once a
                pass), another head dim than the codec's, or tokens that fill no whole number of blocks.
        """
        if x.shape[-1] != self.head_dim:
            raise InputError(f"head dim {self.head_dim}", f"{x.shape[-1]}", "use the codec with the model it was made for")
        if x.shape[2] % self.block:
            raise InputError(f"a multiple of {self.block} tokens", f"{x.shape[2]}", "keep the others until their block is full")
        if not x.is_cuda and not finite(x):
            raise non_finite()
        return self._encode(x.float())

    @abstractmethod
    def _encode(self, x: Tensor) -> Codes: ...

    @property
    def centers(self) -> bool:
        """Whether a fitted codec of these settings has a `center`."""
        return False

    @property
    def reads_positions(self) -> bool:
        """Whether positions are needed to code keys and to read them."""
        return self.pre_rope or self.centers

    def unplace(self, keys: Tensor, rotation: ops.Rotation | None) -> Tensor:
        """What is coded of keys `[B, G, T, D]` as attention takes them; `rotation` is None for those that need no
        positions, and in a model without RoPE."""
        if self.center is None:
            return keys if rotation is None else ops.unrotate(keys, *rotation)
        return keys - (self.center[:, None] if rotation is None else ops.rotated_center(self.center, rotation))

    def place(self, decoded: Tensor, rotation: ops.Rotation | None) -> Tensor:
        """Inverse of `unplace`."""
        if self.center is None:
            return decoded if rotation is None else ops.rotate(decoded, *rotation)
        return decoded + (self.center[:, None] if rotation is None else ops.rotated_center(self.center, rotation))

    def decode(self, codes: Codes) -> Tensor:
        """Vectors `[B, G, T, D]`, float32."""
        latent, basis = self.latent(codes), self.basis
        return latent if basis is None else latent @ basis.to(latent.device)

    def latent(self, codes: Codes) -> Tensor:
        """Float32 `[B, G, T, L]` with `decode(codes) = latent(codes) @ basis`; a subclass has this or `decode`.

        Attention reads what is cheap to make and moves the product to the query's side, once a query and not once a key.
        """
        raise NotImplementedError

    @property
    def basis(self) -> Tensor | None:
        """Float32 `[L, D]`, or `[G, L, D]` for heads of their own; None if `decode` is not a product."""
        return None

    @property
    @abstractmethod
    def bits_per_element(self) -> float:
        """Bits stored per channel of a vector, side information included, codebooks not."""

    def fit(
        self,
        x: Tensor,
        generator: torch.Generator,
        progress: Callable[[], None] = lambda: None,
        facts: Facts = NO_FACTS,
    ) -> None:
        """Learn from samples `x [G, N, D]` (and `facts`); `progress` is called `fit_steps` times. Here: nothing is learned.

        Raises:
            InputError: too few samples.
        """
        progress()

    @property
    def learns(self) -> bool:
        """Whether `fit` learns from samples."""
        return type(self).fit is not Codec.fit

    @property
    def fit_steps(self) -> int:
        """How often `fit` calls `progress`."""
        return 1

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON-able arguments that rebuild the codec together with `tensors`."""

    def tensors(self) -> dict[str, Tensor]:
        """What was learned: name -> contiguous tensor."""
        return {}

    @classmethod
    @abstractmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Inverse of `settings` and `tensors`."""

    def to(self, device: torch.device) -> Self:
        """The codec with its tensors on `device`."""
        return type(self).restore(self.head_dim, self.settings(), {k: v.to(device) for k, v in self.tensors().items()})

    def for_heads(self, start: int, stop: int) -> Self:
        """The codec of KV heads `start..stop-1` alone, for a process that holds only these.

        Raises:
            InputError: what was learned cannot be told apart by heads.
        """
        if self.tensors():
            fix = "run in one process, or serve with rvq"
            raise InputError("a codec that can be split by heads", self.kind, fix)
        return self

    def coded(self, codes: Codes) -> ops.Coded | None:
        """The codes as operands of the fused `ops.attend`, or None if the method has no fused op."""
        return None

    @property
    def coder(self) -> ops.Coder | None:
        """What `encode` is to the fused `ops.code_pages`, or None if the method has no fused op."""
        return None

    @property
    def codebook_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def levels(self) -> int:
        """How often `lower` may drop what describes a vector last; 0 for a method whose codes cannot be cut."""
        return 0

    def bits_at(self, level: int) -> float:
        """`bits_per_element` of codes lowered to `level`."""
        return self.at_level(level).bits_per_element if level else self.bits_per_element

    def lower(self, codes: Codes, level: int) -> Codes:
        """`codes` of this codec, or of a lower level than `level`, cut to `level`; `at_level(level)` reads them."""
        raise NotImplementedError

    def at_level(self, level: int) -> Codec:
        """The codec of codes that were lowered to `level`, 1 to `levels`."""
        raise NotImplementedError

    def distortion(self, x: Tensor) -> float:
        """Mean squared error over mean square of `x [G, N, D]`, whole blocks only; 0 if there is none."""
        x = x[None, :, : x.shape[1] // self.block * self.block].float()
        if not x.numel():
            return 0.0
        return float((self.decode(self.encode(x)) - x).square().mean() / x.square().mean().clamp_min(1e-30))

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # a copied cache shares its codecs


def finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or Inf. Sums tell it sooner, unless they overflow."""
    if math.isfinite(sum(tensor.detach().sum().item() for tensor in tensors)):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


class Reader:
    """Coded keys and values of a layer, and attention over them: fused where both methods can, else decoded tile by tile.

    `rotation` is None unless the key codec reads positions.
    """

    def __init__(self, keys: tuple[Codec, Codes], values: tuple[Codec, Codes], rotation: ops.Rotation | None) -> None:
        self._keys, self._values, self._rotation = keys, values, rotation
        key, value = keys[0].coded(keys[1]), values[0].coded(values[1])
        self._past = None
        if key is not None and value is not None:
            if key.center is not None and rotation is None:  # a model without RoPE: the center stands still
                device = key.packed.device
                positions = torch.zeros(1, keys[1].tokens, dtype=torch.int64, device=device)
                rotation = ops.Rotation(positions, torch.empty(0, device=device), 1.0, False)
            self._past = ops.Past(key, value, rotation)

    def attend(
        self,
        query: Tensor,
        mask: ops.Mask | None,
        softmax_scale: float,
        softcap: float | None,
        exact: ops.Exact | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(out, lse)`; arguments as in `ops.attend_both`."""
        if self._past is not None:
            return ops.attend_both(query, self._past, mask, exact, softmax_scale, softcap)
        coded = self._attend_tiles(query, mask, softmax_scale, softcap)
        return coded if exact is None else ops.merge([coded, ops.attend_exact(query, *exact, softmax_scale, softcap)])

    def _attend_tiles(
        self, query: Tensor, mask: ops.Mask | None, softmax_scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        (key_codec, key_codes), (value_codec, value_codes), rotation = self._keys, self._values, self._rotation
        key_basis = key_codec.basis if rotation is None else None  # keys that are rotated when read are needed as they are
        value_basis = value_codec.basis
        if key_basis is not None:
            query = _by_head(query.float(), key_basis.mT.to(query.device))

        def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
            chosen = key_codes.slice(start, stop)
            k = key_codec.decode(chosen) if key_basis is None else key_codec.latent(chosen)
            k = key_codec.place(k, None if rotation is None else rotation.slice(start, stop))
            chosen = value_codes.slice(start, stop)
            return k, value_codec.decode(chosen) if value_basis is None else value_codec.latent(chosen)

        block = math.lcm(key_codec.block, value_codec.block)
        out, lse = ops.attend_tiles(query, read, key_codes.tokens, mask, softmax_scale, softcap, block)
        return out if value_basis is None else _by_head(out, value_basis.to(out.device)), lse


def _by_head(x: Tensor, matrix: Tensor) -> Tensor:
    """`x [B, H, Q, N] @ matrix`, which is `[N, M]`, or `[G, N, M]` with `H / G` consecutive heads sharing one."""
    if matrix.ndim == 2:
        return x @ matrix
    return (x.unflatten(1, (len(matrix), -1)) @ matrix[:, None]).flatten(1, 2)
