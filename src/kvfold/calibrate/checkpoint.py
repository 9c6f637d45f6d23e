"""Where a long calibration stands, on disk: `NAME.json` names the tensors file it belongs to, `ema.jsonl` is a loss curve.

A checkpoint is a new tensors file, then the JSON replaced in one step, then the older tensors file removed: killed at any
moment, the folder holds a whole checkpoint. Files of others in the folder are left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kvfold.codecs.artifact import CURVE
from kvfold.errors import InputError
from kvfold.files import digest, read_json, read_tensors, replacing_file

_VERSION = 1
_WHAT = "a checkpoint of `kvfold calibrate`"


class Checkpoint:
    """The checkpoint called `name` in `folder`, which is made if its parent exists.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, name: str = "ema") -> None:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            came = f"{folder} ({error.strerror})"
            raise InputError("a folder for checkpoints", came, "choose another --checkpoint") from None
        self.folder, self._name = folder, name
        self._json, self._kind = folder / f"{name}.json", f"kvfold {name} checkpoint"

    def header(self) -> dict[str, Any] | None:
        """What `save` was given as `header`, or None if nothing was saved yet."""
        if not (self._json).exists():
            return None
        header = read_json(self._json, _WHAT)
        if header.get("kind") != self._kind or header.get("version") != _VERSION:
            came = f"{header.get('kind')!r} version {header.get('version')!r} in {self.folder}"
            raise InputError(f"{self._kind!r} version {_VERSION}", came, "start again in another --checkpoint folder")
        if missing := {"step", "steps", "config", "position", "tensors", "tensors_sha256"} - header.keys():
            came = f"{self._json} without {', '.join(sorted(missing))}"
            raise InputError(_WHAT, came, "start again in another --checkpoint folder")
        return header

    def tensors(self, header: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors saved with `header`."""
        file = self.folder / header["tensors"]
        tensors = read_tensors(file, _WHAT)
        if digest(file) != header["tensors_sha256"]:
            raise InputError(_WHAT, f"{file}, altered since it was written", "start again without --resume")
        return tensors

    def save(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Replace the checkpoint by this one, of step `header["step"]`."""
        file = self.folder / f"{self._name}-{header['step']:08d}.safetensors"
        with replacing_file(file) as fresh:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, fresh)
        own = {"kind": self._kind, "version": _VERSION, "tensors": file.name, "tensors_sha256": digest(file)}
        with replacing_file(self._json) as fresh:
            fresh.write_text(json.dumps({**header, **own}, indent=1) + "\n")
        for old in self.folder.glob(f"{self._name}-*.safetensors"):
            if old != file:
                old.unlink()

    def append(self, record: dict[str, Any]) -> None:
        """Add a line to the loss curve."""
        with (self.folder / CURVE).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def cut_curve(self, step: int) -> None:
        """Forget what the loss curve says of steps after `step`: they are taken again."""
        kept = [record for record in self.curve() if record["step"] <= step]
        with replacing_file(self.folder / CURVE) as fresh:
            fresh.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def curve(self) -> list[dict[str, Any]]:
        """The loss curve so far; a last line that was cut short is left out."""
        file = self.folder / CURVE
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]
