"""The interface of a method: fit, encode, decode, and how many bits it stores. One method is one file beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from kvfold import ops
from kvfold.codes import Codes
from kvfold.errors import InputError

Side = Literal["key", "value"]


class Codec(ABC):
    """Codec of one layer's keys or values. Immutable once fitted; shared by every cache that uses it.

    A subclass sets `kind` (its name in codecs.json) and `pre_rope` (True: keys are handed over before RoPE).
    """

    kind: ClassVar[str]
    pre_rope: bool = False

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim

    def encode(self, x: Tensor) -> Codes:
        """Codes of `x [B, G, T, D]`.

        Raises:
            InputError: NaN or Inf in `x`, or another head dim than the codec's.
        """
        if x.shape[-1] != self.head_dim:
            raise InputError(f"head dim {self.head_dim}", f"{x.shape[-1]}", "use the codec with the model it was made for")
        if not bool(torch.isfinite(x).all()):
            raise non_finite()
        return self._encode(x.float())

    @abstractmethod
    def _encode(self, x: Tensor) -> Codes: ...

    @abstractmethod
    def decode(self, codes: Codes) -> Tensor:
        """Vectors `[B, G, T, D]`, float32."""

    @property
    @abstractmethod
    def bits_per_element(self) -> float:
        """Bits stored per channel of a vector, side information included, codebooks not."""

    @abstractmethod
    def fit(
        self,
        x: Tensor,
        generator: torch.Generator,
        progress: Callable[[], None] = lambda: None,
        sensitivity: Tensor | None = None,
    ) -> None:
        """Learn from samples `x [G, N, D]`; `progress` is called `fit_steps` times.

        `sensitivity [G, D, D]` is the second moment of the loss's gradient by such vectors, given if `uses_sensitivity`.

        Raises:
            InputError: too few samples.
        """

    @property
    def uses_sensitivity(self) -> bool:
        """Whether `fit` wants to know which errors the loss feels."""
        return False

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

    def coded(self, codes: Codes) -> ops.Coded | None:
        """The codes as operands of the fused `ops.attend`, or None if the method has no fused op."""
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
        """Mean squared error over mean square of `x [G, N, D]`."""
        x = x[None].float()
        return float((self.decode(self.encode(x)) - x).square().mean() / x.square().mean().clamp_min(1e-30))

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # a copied cache shares its codecs


def non_finite() -> InputError:
    """The error that keys or values with NaN or Inf are refused with."""
    return InputError(
        "finite keys and values", "NaN or Inf", "check the model's weights and dtype (float16 overflows: try bfloat16)"
    )


def attend(
    query: Tensor,
    keys: tuple[Codec, Codes],
    values: tuple[Codec, Codes],
    rotation: ops.Rotation | None,
    mask: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention over coded keys and values, `(out, lse)`: fused where both methods can, else decoded tile by tile.

    Arguments as in `ops.attend`; `rotation` must be None unless the key codec is pre-RoPE.
    """
    (key_codec, key_codes), (value_codec, value_codes) = keys, values
    key, value = key_codec.coded(key_codes), value_codec.coded(value_codes)
    if key is not None and value is not None:
        return ops.attend(query, key, value, rotation, mask, softmax_scale, softcap)

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        k = key_codec.decode(key_codes.slice(start, stop))
        if rotation is not None:
            positions, inv_freq, factor, interleaved = rotation
            k = ops.rotate(k, positions[:, start:stop], inv_freq, factor, interleaved)
        return k, value_codec.decode(value_codes.slice(start, stop))

    return ops.attend_tiles(query, read, key_codes.tokens, mask, softmax_scale, softcap)
