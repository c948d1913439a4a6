"""``microadam report``: the metrics of a training run and its loss in one picture."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError

STATE_FILE = "trainer_state.json"
PREFIX = "microadam/"


class Panel(NamedTuple):
    """One diagram: what is drawn (key in the log -> label), and the factor on it."""

    title: str
    curves: dict[str, str]
    factor: float = 1.0
    limit: float | None = None


PANELS = (
    Panel("loss, nats per token", {"loss": "training", "eval_loss": "held-out"}),
    Panel(
        "compression",
        {
            f"{PREFIX}q": "q: what Top-K leaves / accumulator",
            f"{PREFIX}omega": r"$\omega$: quantization error / residual",
            f"{PREFIX}q_omega": r"$(1 + \omega)\,q$",
        },
        limit=1.0,
    ),
    Panel("norm ratio", {f"{PREFIX}error_to_gradient": "error feedback / gradient"}),
    Panel(
        "share, %",
        {
            f"{PREFIX}gradient_kept": "gradient energy kept",
            f"{PREFIX}touched": "weights touched by a step",
            f"{PREFIX}changed": "weights whose bits change",
        },
        factor=100,
    ),
    Panel("skipped blocks so far", {f"{PREFIX}nonfinite_blocks": "not finite"}),
    Panel(
        "MiB sent by a rank so far",
        {f"{PREFIX}sent_bytes": "exchange of changed weights", f"{PREFIX}dense_bytes": "all weights would be"},
        factor=2**-20,
    ),
)


def write_report(folder: Path, file: Path) -> None:
    """Draw a run of `launch/train.py`, or of any Trainer with a `MetricsCallback`.

    Args:
        folder: What Trainer calls ``output_dir``, or a checkpoint in it.
        file: Where to; the suffix decides the format: ``.html``, or one that matplotlib knows.

    Raises:
        ConfigError: There are no metrics in the folder, or the picture cannot be written.
    """
    source = find_log(folder)
    history = read_history(source)
    if not any(key.startswith(PREFIX) for entry in history for key in entry):
        raise ConfigError(
            f"{source} has a log without MicroAdam's metrics. Train with `launch/train.py --metrics-every 50`, or with "
            "MicroAdam(metrics_every=50) and trainer.add_callback(MetricsCallback(trainer)) from "
            "microadam_dist.integrations.hf."
        )
    try:
        figure = draw(history, title=folder.resolve().name)
        if file.suffix == ".html":
            file.write_text(_as_html(figure, folder.resolve().name), encoding="utf-8")
        else:
            figure.savefig(file, dpi=150)
    except ModuleNotFoundError:
        raise ConfigError("microadam report needs matplotlib: pip install matplotlib") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None


def read_history(source: Path) -> list[dict[str, float]]:
    """What is drawn of Trainer's log, and at which step.

    Raises:
        ConfigError: It is no such log.
    """
    drawn = {key for panel in PANELS for key in panel.curves}
    try:
        entries = json.loads(source.read_text(encoding="utf-8"))["log_history"]
        found = [{key: float(value) for key, value in entry.items() if key in drawn} for entry in entries]
        return [
            {"step": float(entry["step"]), **curves} for entry, curves in zip(entries, found, strict=True) if curves
        ]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{source} is no log of Trainer: {error!r}") from None


def find_log(folder: Path) -> Path:
    """Trainer's state in a run's folder; of a run that has not ended the one in its newest checkpoint.

    Raises:
        ConfigError: There is none.
    """
    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}")
    found = [folder / STATE_FILE, *sorted(folder.glob(f"checkpoint-*/{STATE_FILE}"), key=_step, reverse=True)]
    for path in found:
        if path.is_file():
            return path
    raise ConfigError(
        f"{folder} has no {STATE_FILE}, nor has a checkpoint in it. `launch/train.py` leaves one at its end; after a "
        "Trainer of your own call trainer.save_state()."
    )


def _step(path: Path) -> int:
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def draw(history: list[dict[str, float]], title: str) -> Any:
    """A matplotlib figure: the panels for which the log has something, one below the other."""
    from matplotlib.figure import Figure

    curves = {
        key: [(entry["step"], entry[key]) for entry in history if key in entry]
        for panel in PANELS
        for key in panel.curves
    }
    panels = [panel for panel in PANELS if any(value for key in panel.curves for _, value in curves[key])]
    figure = Figure(figsize=(9, 2.2 * len(panels) + 0.6), layout="constrained")
    figure.suptitle(f"MicroAdam: {title}", parse_math=False)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0].tolist()
    for axes, panel in zip(rows, panels, strict=True):
        for key, label in panel.curves.items():
            if curves[key]:
                steps, values = zip(*curves[key], strict=True)
                marker = "." if len(steps) < 50 else None
                axes.plot(steps, [panel.factor * value for value in values], label=label, marker=marker)
        if panel.limit is not None:
            label = r"the theorem asks for $(1 + \omega)\,q < 1$"
            axes.axhline(panel.limit, color="black", linestyle="--", linewidth=1, label=label)
        axes.set_ylabel(panel.title)
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    rows[-1].set_xlabel("step")
    return figure


def _as_html(figure: Any, title: str) -> str:
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>MicroAdam: {html.escape(title)}</title>'
        f"</head>\n<body>\n{svg[svg.index('<svg') :]}\n"
        "<p>Estimated from a sample of the Top-K blocks; what is measured: microadam_dist.diagnostics.metrics.</p>\n"
        "</body>\n</html>\n"
    )
