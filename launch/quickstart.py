"""The whole path in a few minutes, nothing downloaded: pre-train a tiny model, fine-tune it sharded, compare.

A byte-level Llama learns the Python standard library's source with AdamW, then the English text of Python's own
reference (`pydoc_data.topics`) twice from the same start: with MicroAdam and with AdamW, each at its own best learning
rate, ZeRO-2 on two ranks through the `deepspeed` launcher. Writes metrics.json and loss.png to runs/quickstart.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from training.environment import free_port
from training.sample_texts import python_reference, stdlib_source

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "runs" / "quickstart"
CONFIGS = ROOT / "configs"
OPTIMIZERS = {"microadam": "MicroAdam", "adamw": "AdamW"}

PRETRAIN_BYTES = 3_000_000
SHARED = "--seq-len 256 --logging-steps 5 --schedule cosine".split()
PRETRAIN = [*SHARED, *"--batch-size 4 --steps 300 --eval-steps 100 --eval-fraction 0.01".split()]
# The learning rate of AdamW gives the best held-out loss of 1e-3, 2e-3, 4e-3 with these settings; MicroAdam has three
# times as much.
FINETUNE = [*SHARED, *"--batch-size 2 --steps 300 --eval-steps 30 --eval-fraction 0.1 --seed 1".split()]

console = Console()


class StageFailed(Exception):
    """A training process ended with an error."""


def main(
    fresh: Annotated[bool, typer.Option("--fresh", help="Pre-train again even if nothing changed.")] = False,
) -> None:
    """Pre-train a tiny model, fine-tune it with MicroAdam and AdamW under DeepSpeed ZeRO-2, and compare them."""
    start = time.perf_counter()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    try:
        num_ranks, environment = plan_ranks()
        pretrain(num_ranks, environment, fresh)
        for name, title in OPTIMIZERS.items():
            heading(f"Fine-tuning with {title} on the Python reference, ZeRO-2")
            text = write_text("topics.txt", python_reference())
            source = ["--model", str(OUTPUT / "pretrained"), "--data", str(text)]
            train(name, CONFIGS / "deepspeed" / f"quickstart_{name}.json", [*source, *FINETUNE], num_ranks, environment)
    except StageFailed as failure:
        console.print(f"[bold red]Error:[/] {failure}")
        raise typer.Exit(1) from None
    runs = {name: json.loads((OUTPUT / name / "metrics.json").read_text()) for name in OPTIMIZERS}
    heading("Result")
    write_metrics(runs)
    plot(runs)
    print_comparison(runs)
    console.print(f"{time.perf_counter() - start:.0f} s in all. Weights, metrics.json and loss.png: {OUTPUT}")


def heading(text: str) -> None:
    """A rule with a title."""
    console.rule(f"[bold]{text}", align="left")


def plan_ranks() -> tuple[int, dict[str, str]]:
    """Number of ranks (up to two GPUs, else two CPU processes) and the environment of the processes."""
    import torch

    num_gpus = torch.cuda.device_count()
    # A line of progress every 15 s in a log file, a live bar in a terminal.
    environment = {**os.environ, "TQDM_MININTERVAL": "0.2" if console.is_terminal else "15"}
    if num_gpus == 0:
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        return 2, environment
    return min(num_gpus, 2), environment


def pretrain(num_ranks: int, environment: dict[str, str], fresh: bool) -> None:
    """Make the starting model, unless the one in place came from the same data and settings."""
    heading("Pre-training a byte-level Llama on the standard library's source, AdamW")
    model, ds_config = CONFIGS / "models" / "byte-llama-1m.json", CONFIGS / "deepspeed" / "quickstart_adamw.json"
    corpus = write_text("stdlib.txt", stdlib_source(PRETRAIN_BYTES))
    arguments = ["--model-config", str(model), "--tokenizer", "bytes", "--data", str(corpus), *PRETRAIN]
    inputs = [model.read_bytes(), ds_config.read_bytes(), corpus.read_bytes(), repr((PRETRAIN, num_ranks)).encode()]
    fingerprint = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in inputs)).hexdigest()
    stamp = OUTPUT / "pretrained" / "inputs.sha256"
    if not fresh and stamp.is_file() and stamp.read_text() == fingerprint:
        console.print("Data and settings unchanged: the model of the last run is used (--fresh trains it again).")
        return
    stamp.unlink(missing_ok=True)
    train("pretrained", ds_config, arguments, num_ranks, environment)
    stamp.write_text(fingerprint)


def write_text(name: str, text: str) -> Path:
    """Write a data file of the quickstart."""
    path = OUTPUT / name
    path.write_text(text, encoding="utf-8")
    return path


def train(name: str, ds_config: Path, arguments: list[str], num_ranks: int, environment: dict[str, str]) -> None:
    """Run train.py through the DeepSpeed launcher; its output goes to the terminal and to NAME.log.

    Raises:
        StageFailed: it ended with an error.
    """
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--quiet"]
    launcher += ["--num_gpus", str(num_ranks), "--master_port", str(free_port())]
    script = [str(ROOT / "launch" / "train.py"), *arguments]
    script += ["--deepspeed", str(ds_config), "--output", str(OUTPUT / name), "--overwrite"]
    log = OUTPUT / f"{name}.log"
    with (
        log.open("wb") as file,
        subprocess.Popen(
            launcher + script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        while chunk := process.stdout.read1():
            file.write(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    if process.returncode:
        raise StageFailed(f"{name} ended with exit code {process.returncode}; its output is in {log}")


def write_metrics(runs: dict[str, dict[str, Any]]) -> None:
    """Write the comparison: bytes of all state over all parameters, and MicroAdam's two paths apart."""
    first = runs["microadam"]
    content: dict[str, Any] = {"world_size": first["world_size"], "engine": first["engine"]}
    for name, run in runs.items():
        state = run["state"]
        content[name] = {
            "heldout_before": run["heldout_before"],
            "heldout_after": run["heldout_after"],
            "state_bytes_per_param": state["state_bytes_per_param"],
            "sparse_bytes_per_param": state["sparse_bytes_per_param"],
            "dense_bytes_per_param": state["dense_bytes_per_param"],
            "seconds": run["seconds"],
        }
    (OUTPUT / "metrics.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def plot(runs: dict[str, dict[str, Any]]) -> None:
    """Draw training and held-out loss of both runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for (name, run), color in zip(runs.items(), ("tab:blue", "tab:orange"), strict=True):
        state = run["state"]["state_bytes_per_param"]
        axes.plot(*zip(*run["train_loss"], strict=True), color=color, alpha=0.35, linewidth=1)
        label = f"{OPTIMIZERS[name]}, {state:.2f} bytes of state per parameter"
        axes.plot(*zip(*run["eval_loss"], strict=True), color=color, marker="o", markersize=4, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Held-out loss (dots) and training loss (thin)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(OUTPUT / "loss.png", dpi=120)


def print_comparison(runs: dict[str, dict[str, Any]]) -> None:
    """Print both runs side by side."""
    first = runs["microadam"]
    table = Table(title=f"Full fine-tuning, {first['engine']}, {first['world_size']} ranks")
    table.add_column("")
    for title in OPTIMIZERS.values():
        table.add_column(title, justify="right")
    rows = {
        "held-out loss before": lambda run: f"{run['heldout_before']:.4f}",
        "held-out loss after": lambda run: f"{run['heldout_after']:.4f}",
        "state, bytes per parameter": lambda run: f"{run['state']['state_bytes_per_param']:.3f}",
        "training, s": lambda run: f"{run['seconds']:.1f}",
        "tokens/s": lambda run: f"{run['tokens_per_second']:,.0f}",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(runs[name]) for name in OPTIMIZERS))
    console.print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
