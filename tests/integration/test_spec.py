"""What is read off a model, and what is refused by name with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from tiny import CONFIGS, tiny_codecs, tiny_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import kvfold
from kvfold.config import ModelSpec
from kvfold.integration.attach import hooked
from kvfold.integration.capture import CaptureCache
from kvfold.integration.spec import model_spec

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_spec_survives_json(family: str) -> None:
    spec = model_spec(tiny_model(family))
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    assert again.fingerprint() == spec.fingerprint()


@pytest.mark.parametrize("family", CONFIGS)
def test_reading_a_model_leaves_its_frequencies_alone(family: str) -> None:
    model = tiny_model(family)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model_spec(model)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


def test_sliding_layers_stay_exact_unless_all_slide() -> None:
    assert [layer.coded for layer in model_spec(tiny_model("gemma3")).layers] == [False, True, True]
    assert all(layer.coded for layer in model_spec(tiny_model("mistral-sliding")).layers)


@pytest.mark.parametrize(
    ("config", "interleaved"),
    [
        (tf.CohereConfig(**SMALL), True),
        (tf.GlmConfig(**SMALL, head_dim=16), True),
        (tf.PhiConfig(**SMALL), False),
        (tf.OlmoConfig(**SMALL), False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_pair_layouts_are_undone(config: Any, interleaved: bool) -> None:
    """The keys the codec is given are the projection's outputs, before RoPE."""
    model = build(config)
    spec = model_spec(model)
    assert spec.ropes[0].interleaved is interleaved
    seen: list[torch.Tensor] = []
    project = model.model.layers[0].self_attn.k_proj
    handle = project.register_forward_hook(lambda m, a, out: seen.append(out))
    cache = CaptureCache(spec, pre_rope=True)
    cache.choose(torch.arange(30))
    with torch.no_grad(), hooked(model, lambda: cache):
        model(input_ids=torch.arange(3, 33)[None])
    handle.remove()
    keys, _ = cache.samples(0)
    want = seen[0].view(30, spec.kv_heads, spec.head_dim).transpose(0, 1)
    torch.testing.assert_close(keys, want, rtol=1e-5, atol=1e-5)


REFUSED = [
    (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=97, d_model=32, d_ff=32, num_layers=1, num_heads=2)),
        "encoder-decoder",
    ),
    (
        lambda: tf.DeepseekV3ForCausalLM(
            tf.DeepseekV3Config(
                **{**SMALL, "num_key_value_heads": 4, "num_hidden_layers": 1},
                kv_lora_rank=16,
                q_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=16,
                first_k_dense_replace=1,
            )
        ),
        "MLA",
    ),
    (lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)), "no"),
    (
        lambda: build(tf.LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
        "dynamic RoPE",
    ),
    (
        lambda: tf.Qwen2VLForConditionalGeneration(
            tf.Qwen2VLConfig(
                text_config={
                    **SMALL,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                },
                vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
            )
        ),
        "multimodal RoPE",
    ),
    (
        lambda: build(
            tf.GptOssConfig(
                **SMALL, head_dim=16, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2
            )
        ),
        "sinks",
    ),
    (lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2)), "attention"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_unsupported_models_are_refused_by_name_with_the_reason(make: Any, reason: str) -> None:
    model = make()
    with pytest.raises(kvfold.UnsupportedModelError) as caught:
        model_spec(model)
    assert model.config.get_text_config(decoder=True).model_type in str(caught.value)
    assert reason in str(caught.value)


def test_a_codec_of_another_model_is_refused() -> None:
    for family, difference in (("qwen2", "model type"), ("llama-yarn", "RoPE")):
        with pytest.raises(kvfold.InputError, match=difference), kvfold.attach(tiny_model(family), tiny_codecs("llama")):
            pass
