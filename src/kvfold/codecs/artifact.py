"""All codecs of one model, and the folder they are kept in: `codecs.safetensors` beside `codecs.json`.

The JSON holds kind, version, model shape, settings, seed, sample counts and distortion per layer, and the SHA-256 of the
tensors and of itself, so a truncated or altered file is noticed. The same calibration writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvfold.codecs import KINDS, Codec, Side
from kvfold.codecs.identity import IdentityCodec
from kvfold.codecs.residual import ResidualCodec
from kvfold.config import ModelSpec
from kvfold.errors import InputError
from kvfold.files import digest, read_json, read_tensors, replacing_folder, require_folder_target

VERSION = 1
_KIND = "kvfold codecs"
_JSON, _TENSORS, PLOT = "codecs.json", "codecs.safetensors", "distortion.png"
CURVE, CURVE_PLOT = "ema.jsonl", "ema.png"  # the loss curve of codebooks learned by moving average
_OWN = {_JSON, _TENSORS, PLOT, CURVE, CURVE_PLOT}  # a folder with other files in it is never replaced


@dataclass(frozen=True)
class CodecSet:
    """One key codec and one value codec for every coded layer of a model.

    Attributes:
        method: name in `kvfold codecs`.
        settings: the method's settings.
        spec: shape of the model it was made for.
        keys, values: a codec a layer, None for a layer that stays exact.
        info: seed, tokens, samples, and `distortion` (a pair a layer: mean squared error over mean square).
    """

    method: str
    settings: dict[str, Any]
    spec: ModelSpec
    keys: tuple[Codec | None, ...]
    values: tuple[Codec | None, ...]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def bits_per_element(self) -> float:
        """Mean over the coded layers, exact tokens not counted."""
        bits = [c.bits_per_element for c in (*self.keys, *self.values) if c is not None]
        return sum(bits) / len(bits)

    @property
    def codebook_bytes(self) -> int:
        return sum(c.codebook_bytes for c in (*self.keys, *self.values) if c is not None)

    @property
    def device(self) -> torch.device:
        """Where the codebooks are; the CPU for a method without any."""
        tensors = (t for c in (*self.keys, *self.values) if c is not None for t in c.tensors().values())
        return next(tensors, torch.empty(0)).device

    def fingerprint(self) -> str:
        """SHA-256 over method, settings and tensors: two sets with equal codes have equal fingerprints.

        The model's frequencies are left out: a model cast to another dtype has rounded ones, and the same codecs.
        """
        spec = self.spec
        shape = [self.method, spec.model_type, spec.heads, spec.kv_heads, spec.head_dim, len(spec.layers)]
        total = hashlib.sha256(json.dumps(shape).encode())
        for name, codec in self._named():
            settings = {k: v for k, v in codec.settings().items() if k not in ("beam", "iterations", "max_vectors")}
            total.update(json.dumps([name, codec.kind, settings], sort_keys=True).encode())
            for key, tensor in sorted(codec.tensors().items()):
                total.update(key.encode() + tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def to(self, device: torch.device | str) -> CodecSet:
        """The set with its codebooks on `device`."""
        place = torch.device(device)
        move = lambda codecs: tuple(None if c is None else c.to(place) for c in codecs)  # noqa: E731
        return replace(self, keys=move(self.keys), values=move(self.values))

    def with_beam(self, beam: int) -> CodecSet:
        """The same codebooks searched with another beam; InputError for a method without one."""
        if beam < 1:
            raise InputError("beam of at least 1", str(beam), "set beam to a positive number")
        return self._changed(lambda codec: codec.with_beam(beam), beam=beam)

    def with_stages(self, stages: int) -> CodecSet:
        """The first `stages` stages of every codec; InputError if there are fewer, or for a method without stages."""
        return self._changed(lambda codec: codec.with_stages(stages), stages=stages, extra_value_stages=0)

    def only(self, side: Side) -> CodecSet:
        """This side's codecs; the other side stays uncompressed, in float32."""
        other = tuple(None if codec is None else IdentityCodec(self.spec.head_dim) for codec in self.keys)
        return replace(self, values=other) if side == "key" else replace(self, keys=other)

    def _changed(self, change: Callable[[ResidualCodec], Codec], **settings: Any) -> CodecSet:
        def apply(codec: Codec | None) -> Codec | None:
            return change(codec) if isinstance(codec, ResidualCodec) else codec

        if not any(isinstance(codec, ResidualCodec) for codec in (*self.keys, *self.values)):
            raise InputError(f"a residual codec for {', '.join(settings)}", f"method {self.method!r}", "leave it out")
        keys, values = tuple(map(apply, self.keys)), tuple(map(apply, self.values))
        return replace(self, settings={**self.settings, **settings}, keys=keys, values=values)

    def save(self, folder: str | Path) -> None:
        """Write the folder; an older codec folder of that name is replaced as a whole.

        Raises:
            InputError: `folder` exists and holds something else, or its parent does not exist.
        """
        with replacing_folder(Path(folder), _OWN) as fresh:
            tensors = {f"{n}.{k}": t.contiguous().cpu() for n, c in self._named() for k, t in sorted(c.tensors().items())}
            save_file(tensors, fresh / _TENSORS)
            codecs = {name: {"kind": codec.kind, "settings": codec.settings()} for name, codec in self._named()}
            header = {
                "kind": _KIND,
                "version": VERSION,
                "method": self.method,
                "settings": self.settings,
                "model": self.spec.to_json(),
                "model_fingerprint": self.spec.fingerprint(),
                "info": self.info,
                "codecs": codecs,
                "tensors_sha256": digest(fresh / _TENSORS),
            }
            header["sha256"] = _seal(header)
            (fresh / _JSON).write_text(json.dumps(header, indent=1, sort_keys=True) + "\n")

    def _named(self) -> list[tuple[str, Codec]]:
        named = [(f"{i}.{side}", c) for side in ("key", "value") for i, c in enumerate(getattr(self, side + "s"))]
        return [(name, codec) for name, codec in named if codec is not None]


def require_target(folder: str | Path) -> None:
    """Raise InputError if `CodecSet.save(folder)` would refuse: asked before calibrating, not after it."""
    require_folder_target(Path(folder), _OWN)


def load(folder: str | Path) -> CodecSet:
    """Read a folder that `CodecSet.save` wrote.

    Raises:
        InputError: no such folder, another kind or version of file, or a truncated or altered one.
    """
    path = Path(folder)
    what = "a codec folder made by `kvfold calibrate`"
    header = read_json(path / _JSON, what)
    if header.get("kind") != _KIND or header.get("version") != VERSION:
        came = f"{header.get('kind')!r} version {header.get('version')!r}"
        raise InputError(f"{_KIND!r} version {VERSION}", f"{came} in {path}", "calibrate again with this kvfold")
    if _seal(header) != header.get("sha256"):
        raise InputError(what, f"{path / _JSON}, altered since it was written", "calibrate again")
    tensors = read_tensors(path / _TENSORS, what)
    if digest(path / _TENSORS) != header.get("tensors_sha256"):
        raise InputError(what, f"{path / _TENSORS}, altered since it was written", "calibrate again")
    try:
        spec = ModelSpec.from_json(header["model"])
        if spec.fingerprint() != header["model_fingerprint"]:
            raise ValueError("its model fingerprint does not match")
        keys, values = (
            tuple(_restore(header, tensors, spec, f"{i}.{side}", layer.coded) for i, layer in enumerate(spec.layers))
            for side in ("key", "value")
        )
        return CodecSet(header["method"], header["settings"], spec, keys, values, header["info"])
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(what, f"{path / _JSON}, which was altered ({error!r})", "calibrate again") from None


def _seal(header: dict) -> str:
    """SHA-256 over the header without its seal: settings that no longer fit the codebooks would decode to nonsense."""
    return hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "sha256"}, sort_keys=True).encode()).hexdigest()


def _restore(header: dict, tensors: dict[str, Tensor], spec: ModelSpec, name: str, coded: bool) -> Codec | None:
    if not coded:
        return None
    entry = header["codecs"][name]
    if entry["kind"] not in KINDS:
        raise InputError(f"a codec kind among {', '.join(KINDS)}", repr(entry["kind"]), "use the kvfold that wrote it")
    prefix = name + "."
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    return KINDS[entry["kind"]].restore(spec.head_dim, entry["settings"], own)
