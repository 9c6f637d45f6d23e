"""kvfold inside vLLM, on the real model: `make test-vllm`, in an environment of its own. Engines run in other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from served import NEW, answer

import kvfold
from kvfold.integration.models import load_model

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def served(codec: Path, prompts: list[list[int]]) -> dict[str, Any]:
    return answer(codec, prompts)


def agreement(codec: Path, prompts: list[list[int]], served: dict[str, Any]) -> float:
    """Of what vLLM said, read by transformers through `CompressedCache(sinks=0, window=0)`: the share of tokens that are the
    likeliest there too."""
    model, _ = load_model("smollm2")
    likeliest = 0
    with torch.no_grad(), kvfold.attach(model, kvfold.load(codec), sinks=0, window=0):
        for ids, tokens in zip(prompts, served["tokens"][0], strict=False):
            logits = model(input_ids=torch.tensor([ids + tokens[:-1]]), use_cache=True).logits[0, len(ids) - 1 :]
            likeliest += int((logits.argmax(-1) == torch.tensor(tokens)).sum())
    return likeliest / (len(served["tokens"][0]) * NEW)


def test_what_is_said_is_what_transformers_says(codec: Path, prompts: list[list[int]], served: dict[str, Any]) -> None:
    """Sums in another order turn a near-tie of the search (300,000 choices of codes for 100 tokens), and from there on the row
    has another draw of the same quantization error; without that texts are the same to the word: the next test."""
    assert agreement(codec, prompts, served) >= 0.85


def said_by_transformers(codec: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy text, a prompt and then a token at a time."""
    model, _ = load_model("smollm2")
    texts = []
    with torch.no_grad(), kvfold.attach(model, kvfold.load(codec), sinks=0, window=0):
        for ids in prompts:
            text, cache = list(ids), None
            for _ in range(NEW):
                given = torch.tensor([text if cache is None else text[-1:]])
                answer = model(input_ids=given, past_key_values=cache, use_cache=True)
                cache = answer.past_key_values
                text.append(int(answer.logits[0, -1].argmax()))
            texts.append(text[len(ids) :])
    return texts


def test_by_the_same_arithmetic_the_text_is_that_of_transformers(codec: Path, prompts: list[list[int]]) -> None:
    """Prompts one at a time, the model's code that of transformers, products PyTorch's, on one thread as here: every sum has
    the order it has there, so keys and values are the same to the last bit, and so are codes."""
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    how = {"model_impl": "transformers", "max_num_seqs": 1, "enable_prefix_caching": False}
    got = answer(codec, prompts, env=alone, engine=how, plain_products=True)
    same = sum(a == b for a, b in zip(got["tokens"][0], said_by_transformers(codec, prompts), strict=True))
    assert same >= 48


def test_pages_hold_six_times_the_tokens_of_bfloat16(prompts: list[list[int]], served: dict[str, Any]) -> None:
    plain = answer(None, prompts[:1], engine={"dtype": "bfloat16"})
    assert served["capacity"] >= 6 * plain["capacity"]


def test_chunks_prefixes_and_preemption_change_nothing(codec: Path, prompts: list[list[int]], served: dict[str, Any]) -> None:
    """Prompts in chunks of 64 tokens; room for a few rows only, so that others are put off and done again; and, in the second
    round, prefixes that are in the cache already. Codes are the same in any company, but products of other shapes round
    otherwise, which turns a text or two (21 and 22 of 24 were the same on one machine, 23 or more on another)."""
    tight = {"max_num_batched_tokens": 64, "max_num_seqs": 16, "num_gpu_blocks_override": 12, "block_size": 32}
    got = answer(codec, prompts[:24], rounds=2, engine={**tight, "max_model_len": 256, "enable_prefix_caching": True})
    for tokens in got["tokens"]:
        same = sum(a == b for a, b in zip(tokens, served["tokens"][0], strict=False))
        assert same >= 20, same


def test_three_processes_share_the_heads(codec: Path, prompts: list[list[int]]) -> None:
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|0|1"}  # three processes on the two cores that a small machine has
    got = answer(codec, prompts[:8], env=bound, engine={"tensor_parallel_size": 3})
    assert agreement(codec, prompts, got) >= 0.85


def test_the_environment_names_a_codec_too(codec: Path, prompts: list[list[int]], served: dict[str, Any]) -> None:
    got = answer(None, prompts[:2], env={"KVFOLD_CODEC": str(codec)})
    assert got["capacity"] == served["capacity"]
    assert got["tokens"][0] == served["tokens"][0][:2]


def test_a_codec_of_another_model_is_refused(tmp_path: Path, prompts: list[list[int]]) -> None:
    from small import SPEC, codec_set

    folder = tmp_path / "other"
    codec_set("rvq").save(folder)
    with pytest.raises(AssertionError, match=f"the model this codec was calibrated for .a {SPEC.model_type} of 3 layers"):
        answer(folder, prompts[:1], env={"VLLM_LOGGING_LEVEL": "ERROR"})


def test_the_backend_of_gpus_fits_vllm() -> None:
    """As far as a machine without one can tell: it is made, and what vLLM asks of it is there."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

    from kvfold.serving.vllm import GPUBackend

    assert issubclass(GPUBackend, TritonAttentionBackend)
    assert GPUBackend.get_name() == "CUSTOM"
    assert not GPUBackend.forward_includes_kv_cache_update
    with set_current_vllm_config(VllmConfig()):
        assert GPUBackend.get_impl_cls() is TritonAttentionImpl
