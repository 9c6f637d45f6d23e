"""generate() on the compressed cache: every way of decoding, several turns, saving and resuming, and leaving no trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, given, padded, random_ids, tiny_codecs, tiny_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

import kvfold
from kvfold.compat import output_cache

SIZES = {"sinks": 2, "window": 5, "block": 3}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam search": {"do_sample": False, "num_beams": 4},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 7},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
}


def run(model: Any, inputs: dict[str, Tensor], how: dict[str, Any], tokens: int = 24) -> Tensor:
    torch.manual_seed(3)
    return model.generate(**inputs, max_new_tokens=tokens, **how)


def prompts(way: str) -> dict[str, Tensor]:
    if way == "prompt lookup":  # transformers: batch 1 only; a repeating prompt, so that candidates are found
        return {"input_ids": random_ids(1, 7).repeat(1, 5)}
    if way == "chunked prefill":
        return {"input_ids": random_ids(2, 30)}
    return padded([30, 21])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("way", WAYS)
def test_identity_gives_the_stock_text(family: str, way: str) -> None:
    model, inputs = tiny_model(family), prompts(way)
    want = run(model, inputs, WAYS[way])
    with kvfold.attach(model, tiny_codecs(family, "identity"), **SIZES):
        got = run(model, inputs, WAYS[way])
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("method", ["rvq", "rvq-post", "kivi"])
def test_inference_mode_changes_nothing(method: str) -> None:
    """Tensors made there do not count what is written to them; codecs that a first pass there makes ready serve later ones."""
    model, codecs, inputs = tiny_model("llama"), tiny_codecs("llama", method), prompts("greedy")
    with kvfold.attach(model, codecs, **SIZES):
        want = run(model, inputs, WAYS["greedy"])
    with torch.inference_mode(), kvfold.attach(model, tiny_codecs("llama", method), **SIZES):
        first = run(model, inputs, WAYS["greedy"])
    with kvfold.attach(model, codecs, **SIZES):
        again = run(model, inputs, WAYS["greedy"])
    assert first.tolist() == again.tolist() == want.tolist()


@pytest.mark.parametrize("method", ["rvq", "kivi"])
@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_assisted_decoding_on_codes_equals_greedy_on_codes(way: str, method: str) -> None:
    model, codecs, inputs = tiny_model("llama"), tiny_codecs("llama", method), prompts("prompt lookup")
    how = WAYS[way] if way in WAYS else {"do_sample": False, "assistant_model": tiny_model("llama")}
    with kvfold.attach(model, codecs, **SIZES) as attached:
        want = run(model, inputs, WAYS["greedy"], tokens=40)
        got = run(model, inputs, how, tokens=40)
        assert attached.cache is not None
        assert all(layer.coded > 50 for layer in attached.cache.coded_layers)
    assert got.tolist() == want.tolist()


def test_a_padded_row_reads_what_it_would_alone() -> None:
    """Windows are counted from the newest token, so a row's codes do not depend on its padding (sinks do: here none)."""
    model, codecs = tiny_model("llama"), tiny_codecs("llama")
    both = padded([40, 28])
    alone = {"input_ids": both["input_ids"][1:, 12:]}
    with kvfold.attach(model, codecs, sinks=0, window=5, block=1):
        want = run(model, alone, WAYS["greedy"])
        got = run(model, both, WAYS["greedy"])
    assert got[1, 12:].tolist() == want[0].tolist()


def test_several_turns_on_one_cache_equal_one_long_prompt() -> None:
    model, codecs = tiny_model("llama"), tiny_codecs("llama")
    with kvfold.attach(model, codecs, **SIZES) as attached:
        cache = attached.new_cache()
        ids = random_ids(1, 20)
        for turn in range(3):
            ids = model.generate(input_ids=ids, **given(model, cache), max_new_tokens=9, do_sample=False)
            if turn < 2:
                ids = torch.cat((ids, random_ids(1, 6, seed=turn)), 1)
        at_once = model.generate(input_ids=ids[:, :-9], max_new_tokens=9, do_sample=False)
    assert ids.tolist() == at_once.tolist()


@pytest.mark.parametrize("prompt", [1, 2, 3, 7, 8, 30])
def test_prompts_shorter_and_longer_than_the_window(prompt: int) -> None:
    model, inputs = tiny_model("qwen2"), {"input_ids": random_ids(1, prompt)}
    want = run(model, inputs, WAYS["greedy"])
    with kvfold.attach(model, tiny_codecs("qwen2", "identity"), **SIZES):
        got = run(model, inputs, WAYS["greedy"])
    assert got.tolist() == want.tolist()


def test_longrope_generation_crosses_its_switch_as_the_stock_model_does() -> None:
    model, inputs = tiny_model("phi3-longrope"), {"input_ids": random_ids(1, 40)}
    want = run(model, inputs, WAYS["greedy"])
    with kvfold.attach(model, tiny_codecs("phi3-longrope", "identity"), **SIZES) as attached:
        got = run(model, inputs, WAYS["greedy"])
    assert got.tolist() == want.tolist()
    assert attached.cache is not None  # Phi-3 drops its cache at the switch and computes a new one: that is coded too
    assert attached.cache.get_seq_length() > 0


def test_longrope_keys_keep_the_frequencies_they_were_rotated_with() -> None:
    """Two passes, below and above the switch: the stock cache keeps short-frequency keys, and so must the codes."""
    model = tiny_model("phi3-longrope")
    ids = random_ids(4, 70, 1)
    logits = []
    with torch.no_grad():
        for attached in (False, True):
            if attached:
                with kvfold.attach(
                    model, tiny_codecs("phi3-longrope", "rvq-paper", stages=12, codebook_size=64), **SIZES
                ) as on:
                    cache = on.new_cache()
                    model(input_ids=ids[:, :40], **given(model, cache))
                    model(input_ids=ids[:, 40:60], **given(model, cache))
                    assert len(cache.positions.regimes(0, 60)) == 2
                    logits.append(model(input_ids=ids[:, 60:], **given(model, cache)).logits)
            else:
                cache = None
                for part in ids.split([40, 20, 10], 1):
                    output = model(input_ids=part, **given(model, cache), use_cache=True)
                    cache = output_cache(output)
                logits.append(output.logits)
    stock, coded = logits
    assert float((stock - coded).abs().mean() / stock.abs().mean()) < 0.13


def test_saved_cache_continues_in_another_process(tmp_path: Path) -> None:
    model, codecs = tiny_model("gemma3"), tiny_codecs("gemma3")
    codecs.save(tmp_path / "codecs")
    prompt = random_ids(2, 40)
    with kvfold.attach(model, codecs, **SIZES) as attached:
        ids = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False)
        assert attached.cache is not None
        attached.cache.save(tmp_path / "cache.safetensors", ids)
        want = model.generate(input_ids=ids, **given(model, attached.cache), max_new_tokens=10, do_sample=False)
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import kvfold
from tiny import given, tiny_model
model = tiny_model("gemma3")
codecs = kvfold.load({str(tmp_path / "codecs")!r})
cache = kvfold.load_cache({str(tmp_path / "cache.safetensors")!r}, codecs, model.config)
with kvfold.attach(model, codecs):
    ids = model.generate(input_ids=cache.input_ids, **given(model, cache), max_new_tokens=10, do_sample=False)
print(ids.tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(want.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
def test_a_model_cast_to_another_dtype_keeps_its_codecs(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """`model.to(dtype)` rounds the RoPE frequencies too, so the cache has to rotate by the model's own."""
    model, codecs = tiny_model(family).to(dtype), tiny_codecs(family, "rvq", stages=6, codebook_size=64)
    ids = random_ids(1, 200)
    with torch.no_grad():
        want = model(input_ids=ids).logits.float()
        with kvfold.attach(model, codecs, **SIZES) as attached:
            got = model(input_ids=ids).logits.float()
            assert attached.cache is not None
            attached.cache.save(tmp_path / "cache")
    assert kvfold.load_cache(tmp_path / "cache", codecs, model.config).get_seq_length() == 200
    assert attached.cache.coded_layers[0].exact["keys"].dtype == dtype
    exact = tiny_model(family)
    with torch.no_grad(), kvfold.attach(exact, codecs, **SIZES):
        loss = (exact(input_ids=ids).logits - tiny_model(family)(input_ids=ids).logits).square().mean()
    assert float((got - want).square().mean()) < 2 * float(loss) + 0.01


@pytest.mark.parametrize("family", CONFIGS)
def test_attach_leaves_nothing_behind(family: str) -> None:
    model = tiny_model(family)
    before = (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    own = set(vars(model))

    def fail_midway() -> None:
        with kvfold.attach(model, tiny_codecs(family)):
            assert model.config._attn_implementation == "kvfold"
            model.generate(input_ids=random_ids(1, 5), max_new_tokens=2)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert model.config._attn_implementation == "eager"
    assert (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping) == before
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert set(vars(model)) == own


def test_two_models_attached_at_once_and_one_left_first() -> None:
    first, second = tiny_model("llama"), tiny_model("qwen3")
    inputs = {"input_ids": random_ids(1, 30)}
    with kvfold.attach(second, tiny_codecs("qwen3"), **SIZES):
        want = run(second, inputs, WAYS["greedy"])
        with kvfold.attach(first, tiny_codecs("llama"), **SIZES):
            run(first, inputs, WAYS["greedy"])
        assert run(second, inputs, WAYS["greedy"]).tolist() == want.tolist()


def test_attaching_twice_is_refused() -> None:
    model = tiny_model("llama")
    with (
        kvfold.attach(model, tiny_codecs("llama")),
        pytest.raises(kvfold.InputError, match="not attached"),
        kvfold.attach(model, tiny_codecs("llama")),
    ):
        pass


def test_another_cache_asked_for_by_name_is_refused() -> None:
    model = tiny_model("llama")
    with kvfold.attach(model, tiny_codecs("llama")), pytest.raises(kvfold.InputError, match="cache_implementation"):
        model.generate(input_ids=random_ids(1, 5), max_new_tokens=2, cache_implementation="static")


def test_use_cache_false_makes_no_cache() -> None:
    model = tiny_model("llama")
    ids = random_ids(1, 30)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        with kvfold.attach(model, tiny_codecs("llama"), sinks=0, window=0) as attached:
            got = model(input_ids=ids, use_cache=False).logits
            assert attached.cache is None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
