"""A needle test of our own making: one fact hidden at a depth of a filler text, and a question about it at the end.

After the idea of github.com/gkamradt/LLMTest_NeedleInAHaystack, with other facts, other filler and no judge: the filler is
text that comes with Python (or the user's), the fact is "The magic number of CITY is NUMBER.", city and number drawn anew
for each prompt, and an answer is right if it holds the number. The prompt is in the model's own chat template.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.cache import SINKS, WINDOW
from kvfold.calibrate.text import builtin_text
from kvfold.codecs.artifact import CodecSet
from kvfold.errors import InputError
from kvfold.integration.attach import attach
from kvfold.integration.spec import model_spec
from kvfold.progress import Progress

CONTEXTS = (1024, 2048, 4096, 7500)
DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
EXACT = "exact"  # the name of the model's own cache
_NEW_TOKENS = 24
_CHUNK = 1024  # tokens of one prefill pass
_BEFORE = "Read the text and remember the magic number in it.\n\n"
_FACT = "\nThe magic number of {city} is {number}.\n"
_QUESTION = "\n\nWhat is the magic number of {city}? Answer with the number only."
_CITIES = ("Lisbon", "Oslo", "Kyoto", "Quito", "Nairobi", "Dublin", "Hanoi", "Lima", "Athens", "Cairo", "Perth", "Riga")


@dataclass(frozen=True)
class NeedleAnswer:
    """What one cache answered to one prompt.

    Attributes:
        cache: "exact", or the codec's name.
        context: tokens asked for; `tokens` are what the prompt has, at most as many.
        depth: percent of the filler before the fact.
        number: the fact; `found` says whether `answer` holds it.
        bits_per_element: of the cache at the end; None for "exact".
    """

    cache: str
    context: int
    tokens: int
    depth: float
    number: str
    answer: str
    found: bool
    bits_per_element: float | None


@dataclass(frozen=True)
class NeedleResult:
    """Result of `needle`; field names are those of `kvfold needle --json`. `found` is the share of right answers, by cache."""

    answers: tuple[NeedleAnswer, ...]
    found: dict[str, float]
    sinks: int
    window: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def contexts(self) -> list[int]:
        return sorted({answer.context for answer in self.answers})

    @property
    def depths(self) -> list[float]:
        return sorted({answer.depth for answer in self.answers})

    def grid(self, cache: str) -> list[list[float]]:
        """1 where `cache` found the fact and 0 where not: a row a depth, a column a context, both ascending."""
        cells = {(a.depth, a.context): float(a.found) for a in self.answers if a.cache == cache}
        return [[cells[depth, context] for context in self.contexts] for depth in self.depths]


@torch.no_grad()
def needle(
    model: Any,
    tokenizer: Any,
    codecs: Mapping[str, CodecSet],
    texts: Sequence[str] | None = None,
    *,
    contexts: Sequence[int] = CONTEXTS,
    depths: Sequence[float] = DEPTHS,
    sinks: int = SINKS,
    window: int = WINDOW,
    seed: int = 0,
    quiet: bool = False,
) -> NeedleResult:
    """Ask every prompt of the model's own cache and of a compressed one per codec; greedy answers.

    Args:
        codecs: by the name under which their answers are reported.
        texts: filler; text that comes with Python if None.
        contexts: tokens of the prompts, template and question included.
        depths: percent of the filler before the fact.
        sinks, window: of the compressed caches.
        seed: of cities and numbers.

    Raises:
        InputError: a context that the model cannot hold or that has no room for filler, a depth outside 0 to 100, filler
            that is too short, codecs of another model.
    """
    longest = model_spec(model).max_positions - _NEW_TOKENS
    for wrong in [c for c in contexts if c > longest]:
        raise InputError(f"contexts of at most {longest} tokens for this model", str(wrong), "choose shorter ones")
    for outside in [d for d in depths if not 0 <= d <= 100]:
        raise InputError("depths from 0 to 100 percent", str(outside), "choose others")
    if not contexts or not depths:
        raise InputError("at least one context and one depth", "none", "give --contexts and --depths")
    if EXACT in codecs:
        raise InputError("codecs named otherwise than 'exact'", "one of that name", "rename it")
    start = time.monotonic()
    prompts = list(_prompts(tokenizer, texts, sorted(set(contexts), reverse=True), sorted(set(depths)), seed))
    total = sum(ids.shape[1] for *_, ids in prompts)
    if not quiet:
        each = f"each read with {len(codecs) + 1} caches"
        print(f"needle: {len(prompts)} prompts of {total:,} tokens in all, {each}, longest first", file=sys.stderr)
    caches: dict[str, CodecSet | None] = {EXACT: None, **codecs}
    answers = []
    with Progress("needle", len(prompts) * len(caches), quiet) as step, _eval_mode(model):
        for context, depth, number, ids in prompts:
            for name, codec in caches.items():
                with attach(model, codec, sinks=sinks, window=window) if codec else nullcontext() as attached:
                    answer = _answer(model, tokenizer, ids)
                    bits = attached.cache.report().bits_per_element if attached and attached.cache else None
                found = number in answer.replace(",", "")
                answers.append(NeedleAnswer(name, context, ids.shape[1], depth, number, answer, found, bits))
                step()
    shares = {name: [a.found for a in answers if a.cache == name] for name in caches}
    found_by = {name: sum(those) / len(those) for name, those in shares.items()}
    return NeedleResult(tuple(answers), found_by, sinks, window, time.monotonic() - start)


def _prompts(
    tokenizer: Any, texts: Sequence[str] | None, contexts: Sequence[int], depths: Sequence[float], seed: int
) -> Iterator[tuple[int, float, str, Tensor]]:
    """Context, depth, number, and tokens `[1, T]` of every prompt."""
    draw = random.Random(seed)
    text = "\n\n".join(builtin_text() if texts is None else texts)
    filler = tokenizer(text[: 16 * max(contexts)], add_special_tokens=False, verbose=False)["input_ids"]
    for context in contexts:
        for depth in depths:
            fact = {"city": draw.choice(_CITIES), "number": str(draw.randint(10_000, 99_999))}
            yield context, depth, fact["number"], _prompt(tokenizer, filler, context, depth, fact)


def _prompt(tokenizer: Any, filler: list[int], context: int, depth: float, fact: Mapping[str, str]) -> Tensor:
    """A prompt of at most `context` tokens and little less."""
    used = context
    while True:
        if used > len(filler):
            raise InputError(f"filler of {used} tokens for a context of {context}", f"{len(filler)}", "give a longer text")
        ids = _tokens(tokenizer, _filled(tokenizer, filler[:used], depth, fact))
        if ids.shape[1] <= context:
            return ids
        used -= max(1, ids.shape[1] - context)
        if used < 1:
            least = ids.shape[1] - used
            raise InputError("contexts with room for the question and some filler", f"{context}, of {least}", "raise it")


def _filled(tokenizer: Any, filler: list[int], depth: float, fact: Mapping[str, str]) -> str:
    """Instruction, filler with the fact at the end of the line where `depth` falls, question."""
    cut = round(len(filler) * depth / 100)
    before, after = tokenizer.decode(filler[:cut]), tokenizer.decode(filler[cut:])
    line = before.rfind("\n") + 1 if after else len(before)
    fact_line, question = _FACT.format(**fact), _QUESTION.format(**fact)
    return f"{_BEFORE}{before[:line]}{fact_line}{before[line:]}{after}{question}"


def _tokens(tokenizer: Any, message: str) -> Tensor:
    """The user's turn in the model's chat template, `[1, T]`; a model without one gets the bare text."""
    if tokenizer.chat_template is None:
        return tokenizer(f"{message}\nAnswer:", return_tensors="pt", verbose=False)["input_ids"]
    turn = [{"role": "user", "content": message}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]


def _answer(model: Any, tokenizer: Any, ids: Tensor) -> str:
    placed = ids.to(next(model.parameters()).device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    out = model.generate(
        input_ids=placed,
        attention_mask=torch.ones_like(placed),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        prefill_chunk_size=_CHUNK,
        pad_token_id=pad,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
