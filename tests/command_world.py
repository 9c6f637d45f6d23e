"""What tests of commands share: a tiny random model in a folder, a tokenizer of words, and how a refusal looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import VOCAB, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<bos>", "<unk>", "system", "user", "assistant", *(f"w{i}" for i in range(6, VOCAB))]


TEMPLATE = (
    "system w90 {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


SMALL = [
    "--set",
    "group=8",
    "--set",
    "codebook_size=16",
    "--set",
    "stages=2",
    "--set",
    "iterations=2",
    "--set",
    "distill_steps=2",
]


PROMPT = " ".join(f"w{i}" for i in range(10, 40))


SIZES = ["--sinks", "2", "--window", "8"]


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class World(NamedTuple):
    """Paths of everything made once: model, codec, text."""

    root: Path
    model: str
    codec: str
    text: str


def words(ids: torch.Tensor) -> str:
    return " ".join(WORDS[int(i)] for i in ids.clamp_min(6).flatten())


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner)  # without special tokens: every word is printed
    made.chat_template = TEMPLATE
    return made


def save_model(folder: Path, change: Callable[[Any], None] = lambda model: None, family: str = "llama") -> str:
    model = tiny_model(family)
    change(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def refused(ran: Ran, *told: str) -> None:
    """Exit status 2, one message in three parts that holds the words of `told`, nothing on standard output."""
    assert (ran.status, ran.out) == (2, "")
    messages = [line for line in ran.err.splitlines() if line.startswith("kvfold:")]
    assert len(messages) == 1, ran.err
    assert messages[0].startswith("kvfold: error: expected ")
    assert messages[0].count("; ") >= 2
    assert "; got " in messages[0]
    assert "Traceback" not in ran.err
    for words in told:
        assert words in messages[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
