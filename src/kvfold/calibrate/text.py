"""Calibration text for a user who brings none: what the model itself says, or what comes with every Python installation.

The model's own samples are the better of the two (docs/log.md, 2026-11-24) and the default of `calibrate`; they cost as much
time as writing them takes. Text of Python's is for what needs other text than the model's own: a stream, a test, a demo.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kvfold.errors import non_finite
from kvfold.progress import Progress

_LENGTH, _BATCH = 512, 32


def builtin_text() -> list[str]:
    """Documentation topics of the running Python, in a fixed order; about 450,000 characters of English and code."""
    return [topics[name] for name in sorted(topics)]


@torch.no_grad()
def own_samples(model: Any, tokenizer: Any, tokens: int, longest: int, seed: int, quiet: bool = False) -> list[Tensor]:
    """Sequences of token ids that `model` samples at temperature 1 from its start token, `tokens` in all.

    Sequences have up to 512 tokens (at most `longest`); an end of text is never sampled, so that all are full.

    Raises:
        InputError: the model's predictions are NaN or Inf.
    """
    length = min(_LENGTH, longest, tokens)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    start = next((token for token in special if token is not None), 0)
    device = next(model.parameters()).device
    rows = -(-tokens // length)
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), Progress("sampling text", -(-rows // _BATCH) * (length - 1), quiet) as step:
            torch.manual_seed(seed)
            batches = [
                model.generate(
                    input_ids=torch.full((min(_BATCH, rows - first), 1), start, device=device),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    repetition_penalty=1.0,
                    min_new_tokens=length - 1,
                    max_new_tokens=length - 1,
                    pad_token_id=start,
                    logits_processor=LogitsProcessorList([_EachStep(step)]),
                )
                for first in range(0, rows, _BATCH)
            ]
    finally:
        model.train(training)
    ids = torch.cat(batches).cpu().flatten()[:tokens]
    return [window for window in ids.split(length) if len(window) > 1]


class _EachStep(LogitsProcessor):
    """Tells the progress of `generate`, and stops it where sampling would fail."""

    def __init__(self, step: Progress) -> None:
        self._step = step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any() | (scores == torch.inf).any()):
            raise non_finite()
        self._step()
        return scores
