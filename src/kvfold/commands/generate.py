"""`kvfold generate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.cache import SINKS, WINDOW, CompressedCache
from kvfold.cache.saved import load_cache
from kvfold.codecs.artifact import CodecSet
from kvfold.commands.common import (
    chosen_codecs,
    named_model,
)
from kvfold.compat import cache_argument
from kvfold.errors import InputError
from kvfold.files import read_text, require_file_target
from kvfold.integration.attach import attach


def generate(args: argparse.Namespace) -> None:
    """`kvfold generate`: only the new text goes to standard output."""
    codecs = chosen_codecs(args)
    prompt = read_text(Path(args.prompt_file)) if args.prompt_file else args.prompt
    if args.save_cache:
        require_file_target(Path(args.save_cache))
    model, tokenizer = named_model(args)
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
