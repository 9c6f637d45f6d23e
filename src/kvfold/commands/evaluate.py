"""`kvfold eval`, on text or on tasks."""

from __future__ import annotations

import argparse
import logging

from kvfold.commands.common import (
    check_outputs,
    chosen_codecs,
    emit,
    named_model,
    quiet_libraries,
    read_texts,
    record_if_asked,
    table,
)
from kvfold.errors import InputError
from kvfold.evaluate import evaluate
from kvfold.evaluate.tasks import TaskResults, evaluate_tasks, load_tasks


def evaluate_any(args: argparse.Namespace) -> None:
    """`kvfold eval`: on a text, or on tasks."""
    if args.tasks:
        _evaluate_tasks(args)
        return
    if args.codec is None:
        raise InputError("--codec DIR with --text", "none", "give the folder made by `kvfold calibrate`")
    for name in ("task_path", "limit", "num_fewshot", "resume"):
        if getattr(args, name) is not None:
            raise InputError("--tasks", f"--{name.replace('_', '-')} without it", "add --tasks, or leave the option out")
    evaluate_text(args)


def evaluate_text(args: argparse.Namespace) -> None:
    """`kvfold eval`."""
    codecs = chosen_codecs(args)
    texts = read_texts(args.text)
    check_outputs(args, "eval")
    model, tokenizer = named_model(args)
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
    emit(args, facts, f"{head}\n{table(rows)}")
    record_if_asked(args, "eval", facts)


def _evaluate_tasks(args: argparse.Namespace) -> None:
    codecs = chosen_codecs(args) if args.codec else None
    check_outputs(args, "tasks")
    quiet_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = load_tasks(args.tasks, args.task_path, args.num_fewshot, args.seed)
    model, tokenizer = named_model(args)
    sizes = {"sinks": args.sinks, "window": args.window}
    result = evaluate_tasks(model, tokenizer, codecs, tasks, limit=args.limit, resume=args.resume, **sizes)
    facts = {**result.to_json(), "settings": codecs.settings if codecs else None}
    emit(args, facts, _task_table(result))
    record_if_asked(args, "tasks", facts)


def _task_table(result: TaskResults) -> str:
    rows = [["task", "metric", "filter", "value", "standard error", "documents", "shots"]]
    for score in result.scores:
        error = "-" if score.stderr is None else f"{score.stderr:.4f}"
        shots = "-" if score.shots is None else str(score.shots)
        rows.append([score.task, score.metric, score.filter, f"{score.value:.4f}", error, str(score.samples), shots])
    bits = "" if result.bits_per_element is None else f", {result.bits_per_element:.3f} bits per element"
    return f"{table(rows, left=(0, 1, 2))}\n\n{result.method}{bits}, {result.seconds:.0f} s"
