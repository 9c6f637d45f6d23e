"""Where a calibration with training stands, on disk, so that an interrupted one goes on: fitted codecs, then steps of training.

The folder belongs to one calibration: its `recipe` is everything the result depends on. A folder of another recipe is no error,
it is started anew. Going on gives the bytes that an uninterrupted run gives.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.calibrate.checkpoint import Checkpoint
from kvfold.codecs.artifact import CodecSet, load
from kvfold.errors import InputError

EVERY = 20  # steps between checkpoints
_NAME, _FITTED, _RANDOM = "training", "fitted", "random"


class Stages:
    """Stages of the calibration `recipe` in `folder`, which is made when there is something to keep.

    Raises:
        InputError: the folder's parent does not exist, or a file in it is damaged.
    """

    def __init__(self, folder: Path, recipe: str) -> None:
        self._folder, self._recipe = folder, recipe
        self._header: dict[str, Any] | None = None
        self._tensors: dict[str, Tensor] = {}
        if not folder.exists():
            if not folder.parent.is_dir():
                raise InputError("a folder for checkpoints", f"{folder}, whose parent does not exist", "choose another")
            return
        checkpoint = Checkpoint(folder, _NAME)
        header = checkpoint.header()
        if header is not None and header["config"] == recipe:
            self._header, self._tensors = header, checkpoint.tensors(header)

    @property
    def step(self) -> int | None:
        """Steps of training that are done; None if not even the codecs are fitted."""
        return None if self._header is None else self._header["step"]

    def fitted(self, generator: torch.Generator) -> CodecSet:
        """The fitted codecs, if `step` is not None; `generator` goes on from where it stood."""
        generator.set_state(self._tensors[_RANDOM])
        return load(self._folder / _FITTED)

    def training(self) -> dict[str, Tensor]:
        """What `keep` was given at `step`."""
        return {name: tensor for name, tensor in self._tensors.items() if name != _RANDOM}

    def keep_fitted(self, codecs: CodecSet, steps: int, generator: torch.Generator) -> None:
        """Codecs are fitted; `steps` of training are to come."""
        self._folder.mkdir(exist_ok=True)
        codecs.save(self._folder / _FITTED)
        self.keep(0, steps, {}, generator)

    def keep(self, step: int, steps: int, tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        """`step` of `steps` steps are done."""
        header = {"step": step, "steps": steps, "config": self._recipe, "position": None}
        Checkpoint(self._folder, _NAME).save(header, {**tensors, _RANDOM: generator.get_state()})

    def remove(self) -> None:
        """The calibration is done and its result is safe."""
        shutil.rmtree(self._folder, ignore_errors=True)
