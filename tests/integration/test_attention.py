"""Masks and the attention function that a model runs while kvfold is attached, by themselves."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import nn

from kvfold.integration.attention import codes_attention, codes_mask

CAUSAL = torch.ones(8, 8, dtype=torch.bool).tril()


@pytest.mark.parametrize("asked", [1, 3, 8])
def test_plain_causal_attention_needs_no_mask(asked: int) -> None:
    given = {"batch_size": 2, "q_length": asked, "kv_length": 8, "q_offset": 8 - asked}
    assert codes_mask(**given) is None
    assert codes_mask(**given, attention_mask=torch.ones(2, 8, dtype=torch.bool)) is None


@pytest.mark.parametrize("asked", [3, 8])
def test_anything_else_gets_one(asked: int) -> None:
    given = {"batch_size": 2, "q_length": asked, "kv_length": 8, "q_offset": 8 - asked}
    there = torch.ones(2, 8, dtype=torch.bool)
    there[1, :2] = False
    padded = codes_mask(**given, attention_mask=there)
    assert padded is not None
    assert torch.equal(padded, (CAUSAL[-asked:] & there[:, None])[:, None])
    forced = codes_mask(**given, allow_is_causal_skip=False)
    assert forced is not None
    assert torch.equal(forced, CAUSAL[-asked:].expand(2, 1, -1, -1))
    assert codes_mask(**given, local_size=4) is not None


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("asked", [1, 3, 8])
def test_a_layer_that_stays_exact_is_causal_behind_earlier_tokens_too(asked: int, softcap: float | None) -> None:
    module = nn.Module()
    module.is_causal, module.num_key_value_groups, module.training = True, 2, False
    query, keys, values = torch.randn(2, 4, asked, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    out, weights = codes_attention(module, query, keys, values, None, scaling=0.25, softcap=softcap)
    right = reference.attention(query, keys, values, CAUSAL[-asked:], 0.25, softcap)[0]
    assert weights is None
    assert torch.allclose(out.transpose(1, 2).double(), right, atol=1e-5)
