"""Decoding speed and memory of a whole model, kvfold beside the plain cache.

Reading the prompt (prefill) and decoding are timed apart: prefill is one pass over `context` tokens, decoding is
`new_tokens` passes of one token, greedy. Every measurement runs in a process of its own, because a process's peak
memory never goes down again; the peak is Linux's VmHWM, since `ru_maxrss` starts at the parent's.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.layer import CodedLayer
from kvfold.calibrate.text import builtin_text
from kvfold.codecs.artifact import CodecSet, load
from kvfold.compat import DynamicCache, cache_argument
from kvfold.errors import InputError
from kvfold.files import read_text
from kvfold.integration.attach import attach
from kvfold.integration.models import load_model
from kvfold.progress import Progress

CONTEXTS = (512, 2048, 4096)
CACHES = ("kvfold", "plain")


def bench_generate(
    model: str,
    codec: str,
    *,
    contexts: Sequence[int] = CONTEXTS,
    new_tokens: int = 32,
    repeats: int = 3,
    text: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    beam: int | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Measure every context with either cache.

    Args:
        model: as on the command line; every process loads it anew.
        codec: folder of a codec.
        contexts: prompt tokens.
        new_tokens: tokens decoded after each prompt.
        repeats: of prompt and decoding in one process; medians are reported.
        text: file the prompt is cut from; None for the built-in text.
        threads: of torch; None leaves its default.
        beam: of the search for codes; None for the codec's own.

    Returns:
        One object a context and cache: `context`, `cache` ("kvfold" or "plain"), `dtype`, `new_tokens`, `repeats`,
        `prefill_s`, `encode_s`, the part of it that made codes of keys and values (None for "plain", and on a GPU, which
        would have to be waited for), `encode_share`, that over the plain cache's `prefill_s`, `tokens_per_s`, `bytes_cache`
        and `bytes_codebooks` after the last token, `loaded_rss_bytes` (model and codec loaded, nothing run) and
        `peak_rss_bytes`.

    Raises:
        InputError: bad codec, model or text, or contexts that the model or the text is too short for.
    """
    longest = load(codec).spec.max_positions
    for context in contexts:
        if context < 1 or context + new_tokens > longest:
            raise InputError(
                f"a context and {new_tokens} new tokens within the model's {longest}", str(context), "choose other --contexts"
            )
    if text is not None:
        read_text(Path(text))
    request = {"model": model, "codec": codec, "new_tokens": new_tokens, "repeats": repeats, "text": text}
    request |= {"dtype": dtype, "device": device, "threads": threads, "beam": beam}
    results = []
    with Progress("bench generate", len(contexts) * len(CACHES), quiet) as step:
        for context in contexts:
            for cache in CACHES:
                results.append(_in_own_process({**request, "context": context, "cache": cache}))
                step()
            ours, plain = results[-2:]
            ours["encode_share"] = None if ours["encode_s"] is None else ours["encode_s"] / plain["prefill_s"]
    return results


def _in_own_process(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-c", "from kvfold.bench.generate import answer; answer()"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the measuring process ended with status {done.returncode}: {last}")
    result = json.loads(done.stdout.splitlines()[-1])
    if "input_error" in result:
        raise InputError(*result["input_error"])
    return result


def answer() -> None:
    """What the measuring process does: a request on standard input, its result as the last line of standard output."""
    try:
        result = _measure(**json.load(sys.stdin))
    except InputError as error:
        result = {"input_error": [error.expected, error.got, error.fix]}
    print(json.dumps(result))


@torch.no_grad()
def _measure(
    model: str,
    codec: str,
    text: str | None,
    context: int,
    cache: str,
    new_tokens: int,
    repeats: int,
    dtype: str,
    device: str,
    threads: int | None,
    beam: int | None,
) -> dict[str, Any]:
    if threads is not None:
        torch.set_num_threads(threads)
    codecs = load(codec) if beam is None else load(codec).with_beam(beam)
    loaded, tokenizer = load_model(model, dtype, device)
    ids = _prompt(tokenizer, text, context).to(device)
    before = _rss("VmRSS")
    prefill, encode, decode = [], [], []
    with _cache_maker(loaded, codecs if cache == "kvfold" else None) as make:
        _run(loaded, ids[:, :8], make(), 1)  # the first pass of a process is slower
        for _ in range(repeats):
            used = make()
            spent = _timed_encoding(used) if cache == "kvfold" else []
            times = _run(loaded, ids, used, new_tokens)
            prefill.append(times[0])
            decode.append(times[1])
            encode.append(sum(spent[: len(spent) // (1 + new_tokens)]))  # a layer encodes once a pass; the prompt is the first
    return {
        "context": context,
        "cache": cache,
        "dtype": dtype,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "prefill_s": statistics.median(prefill),
        "encode_s": statistics.median(encode) if cache == "kvfold" and not ids.is_cuda else None,
        "encode_share": None,
        "tokens_per_s": new_tokens / statistics.median(decode),
        "bytes_cache": used.report().bytes_cache if cache == "kvfold" else dense_bytes(used),
        "bytes_codebooks": codecs.codebook_bytes if cache == "kvfold" else 0,
        "loaded_rss_bytes": before,
        "peak_rss_bytes": _rss("VmHWM"),
    }


def _prompt(tokenizer: Any, text: str | None, context: int) -> Tensor:
    joined = read_text(Path(text)) if text is not None else "\n\n".join(builtin_text())
    ids = tokenizer(joined[: 64 * context], return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]
    if ids.shape[1] < context:
        raise InputError(f"text of at least {context} tokens", f"{ids.shape[1]}", "give a longer --text or smaller --contexts")
    return ids[:, :context]


@contextmanager
def _cache_maker(model: Any, codecs: CodecSet | None) -> Iterator[Any]:
    if codecs is None:
        yield lambda: DynamicCache(config=model.config)
    else:
        with attach(model, codecs) as attached:
            yield attached.new_cache


def _timed_encoding(cache: Any) -> list[float]:
    """Seconds that the layers of `cache` spend on making codes, one number a call, as they come."""
    spent: list[float] = []

    def timed(encode: Callable[[int], None]) -> Callable[[int], None]:
        def run(boundary: int) -> None:
            start = time.perf_counter()
            encode(boundary)
            spent.append(time.perf_counter() - start)

        return run

    for layer in cache.layers:
        if isinstance(layer, CodedLayer):
            vars(layer)["encode_until"] = timed(layer.encode_until)
    return spent


def _run(model: Any, ids: Tensor, cache: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds of the pass over the prompt, and of `new_tokens` greedy passes behind it."""
    given = {cache_argument(model) or "past_key_values": cache, "use_cache": True}
    start = time.perf_counter()
    token = model(input_ids=ids, logits_to_keep=1, **given).logits[:, -1].argmax(-1, keepdim=True)
    _wait(token)
    middle = time.perf_counter()
    for _ in range(new_tokens):
        token = model(input_ids=token, **given).logits[:, -1].argmax(-1, keepdim=True)
    _wait(token)
    return middle - start, time.perf_counter() - middle


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def dense_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a plain transformers cache."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def _rss(field: str) -> int:
    """Resident memory in bytes: "VmRSS" now, "VmHWM" at its peak; where there is no /proc, the peak for both."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])
