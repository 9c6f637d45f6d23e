"""Whether Triton interprets its kernels, on tensors of the CPU (`TRITON_INTERPRET=1`), instead of compiling them."""

from __future__ import annotations

import os


def interpreted() -> bool:
    """As the environment says now; Triton itself asks when a kernel is defined, so it is to be set before that."""
    return os.environ.get("TRITON_INTERPRET") == "1"
