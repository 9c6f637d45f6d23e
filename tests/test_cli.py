"""The command line, run as a user would: a tiny random model in a folder, a tokenizer of words, text files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import VOCAB, random_ids, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import kvfold
from kvfold.cli import main
from kvfold.commands import inspect
from kvfold.evaluate import evaluate

_WORDS = ["<pad>", "<bos>", "<unk>", "system", "user", "assistant", *(f"w{i}" for i in range(6, VOCAB))]
_TEMPLATE = (
    "system w90 {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
_SMALL = ["--set", "group=8", "--set", "codebook_size=16", "--set", "stages=2", "--set", "iterations=2"]
_PROMPT = " ".join(f"w{i}" for i in range(10, 40))
_SIZES = ["--sinks", "2", "--window", "8"]


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


def _words(ids: torch.Tensor) -> str:
    return " ".join(_WORDS[int(i)] for i in ids.clamp_min(6).flatten())


def _tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner)  # without special tokens: every word is printed
    made.chat_template = _TEMPLATE
    return made


def _save_model(folder: Path, change: Callable[[Any], None] = lambda model: None, family: str = "llama") -> str:
    model = tiny_model(family)
    change(model)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("cli")
    model = _save_model(root / "model")
    text = root / "text.txt"
    text.write_text(_words(random_ids(1, 600, 5)))
    codec = root / "codec"
    assert main(["calibrate", model, "--out", str(codec), "--text", str(text), "--tokens", "400", *_SMALL]) == 0
    return World(root, model, str(codec), str(text))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*argv: str) -> Ran:
        capsys.readouterr()
        status = main(list(argv))
        return Ran(status, *capsys.readouterr())

    return run


@pytest.fixture
def generate(run: Callable[..., Ran], world: World) -> Callable[..., Ran]:
    return lambda *argv, model=world.model, codec=world.codec: run("generate", model, "--codec", codec, *argv)


def _refused(ran: Ran, *told: str) -> None:
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


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- calibrate ---------------------------------------------------------------------------------------------------------


def test_calibrate_writes_a_folder_and_says_what_it_is(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    first, second, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    given = ["calibrate", world.model, "--text", world.text, "--tokens", "400", *_SMALL]
    ran = run(*given, "--out", str(first))
    codecs = kvfold.load(first)
    assert ran.status == 0
    assert ran.out.count("\n") == 1
    for part in (str(first), f"{codecs.bits_per_element:.3f} bits", f"{codecs.codebook_bytes:,} bytes", "distortion"):
        assert part in ran.out
    assert "calibrating rvq on 400 tokens" in ran.err
    assert codecs.settings["stages"] == 2
    assert codecs.info["tokens"] == 400
    assert run(*given, "--out", str(second)).status == 0
    assert _files(first) == _files(second)
    assert run(*given, "--out", str(other), "--seed", "1").status == 0
    assert _files(first)["codecs.safetensors"] != _files(other)["codecs.safetensors"]


def test_calibrate_joins_several_texts(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(_words(random_ids(1, 150, ord(name))))
    texts = ["--text", str(tmp_path / "a"), str(tmp_path / "b")]
    assert run("calibrate", world.model, "--out", str(tmp_path / "codec"), *texts, *_SMALL).status == 0
    assert kvfold.load(tmp_path / "codec").info["tokens"] == 300


def test_calibrate_without_text_uses_the_built_in_one(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    ran = run("calibrate", world.model, "--out", str(tmp_path / "codec"), "--tokens", "200", *_SMALL)
    assert ran.status == 0
    assert kvfold.load(tmp_path / "codec").info["text"] == "own samples"


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_prints_a_row_a_layer_and_draws(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    plot = tmp_path / "d.png"
    ran = run("inspect", world.codec, "--plot", str(plot))
    codecs = kvfold.load(world.codec)
    assert ran.status == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "rvq: " in ran.out
    assert "group=8" in ran.out
    for layer, (key, value) in enumerate(codecs.info["distortion"]):
        row = next(line.split() for line in ran.out.splitlines() if line.split()[:1] == [str(layer)])
        assert row[1:] == ["2", "2", f"{key:.4g}", f"{value:.4g}"]


def test_inspect_json_has_everything_and_nothing_else_is_printed(run: Callable[..., Ran], world: World) -> None:
    facts = run("inspect", world.codec, "--json", "-").json
    codecs = kvfold.load(world.codec)
    assert Path(world.codec, "distortion.png").is_file()
    assert (facts["method"], facts["seed"], facts["tokens"]) == ("rvq", 0, 400)
    assert facts["bytes_codebooks"] == codecs.codebook_bytes
    assert [row["key_distortion"] for row in facts["layers"]] == [pair[0] for pair in codecs.info["distortion"]]


def test_inspect_without_matplotlib_still_prints(
    run: Callable[..., Ran], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    ran = run("inspect", world.codec, "--plot", str(tmp_path / "d.png"))
    assert ran.status == 0
    assert "key distortion" in ran.out
    assert "pip install kvfold[plot]" in ran.err
    assert not list(tmp_path.iterdir())


def test_inspect_shows_layers_that_stay_exact(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    model = _save_model(tmp_path / "gemma3", family="gemma3")
    codec = str(tmp_path / "codec")
    assert run("calibrate", model, "--out", codec, "--text", world.text, "--tokens", "300", *_SMALL).status == 0
    rows = run("inspect", codec, "--json", "-").json["layers"]
    assert [row["key_bits"] for row in rows] == [None, 2.0, 2.0]
    assert "exact" in run("inspect", codec).out


# -- eval --------------------------------------------------------------------------------------------------------------


def test_eval_json_is_what_evaluate_measures(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    sizes = {"context": 100, "windows": 3, "sinks": 2, "window": 8}
    options = [part for name, number in sizes.items() for part in (f"--{name}", str(number))]
    given = ["eval", world.model, "--codec", world.codec, "--text", world.text, *options]
    facts = run(*given, "--json", "-").json
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world.model), AutoTokenizer.from_pretrained(world.model)
    wanted = evaluate(model, tokenizer, kvfold.load(world.codec), Path(world.text).read_text(), **sizes, quiet=True).to_json()
    for name in ("perplexity", "perplexity_exact", "kl_mean", "kl_p99", "top1_agreement"):
        assert facts[name] == pytest.approx(wanted[name], rel=1e-5)
    for name in ("bits_per_element", "bits_per_element_with_codebooks", "bytes_cache", "bytes_bf16", "tokens", *sizes):
        assert facts[name] == wanted[name]
    assert facts["seconds"] > 0
    assert facts["kl_mean"] > 1e-4

    ran = run(*given, "--json", str(tmp_path / "out.json"), "--record", str(tmp_path))
    assert ran.status == 0
    assert f"{facts['perplexity']:.4f}" in ran.out
    assert json.loads((tmp_path / "out.json").read_text())["kl_mean"] == facts["kl_mean"]
    recorded = json.loads((tmp_path / "eval.jsonl").read_text())
    assert recorded["kl_mean"] == facts["kl_mean"]
    assert recorded["config"]["context"] == 100
    assert recorded["machine"]["torch"] == torch.__version__


def test_eval_defaults_to_the_papers_protocol(run: Callable[..., Ran], world: World) -> None:
    facts = run("eval", world.model, "--codec", world.codec, "--text", world.text, "--context", "60", "--json", "-").json
    assert (facts["sinks"], facts["window"], facts["windows"], facts["tokens"]) == (0, 0, 8, 8 * 59)
    assert facts["bits_per_element"] == kvfold.load(world.codec).bits_per_element


def test_eval_with_another_beam(run: Callable[..., Ran], world: World) -> None:
    given = ["eval", world.model, "--codec", world.codec, "--text", world.text, "--context", "100", "--json", "-"]
    greedy, wide = run(*given).json, run(*given, "--set", "beam=8").json
    assert (greedy["settings"]["beam"], wide["settings"]["beam"]) == (1, 8)
    assert greedy["kl_mean"] != wide["kl_mean"]


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_prints_only_the_new_text(generate: Callable[..., Ran], world: World) -> None:
    ran = generate("--prompt", _PROMPT, "--max-new-tokens", "30", *_SIZES, "--report")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world.model), AutoTokenizer.from_pretrained(world.model)
    ids = tokenizer(_PROMPT, return_tensors="pt")["input_ids"]
    with kvfold.attach(model, kvfold.load(world.codec), sinks=2, window=8) as attached:
        out = model.generate(input_ids=ids, max_new_tokens=30, do_sample=False)
        report = str(attached.cache.report())
    assert ran.out == tokenizer.decode(out[0, ids.shape[1] :]) + "\n"
    assert len(set(ran.out.split())) > 3
    assert report in ran.err
    assert "codes 0 B" not in report


def test_generate_takes_the_prompt_from_a_file(generate: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(_PROMPT)
    by_file = generate("--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "10")
    assert by_file.status == 0
    assert by_file.out == generate("--prompt", _PROMPT, "--max-new-tokens", "10").out


def test_generate_samples_with_a_seed(generate: Callable[..., Ran]) -> None:
    given = ["--prompt", _PROMPT, "--max-new-tokens", "20", "--sample", "--temperature", "2"]
    texts = [generate(*given, "--seed", seed).out for seed in ("3", "3", "4")]
    assert texts[0] == texts[1] != texts[2]


def test_generate_goes_on_from_a_saved_cache(generate: Callable[..., Ran], tmp_path: Path) -> None:
    whole = generate("--prompt", _PROMPT, "--max-new-tokens", "50", *_SIZES)
    first = generate("--prompt", _PROMPT, "--max-new-tokens", "20", *_SIZES, "--save-cache", str(tmp_path / "1"))
    second = generate("--load-cache", str(tmp_path / "1"), "--max-new-tokens", "15", "--save-cache", str(tmp_path / "2"))
    command = [sys.executable, "-m", "kvfold", "generate", *_model_and_codec(generate), "--load-cache", str(tmp_path / "2")]
    third = subprocess.run([*command, "--max-new-tokens", "15"], capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert third.stderr == ""
    assert len(whole.out.split()) == 50
    assert [*first.out.split(), *second.out.split(), *third.stdout.split()] == whole.out.split()


def _model_and_codec(generate: Callable[..., Ran]) -> list[str]:
    defaults = generate.__kwdefaults__
    return [defaults["model"], "--codec", defaults["codec"]]


def test_generate_appends_the_prompt_to_a_loaded_cache(generate: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    saved = str(tmp_path / "c")
    assert generate("--prompt", _PROMPT, "--max-new-tokens", "10", *_SIZES, "--save-cache", saved).status == 0
    ran = generate("--load-cache", saved, "--prompt", "w50 w51", "--max-new-tokens", "10")
    codecs = kvfold.load(world.codec)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world.model), AutoTokenizer.from_pretrained(world.model)
    cache = kvfold.load_cache(saved, codecs, model.config)
    ids = torch.cat((cache.input_ids, tokenizer("w50 w51", return_tensors="pt")["input_ids"]), 1)
    with kvfold.attach(model, codecs):
        out = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert ran.out == tokenizer.decode(out[0, ids.shape[1] :]) + "\n"
    assert ran.out != generate("--load-cache", saved, "--max-new-tokens", "10").out


def test_chat_wraps_the_first_turn_whole_and_later_ones_without_the_systems_part(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    saved, again = str(tmp_path / "c"), str(tmp_path / "d")
    by_hand = generate("--prompt", "system w90 user w20 w21 assistant", "--max-new-tokens", "5")
    assert generate("--chat", "--prompt", "w20 w21", "--max-new-tokens", "5", "--save-cache", saved).out == by_hand.out
    by_hand = generate("--load-cache", saved, "--prompt", "user w22 assistant", "--max-new-tokens", "5")
    chatted = generate("--load-cache", saved, "--chat", "--prompt", "w22", "--max-new-tokens", "5", "--save-cache", again)
    assert chatted.out == by_hand.out


# -- bench, codecs -----------------------------------------------------------------------------------------------------


def test_bench_generate_measures_both_caches(run: Callable[..., Ran], world: World) -> None:
    given = ["bench", "generate", world.model, "--codec", world.codec, "--contexts", "90", "--new-tokens", "6"]
    ours, plain = run(*given, "--repeats", "1", "--text", world.text, "--threads", "1", "--json", "-").json
    assert [(r["context"], r["cache"], r["dtype"]) for r in (ours, plain)] == [
        (90, "kvfold", "float32"),
        (90, "plain", "float32"),
    ]
    numbers = 3 * 2 * 2 * 16  # layers, keys and values, KV heads, head dim
    assert plain["bytes_cache"] == 96 * numbers * 4
    coded = (96 - 4 - 64) // 16 * 16
    assert ours["bytes_cache"] == (96 - coded) * numbers * 4 + coded * numbers * 2 // 8  # 2 bits a number
    for result in (ours, plain):
        assert result["tokens_per_s"] > 0
        assert result["prefill_s"] > 0
        assert result["peak_rss_bytes"] >= result["loaded_rss_bytes"] > 1 << 20


def test_codecs_lists_every_method_with_its_bits(run: Callable[..., Ran]) -> None:
    ran = run("codecs")
    rows = {line.split()[0]: line for line in ran.out.splitlines()[1:]}
    assert rows["rvq"].split()[1:3] == ["2.250", "2.125"]
    assert rows["rvq-paper"].split()[1:3] == ["3.000", "2.875"]
    assert "arXiv 2410.15704" in rows["rvq-paper"]
    assert rows["identity"].split()[1:3] == ["32.000", "32.000"]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "nothing at"), (b"", "empty"), (b"  \n\t\n", "empty"), (b"w10 \xff\xfe", "UTF-8"), ("folder", "directory")],
    ids=["missing", "empty", "white", "undecodable", "folder"],
)
def test_bad_text(run: Callable[..., Ran], world: World, tmp_path: Path, content: bytes | str | None, told: str) -> None:
    file = tmp_path / "bad.txt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        file.mkdir()
    before = _files(tmp_path)
    common = ["--codec", world.codec]
    _refused(run("eval", world.model, *common, "--text", world.text, str(file)), told)
    _refused(run("generate", world.model, *common, "--prompt-file", str(file)), told)
    _refused(run("bench", "generate", world.model, *common, "--contexts", "16", "--text", str(file)), told)
    _refused(run("calibrate", world.model, "--out", str(tmp_path / "out"), "--text", str(file), *_SMALL), told)
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tokens", "3", *_SMALL], ("16",)),  # fewer vectors than codewords
        (["--tokens", "1", *_SMALL], ("--tokens",)),
        (["--tokens", "many"], ("--tokens", "'many'")),
        (["--codec", "nonsense"], ("nonsense", "rvq-paper")),
        (["--set", "nonsense=1"], ("nonsense", "codebook_size")),
        (["--set", "stages"], ("stages", "key=value")),
        (["--set", "stages=few"], ("stages", "few")),
        (["--set", "stages=0", "--set", "group=8"], ("stages",)),
        (["--set", "group=5"], ("group=5", "head dim 16")),
        (["--set", "group=8", "--set", "codebook_size=1"], ("codebook_size",)),
        (["--set", "group=8", "--set", "codebook_size=65537"], ("65536",)),
        (["--set", "group=8", "--set", "key_groups=random"], ("random", "strided")),
        (["--set", "group=8", "--set", "bits=0.1"], ("bits",)),
        (["--device", "nowhere"], ("device", "nowhere")),
        (["--dtype", "int3"], ("int3", "float32")),
        (["--threads", "0"], ("--threads",)),
        (["--nonsense"], ("--nonsense",)),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_calibrate_refuses(
    run: Callable[..., Ran], world: World, tmp_path: Path, options: list[str], told: tuple[str, ...]
) -> None:
    _refused(run("calibrate", world.model, "--out", str(tmp_path / "out"), "--text", world.text, *options), *told)
    assert not list(tmp_path.iterdir())


def test_calibrate_refuses_a_folder_with_other_files(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    before = _files(tmp_path)
    given = ["calibrate", world.model, "--text", world.text, *_SMALL, "--out"]
    ran = run(*given, str(tmp_path))
    _refused(ran, "other files")
    assert "calibrating" not in ran.err  # told before the work, not after it
    _refused(run(*given, str(tmp_path / "no" / "such")), "no")
    assert _files(tmp_path) == before


def test_not_a_number_in_keys(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan

    model = _save_model(tmp_path / "model", spoil)
    before = set(tmp_path.iterdir())
    _refused(run("calibrate", model, "--out", str(tmp_path / "out"), "--text", world.text, *_SMALL), "NaN")
    _refused(run("generate", model, "--codec", world.codec, "--prompt", _PROMPT, "--save-cache", str(tmp_path / "c")), "NaN")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("family", "told"), [("mistral", "llama"), ("gpt-neox", "llama"), ("llama-llama3-rope", "RoPE")], ids=lambda v: v
)
def test_codec_of_another_model(run: Callable[..., Ran], world: World, tmp_path: Path, family: str, told: str) -> None:
    model = _save_model(tmp_path / "other", family=family)
    _refused(run("generate", model, "--codec", world.codec, "--prompt", _PROMPT), told)
    _refused(run("eval", model, "--codec", world.codec, "--text", world.text, "--context", "64"), told)


def test_bench_tells_bad_input_of_its_measuring_process(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    model = _save_model(tmp_path / "other", family="mistral")
    _refused(run("bench", "generate", model, "--codec", world.codec, "--contexts", "16", "--json", "-"), "llama")
    for contexts in ("600", "0", "16,", "-4"):
        _refused(run("bench", "generate", model, "--codec", world.codec, "--contexts", contexts), "contexts")


@pytest.mark.parametrize("name", ["nowhere", "folder", "no/such/folder/here", "model.gguf"])
def test_no_such_model(
    run: Callable[..., Ran], world: World, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries of a hub that is out of reach
    (tmp_path / "folder").mkdir()
    _refused(run("generate", name, "--codec", world.codec, "--prompt", _PROMPT), name)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)


def _swap(old: str, new: str) -> Callable[[Path], None]:
    def swap(file: Path) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return swap


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("codecs.safetensors", _cut),
        ("codecs.safetensors", _flip),
        ("codecs.safetensors", Path.unlink),
        ("codecs.json", _cut),
        ("codecs.json", Path.unlink),
        ("codecs.json", _swap('"kv_heads": 2', '"kv_heads": 4')),
        ("codecs.json", _swap('"stages": 2', '"stages": 3')),
        ("codecs.json", _swap('"kind": "residual"', '"kind": "nonsense"')),
        ("codecs.json", _swap('"version": 1', '"version": 99')),
        ("codecs.json", lambda file: file.write_text("[]")),
    ],
    ids=["cut", "flipped", "no-tensors", "cut-json", "no-json", "other-heads", "other-stages", "other-kind", "version", "list"],
)
def test_damaged_codec(run: Callable[..., Ran], world: World, tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    codec = tmp_path / "codec"
    shutil.copytree(world.codec, codec)
    harm(codec / name)
    before = _files(codec)
    _refused(run("inspect", str(codec)))
    _refused(run("generate", world.model, "--codec", str(codec), "--prompt", _PROMPT))
    assert _files(codec) == before


def test_damaged_cache(generate: Callable[..., Ran], run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    saved, harmed = tmp_path / "cache", tmp_path / "harmed"
    assert generate("--prompt", _PROMPT, "--max-new-tokens", "5", *_SIZES, "--save-cache", str(saved)).status == 0
    for harm in (_cut, _flip, lambda file: file.write_text("nonsense"), Path.unlink):
        shutil.copy(saved, harmed)
        harm(harmed)
        _refused(generate("--load-cache", str(harmed)), str(harmed))
    other = str(tmp_path / "other")
    assert run("calibrate", world.model, "--out", other, "--text", world.text, "--seed", "9", *_SMALL).status == 0
    _refused(generate("--load-cache", str(saved), codec=other), "codec")
    _refused(generate("--load-cache", str(saved), "--window", "9"), "--window 8")
    _refused(generate("--load-cache", str(saved), "--sinks", "3"), "--sinks 2")


def test_a_cache_saved_without_its_tokens_cannot_go_on(generate: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    model, codecs = AutoModelForCausalLM.from_pretrained(world.model), kvfold.load(world.codec)
    with kvfold.attach(model, codecs) as attached, torch.no_grad():
        model(input_ids=random_ids(1, 20))
        attached.cache.save(tmp_path / "bare")
        attached.cache.save(tmp_path / "full", random_ids(1, 20))
    _refused(generate("--load-cache", str(tmp_path / "bare")), "tokens")
    _refused(generate("--load-cache", str(tmp_path / "full")), "prompt")  # the model has nothing left to read
    assert generate("--load-cache", str(tmp_path / "full"), "--prompt", "w9", "--max-new-tokens", "2").status == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "prompt"),
        (["--prompt", ""], "prompt"),
        (["--prompt", "   "], "prompt"),
        (["--prompt", "w9 " * 513], "512"),
        (["--prompt", _PROMPT, "--max-new-tokens", "483"], "512"),
        (["--prompt", _PROMPT, "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", _PROMPT, "--temperature", "0"], "--temperature"),
        (["--prompt", _PROMPT, "--sinks", "-1"], "sinks"),
        (["--prompt", _PROMPT, "--window", "-1"], "window"),
        (["--prompt", _PROMPT, "--max-bytes", "1000"], "max_bytes"),
        (["--prompt", _PROMPT, "--set", "stages=3"], "beam"),
        (["--prompt", _PROMPT, "--set", "beam=0"], "beam"),
        (["--prompt", _PROMPT, "--set", "beam=wide"], "beam"),
    ],
    ids=lambda value: " ".join(value)[-24:] if isinstance(value, list) else "",
)
def test_generate_refuses(
    generate: Callable[..., Ran], tmp_path: Path, options: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    forward = type(tiny_model("llama")).forward
    monkeypatch.setattr(
        type(tiny_model("llama")), "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs)
    )
    _refused(generate(*options, "--save-cache", str(tmp_path / "c")), told)
    assert not list(tmp_path.iterdir())
    assert passes == ([1] if "--max-bytes" in options else [])  # max_bytes is checked as the pass begins


def test_the_longest_text_that_fits_is_written(generate: Callable[..., Ran]) -> None:
    assert len(generate("--prompt", "w9 " * 508, "--max-new-tokens", "4").out.split()) == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--context", "513"], "512"),
        (["--context", "1"], "--context"),
        (["--windows", "0"], "--windows"),
        (["--sinks", "-1"], "sinks"),
        (["--set", "group=8"], "beam"),
        (["--json", "no/such/folder/x.json"], "folder"),
        (["--json", "."], "folder"),
        (["--record", "no/such/folder"], "folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_refuses(run: Callable[..., Ran], world: World, options: list[str], told: str) -> None:
    given = ["eval", world.model, "--codec", world.codec, "--text", world.text, "--context", "64"]
    _refused(run(*given, *options), told)


# -- the program -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["bench"], ["bench", "nonsense"], ["eval", "x"], ["calibrate", "x"], ["inspect"]], ids=" ".join
)
def test_wrong_use(run: Callable[..., Ran], argv: list[str]) -> None:
    _refused(run(*argv), "--help")


@pytest.mark.parametrize("command", ["", "calibrate", "inspect", "generate", "eval", "codecs", "bench generate"])
def test_help(run: Callable[..., Ran], command: str) -> None:
    ran = run(*command.split(), "--help")
    assert (ran.status, ran.err) == (0, "")
    if command:
        for option in ("--seed", "--threads", "--device", "--dtype"):
            assert option in ran.out


def test_other_failures_are_short_unless_asked(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Any) -> None:
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr(inspect, "codecs", fail)
    ran = run("codecs")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert "RuntimeError: boom" in ran.err
    monkeypatch.setenv("KVFOLD_DEBUG", "1")
    assert "Traceback" in run("codecs").err


def test_interrupted(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "codecs", interrupt)
    assert run("codecs") == Ran(130, "", "kvfold: interrupted\n")


def test_as_a_program() -> None:
    script = Path(sys.executable).with_name("kvfold")
    assert subprocess.run([script, "codecs"], capture_output=True, text=True).stdout.startswith("codec ")
    wrong = subprocess.run([sys.executable, "-m", "kvfold", "inspect", "/no/such"], capture_output=True, text=True)
    _refused(Ran(wrong.returncode, wrong.stdout, wrong.stderr), "/no/such")


def test_ablate_writes_rows_table_and_picture(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    sizes = ["--tokens", "400", "--context", "64", "--windows", "2", "--codec", "rvq", *_SMALL]
    texts = ["--text", world.text, "--calibration-text", world.text]
    plot, kept = tmp_path / "target.png", tmp_path / "rows.json"
    ran = run("ablate", "target", world.model, *texts, *sizes, "--json", str(kept), "--plot", str(plot))
    assert ran.status == 0, ran.err
    rows = json.loads(kept.read_text())
    assert [row["name"] for row in rows] == ["keys only", "values only", "keys and values"]
    assert all(row["name"] in ran.out and row["windows"] == 2 for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = run("ablate", "target", world.model, *texts, *sizes, "--json", "-").json
    assert [row["perplexity"] for row in again] == [row["perplexity"] for row in rows]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["depth"], "depth"),
        (["target", "--codec", "identity"], "residual"),
        (["target", "--text", "no/such.txt"], "no/such.txt"),
        (["size", "--tokens", "400", "--context", "64"], "2048 sample vectors"),
        (["size", "--tokens", "400"], "--context from 2 to the model's 512"),
    ],
)
def test_ablate_refuses(run: Callable[..., Ran], world: World, argv: list[str], told: str) -> None:
    what, *rest = argv
    texts = [] if "--text" in rest else ["--text", world.text]
    sizes = ["--set", "group=8", "--set", "iterations=2"] if "identity" not in rest else []
    _refused(run("ablate", what, world.model, *texts, "--calibration-text", world.text, *sizes, *rest), told)
