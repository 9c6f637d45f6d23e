"""Paged codes against the compressed cache with the same codecs, and laws of the layout."""

from __future__ import annotations

import pytest
import torch
from small import fit, samples
from torch import Tensor

from kvfold import ops
from kvfold.codecs.base import Reader
from kvfold.codecs.turboquant import TurboQuantCodec
from kvfold.config import RopeSpec
from kvfold.errors import InputError
from kvfold.serving.paged import PagedLayer, PageLayout, Rows

HEADS, DIM, BLOCK = 2, 16, 4
ROPE = RopeSpec((tuple(100.0 ** -(i / 8) for i in range(8)),))


@pytest.fixture(params=["rvq", "rvq-post", "turboquant"])
def layer(request: pytest.FixtureRequest) -> PagedLayer:
    return PagedLayer(fit(request.param, "key"), fit(request.param, "value"), ROPE, HEADS)


def states(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, HEADS, DIM), torch.randn(tokens, HEADS, DIM)


def poisoned(layer: PagedLayer, pages: int) -> Tensor:
    return torch.full((pages, HEADS, BLOCK, layer.layout.bytes), 255, dtype=torch.uint8)


def expected(layer: PagedLayer, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same row's attention on codes that never saw a page."""
    tokens, count = len(keys), len(query)
    at = torch.arange(tokens, dtype=torch.int32)[None]
    turn = layer._rope and ops.Rotation(at, torch.tensor(ROPE.inv_freq[0]), 1.0, False)
    placed = keys.transpose(0, 1)[None]
    coded = layer._key.encode(placed if turn is None else layer._key.unplace(placed, turn))
    slot, last = torch.arange(tokens), torch.arange(tokens - count, tokens)[:, None]
    sides = (layer._key, coded), (layer._value, layer._value.encode(values.transpose(0, 1)[None]))
    reader, seen = Reader(*sides, turn), (slot <= last)[None, None]
    return reader.attend(query.transpose(0, 1)[None], seen, 0.25, None)[0][0].transpose(0, 1)


def test_rows_of_a_mixed_batch_read_their_own_pages(layer: PagedLayer) -> None:
    """A prompt, steps of like and other lengths, an absent row and the end of a prompt in chunks, pages shuffled."""
    lengths, queries = [7, 13, 5, 0, 9, 12, 13], [7, 1, 1, 1, 4, 1, 1]
    pages = poisoned(layer, 40)
    order = torch.randperm(40)
    table = torch.full((7, 6), -1)
    rows, used, query = [], 0, []
    for row, (length, count) in enumerate(zip(lengths, queries, strict=True)):
        needed = -(-length // BLOCK)
        table[row, :needed] = order[used : used + needed]
        used += needed
        keys, values = states(length)
        slot = torch.arange(length)
        slots = table[row, slot // BLOCK] * BLOCK + slot % BLOCK
        for part in torch.arange(length).split(3) if length else ():  # in chunks
            layer.store(pages, slots[part], keys[part], values[part], slot[part])
        query.append(torch.randn(count, 2 * HEADS, DIM))
        rows.append((keys, values))
    out = layer.attend(pages, table, torch.cat(query), Rows(queries, lengths), 0.25)
    for row, part in enumerate(out.split(queries)):
        if lengths[row]:
            assert torch.allclose(part, expected(layer, query[row], *rows[row]), atol=1e-5)
        else:
            assert not part.any()


def test_a_shared_prefix_is_read_by_both_rows(layer: PagedLayer) -> None:
    pages = poisoned(layer, 8)
    table = torch.tensor([[5, 2, 0], [5, 2, 7]])
    keys, values = states(8)
    at = torch.arange(8)
    layer.store(pages, table[0, at // BLOCK] * BLOCK + at % BLOCK, keys, values, at)
    own = [states(2) for _ in range(2)]
    for row in range(2):
        layer.store(pages, table[row, 2] * BLOCK + torch.arange(2), *own[row], torch.arange(8, 10))
    query = torch.randn(2, 2 * HEADS, DIM)
    out = layer.attend(pages, table, query, Rows([1, 1], [10, 10]), 0.25)
    for row in range(2):
        whole = (torch.cat((keys, own[row][0])), torch.cat((values, own[row][1])))
        assert torch.allclose(out[row : row + 1], expected(layer, query[row : row + 1], *whole), atol=1e-5)


def test_what_is_written_is_read_and_nothing_else_changes(layer: PagedLayer) -> None:
    layout, pages = layer.layout, poisoned(layer, 3)
    keys, values = (layer._key.encode(torch.randn(1, HEADS, 5, DIM)), layer._value.encode(torch.randn(1, HEADS, 5, DIM)))
    slots = torch.tensor([9, 1, 4, 11, 2])
    layout.write(pages, slots, keys, values)
    for codes, back in zip((keys, values), layout.read(pages, torch.tensor([[0, 1, 2]]), [12]), strict=True):
        for name, tensor in codes.fields.items():
            assert back.fields[name].dtype == tensor.dtype
            assert torch.equal(back.fields[name][:, :, slots].view(torch.uint8), tensor.view(torch.uint8))
    untouched = [slot for slot in range(12) if slot not in slots.tolist()]
    assert bool((pages.transpose(1, 2).flatten(0, 1)[untouched] == 255).all())


def test_bytes_are_those_of_the_codes(layer: PagedLayer) -> None:
    bits = layer._key.bits_per_element + layer._value.bits_per_element
    assert DIM * bits / 8 <= layer.layout.bytes < DIM * bits / 8 + 4


def test_codecs_of_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="codes 4 tokens together"):
        PageLayout(fit("kivi", "key", group=4), fit("kivi", "value", group=4), HEADS)


@pytest.mark.parametrize("name", ["rvq", "rvq-post", "rvq-paper"])
def test_heads_alone_code_as_they_do_together(name: str) -> None:
    codec, x = fit(name), samples(40)[None]
    whole = codec.encode(x)
    for head in range(HEADS):
        alone = codec.for_heads(head, head + 1)
        codes = alone.encode(x[:, head : head + 1])
        for field, tensor in codes.fields.items():
            assert torch.equal(tensor, whole.fields[field][:, head : head + 1])
        assert torch.equal(alone.decode(codes), codec.decode(whole)[:, head : head + 1])
    assert codec.for_heads(0, 1).codebook_bytes <= codec.codebook_bytes


def test_heads_that_share_what_was_learned_are_not_told_apart() -> None:
    assert isinstance(fit("turboquant", outliers=0).for_heads(0, 1), TurboQuantCodec)
    with pytest.raises(InputError, match="split by heads"):
        fit("kvquant").for_heads(0, 1)
