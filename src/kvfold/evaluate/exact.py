"""The exact model's predictions on windows of text, for several evaluations on the same windows."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

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
        with ExitStack() as undo:
            if key in self._kept:
                undo.enter_context(patch.object(decoder, "forward", lambda *args, **kwargs: self._kept[key]))
            else:
                undo.callback(decoder.register_forward_hook(lambda *told: self._kept.update({key: told[-1]})).remove)
            return self._model(input_ids=inputs, use_cache=False).logits[0]
