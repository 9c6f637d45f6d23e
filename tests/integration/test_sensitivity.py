"""Second moments of the loss's gradient by keys and values (`kvfold/integration/sensitivity.py`)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny import random_ids, tiny_model

from kvfold.integration.sensitivity import sensitivities
from kvfold.integration.spec import model_spec


def by_hooks(model: Any, ids: torch.Tensor, drawn: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same of a Llama, from zeros added to the projections' outputs."""
    leaves, handles = [], []
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):

            def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
                leaves.append(torch.zeros_like(output, requires_grad=True))
                return output + leaves[-1]

            handles.append(projection.register_forward_hook(add))
    likelihoods = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(-likelihoods.gather(1, drawn).sum(), leaves)
    moments = []
    for gradient in gradients:
        heads = gradient[0].unflatten(-1, (2, 16)).transpose(0, 1)[:, 1:]
        moments.append(heads.mT @ heads)
    return list(zip(moments[::2], moments[1::2], strict=True))


def test_moments_are_those_of_the_gradient_by_the_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.integration.sensitivity.reduced_precision", lambda model: nullcontext())
    model, ids = tiny_model("llama"), random_ids(1, 30)[0]
    got = sensitivities(model, model_spec(model), [ids], True, torch.Generator().manual_seed(3), quiet=True)
    with torch.no_grad():
        shares = model(input_ids=ids[None]).logits[0].softmax(-1)
    drawn = torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(3))
    for (key, value), (want_key, want_value) in zip(got, by_hooks(model, ids, drawn), strict=True):
        for moment, want in ((key, want_key), (value, want_value)):
            scale = float(want.abs().max())
            assert scale > 0
            assert float((moment - want).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt-neox", "phi3"])
@pytest.mark.parametrize("pre_rope", [True, False])
def test_every_family_has_them_and_is_left_as_it_was(family: str, pre_rope: bool) -> None:
    model = tiny_model(family)
    spec, before = model_spec(model), {name: t.clone() for name, t in model.state_dict().items()}
    windows = [random_ids(1, 30, seed)[0] for seed in (1, 2)]
    generator = torch.Generator().manual_seed(0)
    got = sensitivities(model.train(), spec, windows, pre_rope, generator, quiet=True)
    assert model.training
    model.eval()
    assert len(got) == len(spec.layers)
    for pair in got:
        for moment in pair:
            assert moment.shape == (spec.kv_heads, spec.head_dim, spec.head_dim)
            assert float(torch.linalg.eigvalsh(moment.double()).min()) > -1e-3 * float(moment.abs().max())
            assert float(moment.abs().max()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_first_token_does_not_count() -> None:
    model = tiny_model("llama")
    alone = sensitivities(model, model_spec(model), [torch.tensor([5])], True, torch.Generator(), quiet=True)
    assert all(not moment.any() for pair in alone for moment in pair)
