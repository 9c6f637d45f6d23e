"""No compression: the elements as they came. The yardstick for the cache itself; everything else is compared with it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from kvfold.codecs.base import Codec
from kvfold.codes import Codes
from kvfold.errors import InputError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class IdentityCodec(Codec):
    """Stores `[B, G, T, D]` in `dtype` ("float32", "float16" or "bfloat16"), keys after RoPE."""

    kind = "identity"

    def __init__(self, head_dim: int, dtype: str = "float32") -> None:
        super().__init__(head_dim)
        if dtype not in _DTYPES:
            raise InputError(f"dtype among {', '.join(_DTYPES)}", repr(dtype), "choose one of these")
        self.dtype = dtype

    def _encode(self, x: Tensor) -> Codes:
        return Codes({"exact": x.to(_DTYPES[self.dtype])})

    def decode(self, codes: Codes) -> Tensor:
        return codes.fields["exact"].float()

    @property
    def bits_per_element(self) -> float:
        return 8.0 * _DTYPES[self.dtype].itemsize

    def settings(self) -> dict[str, Any]:
        return {"dtype": self.dtype}

    @classmethod
    def restore(cls, head_dim: int, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        return cls(head_dim, **settings)
