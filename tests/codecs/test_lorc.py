"""What is particular to LoRC."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from small import DIM, HEADS
from tiny import random_ids, tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.text import builtin_text
from kvfold.codecs import METHODS, build_codec, resolve_settings
from kvfold.codecs.base import Facts
from kvfold.codecs.lorc import LorcCodec, directions, ranks
from kvfold.errors import InputError, UnsupportedModelError

WEIGHTS = torch.randn(HEADS, DIM, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, DIM)[:, None]
INPUT = torch.randn(500, 40, generator=torch.Generator().manual_seed(1))
KEYS = INPUT @ WEIGHTS.mT  # [G, N, D]


def codec(rank: int, bits: int = 16, weights: torch.Tensor = WEIGHTS, latent: str = "joint") -> LorcCodec:
    made = LorcCodec(DIM, rank, bits, latent)
    made.fit(KEYS, torch.Generator().manual_seed(0), facts=Facts(projection=weights))
    return made


@pytest.mark.parametrize("latent", ["joint", "own"])
def test_a_full_rank_is_exact(latent: str) -> None:
    made = codec(DIM, latent=latent)
    decoded = made.decode(made.encode(KEYS[None]))[0]
    assert float((decoded - KEYS).norm() / KEYS.norm()) < 2**-11  # float16 rounds to 2^-12 on average at most


@pytest.mark.parametrize("rank", [1, 5, 12, 15])
def test_weights_of_all_heads_lose_the_tail_of_their_singular_values(rank: int) -> None:
    """Eckart and Young: no weights of this rank are nearer. Columns of weights pass through the codec as keys would."""
    made = codec(rank)
    cut = made.decode(made.encode(WEIGHTS.mT[None]))[0].mT.flatten(0, 1)
    whole = WEIGHTS.flatten(0, 1)
    tail = torch.linalg.svdvals(whole)[HEADS * rank :].square().sum()
    assert torch.allclose((whole - cut).square().sum(), tail, rtol=2e-3)  # float16
    assert int(torch.linalg.matrix_rank(cut, rtol=1e-4)) == HEADS * rank


@pytest.mark.parametrize("rank", [1, 5, 12, 15])
def test_weights_of_a_head_lose_the_tail_of_their_singular_values(rank: int) -> None:
    made = codec(rank, latent="own")
    cut = made.decode(made.encode(WEIGHTS.mT[None]))[0].mT
    tail = torch.linalg.svdvals(WEIGHTS)[:, rank:].square().sum(1)
    assert torch.allclose((WEIGHTS - cut).square().sum((1, 2)), tail, rtol=2e-3)  # float16
    assert int(torch.linalg.matrix_rank(cut[0], rtol=1e-4)) == rank


def test_the_latent_is_what_the_narrow_weights_make_of_the_input() -> None:
    """`c = S_r V_r' x`, from torch's own decomposition; signs are free."""
    left, values, right = torch.linalg.svd(WEIGHTS, full_matrices=False)
    made = codec(6, latent="own")
    assert made.basis is not None
    expected = INPUT @ (values[:, :6, None] * right[:, :6]).mT
    signs = (made.basis * left.mT[:, :6]).sum(2).sign()[:, None]
    got = made.latent(made.encode(KEYS[None]))[0]
    assert torch.allclose(got * signs, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_a_joint_latent_loses_no_more_than_own_ones() -> None:
    """Of the weights. Heads that are mixtures of each other's channels need but one latent."""
    columns = WEIGHTS.mT
    assert codec(6).distortion(columns) <= codec(6, latent="own").distortion(columns)
    alike = WEIGHTS[:1].repeat(HEADS, 1, 1)
    both = codec(DIM // HEADS, weights=alike), codec(DIM // HEADS, weights=alike, latent="own")
    keys = INPUT @ alike.mT
    assert both[0].distortion(keys) < 1e-6 < both[1].distortion(keys)


def test_principal_components_of_samples_lose_the_least() -> None:
    made = LorcCodec(DIM, 6, basis_of="samples")
    made.fit(KEYS + 3, torch.Generator())
    assert not made.wants
    assert made.distortion(KEYS + 3) < codec(6).distortion(KEYS + 3)


def test_directions_are_orthonormal_and_ordered() -> None:
    rows, values = directions(WEIGHTS)
    assert torch.allclose(rows @ rows.mT, torch.eye(DIM), atol=1e-5)
    assert torch.allclose(values.float(), torch.linalg.svdvals(WEIGHTS), rtol=1e-4)


def test_a_bias_is_a_column_whose_input_is_1() -> None:
    shift = 5 * torch.randn(HEADS, DIM, 1)
    biased = codec(6, weights=torch.cat((WEIGHTS, shift), 2))
    moved = KEYS + shift.mT
    assert biased.distortion(moved) < codec(6).distortion(moved)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.01), (4, 0.1)])
def test_latents_of_fewer_bits_cost_little_more(bits: int, limit: float) -> None:
    exact, coded = codec(12), codec(12, bits)
    assert coded.bits_per_element == (12 * bits + 32) / DIM
    assert 0 <= coded.distortion(KEYS) - exact.distortion(KEYS) < limit


@pytest.mark.parametrize(("mean", "least"), [(0.5, 0.25), (0.4, 0.1), (0.9, 0.5), (0.25, 0.25), (1.0, 0.5)])
@pytest.mark.parametrize("conditions", [[3.0, 4.0, 2.0, 5.0, 1.0, 2.5, 9.0], [1.0], [0.0, 0.0], [8.0, 0.1, 0.1, 0.1, 0.1]])
def test_ranks_fall_with_the_layers_and_meet_the_mean(conditions: list[float], mean: float, least: float) -> None:
    got = ranks(conditions, mean, least, 64)
    assert sum(got) == round(mean * 64 * len(got))
    assert all(1 <= later <= earlier <= 64 for earlier, later in pairwise(got))  # what is left to amplify an error only falls


def test_ranks_follow_the_formula() -> None:
    """By hand: log kappa 2, 1, 1 is cumulative 4, 2, 1, so falls of 0, 2/3, 1 between 54 and 18 for a mean of 34."""
    assert ranks([2.0, 1.0, 1.0], 34 / 64, 18 / 64, 64) == [54, 30, 18]


def test_where_the_head_dim_is_the_limit_the_least_gives_way() -> None:
    assert ranks([1.0, 1.0, 1.0], 0.9, 0.25, 60) == [60, 54, 48]


def test_calibration_gives_every_layer_its_rank() -> None:
    model = tiny_model("llama")
    codecs = kvfold.calibrate(
        model, tiny_tokenizer(), builtin_text(), "lorc", tokens=600, context=100, settings={"rank": 0.6}, quiet=True
    )
    found = [codec.rank for codec in codecs.keys if isinstance(codec, LorcCodec)]
    assert found == [codec.rank for codec in codecs.values if isinstance(codec, LorcCodec)]
    assert (sum(found), len(found)) == (29, 3)
    assert found[0] > found[1] > found[2]
    weights = [(m.self_attn.k_proj.weight, m.self_attn.v_proj.weight) for m in model.model.layers]
    conditions = [sum(float(torch.linalg.cond(w.detach().double()).log()) for w in pair) for pair in weights]
    assert found == ranks(conditions, 0.6, 0.25, 16)
    assert codecs.bits_per_element == pytest.approx(16 * 29 / 48)
    assert codecs.info["distortion"][0][0] < codecs.info["distortion"][2][0]


def test_a_full_rank_leaves_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("gpt-neox"), random_ids(1, 40)
    settings = {"rank": 1.0, "least": 1.0}
    codecs = kvfold.calibrate(model, tiny_tokenizer(), builtin_text(), "lorc", tokens=300, settings=settings, quiet=True)
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits.log_softmax(-1)
        with kvfold.attach(model, codecs, sinks=0, window=0, block=1):
            coded = model(ids, use_cache=True).logits.log_softmax(-1)
    assert float((exact.exp() * (exact - coded)).sum(-1).mean()) < 1e-4  # float16 latents


def test_a_model_with_normalised_keys_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="normalised after the projection"):
        kvfold.calibrate(tiny_model("qwen3"), tiny_tokenizer(), builtin_text(), "lorc", tokens=300, quiet=True)


def test_its_keys_may_be_learned_from_instead() -> None:
    settings = {"basis_of": "samples", "latent": "own"}
    model, tokenizer = tiny_model("qwen3"), tiny_tokenizer()
    codecs = kvfold.calibrate(model, tokenizer, builtin_text(), "lorc", tokens=300, settings=settings, quiet=True)
    assert codecs.bits_per_element == 8


def test_another_number_of_heads_is_refused() -> None:
    for latent in ("joint", "own"):
        with pytest.raises(InputError, match="2 KV heads; got 3"):
            codec(6, latent=latent).encode(torch.randn(1, 3, 4, DIM))


@pytest.mark.parametrize(
    "changes", [{"rank": 0}, {"rank": 1.5}, {"least": 0.7}, {"least": 0}, {"bits": 12}, {"bits": 0}, {"latent": "no"}]
)
def test_bad_settings_are_refused(changes: dict) -> None:
    with pytest.raises(InputError, match=r"expected .+; got .+; .+\."):
        build_codec("lorc", "key", 64, resolve_settings("lorc", changes, 64))


def test_only_keys_are_taken_before_rope() -> None:
    sides = [build_codec("lorc", side, 64, METHODS["lorc"].defaults) for side in ("key", "value")]
    assert [codec.pre_rope for codec in sides] == [True, False]
