"""Calibration text for a user who brings none: the language reference that every Python installation carries."""

from __future__ import annotations

from pydoc_data.topics import topics


def builtin_text() -> list[str]:
    """Documentation topics of the running Python, in a fixed order; about 600,000 characters of English and code."""
    return [topics[name] for name in sorted(topics)]
