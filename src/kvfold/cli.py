"""The command line: options, and what an error looks like. What the commands do is in `commands.py`.

Exit status: 0 done; 2 wrong use or bad input, told in one message; 1 failed otherwise; 130 interrupted. A traceback is
printed only for status 1 and with KVFOLD_DEBUG=1.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from kvfold import __version__, commands
from kvfold.bench.generate import CONTEXTS
from kvfold.bench.record import RESULTS
from kvfold.cache.cache import SINKS, WINDOW
from kvfold.calibrate.calibrate import TOKENS
from kvfold.errors import InputError

_MODEL = "a local folder, a hub name, a .gguf file, or smollm2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        args = _parser().parse_args(argv)
        args.command(args)
    except InputError as error:
        return _say(f"error: {error}", 2)
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Exception as error:
        if os.environ.get("KVFOLD_DEBUG") == "1":
            traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "no message")
        return _say(f"failed: {type(error).__name__}: {first} (KVFOLD_DEBUG=1 shows more)", 1)
    return 0


def _say(message: str, status: int) -> int:
    print(f"kvfold: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Wrong options are told as any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"options as in `{self.prog} --help`", message, "correct the command")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kvfold", description="Compress the KV cache of a language model by residual vector quantization.")
    parser.add_argument("--version", action="version", version=f"kvfold {__version__}")
    names = parser.add_subparsers(metavar="COMMAND", required=True)
    _calibrate(_command(names, "calibrate", commands.calibrate, "fit codebooks to a model"))
    _inspect(_command(names, "inspect", commands.inspect, "show what a codec folder holds"))
    _generate(_command(names, "generate", commands.generate, "write text from a compressed cache"))
    _eval(_command(names, "eval", commands.evaluate_text, "measure perplexity, KL and agreement through the cache"))
    _command(names, "codecs", commands.codecs, "list the methods")
    bench = names.add_parser("bench", help="measure speed and memory")
    _bench_generate(
        _command(
            bench.add_subparsers(metavar="WHAT", required=True),
            "generate",
            commands.bench_generation,
            "decoding speed and memory of a whole model, beside the plain cache",
        )
    )
    return parser


def _command(names: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A command with the options that all have."""
    parser = names.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    parser.set_defaults(command=run)
    common = parser.add_argument_group("options of every command")
    common.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")
    common.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    common.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, cuda:1, ... (default cpu)")
    common.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the model")
    return parser


def _calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; an older codec there is replaced")
    _text(parser, "text to calibrate on (default: text that comes with Python)", required=False)
    parser.add_argument("--codec", default="rvq", metavar="NAME", help="method, see `kvfold codecs` (default rvq)")
    _set(parser, "change a setting of the method, e.g. stages=11 or bits=3")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"tokens to use at most (default {TOKENS})")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("codec", metavar="DIR", help="folder made by `kvfold calibrate`")
    parser.add_argument("--plot", metavar="FILE", help="PNG of the distortion per layer (default DIR/distortion.png)")
    _json(parser)


def _generate(parser: argparse.ArgumentParser) -> None:
    _model_and_codec(parser)
    _set(parser, "beam=N searches codes with another beam")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="take the prompt from a file")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="default 128")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--temperature", type=_above_zero, default=1.0, metavar="T", help="of --sample (default 1)")
    parser.add_argument("--sinks", type=int, metavar="N", help=f"first tokens kept exact (default {SINKS})")
    parser.add_argument("--window", type=int, metavar="N", help=f"newest tokens kept exact (default {WINDOW})")
    parser.add_argument("--max-bytes", type=_positive, metavar="N", help="bytes the cache may take")
    parser.add_argument("--report", action="store_true", help="say on standard error what the cache holds at the end")
    parser.add_argument("--save-cache", metavar="F", help="keep the cache and its tokens in a file")
    parser.add_argument("--load-cache", metavar="F", help="go on from such a file; the prompt, if any, is appended")


def _eval(parser: argparse.ArgumentParser) -> None:
    _model_and_codec(parser)
    _text(parser, "text to evaluate on", required=True)
    _set(parser, "beam=N searches codes with another beam")
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens of a window (default 2048)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="windows from the start of the text (default 8)")
    parser.add_argument("--sinks", type=int, default=0, metavar="N", help="first tokens kept exact (default 0)")
    parser.add_argument("--window", type=int, default=0, metavar="N", help="newest tokens kept exact (default 0)")
    _json(parser)
    _record(parser)


def _bench_generate(parser: argparse.ArgumentParser) -> None:
    _model_and_codec(parser)
    default = ",".join(map(str, CONTEXTS))
    parser.add_argument("--contexts", type=_numbers, default=CONTEXTS, metavar="N,N", help=f"prompt tokens (default {default})")
    parser.add_argument("--new-tokens", type=_positive, default=32, metavar="N", help="tokens to decode (default 32)")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N", help="medians of so many runs (default 3)")
    parser.add_argument("--text", metavar="FILE", help="text of the prompt (default: text that comes with Python)")
    _json(parser)
    _record(parser)


def _model_and_codec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--codec", required=True, metavar="DIR", help="folder made by `kvfold calibrate`")


def _text(parser: argparse.ArgumentParser, about: str, required: bool) -> None:
    parser.add_argument("--text", nargs="+", action="extend", metavar="FILE", required=required, help=about)


def _set(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--set", action="append", type=_pair, default=[], metavar="key=value", dest="changes", help=about)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - is standard output, and nothing else there")


def _record(parser: argparse.ArgumentParser) -> None:
    about = f"append result and machine to DIR (default {RESULTS})"
    parser.add_argument("--record", nargs="?", const=RESULTS, metavar="DIR", help=about)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return key, value
