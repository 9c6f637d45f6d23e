"""Growing buffers for codes: allocated ahead, appended to, never rewritten."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.codes import TOKEN_AXIS, Codes

_FIRST_TOKENS = 256
_GROWTH = 1.5


class CodeStore:
    """Codes of tokens `0..tokens-1` in buffers with room for more.

    Args:
        limit: tokens that will never be exceeded, so that growing does not allocate past a memory limit; None if unknown.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.tokens = 0
        self._buffers: Codes | None = None

    def append(self, codes: Codes) -> None:
        """Add `codes` behind those that are there."""
        stop = self.tokens + codes.tokens
        if self._buffers is None or self._buffers.tokens < stop:
            self._grow(codes, stop)
        assert self._buffers is not None
        for name, tensor in codes.fields.items():
            self._buffers.fields[name][:, :, self.tokens : stop] = tensor
        self.tokens = stop

    def codes(self) -> Codes | None:
        """What is stored, without copying; None before the first append."""
        return None if self._buffers is None else self._buffers.slice(0, self.tokens)

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens`."""
        self.tokens = min(self.tokens, max(tokens, 0))

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace each buffer by `function(buffer)`, which may change its batch axis or device."""
        if self._buffers is not None:
            self._buffers = self._buffers.map(function)

    @property
    def allocated_bytes(self) -> int:
        return 0 if self._buffers is None else self._buffers.nbytes

    def _grow(self, like: Codes, tokens: int) -> None:
        room = max(_FIRST_TOKENS, int(tokens * _GROWTH))
        if self.limit is not None:
            room = max(min(room, self.limit), tokens)
        old = self.codes()

        def enlarge(name: str, tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            shape[TOKEN_AXIS] = room
            buffer = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            if old is not None:
                buffer[:, :, : self.tokens] = old.fields[name]
            return buffer

        self._buffers = Codes({name: enlarge(name, tensor) for name, tensor in like.fields.items()})
