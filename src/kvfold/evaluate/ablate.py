"""The paper's ablations on any model: codebook size by depth, channel grouping, which side is coded, finetuning.

Tables 1 and 2 of A. Kumar, arXiv 2410.15704, with perplexity through the cache in place of task scores. Greedy stages do
not depend on later ones, so one calibration of the deepest codec serves every depth, and one of both sides serves each
side alone; that is what keeps an ablation to a few calibrations. Finetuning starts each time from the model's own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvfold.calibrate.finetune import FinetuneSettings, finetune
from kvfold.calibrate.kept import calibrate_or_load
from kvfold.calibrate.readings import Readings
from kvfold.calibrate.text import builtin_text
from kvfold.codecs import Side, method
from kvfold.codecs.artifact import CodecSet
from kvfold.errors import InputError
from kvfold.evaluate.evaluate import Evaluation, eval_windows, evaluate
from kvfold.integration.spec import model_spec

_DEPTHS = (4, 6, 8)
_SIZES = (1024, 2048)


@dataclass(frozen=True)
class Variant:
    """A row of an ablation: `calibration` settings are fitted once per distinct value, `change` is applied to the result."""

    name: str
    calibration: dict[str, Any]
    change: Callable[[CodecSet], CodecSet]
    loss: str | None = None  # finetune with this loss first


@dataclass(frozen=True)
class AblationRow:
    """A variant's result: `rate` is code bits an element as the paper counts, `evaluation` everything measured."""

    name: str
    settings: dict[str, Any]
    rate: float
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        ratio = self.evaluation.perplexity_ratio
        row = {"name": self.name, "settings": self.settings, "rate": self.rate, "perplexity_ratio": ratio}
        return row | asdict(self.evaluation)


def _same(codecs: CodecSet) -> CodecSet:
    return codecs


def _stages(stages: int) -> Callable[[CodecSet], CodecSet]:
    return lambda codecs: codecs.with_stages(stages)


def _only(side: Side) -> Callable[[CodecSet], CodecSet]:
    return lambda codecs: codecs.only(side)


def _contiguous(group: int = 32) -> dict[str, Any]:
    return {"group": group, "key_groups": "contiguous"}


def _steps_beyond() -> list[Variant]:
    """From the paper's codes to those of the preset `rvq` with as many codewords, a change a row."""
    paper, ours = method("rvq-paper").defaults, method("rvq").defaults
    same = ("codebook_size", "center")  # a center is for keys after RoPE only, and these are before it
    changes: list[tuple[str, dict[str, Any]]] = [
        ("the paper's codes", {name: paper[name] for name in ours if paper[name] != ours[name] and name not in same}),
        ("+ codebooks of a head's own, 8 bits", {"sharing": "head", "codebook_dtype": "float8"}),
        ("+ scale in a byte, a stage of values", {"scale_bits": 8, "extra_value_stages": 1}),
        ("+ search weighted by sensitivity", {"weight_power": 0.5}),
        ("+ beam of 4", {"beam": 4}),
        ("+ training end to end", {"distill_steps": ours["distill_steps"]}),
    ]
    settings: dict[str, Any] = {}
    variants = []
    for name, change in changes:
        settings = {**settings, **change}
        variants.append(Variant(name, settings, _same))
    return variants


ABLATIONS: dict[str, tuple[str, list[Variant]]] = {
    "size": (
        "codewords by stages (paper, table 2)",
        [Variant(f"{size} x {depth}", {"codebook_size": size}, _stages(depth)) for size in _SIZES for depth in _DEPTHS],
    ),
    "grouping": (
        "channels of a group (paper, table 1 and section 4)",
        [
            Variant("keys strided, group 32", {}, _only("key")),
            Variant("keys contiguous, group 32", _contiguous(), _only("key")),
            Variant("keys and values, group 32", {}, _same),
            Variant("keys and values, group 64", {"group": 64}, _same),
        ],
    ),
    "rvq": ("what makes the preset rvq better than the paper's codes", _steps_beyond()),
    "target": (
        "what is coded (paper, table 1)",
        [
            Variant("keys only", {}, _only("key")),
            Variant("values only", {}, _only("value")),
            Variant("keys and values", {}, _same),
        ],
    ),
    "finetune": (
        "with and without finetuning (paper, table 1)",
        [
            Variant("frozen model", {}, _same),
            Variant("finetuned, language-model loss", {}, _same, "lm"),
            Variant("finetuned, KL to the exact model", {}, _same, "kl"),
        ],
    ),
}


def ablate(
    model: Any,
    tokenizer: Any,
    what: str,
    calibration_text: Sequence[str] | str | None,
    text: Sequence[str] | str,
    *,
    codec: str = "rvq-paper",
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    tokens: int = 32768,
    context: int = 2048,
    windows: int = 8,
    finetuning: FinetuneSettings | None = None,
    keep: Path | None = None,
    each: Callable[[AblationRow], None] = lambda row: None,
    quiet: bool = False,
) -> list[AblationRow]:
    """Rows of one ablation, in the paper's order.

    Args:
        what: a key of `ABLATIONS`.
        calibration_text, tokens, seed: as in `kvfold.calibrate`.
        text, context, windows: as in `evaluate`; every token is coded (sinks 0, window 0), the paper's protocol.
        codec: residual method whose defaults the variants change; `settings` are changed in all of them.
        finetuning: of "finetune", whose variants set the loss; the text is the calibration text.
        keep: folder of calibrated codecs; those that are there are not fitted again, by this ablation or another.
        each: called with every row as it is done.

    Raises:
        InputError: unknown ablation, or bad input to calibration or evaluation.
    """
    if what not in ABLATIONS:
        raise InputError(f"an ablation among {', '.join(ABLATIONS)}", repr(what), "choose one of these")
    if "stages" not in method(codec).defaults:
        raise InputError("a residual codec, such as rvq-paper", repr(codec), "choose another --codec")
    eval_windows(tokenizer, text, context, windows, model_spec(model).max_positions)  # refused now, not after calibrating
    fitted: dict[str, CodecSet] = {}
    readings = Readings()
    rows = []
    for variant in ABLATIONS[what][1]:
        chosen = {**(settings or {}), **variant.calibration}
        key = repr(sorted(chosen.items()))
        if key not in fitted:
            common = (seed, tokens, keep, readings, quiet)
            fitted[key] = calibrate_or_load(model, tokenizer, calibration_text, codec, chosen, *common)
        codecs = variant.change(fitted[key])
        with ExitStack() as undo:
            if variant.loss is not None:
                undo.enter_context(_weights_kept(model))
                chosen_settings = replace(finetuning or FinetuneSettings(), loss=variant.loss)
                trained = finetune(
                    model, tokenizer, codecs, calibration_text or builtin_text(), chosen_settings, seed=seed, quiet=quiet
                )
                codecs = trained.codecs
            result = evaluate(model, tokenizer, codecs, text, context=context, windows=windows, quiet=quiet)
        row = AblationRow(variant.name, codecs.settings, _rate(codecs), result)
        each(row)
        rows.append(row)
    return rows


@contextmanager
def _weights_kept(model: Any) -> Iterator[None]:
    """The model's weights are afterwards what they were."""
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)


def _rate(codecs: CodecSet) -> float:
    """Bits of codes an element of a coded side, without scales: the paper's rate, `stages * log2(C) / group`."""
    settings = codecs.settings
    return settings["stages"] * (settings["codebook_size"] - 1).bit_length() / settings["group"]
