"""Errors a user can act on: what was expected, what came, what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in three parts. The command line prints it without a traceback and exits with status 2.

    Args:
        expected: what the code needs.
        got: what it was given.
        fix: what the user can do about it.
    """

    def __init__(self, expected: str, got: str, fix: str) -> None:
        self.expected, self.got, self.fix = expected, got, fix
        super().__init__(f"expected {expected}; got {got}; {fix}.")


class UnsupportedModelError(InputError):
    """A model whose cache kvfold cannot compress; names the model and the reason."""


class CacheFullError(InputError):
    """The next tokens do not fit `max_bytes`; the cache is left as it was."""


def non_finite() -> InputError:
    """The error that keys or values with NaN or Inf are refused with."""
    return InputError(
        "finite keys and values", "NaN or Inf", "check the model's weights and dtype (float16 overflows: try bfloat16)"
    )
