from __future__ import annotations

import json
from dataclasses import replace

import pytest
from small import SPEC, other_spec

from kvfold.config import LayerSpec, ModelSpec
from kvfold.errors import InputError

ROPE = SPEC.ropes[0]
DIFFERENCES = {
    "model type": {"model_type": "qwen2"},
    "query heads": {"heads": 8},
    "KV heads": {"kv_heads": 4},
    "head dim": {"head_dim": 32},
    "2 layers": {"layers": SPEC.layers[:2]},
    "layer 1": {"layers": (SPEC.layers[0], LayerSpec(True, 1), SPEC.layers[2])},
    "layer 2 with": {"layers": (*SPEC.layers[:2], LayerSpec(True, 0))},
    "RoPE": {"ropes": (replace(ROPE, factor=1.3), SPEC.ropes[1])},
    "different RoPE": {"ropes": (replace(ROPE, inv_freq=((1.0, 0.1, 0.02), ROPE.inv_freq[1])), SPEC.ropes[1])},
    "layer 0 with": {"ropes": (replace(ROPE, interleaved=False), SPEC.ropes[1])},
    "layer 0": {"ropes": (replace(ROPE, switch_length=64), SPEC.ropes[1])},
}


def test_a_spec_fits_itself_and_survives_json() -> None:
    again = ModelSpec.from_json(json.loads(json.dumps(SPEC.to_json())))
    assert again == SPEC
    assert again.fingerprint() == SPEC.fingerprint()
    SPEC.require_same(again)


@pytest.mark.parametrize("word", DIFFERENCES)
def test_each_difference_is_named_and_changes_the_fingerprint(word: str) -> None:
    other = other_spec(**DIFFERENCES[word])
    with pytest.raises(InputError, match=word):
        SPEC.require_same(other)
    assert other.fingerprint() != SPEC.fingerprint()


def test_rope_and_switch_length_are_looked_up_by_layer() -> None:
    assert [SPEC.rope(layer) for layer in range(3)] == [SPEC.ropes[0], SPEC.ropes[1], None]
    assert SPEC.switch_length == 128
    assert other_spec(ropes=SPEC.ropes[1:]).switch_length is None
