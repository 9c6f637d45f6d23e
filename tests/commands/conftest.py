"""Model, codec and text made once for the tests of all commands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from command_world import SMALL, Ran, World, save_model, words
from tiny import random_ids

from kvfold.cli import main


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("cli")
    model = save_model(root / "model")
    text = root / "text.txt"
    text.write_text(words(random_ids(1, 600, 5)))
    codec = root / "codec"
    assert main(["calibrate", model, "--out", str(codec), "--text", str(text), "--tokens", "400", *SMALL]) == 0
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
