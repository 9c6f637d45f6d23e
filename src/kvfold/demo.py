"""`make demo`: calibrate SmolLM2, ask it about a long text with the plain and the compressed cache, compare.

All text is the language reference that comes with Python: calibration reads its first topics, the question is about
its last ones, and perplexity is measured on topics between, which neither has seen.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.bench.generate import dense_bytes
from kvfold.cache.cache import SINKS, WINDOW
from kvfold.calibrate import calibrate
from kvfold.calibrate.text import builtin_text
from kvfold.commands.common import quiet_libraries, table
from kvfold.compat import DynamicCache, cache_argument
from kvfold.evaluate import evaluate
from kvfold.integration.attach import attach
from kvfold.integration.models import load_model

_QUESTION = (
    'According to the text above, what does the "with" statement guarantee if the "__enter__()" method returns without an '
    "error? Answer in one sentence."
)
_TOPICS = 5  # the last ones, the question's among them
_CONTEXT, _WINDOWS = 1024, 2


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvfold.demo", description=__doc__)
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="where the codec folder goes")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="tokens of calibration")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="steps of training (120 without this being a demo)")
    parser.add_argument("--new-tokens", type=int, default=60, metavar="N", help="tokens of each answer")
    args = parser.parse_args()
    quiet_libraries()
    start = time.monotonic()

    model, tokenizer = load_model("smollm2")
    Path(args.out).mkdir(exist_ok=True)
    topics = builtin_text()

    _title(f"1. Calibrating SmolLM2-135M on {args.tokens} tokens (preset rvq)")
    settings = {"distill_steps": args.steps}
    codecs = calibrate(model, tokenizer, topics[: -3 * _TOPICS], tokens=args.tokens, settings=settings)
    codecs.save(Path(args.out, "codec"))
    print(f"{codecs.bits_per_element:.2f} bits per element instead of 16 or 32; written to {args.out}/codec")

    turn = [{"role": "user", "content": "\n\n".join(topics[-_TOPICS:]) + "\n\n" + _QUESTION}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    _title(f"2. A question about {ids.shape[1]} tokens of text")
    print(_QUESTION)
    plain = DynamicCache(config=model.config)
    _answer("plain cache", model, tokenizer, ids, plain, args.new_tokens)
    with attach(model, codecs) as attached:
        compressed = attached.new_cache()
        _answer("compressed cache", model, tokenizer, ids, compressed, args.new_tokens)
    report, size = compressed.report(), dense_bytes(plain)
    rows = [["cache after the answer", "tokens", "bytes", "bytes a token", "of plain"]]
    for name, tokens, number in (
        (f"plain, {str(model.dtype).removeprefix('torch.')}", plain.get_seq_length(), size),
        ("plain, if it were bfloat16", report.tokens, report.bytes_bf16),
        ("compressed", report.tokens, report.bytes_cache),
    ):
        share = number / tokens / (size / plain.get_seq_length())
        rows.append([name, str(tokens), f"{number:,}", f"{number / tokens:,.0f}", f"{share:.3f}"])
    print(f"\n{table(rows)}\ncompressed: {report}")

    _title(f"3. Perplexity on {_WINDOWS} x {_CONTEXT} tokens of text that neither calibration nor question used")
    held = topics[-3 * _TOPICS : -_TOPICS]
    rows = [["cache", "perplexity", "over exact", "KL (nats)", "same top token"]]
    for name, sinks, window in (("as above", SINKS, WINDOW), ("every token coded", 0, 0)):
        result = evaluate(
            model, tokenizer, codecs, held, context=_CONTEXT, windows=_WINDOWS, sinks=sinks, window=window, quiet=True
        )
        if len(rows) == 1:
            rows.append(["plain", f"{result.perplexity_exact:.3f}", "1.000", "0", "100.0%"])
        numbers = [f"{result.perplexity:.3f}", f"{result.perplexity_ratio:.3f}", f"{result.kl_mean:.4f}"]
        rows.append([f"compressed, {name}", *numbers, f"{result.top1_agreement:.1%}"])
    print(table(rows))
    print(f"\nEverything took {time.monotonic() - start:.0f} s.")
    return 0


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _answer(name: str, model: Any, tokenizer: Any, ids: Tensor, cache: Any, new_tokens: int) -> None:
    start = time.monotonic()
    given = {cache_argument(model) or "past_key_values": cache}
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **given
    )
    new = out[0, ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    print(f"\n{name} ({time.monotonic() - start:.0f} s, {len(new)} tokens): {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
