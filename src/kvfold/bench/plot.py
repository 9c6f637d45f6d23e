"""Pictures; matplotlib is wanted here and nowhere else (`pip install kvfold[plot]`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvfold.files import replacing_file

_MARKERS = "os^DvPX<>pd*h8H"


@contextmanager
def _axes(file: Path, size: tuple[float, float], panels: int = 1, dpi: int = 120) -> Iterator[list[Any]]:
    """Axes of `panels` panels in a row; what was drawn on them is then written to `file`.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # a bare figure draws with Agg: no display, and no backend is chosen for the process

    figure = Figure(figsize=size, layout="constrained")
    yield list(figure.subplots(1, panels, squeeze=False)[0])
    with replacing_file(file) as fresh:
        figure.savefig(fresh, format="png", dpi=dpi)


def plot_distortion(layers: Sequence[int], keys: Sequence[float], values: Sequence[float], title: str, file: Path) -> None:
    """Write a PNG of the distortion (mean squared error over mean square) of keys and values, layer by layer.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    with _axes(file, (8, 4.5)) as (axes,):
        axes.plot(layers, keys, marker="o", label="keys")
        axes.plot(layers, values, marker="s", label="values")
        if any(x > 0 for x in (*keys, *values)):
            axes.set_yscale("log")
        axes.set(title=title, xlabel="layer", ylabel="distortion (squared error / square)")
        axes.grid(alpha=0.3, which="both")
        axes.legend()


def plot_losses(losses: Mapping[str, Sequence[float]], file: Path) -> None:
    """Write a PNG of training losses, nats a token, step by step; a line a name.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    with _axes(file, (8, 4.5)) as (axes,):
        for name, values in losses.items():
            axes.plot(range(1, len(values) + 1), values, label=name)
        axes.set(title="finetuning", xlabel="step", ylabel="loss (nats a token)")
        axes.grid(alpha=0.3, which="both")
        axes.legend()


def plot_curve(records: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Write a PNG of a loss curve: `key_mse` and `value_mse`, the errors of scaled vectors, over `step`.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    with _axes(file, (8, 4.5)) as (axes,):
        for side in ("key", "value"):
            axes.plot([record["step"] for record in records], [record[f"{side}_mse"] for record in records], label=f"{side}s")
        axes.set(title=title, xlabel="step", ylabel="mean squared error of scaled vectors")
        axes.grid(alpha=0.3)
        axes.legend()


def plot_needle(
    panels: Mapping[str, Sequence[Sequence[float]]], contexts: Sequence[int], depths: Sequence[float], file: Path
) -> None:
    """Write a PNG with a heat map a cache: green where the fact was found, a row a depth, a column a context.

    Args:
        panels: title -> shares found `[depths][contexts]`.
        contexts, depths: ascending; tokens and percent.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    size = (1.2 + len(panels) * (1.2 + 0.55 * len(contexts)), 1.6 + 0.4 * len(depths))
    with _axes(file, size, len(panels)) as row:
        for axes, (title, shares) in zip(row, panels.items(), strict=True):
            axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
            axes.set(title=title, xlabel="context, tokens", ylabel="depth of the fact, %")
            axes.set_xticks(range(len(contexts)), [str(context) for context in contexts], rotation=45)
            axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
            axes.set_xticks([x - 0.5 for x in range(1, len(contexts))], minor=True)
            axes.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
            axes.grid(which="minor", color="white", linewidth=1.5)
            axes.tick_params(which="minor", length=0)


def plot_bars(names: Sequence[str], heights: Sequence[float], title: str, unit: str, file: Path) -> None:
    """Write a PNG with a bar a name.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    with _axes(file, (8, 0.5 + 0.5 * len(names))) as (axes,):
        bars = axes.barh(list(names), list(heights))
        axes.bar_label(bars, fmt="%.3f", padding=3)
        axes.invert_yaxis()
        axes.set(title=title, xlabel=unit, xlim=(min(1.0, *heights), max(heights) * 1.05))


def plot_times(panels: Mapping[str, Mapping[str, Sequence[float]]], contexts: Sequence[int], file: Path) -> None:
    """Write a PNG of milliseconds over the context, both axes logarithmic; a panel a title, a line a name.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    with _axes(file, (1 + 5 * len(panels), 4.5), len(panels), dpi=110) as row:
        for axes, (title, lines) in zip(row, panels.items(), strict=True):
            for name, times in lines.items():
                axes.plot(contexts, times, marker="o", label=name, linestyle="--" if name.startswith("reading") else "-")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set(title=title, xlabel="keys", ylabel="milliseconds")
            axes.grid(alpha=0.3, which="both")
        axes.legend()


def plot_lines(
    lines: Mapping[str, Sequence[float | None]], at: Sequence[float], title: str, across: str, up: str, file: Path
) -> None:
    """Write a PNG with a line a name over `at`; a line has a gap where it is None.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    with _axes(file, (8, 4.5)) as (axes,):
        for name, heights in lines.items():
            axes.plot(at, [float("nan") if height is None else height for height in heights], marker="o", label=name)
        axes.set(title=title, xlabel=across, ylabel=up, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()


def plot_rates(lines: Mapping[str, Sequence[tuple[float, float, float]]], title: str, file: Path) -> None:
    """Write a PNG with two panels over bits per element: perplexity over exact (its excess, logarithmic) and KL.

    Args:
        lines: method -> points (bits, perplexity over exact, KL), by bits. An excess or a KL below 1e-4 is drawn there; bits
            above 8, of a cache hardly compressed, make their axis logarithmic.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    from matplotlib.ticker import LogLocator

    with _axes(file, (13, 5.5), 2) as (left, right):
        for i, (name, points) in enumerate(lines.items()):
            bits, ratios, divergences = zip(*points, strict=True)
            style: dict[str, Any] = {"label": name, "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5}
            style |= {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}  # there are ten colours
            left.plot(bits, [max(ratio - 1, 1e-4) for ratio in ratios], **style)
            right.plot(bits, [max(divergence, 1e-4) for divergence in divergences], **style)
        left.set(ylabel="perplexity over exact", yscale="log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(lambda excess, _: f"{1 + excess:.10g}")
        right.set(ylabel="KL (nats a token)", yscale="log")
        right.yaxis.set_major_formatter("{x:g}")
        wide = max(point[0] for points in lines.values() for point in points) > 8
        for axes in (left, right):
            axes.set(xlabel="bits per element")
            if wide:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25)
            axes.grid(alpha=0.08, which="minor")
        left.figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
        left.figure.suptitle(title, fontsize=10)
