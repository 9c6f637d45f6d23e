"""Pictures; matplotlib is wanted here and nowhere else (`pip install kvfold[plot]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvfold.files import replacing_file


def plot_distortion(layers: Sequence[int], keys: Sequence[float], values: Sequence[float], title: str, file: Path) -> None:
    """Write a PNG of the distortion (mean squared error over mean square) of keys and values, layer by layer.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # a bare figure draws with Agg: no display, and no backend is chosen for the process

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(layers, keys, marker="o", label="keys")
    axes.plot(layers, values, marker="s", label="values")
    if any(x > 0 for x in (*keys, *values)):
        axes.set_yscale("log")
    axes.set(title=title, xlabel="layer", ylabel="distortion (squared error / square)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing_file(file) as fresh:
        figure.savefig(fresh, format="png", dpi=120)


def plot_losses(losses: Mapping[str, Sequence[float]], file: Path) -> None:
    """Write a PNG of training losses, nats a token, step by step; a line a name.

    Raises:
        ImportError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set(title="finetuning", xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing_file(file) as fresh:
        figure.savefig(fresh, format="png", dpi=120)
