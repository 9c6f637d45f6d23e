"""What is particular to AQLM."""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest
import torch
from small import DIM, HEADS, samples
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

import kvfold
from kvfold.calibrate.ema import Ema
from kvfold.calibrate.text import builtin_text
from kvfold.codecs import build_codec, resolve_settings
from kvfold.codecs.aqlm import AdditiveFit, AqlmCodec
from kvfold.codecs.base import Facts
from kvfold.codecs.residual import ResidualCodec
from kvfold.errors import InputError

SMALL = {"group": 8, "codebook_size": 16, "stages": 2, "iterations": 5}


def demand(seed: int = 0) -> Tensor:
    """`[G, D, D]` with channels that matter and others that hardly do."""
    root = torch.randn(HEADS, DIM, DIM, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 1, DIM)
    return root.mT @ root


def fitted(facts: Facts | None = None, side: str = "value", **changes: object) -> AqlmCodec:
    codec = build_codec("aqlm", side, DIM, resolve_settings("aqlm", {**SMALL, **changes}, DIM))
    assert isinstance(codec, AqlmCodec)
    codec.fit(samples(2000), torch.Generator().manual_seed(0), facts=Facts(demand=demand()) if facts is None else facts)
    return codec


def felt(codec: ResidualCodec, x: Tensor, by: Tensor) -> float:
    """Sum of `e' M e` over vectors and groups of channels, with the blocks of `M` within the groups."""
    error = (x - codec.decode(codec.encode(x[None]))[0])[..., codec.channels]  # [G, N, P, d]
    blocks = torch.stack([by[:, c][:, :, c] for c in codec.channels], 1)
    return float(torch.einsum("gnpd,gpde,gnpe->", error, blocks, error))


@pytest.mark.parametrize("changes", [{}, {"sharing": "layer"}, {"stages": 4}, {"weight_power": 0.5}, {"group": 4}])
def test_alternation_never_raises_the_loss(changes: dict) -> None:
    losses = fitted(**changes).losses
    assert len(losses) > 1
    assert all(later <= earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]


def test_losses_are_those_of_the_codec_itself() -> None:
    """The last one, against what encode and decode do to the same samples; keeping old codes makes it a little better."""
    codec, x = fitted(), samples(2000)
    whole = torch.einsum(
        "gnpd,gpde,gnpe->",
        *(x[..., codec.channels], torch.stack([demand()[:, c][:, :, c] for c in codec.channels], 1), x[..., codec.channels]),
    )
    assert felt(codec, x, demand()) / float(whole) == pytest.approx(codec.losses[-1], rel=0.01)


@pytest.mark.parametrize("side", ["key", "value"])
def test_it_beats_residual_codes_of_the_same_shape_on_vectors_it_has_not_seen(side: str) -> None:
    codec, plain, unweighted = (fitted(side=side, **c) for c in ({}, {"rounds": 0}, {"rounds": 0, "weight_power": 0.0}))
    unseen = samples(1000, seed=9)
    assert felt(codec, unseen, demand()) < 0.98 * felt(plain, unseen, demand())
    assert felt(codec, unseen, demand()) < 0.9 * felt(unweighted, unseen, demand())
    assert codec.bits_per_element == plain.bits_per_element


@pytest.mark.parametrize("shared", [False, True])
def test_codebooks_are_those_of_least_squares(shared: bool) -> None:
    """Against `torch.linalg.lstsq` over all codewords at once, groups with forms of their own under shared codebooks."""
    draw = torch.Generator().manual_seed(0)
    heads, count, groups, dim, stages, size = 1, 60, 2, 3, 2, 4
    vectors = torch.randn(heads, count, groups, dim, generator=draw)
    scale = torch.rand(heads, count, generator=draw) + 0.5
    roots = torch.randn(heads, groups, dim, dim, generator=draw)
    book = torch.arange(stages)[:, None, None] * 2 + (0 if shared else torch.arange(2))
    book = book.expand(stages, heads, groups).contiguous()
    codes = torch.randint(size, (heads, count, stages, groups), generator=draw)
    fitting = AdditiveFit(vectors, scale, roots @ roots.mT, book)
    books = int(book.max()) + 1
    rows, right = [], []
    for n, p in itertools.product(range(count), range(groups)):
        row = torch.zeros(books, size)
        for s in range(stages):
            row[book[s, 0, p], codes[0, n, s, p]] += 1
        rows.append(scale[0, n] * torch.kron(row.flatten()[None], roots[0, p].mT.contiguous()))  # of root' C'z
        right.append(scale[0, n] * roots[0, p].mT @ vectors[0, n, p])
    system, target = torch.cat(rows).double(), torch.cat(right).double()
    exact = torch.linalg.lstsq(system, target, driver="gelsd").solution
    got = fitting.solve(torch.randn(books, size, dim, generator=draw), codes, 500)
    least = float((system @ exact - target).square().sum()) / float(scale.square().mean())
    assert float(fitting.loss(got, codes)) == pytest.approx(least, rel=1e-4)
    assert torch.allclose(system @ got.double().flatten(), system @ exact, atol=1e-3)  # what the free constants do not touch


def test_a_few_steps_of_the_solver_are_as_good_as_all() -> None:
    codec, x = fitted(rounds=0), samples(2000)
    vectors, scale = codec.scaled_groups(x)
    fitting = AdditiveFit(vectors, scale[..., 0].float(), codec._form(demand(), HEADS), codec.book)
    codes = codec._search_codes(vectors[None])[0]
    few, all_of_them = (float(fitting.loss(fitting.solve(codec.codebooks, codes, n), codes)) for n in (40, 1000))
    assert few <= 1.001 * all_of_them
    assert few < float(fitting.loss(codec.codebooks, codes))


def test_codewords_without_vectors_stay() -> None:
    codec, x = fitted(rounds=0), samples(50)
    vectors, scale = codec.scaled_groups(x)
    fitting = AdditiveFit(vectors, scale[..., 0].float(), codec._form(demand(), HEADS), codec.book)
    codes = codec._search_codes(vectors[None])[0].clamp_max(14)
    moved = fitting.solve(codec.codebooks, codes)
    assert torch.equal(moved[:, 15], codec.codebooks[:, 15].float())
    assert not torch.equal(moved[:, :15], codec.codebooks[:, :15].float())


def test_a_wide_beam_finds_the_best_sum_of_codewords() -> None:
    """Against all pairs of codewords, under the form the codec weighs with."""
    codec, x = fitted(beam=16), samples(100, seed=5)
    vectors, _ = codec.scaled_groups(x)
    form = codec._form(demand(), HEADS)
    table = codec.codebooks.float()[codec.book]  # [S, G, P, C, d]
    sums = (table[0][..., :, None, :] + table[1][..., None, :, :]).flatten(2, 3)  # [G, P, C * C, d]
    error = vectors[..., None, :] - sums[:, None]
    best = torch.einsum("gnpcd,gpde,gnpce->gnpc", error, form, error).amin(-1)
    codes = codec._search_codes(vectors[None])[0].long()  # [G, n, S, P]
    pairs = (codes[:, :, 0] * 16 + codes[:, :, 1]).transpose(1, 2)[..., None]
    decoded = sums.gather(2, pairs.expand(-1, -1, -1, 8)).transpose(1, 2)
    found = torch.einsum("gnpd,gpde,gnpe->gnp", vectors - decoded, form, vectors - decoded)
    assert float(found.sum()) <= 1.005 * float(best.sum())  # weights of the search are rounded to float16


def test_without_facts_errors_count_alike() -> None:
    codec = fitted(Facts())
    assert codec.weights is None
    assert codec.losses[-1] < codec.losses[0]


@pytest.mark.parametrize(
    ("changes", "bits"), [({}, 2.25), ({"scale_bits": 8}, 2.125), ({"stages": 3}, 3.25), ({"bits": 4.25}, 4.25)]
)
def test_bits(changes: dict, bits: float) -> None:
    codecs = [build_codec("aqlm", side, 64, resolve_settings("aqlm", changes, 64)) for side in ("key", "value")]
    assert [codec.bits_per_element for codec in codecs] == [bits, bits]
    assert [codec.pre_rope for codec in codecs] == [True, False]


def test_calibration_tells_what_the_model_demands_and_training_goes_on_from_there() -> None:
    settings = {"group": 4, "codebook_size": 16, "iterations": 3, "rounds": 2, "distill_steps": 2}
    codecs = kvfold.calibrate(
        tiny_model("qwen3"), tiny_tokenizer(), builtin_text(), "aqlm", tokens=600, context=100, settings=settings, quiet=True
    )
    for codec in (*codecs.keys, *codecs.values):
        assert isinstance(codec, AqlmCodec)
        assert codec.weights is not None
    assert codecs.info["distill"]["steps"] == 2


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="rounds of at least 0; got -1"):
        build_codec("aqlm", "key", 64, resolve_settings("aqlm", {"rounds": -1}, 64))
    model, ema = tiny_model("llama"), Ema(steps=1)
    with pytest.raises(InputError, match="a residual method for --ema-steps"):
        kvfold.calibrate(
            model, tiny_tokenizer(), builtin_text(), "aqlm", tokens=600, settings={"sharing": "layer"}, ema=ema, quiet=True
        )
