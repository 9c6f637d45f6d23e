"""What the compiled CPU ops refuse, every instruction set that runs here, before they read past anything."""

from __future__ import annotations

import pytest
import torch
from coded import coded, rotation

from kvfold import ops
from kvfold.ops import native

pytestmark = [pytest.mark.skipif(not native.available_isas(), reason=native.MISSING), pytest.mark.usefixtures("isa")]


@pytest.mark.parametrize("tokens", [10, 300])
@pytest.mark.parametrize("side", ["key", "value"])
def test_codes_that_name_no_codeword_are_refused(side: str, tokens: int) -> None:
    sides = {"key": coded(1, 2, tokens, 64, size=200), "value": coded(1, 2, tokens, 64, size=200)}
    sides[side].packed[0, 1, tokens - 1, 3] = 201
    with pytest.raises(ValueError, match="names a codeword that is not there"):
        ops.attend(torch.randn(1, 4, 1, 64), sides["key"], sides["value"], None, None, 1.0, backend="cpu")


@pytest.mark.parametrize("keys", [(1, 3, 9, 64), (2, 2, 9, 64), (1, 2, 9, 32), (1, 2, 8, 64)], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_exact_tokens_unlike_the_coded_ones_are_refused(keys: tuple[int, ...], swapped: bool) -> None:
    exact = [torch.zeros(keys), torch.zeros(1, 2, 9, 64)]
    too = ops.Exact(*(reversed(exact) if swapped else exact), None)
    past = ops.Past(coded(1, 2, 300, 64), coded(1, 2, 300, 64))
    with pytest.raises(ValueError, match=r"shape of|unlike the coded"):
        ops.attend_both(torch.randn(1, 4, 1, 64), past, None, too, 1.0, backend="cpu")


@pytest.mark.parametrize("code", [-1, 7, 2**31 - 1])
def test_decode_refuses_codes_out_of_range(code: int) -> None:
    codes = torch.zeros(1, 2, 3, 1, 1, dtype=torch.int32)
    codes[0, 1, 2] = code
    with pytest.raises(ValueError, match="names a codeword that is not there"):
        ops.decode(codes, torch.randn(1, 7, 4), torch.zeros(1, 2, 1, dtype=torch.int64), "cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        {"query": torch.zeros(1, 4, 1, 63)},
        {"query": torch.zeros(1, 3, 1, 64)},
        {"query": torch.zeros(2, 4, 1, 64)},
        {"mask": torch.ones(1, 1, 1, 299, dtype=torch.bool)},
        {"mask": torch.ones(3, 1, 1, 300, dtype=torch.bool)},
        {"mask": ops.Spans(torch.zeros(2, 1, 2, dtype=torch.int32))},
        {"mask": ops.Spans(torch.zeros(1, 2, 3, dtype=torch.int32))},
        {"positions": torch.zeros(1, 299, dtype=torch.int32)},
        {"inv_freq": torch.ones(40)},
        {"scale": torch.ones(1, 2, 299, 1, dtype=torch.float16)},
        {"packed": torch.zeros(1, 2, 300, 15, dtype=torch.uint8)},
        {"packed": torch.zeros(1, 3, 300, 16, dtype=torch.uint8)},
        {"book": torch.full((8, 2, 2), 8)},
        {"book": torch.full((8, 2, 2), -1)},
        {"channels": torch.zeros(2, 32, dtype=torch.int64)},
        {"channels": torch.arange(1, 65).view(2, 32)},
        {"bits": 7},
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused_before_anything_is_read(wrong: dict[str, object]) -> None:
    key, value, turned = coded(1, 2, 300, 64, strided=True), coded(1, 2, 300, 64), rotation(300, 64)
    key = key._replace(**{name: thing for name, thing in wrong.items() if name in key._fields})
    turned = turned._replace(**{name: thing for name, thing in wrong.items() if name in turned._fields})
    query = wrong.get("query", torch.randn(1, 4, 1, 64))
    with pytest.raises(ValueError, match=r"shape|not there|permutation|multiple|codes of|inv_freq|mask"):
        ops.attend(query, key, value, turned, wrong.get("mask"), 1.0, backend="cpu")


@pytest.mark.parametrize(
    ("channels", "weights"),
    [
        (torch.arange(6).view(2, 3), None),
        (torch.arange(1, 9).view(2, 4), None),
        (torch.arange(-1, 7).view(2, 4), None),
        (torch.arange(8).view(2, 4), torch.zeros(3, 2, 4, 3)),
        (torch.arange(8).view(2, 4), torch.zeros(2, 2, 4, 4)),
    ],
    ids=str,
)
def test_encoding_refuses_channels_and_weights_that_do_not_fit(channels: torch.Tensor, weights: torch.Tensor | None) -> None:
    with pytest.raises((ValueError, TypeError)):
        ops.code(
            torch.zeros(1, 3, 5, 8), torch.zeros(1, 16, 4), torch.zeros(2, 3, 2).long(), channels, weights, 4, backend="cpu"
        )
