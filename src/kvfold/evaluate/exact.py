"""The exact model's predictions on windows of text, for several evaluations on the same windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kvfold.integration.spec import decoder_of


class ExactModel:
    """Logits of `model` without a compressed cache.

    A window seen before costs no pass: what left the decoder is kept (`[T, hidden]`, a thousandth of the logits of a large
    vocabulary) and only the head runs again, as the model runs it.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: dict[bytes, Any] = {}

    def logits(self, inputs: Tensor) -> Tensor:
        """`[T, vocabulary]` of the token ids `[1, T]`; to be called without gradients, in eval mode, nothing attached."""
        key = inputs.cpu().numpy().tobytes()
        decoder = decoder_of(self._model)
        with _replaying(decoder, self._kept[key]) if key in self._kept else _keeping(decoder, self._kept, key):
            return self._model(input_ids=inputs, use_cache=False).logits[0]


@contextmanager
def _keeping(decoder: Any, kept: dict[bytes, Any], key: bytes) -> Iterator[None]:
    """Put what leaves the decoder into `kept`."""
    hook = decoder.register_forward_hook(lambda *told: kept.update({key: told[-1]}))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _replaying(decoder: Any, output: Any) -> Iterator[None]:
    """The decoder answers `output` without a pass."""
    before = vars(decoder).get("forward")  # set on the module where another tool has wrapped it
    decoder.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before
