"""`kvfold generate`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from command_world import PROMPT, SIZES, Ran, World
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvfold


def test_generate_prints_only_the_new_text(generate: Callable[..., Ran], world: World) -> None:
    ran = generate("--prompt", PROMPT, "--max-new-tokens", "30", *SIZES, "--report")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world.model), AutoTokenizer.from_pretrained(world.model)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with kvfold.attach(model, kvfold.load(world.codec), sinks=2, window=8) as attached:
        out = model.generate(input_ids=ids, max_new_tokens=30, do_sample=False)
        report = str(attached.cache.report())
    assert ran.out == tokenizer.decode(out[0, ids.shape[1] :]) + "\n"
    assert len(set(ran.out.split())) > 3
    assert report in ran.err
    assert "codes 0 B" not in report


def test_generate_takes_the_prompt_from_a_file(generate: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    by_file = generate("--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "10")
    assert by_file.status == 0
    assert by_file.out == generate("--prompt", PROMPT, "--max-new-tokens", "10").out


def test_generate_samples_with_a_seed(generate: Callable[..., Ran]) -> None:
    given = ["--prompt", PROMPT, "--max-new-tokens", "20", "--sample", "--temperature", "2"]
    texts = [generate(*given, "--seed", seed).out for seed in ("3", "3", "4")]
    assert texts[0] == texts[1] != texts[2]


def test_generate_goes_on_from_a_saved_cache(generate: Callable[..., Ran], tmp_path: Path) -> None:
    whole = generate("--prompt", PROMPT, "--max-new-tokens", "50", *SIZES)
    first = generate("--prompt", PROMPT, "--max-new-tokens", "20", *SIZES, "--save-cache", str(tmp_path / "1"))
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
    assert generate("--prompt", PROMPT, "--max-new-tokens", "10", *SIZES, "--save-cache", saved).status == 0
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


def test_the_longest_text_that_fits_is_written(generate: Callable[..., Ran]) -> None:
    assert len(generate("--prompt", "w9 " * 508, "--max-new-tokens", "4").out.split()) == 4
