"""The command line: options, and what an error looks like. What the commands do is in `commands/`.

Exit status: 0 done; 2 wrong use or bad input, told in one message; 1 failed otherwise; 130 interrupted. A traceback is
printed only for status 1 and with KVFOLD_DEBUG=1.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from kvfold import __version__
from kvfold.bench.attend import CONTEXTS as ATTEND_CONTEXTS
from kvfold.bench.attend import ROPES
from kvfold.bench.encode import BEAMS, VECTORS
from kvfold.bench.generate import CONTEXTS
from kvfold.bench.record import RESULTS
from kvfold.cache.cache import SINKS, WINDOW
from kvfold.calibrate.calibrate import CONTEXT, TOKENS
from kvfold.calibrate.ema import BATCH_TOKENS, EVERY
from kvfold.calibrate.finetune import LOSSES, FinetuneSettings
from kvfold.calibrate.trainable import KINDS
from kvfold.codecs.ema import DECAY
from kvfold.commands import ablate, bench, budget, calibrate, compare, evaluate, finetune, generate, inspect, needle, serve
from kvfold.commands.arguments import above_zero, names, numbers, pair, percents, positive
from kvfold.errors import InputError
from kvfold.evaluate.ablate import ABLATIONS
from kvfold.evaluate.budget import CONTEXTS as BUDGET_CONTEXTS
from kvfold.evaluate.compare import CODECS as COMPARED
from kvfold.evaluate.needle import CONTEXTS as NEEDLE_CONTEXTS
from kvfold.evaluate.needle import DEPTHS

_MODEL = "a local folder, a hub name, a .gguf file, or smollm2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        given = sys.argv[1:] if argv is None else list(argv)
        own, options = _split(given)
        args = _parser().parse_args(own)
        args.options = options
        if options and args.command is not serve.serve:
            raise InputError("-- with `kvfold serve` only", " ".join(options), "leave it out")
        args.command_line = shlex.join(["kvfold", *given])
        args.command(args)
    except InputError as error:
        return _say(f"error: {error}", 2)
    except SystemExit as stop:  # --help, --version; a command that has told its failures itself
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Exception as error:
        if os.environ.get("KVFOLD_DEBUG") == "1":
            traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "no message")
        return _say(f"failed: {type(error).__name__}: {first} (KVFOLD_DEBUG=1 shows more)", 1)
    return 0


def _split(given: list[str]) -> tuple[list[str], list[str]]:
    """What is kvfold's, and what follows `--`."""
    at = given.index("--") if "--" in given else len(given)
    return given[:at], given[at + 1 :]


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
    _calibrate(_command(names, "calibrate", calibrate.calibrate, "fit codebooks to a model"))
    _inspect(_command(names, "inspect", inspect.inspect, "show what a codec folder holds"))
    _generate(_command(names, "generate", generate.generate, "write text from a compressed cache"))
    _eval(_command(names, "eval", evaluate.evaluate_any, "measure perplexity and KL, or tasks, through the cache"))
    _needle(_command(names, "needle", needle.needle, "find a fact hidden in long text, through the cache"))
    _compare(_command(names, "compare", compare.compare, "several codecs on one model: quality against bits"))
    about = "quality of a cache that may not grow, as the context grows"
    _budget(_command(names, "budget", budget.budget, about))
    _command(names, "codecs", inspect.codecs, "list the methods")
    about = "train attention weights and codebooks for each other"
    _finetune(_command(names, "finetune", finetune.finetune, about))
    _ablate(_command(names, "ablate", ablate.ablate, "repeat the paper's ablations"))
    _serve(_command(names, "serve", serve.serve, "answer requests over HTTP, by vLLM with a compressed cache"))
    benches = names.add_parser("bench", help="measure speed and memory").add_subparsers(metavar="WHAT", required=True)
    about = "decoding speed and memory of a whole model, beside the plain cache"
    _bench_generate(_command(benches, "generate", bench.bench_generation, about))
    about = "one layer's attention on codes, beside PyTorch's on an uncompressed cache"
    _bench_attend(_command(benches, "attend", bench.bench_attention, about))
    about = "vectors encoded a second, beside other residual quantizers where installed"
    _bench_encode(_command(benches, "encode", bench.bench_encoding, about))
    about = "decoding inside vLLM, beside its own cache"
    _bench_serve(_command(benches, "serve", bench.bench_serving, about))
    return parser


def _command(names: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A command with the options that all have."""
    parser = names.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    parser.set_defaults(command=run)
    common = parser.add_argument_group("options of every command")
    common.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")
    common.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    common.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...; auto spreads the model")
    common.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the model")
    return parser


def _calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; an older codec there is replaced")
    about = "text to calibrate on: files, or hf:NAME[:split[:column]] from the hub (default: what the model itself says)"
    _text(parser, about, required=False)
    parser.add_argument("--codec", default="rvq", metavar="NAME", help="method, see `kvfold codecs` (default rvq)")
    _set(parser, "change a setting of the method, e.g. stages=11 or bits=3")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"tokens of k-means at most (default {TOKENS})")
    parser.add_argument("--context", type=positive, default=CONTEXT, metavar="N", help=f"of a pass (default {CONTEXT})")
    ema = parser.add_argument_group("learning on by moving average, over a stream of text; may be run under torchrun")
    ema.add_argument("--ema-steps", type=positive, metavar="N", help="updates of the codebooks after k-means")
    ema.add_argument("--ema-batch-tokens", type=positive, metavar="N", help=f"tokens of a step (default {BATCH_TOKENS})")
    ema.add_argument("--ema-decay", type=float, metavar="X", help=f"share of the past kept by a step (default {DECAY})")
    ema.add_argument("--ema-reseed", type=float, metavar="X", help="move codewords used less than X of the mean (default 0)")
    ema.add_argument("--checkpoint", metavar="DIR", help="folder for checkpoints and loss curve (default: OUT.ema)")
    ema.add_argument("--checkpoint-every", type=positive, metavar="N", help=f"steps between checkpoints (default {EVERY})")
    ema.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")


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
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="default 128")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--temperature", type=above_zero, default=1.0, metavar="T", help="of --sample (default 1)")
    parser.add_argument("--sinks", type=int, metavar="N", help=f"first tokens kept exact (default {SINKS})")
    parser.add_argument("--window", type=int, metavar="N", help=f"newest tokens kept exact (default {WINDOW})")
    parser.add_argument("--max-bytes", type=positive, metavar="N", help="bytes the cache may take")
    parser.add_argument("--report", action="store_true", help="say on standard error what the cache holds at the end")
    parser.add_argument("--save-cache", metavar="F", help="keep the cache and its tokens in a file")
    parser.add_argument("--load-cache", metavar="F", help="go on from such a file; the prompt, if any, is appended")


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--codec", metavar="DIR", help="from `kvfold calibrate`; with --tasks, none is the exact model")
    what = parser.add_mutually_exclusive_group(required=True)
    _text(what, "text to evaluate on", required=False)
    what.add_argument("--tasks", type=names, metavar="NAME,NAME", help="tasks of lm-eval instead, see `lm-eval ls tasks`")
    _set(parser, "beam=N searches codes with another beam")
    _protocol(parser)
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument("--task-path", metavar="DIR", help="folder of YAML files with tasks of one's own")
    tasks.add_argument("--limit", type=positive, metavar="N", help="documents of each task (default: all)")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples in a prompt (default: the task's number)")
    tasks.add_argument("--resume", metavar="FILE", help="keep the answers there as they come, and go on from them")
    _json(parser)
    _record(parser)


def _needle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    about = "folders made by `kvfold calibrate`, one or more to compare"
    parser.add_argument("--codec", nargs="+", required=True, metavar="DIR", help=about)
    contexts, depths = (",".join(f"{x:g}" for x in numbers) for numbers in (NEEDLE_CONTEXTS, DEPTHS))
    about = f"tokens of the prompts (default {contexts})"
    parser.add_argument("--contexts", type=numbers, default=NEEDLE_CONTEXTS, metavar="N,N", help=about)
    about = f"percent of the text before the fact (default {depths})"
    parser.add_argument("--depths", type=percents, default=DEPTHS, metavar="N,N", help=about)
    _text(parser, "text to hide the fact in (default: text that comes with Python)", required=False)
    parser.add_argument("--sinks", type=int, default=SINKS, metavar="N", help=f"first tokens kept exact (default {SINKS})")
    parser.add_argument("--window", type=int, default=WINDOW, metavar="N", help=f"newest tokens kept exact (default {WINDOW})")
    parser.add_argument("--plot", metavar="FILE", help="PNG of the heat maps")
    _json(parser)
    _record(parser)


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    _text(parser, "text to evaluate on", required=True)
    about = "text to calibrate on, the same for all (default: what the model says)"
    parser.add_argument("--calibration-text", nargs="+", metavar="FILE", help=about)
    about = f"methods, settings after colons (default {','.join(COMPARED)})"
    parser.add_argument("--codecs", type=names, default=COMPARED, metavar="A,B:bits=3", help=about)
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"tokens of calibration (default {TOKENS})")
    _protocol(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="folder for picture, report, rows, codecs; a run goes on from what is there"
    )
    _json(parser)
    _record(parser)


def _budget(parser: argparse.ArgumentParser) -> None:
    _model_and_codec(parser)
    _text(parser, "text to read", required=True)
    parser.add_argument("--max-bytes", type=positive, required=True, metavar="N", help="bytes the limited cache may take")
    contexts = ",".join(map(str, BUDGET_CONTEXTS))
    about = f"tokens in the cache (default {contexts})"
    parser.add_argument("--contexts", type=numbers, default=BUDGET_CONTEXTS, metavar="N,N", help=about)
    parser.add_argument("--windows", type=positive, default=2, metavar="N", help="of text, a context (default 2)")
    parser.add_argument("--sinks", type=int, default=SINKS, metavar="N", help=f"first tokens kept exact (default {SINKS})")
    parser.add_argument("--window", type=int, default=WINDOW, metavar="N", help=f"newest tokens kept exact (default {WINDOW})")
    _set(parser, "beam=N searches codes with another beam")
    parser.add_argument("--plot", metavar="FILE", help="PNG of the table")
    _json(parser)
    _record(parser)


def _finetune(parser: argparse.ArgumentParser) -> None:
    default = FinetuneSettings()
    _model_and_codec(parser)
    _text(parser, "text to train on: files, or hf:NAME[:split[:column]] from the hub", required=True)
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the model; its codec goes to DIR/codec")
    about = f"kl to the exact model, or lm as in the paper (default {default.loss})"
    parser.add_argument("--loss", choices=LOSSES, default=default.loss, help=about)
    about = f"attention projections themselves, or low-rank updates of them (default {default.train})"
    parser.add_argument("--train", choices=KINDS, default=default.train, help=about)
    parser.add_argument("--rank", type=positive, default=default.rank, metavar="N", help=f"of lora (default {default.rank})")
    about = f"learning rate, constant (default {default.lr:g})"
    parser.add_argument("--lr", type=above_zero, default=default.lr, metavar="X", help=about)
    numbers = {
        "--steps": "of the optimizer",
        "--tokens-per-step": "gradients of so many tokens are accumulated",
        "--context": "tokens of a pass",
    }
    for option, about in numbers.items():
        value = getattr(default, option[2:].replace("-", "_"))
        parser.add_argument(option, type=positive, default=value, metavar="N", help=f"{about} (default {value})")
    about = f"weight of the commitment term (default {default.commitment:g})"
    parser.add_argument("--commitment", type=float, default=default.commitment, metavar="X", help=about)
    parser.add_argument("--no-ema", action="store_false", dest="ema", help="leave the codebooks as they are")
    about = f"share of the past that codebooks keep in a step (default {default.decay:g})"
    parser.add_argument("--ema-decay", type=float, default=default.decay, metavar="X", help=about)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, one more forward pass")


def _ablate(parser: argparse.ArgumentParser) -> None:
    about = "; ".join(f"{name}: {title}" for name, (title, _) in ABLATIONS.items())
    parser.add_argument("what", choices=tuple(ABLATIONS), help=about)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="smollm2", help=f"{_MODEL} (default smollm2)")
    _text(parser, "text to evaluate on", required=True)
    about = "text to calibrate (and finetune) on (default: what the model says; to finetune, what comes with Python)"
    parser.add_argument("--calibration-text", nargs="+", metavar="FILE", help=about)
    parser.add_argument("--codec", default="rvq-paper", metavar="NAME", help="residual method to vary (default rvq-paper)")
    _set(parser, "change a setting in all variants")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"tokens of calibration (default {TOKENS})")
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens of a window (default 2048)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="windows from the start of the text (default 8)")
    default = FinetuneSettings()
    parser.add_argument("--steps", type=positive, default=default.steps, metavar="N", help="of finetuning")
    parser.add_argument("--lr", type=above_zero, default=default.lr, metavar="X", help="of finetuning")
    about = "folder of calibrated codecs; those that are there are not fitted again"
    parser.add_argument("--keep", metavar="DIR", help=about)
    parser.add_argument("--plot", metavar="FILE", help="PNG of the rows")
    _json(parser)
    _record(parser)


def _serve(parser: argparse.ArgumentParser) -> None:
    _model_and_codec(parser)
    _set(parser, "beam=N searches codes with another beam")
    parser.add_argument("--prefixes", metavar="DIR", help="keep the codes of prefixes there, for later requests and processes")
    parser.add_argument("--prefix-gib", type=above_zero, metavar="N", help="most that they may take (default: no limit)")
    parser.add_argument(
        "options", nargs="*", metavar="-- OPTION", help="further options of `vllm serve`, such as -- --port 8000"
    )


def _bench_generate(parser: argparse.ArgumentParser) -> None:
    _model_and_codec(parser)
    default = ",".join(map(str, CONTEXTS))
    parser.add_argument("--contexts", type=numbers, default=CONTEXTS, metavar="N,N", help=f"prompt tokens (default {default})")
    parser.add_argument("--new-tokens", type=positive, default=32, metavar="N", help="tokens to decode (default 32)")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="medians of so many runs (default 3)")
    parser.add_argument("--text", metavar="FILE", help="text of the prompt (default: text that comes with Python)")
    _set(parser, "beam=N searches codes with another beam")
    _json(parser)
    _record(parser)


def _bench_serve(parser: argparse.ArgumentParser) -> None:
    _model_and_codec(parser)
    _set(parser, "beam=N searches codes with another beam")
    sizes = {"--requests": (8, "that run together"), "--context": (4096, "tokens of a prompt"), "--new-tokens": (32, "decoded")}
    sizes |= {"--repeats": (3, "medians of so many rounds"), "--cache-gib": (2, "GiB of memory for either cache, on a CPU")}
    for option, (default, about) in sizes.items():
        parser.add_argument(option, type=positive, default=default, metavar="N", help=f"{about} (default {default})")
    parser.add_argument("--text", metavar="FILE", help="text of the prompts (default: text that comes with Python)")
    parser.set_defaults(dtype="bfloat16")
    _json(parser)
    _record(parser)


def _bench_attend(parser: argparse.ArgumentParser) -> None:
    default = ",".join(map(str, ATTEND_CONTEXTS))
    about = f"keys in the cache (default {default}; on a GPU 1024 to 131072)"
    parser.add_argument("--contexts", type=numbers, metavar="N,N", help=about)
    parser.add_argument("--batches", type=numbers, metavar="N,N", help="rows of the cache, on a GPU (default 1,16)")
    about = "keys coded after RoPE, before it, both (default), or after it around a rotated center (center)"
    parser.add_argument("--rope", type=names, default=ROPES, metavar="post,pre", dest="ropes", help=about)
    sizes = {"--heads": 32, "--kv-heads": 8, "--head-dim": 128, "--stages": 8, "--codebook-size": 256, "--group": 32}
    for option, default_size in sizes.items():
        parser.add_argument(option, type=positive, default=default_size, metavar="N", help=f"default {default_size}")
    parser.add_argument("--repeats", type=positive, default=15, metavar="N", help="medians of so many runs (default 15)")
    _backend(parser)
    parser.add_argument("--plot", metavar="FILE", help="PNG of all times over the context")
    _json(parser)
    _record(parser)


def _bench_encode(parser: argparse.ArgumentParser) -> None:
    default = ",".join(map(str, BEAMS))
    parser.add_argument("--beams", type=numbers, default=BEAMS, metavar="N,N", help=f"widths of the search (default {default})")
    about = f"encoded in one call (default {VECTORS}; on a GPU 1048576)"
    parser.add_argument("--vectors", type=positive, metavar="N", help=about)
    for option, size in {"--group": 32, "--stages": 8, "--codebook-size": 256}.items():
        parser.add_argument(option, type=positive, default=size, metavar="N", help=f"default {size}")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="medians of so many runs (default 5)")
    _backend(parser)
    _json(parser)
    _record(parser)


def _backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="naive, cpu or gpu (default: KVFOLD_BACKEND, else the best there is)")


def _protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens of a window (default 2048)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="windows from the start of the text (default 8)")
    parser.add_argument("--sinks", type=int, default=0, metavar="N", help="first tokens kept exact (default 0)")
    parser.add_argument("--window", type=int, default=0, metavar="N", help="newest tokens kept exact (default 0)")


def _model_and_codec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--codec", required=True, metavar="DIR", help="folder made by `kvfold calibrate`")


def _text(parser: Any, about: str, required: bool) -> None:
    parser.add_argument("--text", nargs="+", action="extend", metavar="FILE", required=required, help=about)


def _set(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--set", action="append", type=pair, default=[], metavar="key=value", dest="changes", help=about)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - is standard output, and nothing else there")


def _record(parser: argparse.ArgumentParser) -> None:
    about = f"append result and machine to DIR (default {RESULTS})"
    parser.add_argument("--record", nargs="?", const=RESULTS, metavar="DIR", help=about)
