"""What the commands do: `command(args)` with the options of `cli.py`; results on standard output, the rest on error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from kvfold.bench import bench_generate
from kvfold.bench.plot import plot_distortion
from kvfold.bench.record import record, record_file
from kvfold.cache.cache import SINKS, WINDOW, CompressedCache
from kvfold.cache.saved import load_cache
from kvfold.calibrate import calibrate as fit
from kvfold.codecs import METHODS, build_codec, method, resolve_settings
from kvfold.codecs.artifact import PLOT, CodecSet, load, require_target
from kvfold.compat import cache_argument
from kvfold.errors import InputError
from kvfold.evaluate import evaluate
from kvfold.files import read_text, replacing_file, require_file_target
from kvfold.integration.attach import attach
from kvfold.integration.models import load_model


def calibrate(args: argparse.Namespace) -> None:
    """`kvfold calibrate`: fit, write the folder, say in one line what it is."""
    require_target(args.out)
    method(args.codec)
    texts = None if args.text is None else _texts(args.text)
    model, tokenizer = _model(args)
    fitted = fit(model, tokenizer, texts, args.codec, args.seed, tokens=args.tokens, settings=dict(args.changes))
    fitted.save(args.out)
    pairs = [pair for pair in fitted.info["distortion"] if pair is not None]
    mean = sum(map(sum, pairs)) / (2 * len(pairs))
    print(
        f"{args.out}: {fitted.bits_per_element:.3f} bits per element, {fitted.codebook_bytes:,} bytes of codebooks, "
        f"mean distortion {mean:.4g}"
    )


def inspect(args: argparse.Namespace) -> None:
    """`kvfold inspect`: header, a row a layer, and a picture of the distortion."""
    codecs = load(args.codec)
    _check_json(args)
    plot = Path(args.plot or Path(args.codec, PLOT))
    require_file_target(plot)
    layers = _layers(codecs)
    spec, info = codecs.spec, codecs.info
    facts = {
        "method": codecs.method,
        "settings": codecs.settings,
        "model": {
            "type": spec.model_type,
            "layers": len(spec.layers),
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "max_positions": spec.max_positions,
            "fingerprint": spec.fingerprint(),
        },
        **{name: info.get(name) for name in ("seed", "tokens", "samples", "text")},
        "bits_per_element": codecs.bits_per_element,
        "bytes_codebooks": codecs.codebook_bytes,
        "bytes_folder": sum(file.stat().st_size for file in Path(args.codec).glob("codecs.*")),
        "layers": layers,
    }
    settings = " ".join(f"{name}={value}" for name, value in codecs.settings.items())
    rows = [["layer", "key bits", "value bits", "key distortion", "value distortion"]]
    for layer in layers:
        numbers = [layer[name] for name in ("key_bits", "value_bits", "key_distortion", "value_distortion")]
        rows.append([str(layer["layer"]), *("exact" if x is None else f"{x:.4g}" for x in numbers)])
    lines = [
        f"method     {codecs.method}: {settings}",
        f"model      {spec.model_type}, {len(spec.layers)} layers, {spec.heads} query heads, {spec.kv_heads} KV heads, "
        f"head dim {spec.head_dim}",
        f"made from  {info.get('tokens')} tokens ({info.get('text')} text), {info.get('samples')} sampled, "
        f"seed {info.get('seed')}",
        "",
        table(rows),
        "",
        f"{codecs.bits_per_element:.3f} bits per element, {codecs.codebook_bytes:,} bytes of codebooks, "
        f"{facts['bytes_folder']:,} bytes on disk",
    ]
    _emit(args, facts, "\n".join(lines))
    coded = [layer for layer in layers if layer["key_distortion"] is not None]
    keys, values = ([layer[f"{side}_distortion"] for layer in coded] for side in ("key", "value"))
    try:
        plot_distortion([layer["layer"] for layer in coded], keys, values, f"{codecs.method} on {spec.model_type}", plot)
    except ImportError:
        print("kvfold: no picture without matplotlib: pip install kvfold[plot]", file=sys.stderr)
    else:
        print(f"kvfold: wrote {plot}", file=sys.stderr)


def generate(args: argparse.Namespace) -> None:
    """`kvfold generate`: only the new text goes to standard output."""
    codecs = _codecs(args)
    prompt = read_text(Path(args.prompt_file)) if args.prompt_file else args.prompt
    if args.save_cache:
        require_file_target(Path(args.save_cache))
    model, tokenizer = _model(args)
    codecs = codecs.to(args.device)
    torch.manual_seed(args.seed)
    sizes = {"sinks": SINKS if args.sinks is None else args.sinks, "window": WINDOW if args.window is None else args.window}
    with attach(model, codecs, **sizes, max_bytes=args.max_bytes) as attached:
        cache = _loaded_cache(args, codecs, model) if args.load_cache else attached.new_cache()
        ids = _prompt_ids(args, tokenizer, prompt, cache).to(args.device)
        longest = codecs.spec.max_positions
        if ids.shape[1] + args.max_new_tokens > longest:
            raise InputError(
                f"at most the model's {longest} tokens",
                f"{ids.shape[1]} and {args.max_new_tokens} to come",
                "shorten the prompt or lower --max-new-tokens",
            )
        sampling = {"do_sample": True, "temperature": args.temperature} if args.sample else {"do_sample": False}
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.max_new_tokens,
            **sampling,
            **{cache_argument(model) or "past_key_values": cache},
        )
    print(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    if args.report:
        print(cache.report(), file=sys.stderr)
    if args.save_cache:
        cache.save(args.save_cache, out)


def evaluate_text(args: argparse.Namespace) -> None:
    """`kvfold eval`."""
    codecs = _codecs(args)
    texts = _texts(args.text)
    _check_json(args)
    _check_record(args, "eval")
    model, tokenizer = _model(args)
    sizes = {name: getattr(args, name) for name in ("context", "windows", "sinks", "window")}
    result = evaluate(model, tokenizer, codecs, texts, **sizes)
    facts = {**result.to_json(), "perplexity_ratio": result.perplexity_ratio, "settings": codecs.settings}
    rows = [
        ["perplexity, exact", f"{result.perplexity_exact:.4f}"],
        ["perplexity, through the cache", f"{result.perplexity:.4f}"],
        ["ratio", f"{result.perplexity_ratio:.4f}"],
        ["KL, mean", f"{result.kl_mean:.5f} nats"],
        ["KL, 99th percentile", f"{result.kl_p99:.4f} nats"],
        ["top-1 agreement", f"{result.top1_agreement:.4f}"],
        ["bits per element", f"{result.bits_per_element:.3f}"],
        ["  with codebooks", f"{result.bits_per_element_with_codebooks:.3f}"],
        ["bytes of a window's cache", f"{result.bytes_cache:,}"],
        ["  in bfloat16", f"{result.bytes_bf16:,}"],
        ["seconds", f"{result.seconds:.1f}"],
    ]
    head = (
        f"{args.model}, {result.method}: {result.windows} windows of {result.context} tokens, sinks {result.sinks}, "
        f"window {result.window}, {result.tokens} tokens scored"
    )
    _emit(args, facts, f"{head}\n{table(rows)}")
    _record_if_asked(args, "eval", facts)


def bench_generation(args: argparse.Namespace) -> None:
    """`kvfold bench generate`."""
    load(args.codec)
    _check_json(args)
    _check_record(args, "bench-generate")
    _prepare(args)
    results = bench_generate(
        args.model,
        args.codec,
        contexts=args.contexts,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        text=args.text,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
    )
    units = [("tokens_per_s", 1, "tokens/s"), ("prefill_s", 1, "prefill s")]
    units += [("bytes_cache", 1 << 20, "cache MiB"), ("peak_rss_bytes", 1 << 20, "peak RSS MiB")]
    rows = [["context", "cache", *(title for _, _, title in units)]]
    for ours, plain in zip(results[::2], results[1::2], strict=True):
        for one in (ours, plain):
            name = "kvfold" if one is ours else f"plain {one['dtype']}"
            rows.append([str(one["context"]), name, *(f"{one[field] / unit:.2f}" for field, unit, _ in units)])
        rows.append(["", "kvfold/plain", *(f"{ours[field] / plain[field]:.3f}" for field, _, _ in units)])
    _emit(args, results, table(rows))
    _record_if_asked(args, "bench-generate", {"results": results})


def codecs(args: argparse.Namespace) -> None:
    """`kvfold codecs`: a line a method."""
    rows = [["codec", "bits (D=64)", "bits (D=128)", "what", "source"]]
    for name, row in METHODS.items():
        bits = [f"{_bits(name, head_dim):.3f}" for head_dim in (64, 128)]
        rows.append([name, *bits, row.summary, row.source])
    print(table(rows, left=(0, 3, 4)))


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns padded to equal width; those in `left` start at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)


def _bits(name: str, head_dim: int) -> float:
    settings = resolve_settings(name, {}, head_dim)
    sides = [build_codec(name, side, head_dim, settings).bits_per_element for side in ("key", "value")]
    return sum(sides) / 2


def _layers(codecs: CodecSet) -> list[dict[str, Any]]:
    """Bits and distortion of every layer; None in a layer that stays exact."""
    distortion = codecs.info.get("distortion") or [None] * len(codecs.keys)
    rows = []
    for index, (key, value, errors) in enumerate(zip(codecs.keys, codecs.values, distortion, strict=True)):
        bits = [None if codec is None else codec.bits_per_element for codec in (key, value)]
        named = zip(
            ("key_bits", "value_bits", "key_distortion", "value_distortion"), (*bits, *(errors or (None, None))), strict=True
        )
        rows.append({"layer": index, **dict(named)})
    return rows


def quiet_libraries() -> None:
    """No progress bars and warnings of transformers; what matters to the user is an error of ours."""
    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _prepare(args: argparse.Namespace) -> None:
    """Threads, device, and no chatter from the libraries."""
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError("a device torch can use here, such as cpu", f"{args.device!r} ({first})", "change --device") from None


def _model(args: argparse.Namespace) -> tuple[Any, Any]:
    _prepare(args)
    return load_model(args.model, args.dtype, args.device)


def _codecs(args: argparse.Namespace) -> CodecSet:
    """The codec folder, searched with another beam if `--set beam=N` says so."""
    loaded = load(args.codec)
    changes = dict(args.changes)
    if set(changes) - {"beam"}:
        other = ", ".join(sorted(set(changes) - {"beam"}))
        raise InputError("only beam with --set here", other, "set it when you calibrate")
    if not changes:
        return loaded
    return loaded.with_beam(resolve_settings(loaded.method, changes, loaded.spec.head_dim)["beam"])


def _texts(files: Sequence[str]) -> list[str]:
    return [read_text(Path(file)) for file in files]


def _loaded_cache(args: argparse.Namespace, codecs: CodecSet, model: Any) -> CompressedCache:
    cache = load_cache(args.load_cache, codecs, model.config, args.max_bytes)
    for name in ("sinks", "window"):
        asked, saved = getattr(args, name), getattr(cache, name)
        if asked not in (None, saved):
            raise InputError(f"--{name} {saved}, as the saved cache has", str(asked), "leave it out")
    if cache.input_ids is None or len(cache.input_ids) != 1:
        raise InputError("a cache saved with its tokens, one row of them", f"{args.load_cache}", "save it with input_ids")
    return cache


def _prompt_ids(args: argparse.Namespace, tokenizer: Any, prompt: str, cache: CompressedCache) -> Tensor:
    """All tokens `[1, T]`: those of the loaded cache, then the prompt's. The model has to read at least the last one."""
    earlier = cache.input_ids if cache.input_ids is not None else torch.empty(1, 0, dtype=torch.int64)
    first = not earlier.numel()
    if prompt and args.chat:
        if tokenizer.chat_template is None:
            raise InputError("a model with a chat template", f"{args.model!r} without one", "leave out --chat")
        prompt = _chat_turn(tokenizer, prompt, first)
    if prompt:
        new = tokenizer(prompt, return_tensors="pt", add_special_tokens=first and not args.chat, verbose=False)["input_ids"]
        earlier = torch.cat((earlier, new.to(torch.int64)), 1)
    if earlier.shape[1] <= cache.get_seq_length():
        raise InputError("a prompt of at least one token", "none", "give --prompt or --prompt-file")
    return earlier


def _chat_turn(tokenizer: Any, prompt: str, first: bool) -> str:
    """The user's turn in the model's template; a later one leaves out what the template puts before the first."""
    earlier = [] if first else [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
    before = tokenizer.apply_chat_template(earlier, tokenize=False) if earlier else ""
    turns = [*earlier, {"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).removeprefix(before)


def _check_json(args: argparse.Namespace) -> None:
    if args.json not in (None, "-"):
        require_file_target(Path(args.json))


def _emit(args: argparse.Namespace, facts: Any, text: str) -> None:
    """The result for people, or as JSON, or both."""
    document = json.dumps(facts, indent=1)
    print(document if args.json == "-" else text)
    if args.json not in (None, "-"):
        with replacing_file(Path(args.json)) as fresh:
            fresh.write_text(document + "\n")


def _check_record(args: argparse.Namespace, kind: str) -> None:
    if args.record:
        record_file(args.record, kind)


def _record_if_asked(args: argparse.Namespace, kind: str, facts: dict[str, Any]) -> None:
    if args.record:
        config = {name: value for name, value in vars(args).items() if name not in ("command", "json", "record")}
        file = record(args.record, kind, {"config": config, **facts})
        print(f"kvfold: recorded in {file}", file=sys.stderr)
