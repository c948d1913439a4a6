"""Prints the README's memory tables, or the page of plans, computed by the layout arithmetic that allocates the state.

python launch/bench/memory_table.py state
python launch/bench/memory_table.py plans
python launch/bench/memory_table.py page > launch/bench/results/MEMORY.md
"""

from collections.abc import Iterator
from enum import Enum
from typing import Annotated

import typer

from microadam_dist.config import MicroAdamConfig
from microadam_dist.planner.engines import Dtype, Engine, Precision, rank_shards
from microadam_dist.planner.gpus import CONTEXT_BYTES, FRAGMENTATION, GIB, GPUS, smallest_gpu
from microadam_dist.planner.memory import Job, Optimizer, Plan, make_plan, state_bytes
from microadam_dist.planner.shapes import LLAMAS, LlamaShape, numel

SETTINGS = {
    "1, 0.1 (the default)": MicroAdamConfig(window_size=1, density=0.1),
    "1, 0.1, 2 bits": MicroAdamConfig(window_size=1, density=0.1, ef_bits=2),
    "1, 0.1, 1.6 bits": MicroAdamConfig(window_size=1, density=0.1, ef_bits=1.6),
    "2, 0.05": MicroAdamConfig(window_size=2, density=0.05),
    "2, 0.05, packed": MicroAdamConfig(window_size=2, density=0.05, packed_window=True),
    "10, 0.01 (the paper's)": MicroAdamConfig(window_size=10, density=0.01),
    "10, 0.01, packed": MicroAdamConfig(window_size=10, density=0.01, packed_window=True),
}
README_MODELS = ("Llama-2 7B", "Llama-2 13B", "Llama-3 8B")
FP32, BF16 = Precision(weight=4, master=0, compute=4), Precision(weight=2, master=0, compute=2)

# What the engine runs, and on how many GPUs.
PURE = {"dtype": Dtype.pure_bf16}
JOBS = {
    "one GPU, bf16 weights, gradient release": {"engine": Engine.single, **PURE, "gradient_release": True},
    "one GPU, bf16 weights": {"engine": Engine.single, **PURE},
    "one GPU, fp32 weights, autocast": {"engine": Engine.single},
    "DDP, bf16 weights": {"engine": Engine.ddp, **PURE},
    "DDP with sharded state, bf16 weights": {"engine": Engine.ddp_sharded, **PURE},
    "FSDP1, bf16 weights": {"engine": Engine.fsdp1, **PURE},
    "FSDP2, bf16 weights, gradient release": {"engine": Engine.fsdp2, **PURE, "gradient_release": True},
    "FSDP2, bf16 weights": {"engine": Engine.fsdp2, **PURE},
    "FSDP2, fp32 weights": {"engine": Engine.fsdp2},
    "ZeRO-0, bf16 weights": {"engine": Engine.zero0, **PURE},
    "ZeRO-0, fp32 copy": {"engine": Engine.zero0},
    "ZeRO-1, bf16 copy": {"engine": Engine.zero1, "master_free": True},
    "ZeRO-1, fp32 copy": {"engine": Engine.zero1},
    "ZeRO-2, bf16 copy": {"engine": Engine.zero2, "master_free": True},
    "ZeRO-2, fp32 copy": {"engine": Engine.zero2},
    "ZeRO-2, fp32 copy, optimizer on the CPU": {"engine": Engine.zero2, "offload_optimizer": True},
    "ZeRO-3, bf16 copy": {"engine": Engine.zero3, "master_free": True},
    "ZeRO-3, fp32 copy": {"engine": Engine.zero3},
}
GPU_COUNTS = (1, 2, 4, 8)
PLANNED_MODELS = ("Llama-2 7B", "Llama-2 13B")
README_JOBS = (
    "one GPU, bf16 weights, gradient release",
    "DDP with sharded state, bf16 weights",
    "FSDP1, bf16 weights",
    "FSDP2, bf16 weights, gradient release",
    "FSDP2, bf16 weights",
    "ZeRO-1, fp32 copy",
    "ZeRO-2, fp32 copy",
    "ZeRO-2, bf16 copy",
    "ZeRO-3, fp32 copy",
    "ZeRO-3, bf16 copy",
)
# Model, window size, bytes of state per parameter: of the paper, and without a window.
PAPER = (("Llama-2 7B", 10, 0.9), ("Llama-2 13B", 10, 0.9), ("Llama-2 7B", 1, 0.5625), ("Llama-2 13B", 1, 0.5625))


def whole_state(shape: LlamaShape, optimizer: Optimizer, config: MicroAdamConfig, precision: Precision) -> int:
    """Bytes of state of the unsharded model."""
    shards = rank_shards(Engine.single, shape.units(), 1, 0, compute_bytes=precision.compute)
    return state_bytes(optimizer, shards, config, precision)


def state_table() -> Iterator[str]:
    """One row per optimizer, one column per model."""
    models = [LLAMAS[name] for name in README_MODELS]
    yield f"| optimizer state | bytes per parameter | {' | '.join(README_MODELS)} |"
    yield "|---|---|" + "---|" * len(models)
    default = MicroAdamConfig()
    rows = [
        (f"**MicroAdam**, window_size, density = {label}", Optimizer.microadam, config, FP32)
        for label, config in SETTINGS.items()
    ]
    rows += [
        ("8-bit AdamW", Optimizer.adamw_8bit, default, FP32),
        ("AdamW, bf16 moments", Optimizer.adamw, default, BF16),
        ("AdamW", Optimizer.adamw, default, FP32),
    ]
    for label, optimizer, config, precision in rows:
        sizes = [whole_state(shape, optimizer, config, precision) for shape in models]
        cells = " | ".join(f"{size / GIB:.1f} GiB" for size in sizes)
        yield f"| {label} | {sizes[0] / numel(models[0].parameters()):.2f} | {cells} |"


def plan_table() -> Iterator[str]:
    """Peaks with MicroAdam and AdamW: one row per engine, one column per model and number of GPUs."""
    columns = [(name, count) for name in PLANNED_MODELS for count in GPU_COUNTS]
    titles = [f"{name.split()[-1]}, {count} GPU{'s' * (count > 1)}" for name, count in columns]
    yield f"| | {' | '.join(titles)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for label in README_JOBS:
        cells = []
        for name, count in columns:
            plans = plan(name, count, JOBS[label])
            cells.append(f"**{plans[0].total / GIB:.1f}** / {plans[-1].total / GIB:.1f}" if plans else "")
        yield f"| {label} | {' | '.join(cells)} |"


INTRODUCTION = f"""\
# Memory of full fine-tuning, planned

Written by `python launch/bench/memory_table.py page`. One plan in detail: `microadam plan --help`.

Peak of tensors on the fullest GPU in GiB (2^30 bytes) with **MicroAdam** / 8-bit AdamW / AdamW, and below it the
smallest class of GPU that fits each: one that has room for the peak, {FRAGMENTATION:.0%} fragmentation and
{CONTEXT_BYTES / GIB} GiB for CUDA (assumed) within the capacity that PyTorch reports. Batches of one sequence of 2048
tokens on each GPU, activation checkpointing, fused attention, all logits at once; MicroAdam with its default settings.
Weights, optimizer state and the gradients it is given are exact to the byte; buffers of the engines are upper bounds.
8-bit AdamW is counted everywhere, though it does not run under all engines."""

BESIDE_THE_PAPER = """
## Beside the paper

One GPU, bf16 weights, gradient release, before activations. The paper counts 0.5 bytes of error feedback per parameter
and 4 bytes per kept value, 0.9 bytes in all, which leaves out the ranges of the quantization buckets (0.0625 bytes at
bucket_size 64). It also leaves out the gradient that is alive while its weight is updated.

| | window_size | bytes per parameter | weights + state | planned weights | state | both | and a gradient |
|---|---|---|---|---|---|---|---|"""


def page() -> Iterator[str]:
    """Plans for 7B and 13B, and what the paper states."""
    yield INTRODUCTION
    for name in PLANNED_MODELS:
        yield from ("", f"## {name}", "")
        yield "| | " + " | ".join(f"{count} GPU{'s' * (count > 1)}" for count in GPU_COUNTS) + " |"
        yield "|---" * (len(GPU_COUNTS) + 1) + "|"
        for label, settings in JOBS.items():
            yield f"| {label} | " + " | ".join(cell(name, count, settings) for count in GPU_COUNTS) + " |"
    yield from ("", "## GPUs", "", "| class | boards | GiB that PyTorch reports |", "|---|---|---|")
    for gpu in GPUS:
        yield f"| {gpu.nominal_gb} GB | {gpu.names} | {gpu.gib:.2f} |"
    yield BESIDE_THE_PAPER
    yield from paper_rows()


def plan(name: str, count: int, settings: dict[str, object]) -> list[Plan]:
    """Plans with the three optimizers; none where the engine cannot use so many GPUs."""
    if settings["engine"] is Engine.single and count > 1:
        return []
    return list(make_plan(LLAMAS[name], Job(gpus=count, activation_checkpointing=True, **settings)).values())


def cell(name: str, count: int, settings: dict[str, object]) -> str:
    """Peaks and GPUs of the three optimizers."""
    plans = plan(name, count, settings)
    if not plans:
        return ""
    peaks = [f"{plan.total / GIB:.1f}" for plan in plans]
    return f"**{peaks[0]}** / {' / '.join(peaks[1:])}<br>{' / '.join(map(gpu_class, plans))} GB"


def gpu_class(plan: Plan) -> str:
    """Its nominal size."""
    gpu = smallest_gpu(plan.total)
    return str(gpu.nominal_gb) if gpu else f"> {GPUS[-1].nominal_gb}"


def paper_rows() -> Iterator[str]:
    """Weights, state and the largest gradient, beside the arithmetic of the paper."""
    for name, window_size, per_param in PAPER:
        config = MicroAdamConfig(window_size=window_size, density=0.01)
        job = Job(dtype=Dtype.pure_bf16, gradient_release=True, config=config)
        plan = make_plan(LLAMAS[name], job)[Optimizer.microadam]
        sizes = (plan.weights, plan.optimizer_state, plan.resident, plan.resident + plan.gradients)
        cells = " | ".join(f"{size / GIB:.2f}" for size in sizes)
        stated = (2 + per_param) * numel(LLAMAS[name].parameters()) / GIB
        yield f"| {name} | {window_size} | {per_param} | {stated:.1f} | {cells} |"


class What(str, Enum):
    """What is printed."""

    state = "state"
    plans = "plans"
    page = "page"


def main(what: Annotated[What, typer.Argument(help="The README's table of states or of plans, or the page.")]) -> None:
    """Print Markdown."""
    print("\n".join({What.state: state_table, What.plans: plan_table, What.page: page}[what]()))


if __name__ == "__main__":
    typer.run(main)
