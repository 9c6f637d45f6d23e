from __future__ import annotations

from kvfold.calibrate.text import builtin_text


def test_builtin_text_is_long_and_always_the_same() -> None:
    text = builtin_text()
    assert sum(map(len, text)) > 300_000
    assert all(isinstance(part, str) and part for part in text)
    assert text == builtin_text()
