"""Any task of lm-eval, with the model answering from the compressed cache (`pip install kvfold[tasks]`).

lm-eval is EleutherAI's harness (github.com/EleutherAI/lm-evaluation-harness, 0.4.13). How each kind of request is
answered stands in `task_model.py`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvfold.codecs.artifact import CodecSet
from kvfold.errors import InputError
from kvfold.evaluate.answers import Answers
from kvfold.integration.spec import model_spec

_BOOTSTRAPS = 1000  # of metrics whose standard error has no formula


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        filter: what lm-eval did to the answers before, "none" for log-likelihoods.
        stderr: standard error of `value`, or None where lm-eval gives none.
        samples: documents answered; shots: examples in each prompt.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int
    shots: int | None
    version: Any


@dataclass(frozen=True)
class TaskResults:
    """Result of `evaluate_tasks`; field names are those of `kvfold eval --tasks --json`.

    `bits_per_element`, `bytes_cache` and `bytes_bf16` are of all caches used, each at its end; None for "exact", which is
    the `method` without a codec.
    """

    method: str
    scores: tuple[TaskScore, ...]
    bits_per_element: float | None
    bytes_cache: int | None
    bytes_bf16: int | None
    sinks: int | None
    window: int | None
    limit: int | None
    seconds: float
    lm_eval: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, ready to be asked; made by `load_tasks`."""

    names: tuple[str, ...]
    loaded: Any


def load_tasks(
    names: Sequence[str], task_path: str | Path | None = None, num_fewshot: int | None = None, seed: int = 0
) -> Tasks:
    """Find tasks and load their data; from the network if they are lm-eval's own and not on disk yet.

    Args:
        names: of tasks, groups or tags, see `lm-eval ls tasks`.
        task_path: folder of YAML files with tasks of one's own; they come before lm-eval's.
        num_fewshot: examples in each prompt instead of the task's number; a task that says 0 itself keeps it.
        seed: of the choice of examples.

    Raises:
        InputError: no such task or folder, data that cannot be had, or lm-eval is not installed.
    """
    _require_lm_eval()
    from lm_eval.tasks import TaskManager

    if task_path is not None and not Path(task_path).is_dir():
        raise InputError("a folder of task files (YAML)", f"nothing at {task_path}", "check --task-path")
    if not names or not all(names):
        raise InputError("names of tasks, separated by commas", f"{','.join(names)!r}", "see `lm-eval ls tasks`")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError("--num-fewshot of at least 0", str(num_fewshot), "raise it")
    path = None if task_path is None else str(task_path)
    manager = TaskManager(include_path=path, include_defaults=False)
    if set(names) - set(manager.all_tasks):  # reading lm-eval's own files takes seconds
        manager = TaskManager(include_path=path)
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        where = "lm-eval" if path is None else f"{path} or lm-eval"
        raise InputError(f"tasks of {where}", ", ".join(unknown), "see `lm-eval ls tasks`, or give --task-path")
    try:
        loaded = manager.load(list(dict.fromkeys(names)))
    except ImportError as error:
        raise InputError("the packages that the task needs", str(error), "install them") from None
    except Exception as error:  # whatever a data set's code raises
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fix = "check the paths in the task's file, or run once where there is a network"
        raise InputError(f"data of the tasks {', '.join(names)}", f"{type(error).__name__}: {first}", fix) from None
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot)
        task.set_fewshot_seed(seed=seed)
    return Tasks(tuple(dict.fromkeys(names)), loaded)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    codecs: CodecSet | None,
    tasks: Tasks | Sequence[str],
    *,
    limit: int | None = None,
    sinks: int = 0,
    window: int = 0,
    resume: str | Path | None = None,
    quiet: bool = False,
) -> TaskResults:
    """Ask `tasks` of the model, answered from a compressed cache, or from the model's own if `codecs` is None.

    Args:
        tasks: from `load_tasks`, or names, which are loaded with its defaults.
        limit: documents of each task, from its start; all if None.
        sinks, window: first and newest tokens kept exact; with both 0 a token reads even its own key and value as codes.
        resume: file that keeps the answers as they come; a run that was cut off goes on from there.

    Raises:
        InputError: as `load_tasks`; a limit below 1; codecs of another model; a `resume` file of another run.
    """
    if limit is not None and limit < 1:
        raise InputError("--limit of at least 1", str(limit), "raise it, or leave it out for all documents")
    ready = tasks if isinstance(tasks, Tasks) else load_tasks(tasks)
    from lm_eval import __version__, evaluator

    from kvfold.evaluate.task_model import CacheLM

    spec = model_spec(model)
    method = "exact" if codecs is None else codecs.method
    run = {
        "model": [str(getattr(model.config, "name_or_path", "")), spec.fingerprint(), str(model.dtype)],
        "codec": None if codecs is None else [codecs.fingerprint(), codecs.settings, sinks, window],
    }
    start = time.monotonic()
    answers = Answers(None if resume is None else Path(resume), run)
    asked = CacheLM(model, tokenizer, codecs, sinks=sinks, window=window, answers=answers, quiet=quiet)
    results = evaluator.evaluate(asked, ready.loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
    return TaskResults(
        method=method,
        scores=tuple(_scores(results)),
        bits_per_element=16 * asked.bytes_cache / asked.bytes_bf16 if asked.bytes_bf16 else None,
        bytes_cache=asked.bytes_cache or None,
        bytes_bf16=asked.bytes_bf16 or None,
        sinks=None if codecs is None else sinks,
        window=None if codecs is None else window,
        limit=limit,
        seconds=time.monotonic() - start,
        lm_eval=__version__,
    )


def _scores(results: Any) -> list[TaskScore]:
    """Rows of lm-eval's nested result: `{task: {"metric,filter": x, "metric_stderr,filter": y}}`."""
    scores = []
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        for name, value in metrics.items():
            metric, comma, chosen = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            samples = results["n-samples"].get(task, {}).get("effective") or metrics.get("sample_len", 0)
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=chosen,
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    samples=samples,
                    shots=results["n-shot"].get(task),
                    version=results["versions"].get(task),
                )
            )
    return scores


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("the package lm-eval, to run its tasks", "no such package", "pip install kvfold[tasks]")
