"""Tiny random models of every supported family, and codecs fitted on random text of theirs."""

from __future__ import annotations

import functools
import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvfold.cache.cache import CompressedCache
from kvfold.codecs import METHODS, build_codec, resolve_settings
from kvfold.codecs.artifact import CodecSet
from kvfold.codecs.base import Facts
from kvfold.compat import cache_argument
from kvfold.integration.attach import hooked
from kvfold.integration.capture import CaptureCache
from kvfold.integration.spec import model_spec

VOCAB = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "head_dim": 16,
}


def _without(*names: str) -> dict[str, Any]:
    return {k: v for k, v in _COMMON.items() if k not in names}


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 5.0],
    "original_max_position_embeddings": 48,
    "partial_rotary_factor": 0.75,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "llama-llama3-rope": lambda: LlamaConfig(**_COMMON, rope_parameters=_LLAMA3),
    "llama-yarn": lambda: LlamaConfig(**_COMMON, rope_parameters=_YARN),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**_COMMON, sliding_window=12),
    "qwen2": lambda: Qwen2Config(**_without("head_dim")),
    "qwen3": lambda: Qwen3Config(**_COMMON),
    "gemma2": lambda: Gemma2Config(
        **_COMMON, sliding_window=12, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=10.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_COMMON,
        sliding_window=12,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "phi3": lambda: Phi3Config(**_without("head_dim")),
    "phi3-longrope": lambda: Phi3Config(**_without("head_dim"), original_max_position_embeddings=48, rope_parameters=_LONGROPE),
    "gpt-neox": lambda: GPTNeoXConfig(
        **_without("head_dim", "num_key_value_heads"),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
}


@functools.cache
def _weights(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).state_dict()


def tiny_model(family: str) -> PreTrainedModel:
    """A fresh model of the family, always the same weights, eval mode, eager attention (the one that knows soft caps)."""
    _, state = _weights(family)
    config = CONFIGS[family]()
    config._attn_implementation = "eager"
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model.load_state_dict(state)
    return model.eval()


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, ids below `VOCAB`."""
    characters = string.ascii_letters + string.digits + " .,:;!?()'-/\n*`_<>=[]"
    vocab = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{c: i + 3 for i, c in enumerate(characters)}}
    assert len(vocab) <= VOCAB
    raw = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    raw.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


def given(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` under the name that this transformers version's models take it by."""
    name = cache_argument(model)
    assert name is not None
    return {name: cache}


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A left-padded batch of rows of these lengths."""
    longest = max(lengths)
    ids = random_ids(len(lengths), longest, seed)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


@functools.cache
def tiny_codecs(family: str, method: str = "rvq", **changes: Any) -> CodecSet:
    """Codecs fitted on keys and values of random tokens."""
    model = tiny_model(family)
    spec = model_spec(model)
    small = {"group": 4, "codebook_size": 16, "stages": 2, "iterations": 3, "inner": 4, "block": 4}
    small = {name: value for name, value in small.items() if name in METHODS[method].defaults}
    settings = resolve_settings(method, {**small, **changes}, spec.head_dim)
    generator = torch.Generator().manual_seed(0)
    cache = CaptureCache(spec, build_codec(method, "key", spec.head_dim, settings).reads_positions)
    cache.choose(torch.arange(40))
    with torch.no_grad(), hooked(model, lambda: cache):
        for seed in range(4):
            model(input_ids=random_ids(1, 40, 100 + seed), use_cache=True)
    sides = []
    samples = [cache.samples(i) for i in range(len(spec.layers))]
    for side, number in (("key", 0), ("value", 1)):
        codecs = []
        for index, (layer, pair) in enumerate(zip(spec.layers, samples, strict=True)):
            codec = build_codec(method, side, spec.head_dim, settings, index) if layer.coded else None
            if codec is not None:
                codec.fit(pair[number], generator, facts=Facts(place=functools.partial(cache.place, index)))
            codecs.append(codec)
        sides.append(tuple(codecs))
    return CodecSet(method, settings, spec, *sides, info={})


def bytes_at(cache: CompressedCache, tokens: int, level: int = 0) -> int:
    """What `tokens` take, a row, if all that may be coded is at `level`."""
    return int(cache._exact_bytes(tokens, 1) + (tokens - cache.sinks) * cache._token_bytes(1)[level])
