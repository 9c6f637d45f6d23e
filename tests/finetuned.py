"""Short finetunings of a tiny model."""

from __future__ import annotations

from typing import Any

from tiny import tiny_codecs, tiny_model, tiny_tokenizer

import kvfold
from kvfold.calibrate.finetune import Finetuned, FinetuneSettings, finetune
from kvfold.calibrate.text import builtin_text

_TEXT = "\n\n".join(builtin_text())
TEXT, HELD_OUT = _TEXT[:12000], _TEXT[12000:14000]
QUICK = {"steps": 3, "tokens_per_step": 60, "context": 60, "lr": 1e-3}


def trained(model: Any = None, codecs: kvfold.CodecSet | None = None, text: Any = TEXT, seed: int = 0, **how: Any) -> Finetuned:
    """A short finetuning; `stop` and the settings by name."""
    model = tiny_model("llama") if model is None else model
    stop = {"stop": how.pop("stop")} if "stop" in how else {}
    settings = FinetuneSettings(**{**QUICK, **how})
    return finetune(
        model, tiny_tokenizer(), codecs or tiny_codecs("llama", "rvq-paper"), text, settings, seed=seed, quiet=True, **stop
    )
