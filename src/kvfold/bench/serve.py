"""Decoding inside vLLM, codes in its pages beside its own cache: requests that run together, each with a long prompt.

Both engines live at once, each in a process of its own, and take turns, so what disturbs the machine disturbs both. A round
asks for one token of every prompt and then for `1 + new_tokens`: prompts are in the prefix cache by then, and the difference is
`new_tokens` steps of decoding.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

from kvfold.calibrate.text import builtin_text
from kvfold.codecs.artifact import load
from kvfold.errors import InputError
from kvfold.files import read_text
from kvfold.integration.models import load_tokenizer, model_folder
from kvfold.progress import Progress

_SHIFT = 61  # tokens between two prompts' beginnings: they share no page


def bench_serve(
    model: str,
    codec: str,
    *,
    requests: int = 8,
    context: int = 4096,
    new_tokens: int = 32,
    repeats: int = 3,
    text: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    cache_gib: int = 2,
    beam: int | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Measure kvfold's pages and vLLM's own.

    Args:
        model: as on the command line.
        codec: folder of a codec.
        requests: that run together, each with a prompt of `context` tokens.
        new_tokens: steps of decoding that are timed.
        repeats: rounds; medians are reported.
        text: file the prompts are cut from; None for the built-in text.
        dtype: of the model, and of vLLM's own cache.
        cache_gib: of CPU memory for either cache.
        beam: of the search for codes; None for the codec's own.

    Returns:
        Two objects, `cache` "kvfold" and "vllm": `prefill_s` (all prompts, once), `tokens_per_s` (of all requests together),
        `capacity` (tokens that fit, as vLLM tells it), `threads` of vLLM's worker, `speedup` of ours, and the sizes.

    Raises:
        InputError: no vLLM, bad codec, model or text, or prompts that the model or the text is too short for.
    """
    if find_spec("vllm") is None:
        raise InputError("the package vllm", "no such package", "pip install kvfold[vllm], or for the CPU see docs/serving.md")
    codecs = load(codec)
    longest = codecs.spec.max_positions
    length = context + new_tokens + 1
    if length > longest:
        raise InputError(f"a context and {new_tokens} new tokens within the model's {longest}", str(context), "choose fewer")
    joined = read_text(Path(text)) if text is not None else "\n\n".join(builtin_text())
    needed = context + _SHIFT * (requests - 1)
    ids = load_tokenizer(model)(joined[: 64 * needed], add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < needed:
        raise InputError(f"text of at least {needed} tokens", f"{len(ids)}", "give a longer --text, or smaller sizes")
    prompts = [ids[_SHIFT * row : _SHIFT * row + context] for row in range(requests)]
    engine = {"model": model_folder(model), "dtype": dtype, "max_model_len": length, "max_num_seqs": requests}
    engine |= {"enable_prefix_caching": True, "seed": 0}
    named = {"codec": str(Path(codec).resolve()), **({} if beam is None else {"beam": beam})}
    ours = {**engine, "additional_config": {"kvfold": named}}
    if device != "cpu":
        ours |= {"attention_backend": "CUSTOM"}
    told = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ, "VLLM_CPU_KVCACHE_SPACE": str(cache_gib)}
    told["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # of `_threads`, to a worker of our own
    engines: dict[str, _Engine] = {}
    try:
        with Progress("bench serve", 2 * (2 + repeats), quiet) as step:
            answers: dict[str, list[dict[str, Any]]] = {}
            for name, given in (("kvfold", ours), ("vllm", engine)):
                engines[name] = _Engine({"engine": given, "prompts": prompts}, told)
                step()
            for turn in range(1 + repeats):
                for name, running in engines.items():
                    answers.setdefault(name, []).append(running.ask(new_tokens if turn else 0))
                    step()
    finally:
        for running in engines.values():
            running.stop()
    results = []
    for name, (first, *rounds) in answers.items():
        decode = statistics.median(one["decode_s"] for one in rounds)
        speed = {"prefill_s": first["prefill_s"], "tokens_per_s": requests * new_tokens / decode, "capacity": first["capacity"]}
        sizes = {"requests": requests, "context": context, "new_tokens": new_tokens, "repeats": repeats, "dtype": dtype}
        how = (
            {"method": codecs.method, "beam": codecs.settings.get("beam") if beam is None else beam} if name == "kvfold" else {}
        )
        results.append({"cache": name, **how, **speed, **sizes, "cache_gib": cache_gib, "threads": first["threads"]})
    for one in results:
        one["speedup"] = one["tokens_per_s"] / results[1]["tokens_per_s"]
    return results


class _Engine:
    """A process with an engine of vLLM, asked by lines of JSON."""

    def __init__(self, request: dict[str, Any], env: dict[str, str]) -> None:
        command = [sys.executable, "-c", "from kvfold.bench.serve import answer; answer()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self._say(request)
        self._hear()

    def ask(self, new_tokens: int) -> dict[str, Any]:
        """A round; 0 tokens is the first one, which reads the prompts."""
        self._say({"new_tokens": new_tokens})
        return self._hear()

    def stop(self) -> None:
        """End the process."""
        self._pipe(self._process.stdin).close()
        self._process.wait()

    def _say(self, what: dict[str, Any]) -> None:
        pipe = self._pipe(self._process.stdin)
        print(json.dumps(what), file=pipe, flush=True)

    def _hear(self) -> dict[str, Any]:
        for line in self._pipe(self._process.stdout):
            if line.startswith("{"):  # vLLM may print there too
                return json.loads(line)
        raise RuntimeError(f"vLLM's process ended with status {self._process.wait()}; what it said is above")

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def answer() -> None:
    """What the process does: the engine's arguments and prompts are its first line of input, rounds the others."""
    from vllm import LLM, SamplingParams

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start

    request = json.loads(sys.stdin.readline())
    llm = LLM(**request["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    cache = llm.llm_engine.vllm_config.cache_config
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        new_tokens = json.loads(line)["new_tokens"]
        if new_tokens:
            told: dict[str, Any] = {"decode_s": -seconds(1) + seconds(1 + new_tokens)}
        else:
            llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=2), use_tqdm=False)  # done once
            threads = llm.collective_rpc(_threads)[0]
            told = {"prefill_s": seconds(1), "capacity": cache.num_gpu_blocks * cache.block_size, "threads": threads}
        print(json.dumps(told), flush=True)


def _threads(worker: object) -> int:
    """Of vLLM's worker, which leaves a CPU to its other processes unless VLLM_CPU_OMP_THREADS_BIND says otherwise."""
    return torch.get_num_threads()
