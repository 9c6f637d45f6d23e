"""The method that CONTRIBUTING shows is one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import DIM, HEADS, fit, samples
from tiny import given, random_ids, tiny_codecs, tiny_model

import kvfold
from kvfold.codecs import KINDS, METHODS, Codec


@pytest.fixture
def example() -> Iterator[None]:
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(snippet, "CONTRIBUTING.md", "exec"), {})
    yield
    del KINDS["absmax"], METHODS["absmax"]


@pytest.mark.usefixtures("example")
def test_the_example_is_a_codec() -> None:
    codec = fit("absmax")
    assert isinstance(codec, Codec)
    x = samples()[None]
    codes = codec.encode(x)
    assert codec.bits_per_element == 8 * codes.nbytes / x.numel() == 5.0
    step = codes.fields["scale"].float()
    assert bool(((codec.decode(codes) - x).abs() <= 0.51 * step).all())  # half a step, and the step's own rounding
    again = KINDS["absmax"].restore(DIM, codec.settings(), codec.tensors())
    assert torch.equal(again.decode(again.encode(x)), codec.decode(codes))
    assert not codec.decode(codec.encode(torch.zeros(1, HEADS, 2, DIM))).any()


@pytest.mark.usefixtures("example")
def test_the_example_runs_in_a_model() -> None:
    model, codecs = tiny_model("llama"), tiny_codecs.__wrapped__("llama", "absmax", bits=8)
    ids = random_ids(1, 60)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        with kvfold.attach(model, codecs, sinks=0, window=0) as attached:
            cache = attached.new_cache()
            got = model(input_ids=ids, **given(model, cache)).logits
            assert cache.report().bits_per_element == 8 + 16 / 16
    assert 0 < float((got - want).abs().max() / want.abs().max()) < 0.2
