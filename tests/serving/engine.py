"""A vLLM engine in a process of its own: a request as JSON on standard input, its answer the last line of standard output."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    import vllm._custom_ops
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    if request.get("plain_products"):  # PyTorch's own, where vLLM has packed weights for oneDNN
        vllm._custom_ops._supports_onednn = False
    llm = LLM(**request["engine"])
    params = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=1), use_tqdm=False)  # what is done once
    if "before" in request:  # prompts, and how much is said to each: the engine's own cache keeps both
        told = [{"prompt_token_ids": ids} for ids in request["before"][0]]
        said = SamplingParams(temperature=0, max_tokens=request["before"][1], ignore_eos=True)
        llm.generate(told, said, use_tqdm=False)
    rounds, seconds = [], []
    for _ in range(request.get("rounds", 1)):
        start = time.perf_counter()
        rounds.append(llm.generate(prompts, params, use_tqdm=False))
        seconds.append(time.perf_counter() - start)
    cache = llm.llm_engine.vllm_config.cache_config
    answer = {
        "tokens": [[list(one.outputs[0].token_ids) for one in outputs] for outputs in rounds],
        "logprobs": [logprobs(one.outputs[0]) for one in rounds[0]],
        "capacity": cache.num_gpu_blocks * cache.block_size,
        "seconds": seconds,
    }
    print(json.dumps(answer), flush=True)


def logprobs(output: Any) -> list[float]:
    """Of the tokens that were said."""
    return [told[token].logprob for told, token in zip(output.logprobs, output.token_ids, strict=True)]


if __name__ == "__main__":  # vLLM starts its workers by spawning
    main()
