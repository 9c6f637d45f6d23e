"""lm-eval's requests answered from the cache, against sums over log-softmax written out by hand."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import random_ids, tiny_codecs, tiny_model, tiny_tokenizer

import kvfold
from kvfold.cache.layer import CodedLayer
from kvfold.cli import main
from kvfold.evaluate.answers import Answers
from kvfold.evaluate.tasks import TaskResults, evaluate_tasks, load_tasks

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install kvfold[tasks]")

from kvfold.evaluate.task_model import CacheLM  # noqa: E402  (imports lm_eval)

TEMPLATES = Path(__file__).parents[2] / "benchmarks" / "tasks"
TEXT = "In the beginning the cache was without form, and void; and (then) codes came: 0, 1, 2. What a day it was! "
REL = 1e-4  # the same sums in another order: passes of one token, of many, and padded ones
PAIRS = [
    (TEXT[:30], TEXT[30:40]),
    (TEXT[:30], TEXT[50:57]),
    (TEXT[:30], "x"),
    (TEXT[10:40], TEXT[40:49]),
    (TEXT[:7], TEXT[7:20]),
    ("Q", TEXT[3:30]),
    ("", TEXT[:12]),
]
BAD = {"stages": 1, "codebook_size": 2}


@pytest.fixture(autouse=True, scope="module")
def own_data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` keeps what it reads; not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def requests(*args: tuple) -> list[Any]:
    return [SimpleNamespace(args=one) for one in args]


def lm(family: str = "llama", codecs: kvfold.CodecSet | None = None, **how: Any) -> CacheLM:
    return CacheLM(tiny_model(family), tiny_tokenizer(), codecs, quiet=True, **how)


def ids(text: str) -> list[int]:
    return tiny_tokenizer().encode(text, add_special_tokens=False)


def direct(model: Any, tokens: Sequence[int], scored: int) -> tuple[float, bool]:
    """Log-likelihood of the last `scored` tokens by one plain pass over all of them, and whether they are the greedy ones."""
    with torch.no_grad():
        table = model(input_ids=torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)[-scored:]
    target = torch.tensor(tokens[-scored:])
    return float(table.gather(1, target[:, None]).sum()), bool((table.argmax(1) == target).all())


def direct_pair(model: Any, context: str, continuation: str) -> tuple[float, bool]:
    spaces = len(context) - len(context.rstrip())  # lm-eval scores them with the continuation
    return direct(model, [1, *ids(context + continuation)][-512:] if not context else ids(context + continuation),
                  len(ids(continuation)) + spaces)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral-sliding", "gpt-neox"])
@pytest.mark.parametrize("method", [None, "identity"])
def test_log_likelihoods_are_sums_of_log_softmax(family: str, method: str | None) -> None:
    codecs = tiny_codecs(family, method) if method else None
    got = lm(family, codecs).loglikelihood(requests(*PAIRS))
    want = [direct_pair(tiny_model(family), *pair) for pair in PAIRS]
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], rel=REL)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]


def test_greedy_continuations_are_known_as_such() -> None:
    model = tiny_model("llama")
    start = torch.tensor([ids("The cat")])
    with torch.no_grad():
        tokens = model.generate(start, max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()
    asked = lm()
    assert asked._loglikelihood_tokens([(None, tokens[:7], tokens[7:])])[0] == (
        pytest.approx(direct(model, tokens, 4)[0]),
        True,
    )
    changed = [*tokens[:-1], (tokens[-1] + 1) % 97]
    assert asked._loglikelihood_tokens([(None, changed[:7], changed[7:])])[0][1] is False


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (2, 5)])
def test_choices_share_a_context_and_score_as_if_alone(sinks: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"sinks": sinks, "window": window}
    together, alone = lm(codecs=tiny_codecs("llama"), **sizes), lm(codecs=tiny_codecs("llama"), **sizes)
    passes = []
    handle = together.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    got = together.loglikelihood(requests(*PAIRS[:4]))
    handle.remove()
    assert passes == [(2, 29), (4, 10)]  # two contexts of one length, then their four continuations
    want = [alone.loglikelihood(requests(pair))[0] for pair in PAIRS[:4]]
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], rel=REL)
    exact = lm().loglikelihood(requests(*PAIRS[:4]))
    assert all(abs(score - other) > 0.01 for (score, _), (other, _) in zip(got, exact, strict=True))
    assert [score for score, _ in got] != pytest.approx([score for score, _ in exact], rel=1e-2)


def test_long_passes_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lm(codecs=tiny_codecs("llama")).loglikelihood(requests(*PAIRS))
    monkeypatch.setattr("kvfold.evaluate.task_model._CHUNK", 4)
    monkeypatch.setattr("kvfold.evaluate.task_model._ROWS", 2)
    cut = lm(codecs=tiny_codecs("llama")).loglikelihood(requests(*PAIRS))
    assert [score for score, _ in cut] == pytest.approx([score for score, _ in whole], rel=REL)


def test_the_models_length_holds() -> None:
    tokens = random_ids(1, 560)[0].tolist()
    asked = lm(codecs=tiny_codecs("llama", "identity"))
    got = asked._loglikelihood_tokens([(None, tokens[:550], tokens[550:])])[0]
    assert got[0] == pytest.approx(direct(asked.model, tokens[-513:], 10)[0], rel=REL)
    with pytest.raises(kvfold.InputError, match="at most 512"):
        asked._loglikelihood_tokens([(None, [3], tokens[:513])])


@pytest.mark.parametrize("method", [None, "identity"])
def test_rolling_log_likelihood_scores_every_token_once(method: str | None) -> None:
    asked = lm(codecs=tiny_codecs("llama", method) if method else None)
    text = (TEXT * 8)[:700]
    tokens = ids(text)
    first = direct(asked.model, [1, *tokens[:512]], 512)[0]
    second = direct(asked.model, tokens[187:], 188)[0]  # the last window is as long as the model allows
    got = asked.loglikelihood_rolling(requests((text,), (TEXT,)))
    assert got == pytest.approx([first + second, direct(asked.model, [1, *ids(TEXT)], len(TEXT))[0]], rel=REL)


@pytest.mark.parametrize("coded", [False, True])
def test_generation_stops_where_it_is_told(coded: bool) -> None:
    asked = lm(codecs=tiny_codecs("llama") if coded else None)
    start = torch.tensor([ids(TEXT[:40])])
    with torch.no_grad(), asked._answering():
        plain = asked.model.generate(start, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 40:]
    whole = tiny_tokenizer().decode(plain)
    stop = whole[5:8]
    kwargs = [{"until": [], "max_gen_toks": 24}, {"until": [stop], "max_gen_toks": 24}, {"until": stop, "max_gen_toks": 3}]
    got = asked.generate_until(requests(*((TEXT[:40], one) for one in kwargs)))
    assert got == [whole, whole.split(stop)[0], tiny_tokenizer().decode(plain[:3])]
    passes: list[Any] = []
    handle = asked.model.register_forward_hook(lambda *args: passes.append(args))
    asked.generate_until(requests((TEXT[:40], {"until": [whole[0]], "max_gen_toks": 24})))
    handle.remove()
    assert len(passes) == 1  # not all 24 tokens, cut afterwards
    assert asked.bytes_bf16 == pytest.approx(asked.bytes_cache * 16 / 3)
    assert (asked.bytes_cache > 0) == coded
    with pytest.raises(kvfold.InputError, match="max_gen_toks"):
        asked.generate_until(requests(("a", {"until": [], "max_gen_toks": 512})))


# -- tasks of a file ---------------------------------------------------------------------------------------------------


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of random letters whose gold choice is the one that the exact model finds likeliest."""
    draw = random_ids(count, 40, seed)
    asked = lm()
    made = []
    for row in draw.tolist():
        query, choices = tiny_tokenizer().decode(row[:28]), [tiny_tokenizer().decode(row[28 + 3 * i :][:3]) for i in range(4)]
        scores = asked.loglikelihood(requests(*((f"{query}A:", f" {choice}") for choice in choices)))
        made.append({"query": query, "choices": choices, "gold": max(range(4), key=lambda i: scores[i][0])})
    return made


def task_file(folder: Path, data: Path) -> None:
    (folder / "own.yaml").write_text(
        f"""
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data.as_posix()}"}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}A:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task of 24 questions that the exact model answers without a fault."""
    made = tmp_path_factory.mktemp("tasks")
    (made / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(24)))
    task_file(made, made / "data.jsonl")
    return made


def run(folder: Path, codecs: kvfold.CodecSet | None, num_fewshot: int | None = None, **how: Any) -> TaskResults:
    tasks = load_tasks(["own_choice"], folder, num_fewshot)
    return evaluate_tasks(tiny_model("llama"), tiny_tokenizer(), codecs, tasks, quiet=True, **how)


def accuracy(result: TaskResults) -> float:
    (score,) = result.scores
    return score.value


def exact_in_its_own_pass(self: CodedLayer, old: int, before: int) -> torch.Tensor:
    """What many quantized caches do: the pass that brings keys and values reads them exactly, later ones as codes."""
    return torch.full((self.length - old,), before)


def test_a_bad_codec_loses_where_a_naive_harness_sees_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tiny_codecs("llama", **BAD)
    assert accuracy(run(folder, None)) == accuracy(run(folder, tiny_codecs("llama", "identity"))) == 1.0
    assert accuracy(run(folder, bad)) < 0.75
    monkeypatch.setattr(CodedLayer, "_boundaries", exact_in_its_own_pass)
    model, pair = tiny_model("llama"), ids("".join(PAIRS[0]))
    with kvfold.attach(model, bad, sinks=0, window=0):
        naive = direct(model, pair, 10)[0]  # context and continuation in one pass, as harnesses do
    assert naive == pytest.approx(direct(model, pair, 10)[0], rel=REL)
    assert lm(codecs=bad).loglikelihood(requests(PAIRS[0]))[0][0] != pytest.approx(naive, rel=0.01)
    assert accuracy(run(folder, bad)) < 0.75


def test_results_say_what_they_are(folder: Path) -> None:
    result = run(folder, tiny_codecs("llama", **BAD), limit=12, num_fewshot=2)
    (score,) = result.scores
    assert (score.task, score.metric, score.filter, score.samples, score.shots) == ("own_choice", "acc", "none", 12, 2)
    assert score.stderr == pytest.approx((score.value * (1 - score.value) / 11) ** 0.5)
    assert (result.method, result.sinks, result.window, result.limit, result.lm_eval) == ("rvq", 0, 0, 12, lm_eval.__version__)
    assert result.bits_per_element == tiny_codecs("llama", **BAD).bits_per_element
    exact = run(folder, None, limit=12)
    assert (exact.method, exact.bits_per_element, exact.sinks, exact.scores[0].shots) == ("exact", None, None, 0)
    assert run(folder, tiny_codecs("llama"), limit=1, sinks=4, window=512).bits_per_element == 32


def test_a_run_goes_on_from_its_answers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "answers.jsonl"
    codecs = tiny_codecs("llama")
    first = run(folder, codecs, resume=file, limit=6)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 6 * 4
    file.write_text("".join(lines[:-1]) + lines[-1][:9])  # cut off while it wrote
    scored = []
    scores = CacheLM._scores
    monkeypatch.setattr(CacheLM, "_scores", lambda self, *args: scored.extend(args[2]) or scores(self, *args))
    assert run(folder, codecs, resume=file, limit=6).scores == first.scores
    assert len(scored) == 1
    assert file.read_text().splitlines(keepends=True)[:-1] == lines[:-1]
    assert len(json.loads(file.read_text().splitlines()[-1])) == 2
    for other in ({"codecs": None}, {"codecs": tiny_codecs("llama", **BAD)}, {"codecs": codecs, "window": 3}):
        with pytest.raises(kvfold.InputError, match="another run"):
            run(folder, resume=file, **other)


@pytest.mark.parametrize("text", ["{}\n", "no json\n", "[1]\n", '{"kind": "kvfold answers"}\n[1]\n'])
def test_what_is_no_file_of_answers_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x"
    file.write_text(text)
    with pytest.raises(kvfold.InputError, match="--resume"):
        Answers(file, {"model": "m"})
    assert file.read_text() == text


def test_the_task_files_of_the_benchmarks_work(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    choice = {"query": "Question: 1?", "choices": ["a", "b", "c"], "gold": 1}
    shared = {"context_options": ["Ann saw Bob so Ann", "Ann saw Bob so Bob"], "continuation": "hid.", "gold": 0}
    sums = {"question": "1 and 1?", "answer": "It is 2.\n#### 2"}
    files = {"arc_easy": choice, "piqa": choice, "winogrande": shared, "gsm8k_test": sums}
    for name, row in files.items():
        (data / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    script = [sys.executable, str(TEMPLATES / "write.py")]
    names = subprocess.run([*script, str(data), str(out)], capture_output=True, text=True, check=True).stdout.strip().split(",")
    assert names == ["arc_easy_local", "gsm8k_local", "piqa_local", "winogrande_local"]
    result = evaluate_tasks(tiny_model("llama"), tiny_tokenizer(), None, load_tasks(names, out), quiet=True)
    found = {(score.task, score.metric): score.samples for score in result.scores}
    assert found == {
        (name, metric): 3
        for name, metrics in zip(names, ("acc acc_norm", "exact_match", "acc acc_norm", "acc"), strict=True)
        for metric in metrics.split()
    }
    model = tiny_model("llama")
    hid = [direct_pair(model, option, " hid.")[0] for option in shared["context_options"]]
    winogrande = next(score.value for score in result.scores if score.task == "winogrande_local")
    assert winogrande == float(hid[0] > hid[1])
    assert subprocess.run([*script, str(out), str(tmp_path)], capture_output=True).returncode == 1


# -- what is wrong is told ---------------------------------------------------------------------------------------------


@pytest.fixture
def only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading lm-eval's 14,000 tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    def fewer(include_path: Any = None, include_defaults: bool = True) -> Any:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", fewer)


@pytest.mark.usefixtures("only_own_tasks")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"names": ["no_such_task"]}, "no_such_task"),
        ({"task_path": "no/such/folder"}, "--task-path"),
        ({"names": []}, "names of tasks"),
        ({"names": ["own_choice", ""]}, "names of tasks"),
        ({"num_fewshot": -1}, "--num-fewshot"),
    ],
)
def test_tasks_that_cannot_be_loaded(folder: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(kvfold.InputError, match=told):
        load_tasks(**{"names": ["own_choice"], "task_path": folder, **given})


def test_missing_data_and_a_limit_of_nothing(folder: Path, tmp_path: Path) -> None:
    task_file(tmp_path, tmp_path / "gone.jsonl")
    with pytest.raises(kvfold.InputError, match=r"data of the tasks own_choice.*gone\.jsonl"):
        load_tasks(["own_choice"], tmp_path)
    with pytest.raises(kvfold.InputError, match="--limit"):
        run(folder, None, limit=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("saved")
    tiny_model("llama").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    tiny_codecs("llama").save(root / "codec")
    return str(root / "model"), str(root / "codec")


@pytest.mark.usefixtures("only_own_tasks")
def test_on_the_command_line(saved: tuple[str, str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, codec = saved
    ask: Callable[..., int] = functools.partial(lambda *argv: main(["eval", model, *argv]))
    tasks = ["--tasks", "own_choice", "--task-path", str(folder), "--limit", "5"]
    assert ask(*tasks, "--codec", codec, "--json", "-", "--record", str(tmp_path)) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["scores"][0]["samples"] == 5
    assert (facts["method"], facts["settings"]["stages"]) == ("rvq", 2)
    assert json.loads((tmp_path / "tasks.jsonl").read_text())["scores"] == facts["scores"]
    assert ask(*tasks) == 0
    assert "own_choice  acc     none    1.0000" in capsys.readouterr().out
    for wrong, told in (
        ([*tasks, "--text", "x"], "--tasks"),
        (["--text", "x"], "--codec DIR with --text"),
        (["--text", "x", "--codec", codec, "--limit", "3"], "--limit without it"),
        (["--tasks", "no_such_task"], "no_such_task"),
        ([*tasks, "--limit", "0"], "--limit"),
        ([*tasks, "--task-path", "no/such"], "no/such"),
        ([*tasks, "--resume", "no/such/file"], "no/such"),
        ([*tasks, "--codec", codec, "--sinks", "-1"], "sinks"),
    ):
        assert ask(*wrong) == 2, wrong
        ran = capsys.readouterr()
        assert (ran.out, told in ran.err) == ("", True), (wrong, ran.err)
        assert "Traceback" not in ran.err
