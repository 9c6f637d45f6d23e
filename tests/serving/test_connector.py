"""Prefixes that outlive vLLM (`kvfold/serving/connector.py`), on the real model: `make test-vllm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from served import answer

from kvfold.calibrate.text import builtin_text
from kvfold.integration.models import load_model

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm


def connector(folder: Path, **more: Any) -> dict[str, Any]:
    told = {"kv_connector": "PrefixConnector", "kv_connector_module_path": "kvfold.serving.connector", "kv_role": "kv_both"}
    return {"kv_transfer_config": {**told, "kv_connector_extra_config": {"folder": str(folder), **more}}, "block_size": 32}


def plain(folder: Path) -> dict[str, Any]:
    told = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    return {"kv_transfer_config": {**told, "kv_connector_extra_config": {"shared_storage_path": str(folder)}}, "block_size": 32}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in files(folder))


@pytest.fixture(scope="module")
def long_prompt() -> list[int]:
    _, tokenizer = load_model("smollm2")
    ids = tokenizer("\n\n".join(builtin_text())[:40_000], verbose=False)["input_ids"]
    return ids[:4128]


def test_a_process_takes_up_what_another_left(codec: Path, long_prompt: list[int], tmp_path: Path) -> None:
    """Of 4,128 tokens 4,096 are read from disk: the same text, in a quarter of the time to the first token."""
    engine = {**connector(tmp_path), "max_model_len": 4352}
    first = answer(codec, [long_prompt], tokens=1, engine=engine)
    assert len(files(tmp_path)) == len(long_prompt) // 32
    second = answer(codec, [long_prompt], tokens=1, engine=engine)
    assert second["tokens"] == first["tokens"]
    assert second["seconds"][0] <= first["seconds"][0] / 4, (first["seconds"], second["seconds"])
    assert len(files(tmp_path)) == len(long_prompt) // 32


def test_a_token_takes_a_sixth_of_what_vllms_example_writes(codec: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    prompt = (prompts[49] * 3)[:513]
    answer(codec, [prompt], tokens=1, engine=connector(tmp_path / "codes"))
    answer(None, [prompt], tokens=1, engine={**plain(tmp_path / "plain"), "dtype": "bfloat16"})
    tokens = len(files(tmp_path / "codes")) * 32
    assert tokens == 512
    assert size(tmp_path / "codes") / 512 <= size(tmp_path / "plain") / 512 / 6


def test_answers_are_kept_too_and_other_prompts_share_prefixes(codec: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    first = answer(codec, prompts[20:24], tokens=60, engine=connector(tmp_path))
    told = [prompt + said for prompt, said in zip(prompts[20:24], first["tokens"][0], strict=True)]
    assert len(files(tmp_path)) == sum((len(ids) - 1) // 32 for ids in told)  # the last token said was not read yet
    again = [*told, prompts[20][:64] + prompts[30]]
    # To the word what an engine says that kept them in its own memory; without any, products of other shapes round otherwise.
    want = answer(codec, again, engine={"block_size": 32, "enable_prefix_caching": True}, before=[prompts[20:24], 60])
    assert answer(codec, again, engine=connector(tmp_path))["tokens"] == want["tokens"]


def test_damaged_files_are_computed_anew(codec: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    """Found before the pass, and, where the scheduler had found a file whole, in it."""
    first = answer(codec, prompts[40:44], engine=connector(tmp_path))
    for number, file in enumerate(files(tmp_path)):
        if number % 3 == 0:
            file.write_bytes(file.read_bytes()[:-7])
    second = answer(codec, prompts[40:44], engine=connector(tmp_path))
    assert second["tokens"] == first["tokens"]


def test_the_limit_holds(codec: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    gib = 20 * 110_000 / 2**30
    answer(codec, prompts, tokens=1, engine=connector(tmp_path, max_gib=gib))
    assert 0 < size(tmp_path) <= 1.1 * gib * 2**30


def test_three_processes_keep_their_heads(codec: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|0|1"}
    engine = {**connector(tmp_path), "tensor_parallel_size": 3}
    first = answer(codec, prompts[40:42], env=bound, engine=engine, rounds=2)  # the second from vLLM's own cache
    assert len({file.name.split(".")[1] for file in files(tmp_path)}) == 3
    second = answer(codec, prompts[40:42], env=bound, engine=engine)
    assert second["tokens"][0] == first["tokens"][1]


def test_without_a_codec_or_a_folder_it_refuses(codec: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a codec, whose codes are kept"):
        answer(None, prompts[:1], engine=connector(tmp_path))
    engine = connector(tmp_path)
    engine["kv_transfer_config"]["kv_connector_extra_config"] = {"place": "x"}
    with pytest.raises(AssertionError, match="for the connector"):
        answer(codec, prompts[:1], engine=engine)
