from __future__ import annotations

import logging
import os
import shutil

import pytest
import torch

from kvfold import ops
from kvfold.errors import InputError
from kvfold.ops import dispatch, native
from kvfold.ops.attend import naive as naive_attend
from kvfold.ops.decode import naive as naive_decode
from kvfold.ops.encode import naive as naive_encode

NAIVE = {
    "encode": naive_encode.encode,
    "decode": naive_decode.decode,
    "attend": naive_attend.attend,
    "attend_exact": naive_attend.attend_exact,
}
OPS = pytest.mark.parametrize("op", NAIVE)
MISSING = {"cpu": "native CPU ops", "gpu": "Triton|CUDA", "fpga": "no backend of that name"}
MISSING = {name: why for name, why in MISSING.items() if name not in ops.available_backends()}


@OPS
def test_naive_can_always_be_forced(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.select(op, "naive") is NAIVE[op]
    monkeypatch.setenv("KVFOLD_BACKEND", "naive")
    assert ops.select(op) is NAIVE[op]


@OPS
@pytest.mark.parametrize("name", MISSING)
def test_a_forced_backend_that_is_missing_raises_and_says_why(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=MISSING[name]):
        ops.select(op, name)
    monkeypatch.setenv("KVFOLD_BACKEND", name)
    with pytest.raises(InputError, match=MISSING[name]):
        ops.select(op)


@OPS
def test_the_argument_goes_before_the_environment(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_BACKEND", "fpga")
    assert ops.select(op, "naive") is NAIVE[op]
    assert ops.select(op, "auto") is ops.select(op, "cpu" if native.available_isas() else "naive")


@OPS
@pytest.mark.parametrize("value", [None, "", "auto"])
def test_without_a_choice_the_best_there_is_runs(op: str, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFOLD_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("KVFOLD_BACKEND", value)
    assert ops.select(op) is ops.select(op, "auto")


@OPS
def test_a_backend_for_another_device_is_refused(op: str) -> None:
    if native.available_isas():
        with pytest.raises(InputError, match="does not run on cuda"):
            ops.select(op, "cpu", "cuda")


@OPS
def test_triton_is_not_chosen_for_the_cpu_and_says_what_is_missing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFOLD_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "gpu" not in ops.available_backends()
    with pytest.raises(InputError, match=r"expected .+; got 'gpu' \(there is no (CUDA device|Triton)"):
        ops.select(op, "gpu")
    dispatch._automatic.cache_clear()
    assert ops.select(op, None, "cuda") is NAIVE[op]
    dispatch._automatic.cache_clear()
    assert ops.select(op, None, "mps") is NAIVE[op]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_where_there_is_a_compiler_there_are_native_ops() -> None:
    """Installation goes on without what does not compile, and the tests of what is not there are skipped."""
    assert "portable" in native.available_isas()


def test_without_native_ops_everything_runs_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_modules", dict.fromkeys(native.ISAS))
    monkeypatch.delenv("KVFOLD_BACKEND", raising=False)
    dispatch._automatic.cache_clear()
    native._chosen.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "kvfold"):
            assert "cpu" not in ops.available_backends()
            for _ in range(2):
                codes = ops.encode(torch.randn(1, 1, 3, 1, 4), torch.randn(1, 5, 4), torch.zeros(1, 1, 1, dtype=torch.int64))
                assert codes.shape == (1, 1, 3, 1, 1)
        assert len(caplog.records) == 1
        assert "C++ compiler" in caplog.text
        with pytest.raises(InputError, match="native CPU ops"):
            ops.select("encode", "cpu")
    finally:
        dispatch._automatic.cache_clear()
        native._chosen.cache_clear()
