"""Projections and second moments of queries (`kvfold/integration/facts.py`)."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, random_ids, tiny_model

from kvfold import ops
from kvfold.errors import UnsupportedModelError
from kvfold.integration.facts import demands, facts_of, projections
from kvfold.integration.spec import attention_modules, model_spec

IDS = random_ids(1, 60)[0]
NORMALISED = ("qwen3", "gemma3")


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in NORMALISED])
def test_every_family_with_plain_projections_passes_the_check_on_a_real_pass(family: str) -> None:
    model = tiny_model(family)
    spec = model_spec(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    found = projections(model, spec, IDS)
    assert len(found) == len(spec.layers)
    for layer, pair in zip(spec.layers, found, strict=True):
        for weights in pair:
            assert (weights is not None) == layer.coded
            if weights is not None:
                assert weights.shape[:2] == (spec.kv_heads, spec.head_dim)
                assert weights.shape[2] - 64 in (0, 1)  # 1 with a bias
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_check_too(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    key, _ = projections(model, model_spec(model), IDS)[0]
    assert key is not None
    assert torch.equal(key.flatten(0, 1), model.model.layers[0].self_attn.k_proj.weight.float())


@pytest.mark.parametrize("family", NORMALISED)
def test_keys_that_are_normalised_are_refused_by_name(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Attention: its keys are normalised after the projection \(k_norm\)"):
        projections(tiny_model(family), model_spec(tiny_model(family)), IDS)


def test_values_meet_the_gram_matrix_of_the_output_projection() -> None:
    """Against the output itself: `e' demand e` is the squared error at the layer's output, were all heads to read the value."""
    model = tiny_model("llama")
    spec = model_spec(model)
    found = demands(model, spec, [IDS], True, seed(), quiet=True)
    error = torch.randn(spec.kv_heads, spec.head_dim)
    for index, module in attention_modules(model).items():
        for head in range(spec.kv_heads):
            total = 0.0
            for query_head in (2 * head, 2 * head + 1):
                only = torch.zeros(spec.heads, spec.head_dim)
                only[query_head] = error[head]
                total += float(module.o_proj(only.flatten()).detach().square().sum())
            assert float(error[head] @ found[index][1][head] @ error[head]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-yarn"])
def test_keys_meet_the_queries_that_look_at_them(family: str) -> None:
    """Mean squared change of logits by an error of keys before RoPE, over all causal pairs, from the queries' projection."""
    model = tiny_model(family)
    spec, rope = model_spec(model), model_spec(model).ropes[0]
    windows = [random_ids(1, 60, n)[0] for n in range(60)]
    found = demands(model, spec, windows, True, seed(), quiet=True)
    queries: list[torch.Tensor] = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *a: queries.append(a[2].detach()))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    hook.remove()
    at = torch.arange(60)[None]
    turn = lambda x: ops.rotate(x, at, torch.tensor(rope.inv_freq[0]), rope.factor, rope.interleaved)  # noqa: E731
    errors = torch.randn(20, spec.head_dim, generator=torch.Generator().manual_seed(1))
    causal = torch.ones(60, 60).tril()
    for head in range(spec.kv_heads):
        q = torch.cat([turn(x.view(1, 60, 4, 16).transpose(1, 2)) for x in queries])[:, 2 * head : 2 * head + 2]
        for error in errors:
            logits = q @ turn(error.expand(1, 1, 60, 16)).mT / 4  # [windows, 2, Q, T]
            mean = ((logits.square() * causal).sum(-1) / causal.sum(-1)).sum(1).mean()
            got = float(error @ found[1][0][head] @ error)
            assert got == pytest.approx(float(mean), rel=0.1)  # one key is drawn a query: 3600 draws


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("pre_rope", [True, False])
def test_every_family_has_demands(family: str, pre_rope: bool) -> None:
    model = tiny_model(family)
    spec = model_spec(model)
    found = demands(model, spec, [IDS, IDS[:20]], pre_rope, seed(), quiet=True)
    for layer, pair in zip(spec.layers, found, strict=True):
        for moment in pair:
            assert (moment is not None) == layer.coded
            if moment is not None:
                assert moment.shape == (spec.kv_heads, spec.head_dim, spec.head_dim)
                assert float(torch.linalg.eigvalsh(moment.double()).min()) > -1e-4 * float(moment.abs().max())
                assert float(moment.abs().max()) > 0


def test_a_query_is_turned_back_by_the_position_of_its_key() -> None:
    """The first token sees but itself: its moment is that of the query before RoPE, exactly."""
    model = tiny_model("llama")
    got = demands(model, model_spec(model), [IDS[:1]], True, seed(), quiet=True)
    plain = demands(model, model_spec(model), [IDS[:1]], False, seed(), quiet=True)
    for (one, _), (other, _) in zip(got, plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_only_what_is_wanted_is_measured_and_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gemma3").train()
    spec, before = model_spec(model), model.config._attn_implementation
    none = facts_of(model, spec, frozenset(), [], True, seed(), quiet=True)
    assert all(fact.demand is fact.projection is fact.sensitivity is None for pair in none for fact in pair)
    facts = facts_of(model, spec, frozenset({"demand"}), [IDS], True, seed(), quiet=True)
    assert [pair[0].demand is not None for pair in facts] == [layer.coded for layer in spec.layers]
    assert all(fact.projection is fact.sensitivity is None for pair in facts for fact in pair)
    assert (model.training, model.config._attn_implementation) == (True, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
