"""What lm-eval sees of a model that answers from a cache. This file imports lm_eval; `kvfold.evaluate.tasks` imports it late.

Log-likelihoods are split: a pass with all of the context but its last token fills the cache, and everything that is
scored comes from a second pass that reads this cache. A cache that hands exact keys and values to the pass that brings
them (as a quantized cache usually does in prefill) would otherwise lose nothing on such tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import StoppingCriteria

from kvfold.cache.cache import CompressedCache
from kvfold.codecs.artifact import CodecSet
from kvfold.compat import cache_argument, output_cache
from kvfold.errors import InputError
from kvfold.evaluate.answers import Answers
from kvfold.integration.attach import Attachment, attach
from kvfold.integration.spec import decoder_of, model_spec
from kvfold.progress import Progress

_CHUNK = 1024  # tokens of one pass
_ROWS, _TOKENS = 32, 8192  # continuations scored together, and tokens of their contexts
_NEW_TOKENS = 256  # of a task that names no number, as lm-eval does
_log = logging.getLogger(__name__)


class CacheLM(TemplateLM):
    """An lm-eval model over the compressed cache, or over the model's own if `codecs` is None.

    Args:
        model, tokenizer: from transformers.
        codecs: of the model, on any device.
        sinks, window: first and newest tokens kept exact.
        answers: answers had before; greedy ones and log-likelihoods are looked up there and added.
        quiet: no progress on standard error.

    Attributes:
        bytes_cache, bytes_bf16: sums over the compressed caches used so far, each at its end; the latter as if the same
            tokens were kept in bfloat16.

    Raises:
        UnsupportedModelError: a model whose cache cannot be compressed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        codecs: CodecSet | None = None,
        *,
        sinks: int = 0,
        window: int = 0,
        answers: Answers | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.codecs = model, tokenizer, codecs
        self.sinks, self.window, self.quiet = sinks, window, quiet
        self.answers = Answers(None, {}) if answers is None else answers
        self.max_length = model_spec(model).max_positions
        self.bytes_cache = self.bytes_bf16 = 0
        self._device = next(model.parameters()).device
        self._decoder = decoder_of(model)
        self._argument = cache_argument(self._decoder) or "past_key_values"

    # -- tokens ------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        found = self.eot_token_id if bos is None else bos
        if found is None:
            raise InputError("a tokenizer with BOS or EOS, for a text without context", "neither", "use another task or model")
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; special ones as the tokenizer itself adds them, never BOS twice."""
        bos = self.tokenizer.bos_token
        starts = bool(bos) and string.startswith(bos)
        add = (not starts) if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, add_special_tokens=add, verbose=False)

    # -- what lm-eval asks -------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        results: list[Any] = [self.answers.get(["loglikelihood", *pair]) for pair in pairs]
        contexts: dict[tuple[int, ...], list[int]] = {}  # requests still open, by context
        for index, (context, _) in enumerate(pairs):
            if results[index] is None:
                contexts.setdefault(tuple(context), []).append(index)
        batches = list(_batches(contexts))
        with self._answering(), Progress("log-likelihoods, contexts", sum(map(len, batches)), self.quiet) as step:
            for batch in batches:
                members = [index for _, some in batch for index in some]
                source = [row for row, (_, some) in enumerate(batch) for _ in some]
                scores = self._scores([context for context, _ in batch], source, [pairs[index][1] for index in members])
                for index, score in zip(members, scores, strict=True):
                    results[index] = score
                    self.answers.put(["loglikelihood", *pairs[index]], score)
                for _ in batch:
                    step()
        return [(float(total), bool(greedy)) for total, greedy in results]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts: windows of the model's length, each read through a cache of its own."""
        totals = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            scores = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum(total for total, _ in scores))
        return totals

    @torch.no_grad()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        results = []
        with self._answering() as attached, Progress("answers generated", len(requests), self.quiet) as step:
            for context, wanted in (request.args for request in requests):
                sampled = bool(wanted.get("do_sample"))
                answer = None if sampled else self.answers.get(["generate_until", context, wanted])
                if answer is None:
                    answer = self._generated(context, wanted)
                    self._count(attached.cache if attached else None)
                    if not sampled:
                        self.answers.put(["generate_until", context, wanted], answer)
                results.append(answer)
                step()
        return results

    # -- inside ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _answering(self) -> Iterator[Attachment | None]:
        """The model in eval mode, attached if there is a codec. `block=1`: the window counts to the token."""
        sizes = {"sinks": self.sinks, "window": self.window, "block": 1}
        training = self.model.training
        self.model.eval()
        try:
            with attach(self.model, self.codecs, **sizes) if self.codecs else nullcontext() as attached:
                yield attached
        finally:
            self.model.train(training)

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Both, the context cut at its start so that the model can read them; the last token is not read, only scored."""
        room = self.max_length + 1 - max(1, len(continuation))
        if room < 1:
            came = f"one of {len(continuation)}"
            raise InputError(f"a continuation of at most {self.max_length} tokens", came, "use another task or model")
        if len(context) > room:
            _log.warning("a context of %d tokens is cut to its last %d", len(context), room)
        return context[-room:], continuation

    def _scores(
        self, contexts: Sequence[Sequence[int]], source: Sequence[int], continuations: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation (natural log, summed over its tokens), and whether it is the greedy one.

        The contexts, all of one length, are read once; row `source[i]` of their cache is repeated for continuation `i`.
        Continuations are padded at their end: no token looks at what comes after it.
        """
        rows = [[contexts[row][-1], *tokens[:-1]] for row, tokens in zip(source, continuations, strict=True)]
        width = max(map(len, rows))
        filled = lambda part, filler: [*part, *[filler] * (width - len(part))]  # noqa: E731
        inputs = torch.tensor([filled(row, row[0]) for row in rows], device=self._device)
        targets = torch.tensor([filled(tokens, -1) for tokens in continuations], device=self._device)
        cache = self._prefilled([context[:-1] for context in contexts])
        if cache is not None and list(source) != list(range(len(contexts))):
            cache.batch_select_indices(torch.tensor(source, device=self._device))
        total = torch.zeros(len(rows), dtype=torch.float64, device=self._device)
        greedy = torch.ones(len(rows), dtype=torch.bool, device=self._device)
        for chunk, target in zip(inputs.split(_CHUNK, 1), targets.split(_CHUNK, 1), strict=True):
            output = self.model(input_ids=chunk, use_cache=True, **{self._argument: cache})
            cache = output_cache(output)
            scored = target >= 0
            logits = output.logits[scored].float()
            index = torch.arange(len(rows), device=self._device)[:, None].expand_as(target)[scored]
            chosen = logits.log_softmax(-1).gather(-1, target[scored][:, None])[:, 0]
            total.index_add_(0, index, chosen.double())
            greedy[index[logits.argmax(-1) != target[scored]]] = False
        self._count(cache)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _prefilled(self, rows: Sequence[Sequence[int]]) -> Any:
        """A cache that holds the rows, all of one length; None if that is 0. No logits are computed."""
        cache = None
        for chunk in torch.tensor(rows, dtype=torch.int64, device=self._device).split(_CHUNK, 1) if rows[0] else ():
            cache = output_cache(self._decoder(input_ids=chunk, use_cache=True, **{self._argument: cache}))
        return cache

    def _generated(self, context: str, wanted: dict[str, Any]) -> str:
        settings = dict(normalize_gen_kwargs(wanted, _NEW_TOKENS))
        most = settings.pop("max_gen_toks")
        ends = settings.pop("until", None) or []
        stops = [text for text in [*ends, self.tokenizer.eos_token] if text]
        if self.max_length <= most:
            limit = f"fewer than the model's {self.max_length} new tokens (max_gen_toks)"
            raise InputError(limit, str(most), "use another task or model")
        if not settings.setdefault("do_sample", False):
            settings.pop("temperature", None)
        tokens = self.tok_encode(context)
        if len(tokens) > self.max_length - most:
            _log.warning("a prompt of %d tokens is cut to its last %d", len(tokens), self.max_length - most)
        ids = torch.tensor([tokens[most - self.max_length :]], device=self._device)
        pad = self.tokenizer.pad_token_id
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            pad_token_id=self.eot_token_id if pad is None else pad,
            stopping_criteria=[_Stops(self.tokenizer, stops, ids.shape[1])],
            **settings,
        )
        return postprocess_generated_text(self.tokenizer.decode(out[0, ids.shape[1] :]), stops, None)

    def _count(self, cache: Any) -> None:
        if isinstance(cache, CompressedCache):
            report = cache.report()
            self.bytes_cache += report.bytes_cache
            self.bytes_bf16 += report.bytes_bf16


def _batches(contexts: Mapping[tuple[int, ...], list[int]]) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
    """Contexts and the requests that have them, in batches of contexts of one length, the longest first.

    One length, so that no row needs padding before its tokens: sinks and positions are then those of a row alone.
    """
    batch: list[tuple[tuple[int, ...], list[int]]] = []
    rows = 0
    for context in sorted(contexts, key=len, reverse=True):
        members = contexts[context]
        most = max(1, min(_ROWS, _TOKENS // len(context)))
        for some in (members[i : i + most] for i in range(0, len(members), most)):
            if batch and (len(batch[0][0]) != len(context) or rows + len(some) > most):
                yield batch
                batch, rows = [], 0
            batch.append((context, some))
            rows += len(some)
    if batch:
        yield batch


class _Stops(StoppingCriteria):
    """Ends a generation as soon as one of the texts stands in what was written behind the prompt."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._texts, self._prompt = tokenizer, texts, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        written = self._tokenizer.batch_decode(input_ids[:, self._prompt :])
        found = [any(text in row for text in self._texts) for row in written]
        return torch.tensor(found, device=input_ids.device)
