"""Plot of a run's loss over steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from titan_trainer.metrics import read_metrics


def draw_loss_curve(
    metrics: Path, picture: Path, *, levels: Mapping[str, float] | None = None, title: str = ""
) -> None:
    """Plot the training and validation loss of a `metrics.jsonl` into `picture` (PNG, SVG or PDF by its suffix).

    `levels` are named horizontal lines, such as the unigram entropy: the loss of a model that knows only how often each
    token occurs. Needs `pip install titan-trainer[plot]`.
    """
    from matplotlib.figure import Figure  # not pyplot, which has global state and needs a display

    records = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, style in (("loss", "-"), ("validation_loss", "o")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "), linewidth=1.5, markersize=4)
    for (name, level), color in zip((levels or {}).items(), ("tab:red", "tab:green", "tab:purple"), strict=False):
        axes.axhline(level, color=color, linestyle="--", linewidth=1, label=f"{name} {level:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)
