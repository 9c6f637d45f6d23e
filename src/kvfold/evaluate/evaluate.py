"""Perplexity, KL divergence and top-1 agreement, teacher-forced and read through the compressed cache.

Windows of `context` tokens, one after the other from the start of the text, no special tokens added. Inside a window
every query reads codes for its past except the first `sinks` and its newest `window` tokens; with both 0, the paper's
protocol (arXiv 2410.15704, section 4), it reads even its own K and V as codes. Loss is over tokens 2..context. KL is from
the exact model's next-token distribution to the compressed one's, nats a token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.codecs.artifact import CodecSet
from kvfold.errors import InputError
from kvfold.evaluate.exact import ExactModel
from kvfold.integration.attach import attach
from kvfold.progress import Progress

_ROWS = 256  # tokens whose distributions are compared at a time


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`; field names are those of `kvfold eval --json`.

    Bytes and bits are those of the last window's cache at its end; `bytes_bf16` is the same tokens uncompressed in
    bfloat16. `tokens` is how many were scored.
    """

    perplexity: float
    perplexity_exact: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    bits_per_element: float
    bits_per_element_with_codebooks: float
    bytes_cache: int
    bytes_bf16: int
    tokens: int
    sinks: int
    window: int
    seconds: float
    context: int
    windows: int
    method: str

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.perplexity_exact

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    codecs: CodecSet,
    text: Sequence[str] | str,
    *,
    context: int = 2048,
    windows: int = 8,
    sinks: int = 0,
    window: int = 0,
    exact_model: ExactModel | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate `codecs` on `text`.

    Args:
        exact_model: of the same model, to share its passes with other evaluations.

    Raises:
        InputError: empty text, fewer than 2 tokens a window, a context longer than the model's, codecs of another model.
    """
    ids = eval_windows(tokenizer, text, context, windows, codecs.spec.max_positions)
    start = time.monotonic()
    device = next(model.parameters()).device
    exact_model = exact_model or ExactModel(model)
    loss = loss_exact = agreed = 0.0
    divergences = []
    training = model.training
    model.eval()
    try:
        with Progress("evaluating", len(ids), quiet) as step:
            for row in ids:
                inputs = row[None].to(device)
                exact = exact_model.logits(inputs)
                with attach(model, codecs, sinks=sinks, window=window, block=1) as attached:
                    coded = model(input_ids=inputs, use_cache=True).logits[0]
                    assert attached.cache is not None
                    report = attached.cache.report()
                for rows in torch.arange(len(row) - 1, device=device).split(_ROWS):
                    p, q = exact[rows].float().log_softmax(-1), coded[rows].float().log_softmax(-1)
                    target = inputs[0, rows + 1, None]
                    loss_exact -= float(p.gather(1, target).double().sum())
                    loss -= float(q.gather(1, target).double().sum())
                    divergences.append((p.exp() * (p - q)).sum(1).clamp_min(0))
                    agreed += float((p.argmax(1) == q.argmax(1)).sum())
                step()
    finally:
        model.train(training)
    kl = torch.cat(divergences)
    return Evaluation(
        perplexity=math.exp(loss / len(kl)),
        perplexity_exact=math.exp(loss_exact / len(kl)),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1_agreement=agreed / len(kl),
        bits_per_element=report.bits_per_element,
        bits_per_element_with_codebooks=report.bits_per_element_with_codebooks,
        bytes_cache=report.bytes_cache,
        bytes_bf16=report.bytes_bf16,
        tokens=len(kl),
        sinks=sinks,
        window=window,
        seconds=time.monotonic() - start,
        context=context,
        windows=len(ids),
        method=codecs.method,
    )


def eval_windows(tokenizer: Any, text: Sequence[str] | str, context: int, windows: int, longest: int) -> list[Tensor]:
    """Up to `windows` windows of `context` tokens; fewer, or one shorter one, if the text has no more."""
    if not 2 <= context <= longest:
        raise InputError(f"--context from 2 to the model's {longest}", str(context), "choose one in that range")
    if windows < 1:
        raise InputError("--windows of at least 1", str(windows), "raise it")
    joined = text if isinstance(text, str) else "\n\n".join(text)
    if not joined.strip():
        raise InputError("text to evaluate on", "none (empty or only white space)", "give a file with text")
    wanted = context * windows
    tokens = tokenizer(joined[: 64 * wanted], return_tensors="pt", add_special_tokens=False, verbose=False)
    ids = tokens["input_ids"][0][:wanted]
    if len(ids) < 2:
        raise InputError("text of at least 2 tokens", f"{len(ids)}", "give more text")
    whole = [w for w in ids.split(context) if len(w) == context]
    return whole or [ids]
