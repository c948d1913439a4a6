"""``microadam plan``: the options, the table, the JSON and the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from typer import Option

from ..config import MicroAdamConfig
from ..errors import ConfigError
from ..planner.engines import Dtype, Engine
from ..planner.fit import capacity, propose
from ..planner.gpus import CONTEXT_BYTES, FRAGMENTATION, GIB, GPUS, needed_bytes, smallest_gpu
from ..planner.memory import Job, Optimizer, Plan, make_plan
from ..planner.shapes import BUILT_IN_NAMES, LLAMAS, SUPPORTED_MODEL_TYPES, LlamaShape, numel, read_shape
from .output import tables, write_json
from .settings import parse_bits, parse_density

# Parts of a plan in the order in which the table and the picture show them; the last ones are of the step.
RESIDENT = {"weights": "weights", "master": "master weights", "optimizer_state": "optimizer state"}
BACKWARD = {
    "gradients": "gradients",
    "activations": "activations",
    "logits": "logits and loss",
    "working": "backward of a layer",
    "buffers": "engine buffers",
}
STEP = {"step_gradients": "gradients", "step_buffers": "engine buffers"}
DEFAULTS = MicroAdamConfig()


def plan(
    model: Annotated[
        str,
        Option(help="7b, 13b, 70b (Llama-2), 8b (Llama-3), a config.json, a model folder, or a hub id in the cache."),
    ],
    gpus: Annotated[int, Option(min=1, help="Data-parallel ranks.")] = 1,
    engine: Annotated[Engine, Option(help="How the model is spread over the ranks.")] = Engine.single,
    dtype: Annotated[
        Dtype,
        Option(
            help="bf16: DeepSpeed's bf16 section; elsewhere fp32 weights, bf16 arithmetic. pure-bf16: no fp32 copy."
        ),
    ] = Dtype.bf16,
    seq: Annotated[int, Option(min=1, help="Tokens in a sequence.")] = 2048,
    batch: Annotated[int, Option(min=1, help="Sequences per rank and micro-batch.")] = 1,
    window_size: Annotated[int, Option(help="MicroAdam: sparse gradients kept.")] = DEFAULTS.window_size,
    density: Annotated[
        float, Option(parser=parse_density, metavar="FRACTION", help="MicroAdam: kept of a gradient, 0.01 or 1%.")
    ] = DEFAULTS.density,
    block_size: Annotated[int, Option(help="MicroAdam: elements in a Top-K block.")] = DEFAULTS.block_size,
    bucket_size: Annotated[int, Option(help="MicroAdam: elements sharing one scale.")] = DEFAULTS.bucket_size,
    ef_bits: Annotated[
        float, Option(parser=parse_bits, metavar="BITS", help="MicroAdam: of the error feedback, 0, 1, 1.6, 2, 4 or 8.")
    ] = DEFAULTS.ef_bits,
    packed_window: Annotated[bool, Option("--packed-window", help="MicroAdam: window in 12 + 8 bits.")] = False,
    gradient_release: Annotated[bool, Option(help="Update weights in the backward pass (single, fsdp2).")] = False,
    activation_checkpointing: Annotated[bool, Option(help="Recompute every decoder layer.")] = False,
    offload_activations: Annotated[
        bool, Option("--offload-activations", help="What recomputation starts from waits in host memory.")
    ] = False,
    offload_optimizer: Annotated[bool, Option("--offload-optimizer", help="ZeRO-1, 2, 3: to host memory.")] = False,
    master_free: Annotated[bool, Option("--master-free", help="ZeRO-1, 2, 3: a bf16 copy of the weights.")] = False,
    loss_chunk: Annotated[
        int | None, Option(min=1, help="Chunked cross entropy: tokens whose logits exist at a time.")
    ] = None,
    fit: Annotated[
        int | None,
        Option(min=1, metavar="GB", help="Show the settings that fit a GPU sold with so much memory, and how far."),
    ] = None,
    json_file: Annotated[
        Path | None, Option("--json", metavar="FILE", help="Write all numbers, in bytes; - is standard output.")
    ] = None,
    plot_file: Annotated[Path | None, Option("--plot", metavar="FILE", help="Draw them (.png, .svg, .pdf).")] = None,
) -> None:
    """Show the memory a training run needs on each GPU, with MicroAdam, 8-bit AdamW and AdamW."""
    config = MicroAdamConfig.from_dict(locals())  # the options that are settings of MicroAdam
    job = Job(
        engine=engine,
        gpus=gpus,
        dtype=dtype,
        batch=batch,
        seq=seq,
        config=config,
        gradient_release=gradient_release,
        activation_checkpointing=activation_checkpointing,
        offload_activations=offload_activations,
        offload_optimizer=offload_optimizer,
        master_free=master_free,
        loss_chunk=loss_chunk,
    )
    name, shape = find_model(model)
    if fit is not None:
        if plot_file:
            raise ConfigError("--plot draws one plan, not the proposals of --fit; leave one of them out.")
        show_proposals(name, shape, job, fit, json_file)
        return
    plans = make_plan(shape, job)
    tables(json_file).print(make_table(name, shape, job, plans))
    if json_file:
        write_json(as_json(name, shape, job, plans), json_file)
    if plot_file:
        from ..planner.plot import draw

        draw(plot_file, _title(name, job), {optimizer.value: _peak(plan) for optimizer, plan in plans.items()})


def show_proposals(name: str, shape: LlamaShape, job: Job, fit: int, json_file: Path | None) -> None:
    """A table of what fits a GPU of ``fit`` GB."""
    found = propose(shape, job, capacity(fit))
    title = f"{_title(name, found[0].job)}: what fits a GPU with {fit} GB"
    table = Table(
        title=title,
        caption=f"It has {capacity(fit) / GIB:.2f} GiB. Sizes in GiB; needed are the peak, {FRAGMENTATION:.0%} "
        f"fragmentation and {CONTEXT_BYTES / GIB} GiB for CUDA. Activations in host memory (--offload-activations) "
        "are copied there and back in each step; what fewer bits (--ef-bits) cost: "
        "launch/studies/results/RESULTS.md.",
    )
    table.add_column("ef bits", justify="right")
    table.add_column("activations")
    for header in ("state", "peak", "needed", f"sequences of {job.seq}", "longest sequence"):
        table.add_column(header, justify="right")
    for proposal in found:
        table.add_row(
            f"{proposal.job.config.ef_bits:g}",
            f"{proposal.host / GIB:.2f} in host memory" if proposal.job.offload_activations else "on the GPU",
            *(f"{size / GIB:.2f}" for size in (proposal.state, proposal.peak, proposal.needed)),
            str(proposal.batch or "-"),
            str(proposal.seq or "-"),
            style=None if proposal.batch else "dim",
        )
    tables(json_file).print(table)
    if json_file:
        proposals = [
            {**dataclasses.asdict(proposal), "bytes_of_gpu": capacity(fit), "unit": "bytes"} for proposal in found
        ]
        write_json(proposals, json_file)


def find_model(model: str) -> tuple[str, LlamaShape]:
    """The built-in model, file, folder or cached hub model of this name: what to call it, and its shape.

    Raises:
        ConfigError: There is none, or it is not supported.
    """
    if built_in := BUILT_IN_NAMES.get(model.lower()):
        return built_in, LLAMAS[built_in]
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        path = _cached_config(model)
    return model, read_shape(path)


def _cached_config(hub_id: str) -> Path:
    found: object = None
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(hub_id, "config.json")
    except (ImportError, ValueError):  # not installed; no such file and no valid id either
        pass
    if isinstance(found, str):
        return Path(found)
    raise ConfigError(
        f"--model {hub_id}: no such file or folder, not built in ({', '.join(BUILT_IN_NAMES)}), and not in the local "
        "Hugging Face cache. Nothing is downloaded here: run 'hf download "
        f"{hub_id} config.json' first, or give the path of a config.json "
        f"(model_type {', '.join(SUPPORTED_MODEL_TYPES)})."
    )


def _title(name: str, job: Job) -> str:
    flags = ("gradient_release", "activation_checkpointing", "offload_activations", "offload_optimizer", "master_free")
    parts = [
        f"{name}, {job.gpus} x {job.engine.value}",
        job.dtype.value,
        f"batch {job.batch} x {job.seq} tokens",
        *(flag.replace("_", " ") for flag in flags if getattr(job, flag)),
    ]
    return ", ".join(parts)


def make_table(name: str, shape: LlamaShape, job: Job, plans: Mapping[Optimizer, Plan]) -> Table:
    """One column an optimizer, one row a part, in GiB."""
    table = Table(
        title=f"{_title(name, job)}: GiB on each rank",
        caption=f"1 GiB = 2^30 bytes. {numel(shape.parameters()) / 1e9:.2f} billion parameters. A GPU fits if it has "
        f"room for the peak, {FRAGMENTATION:.0%} fragmentation and {CONTEXT_BYTES / GIB} GiB for CUDA.",
    )
    table.add_column("")
    for optimizer in plans:
        table.add_column(optimizer.value, justify="right")

    def add(label: str, attribute: str, style: str | None = None) -> None:
        table.add_row(label, *(f"{getattr(plan, attribute) / GIB:.2f}" for plan in plans.values()), style=style)

    for attribute, label in RESIDENT.items():
        add(label, attribute)
    for title, parts in (("backward pass adds", BACKWARD), ("optimizer step adds", STEP)):
        table.add_section()
        table.add_row(title, style="dim")
        for attribute, label in parts.items():
            if any(getattr(plan, attribute) for plan in plans.values()):
                add(f"  {label}", attribute)
    table.add_section()
    add("peak", "total", style="bold")
    if any(plan.host for plan in plans.values()):
        add("in host memory", "host")
    table.add_row("smallest GPU", *(_gpu_name(plan) for plan in plans.values()))
    return table


def _gpu_name(plan: Plan) -> str:
    gpu = smallest_gpu(plan.total)
    return f"{gpu.nominal_gb} GB\n{gpu.names}" if gpu else f"none: above\n{GPUS[-1].nominal_gb} GB"


def _peak(plan: Plan) -> dict[str, int]:
    """What the memory is used for in the phase that needs most."""
    phase = BACKWARD if plan.backward >= plan.step else STEP
    return {label: getattr(plan, attribute) for attribute, label in (RESIDENT | phase).items()}


def as_json(name: str, shape: LlamaShape, job: Job, plans: Mapping[Optimizer, Plan]) -> dict[str, Any]:
    """Everything in bytes, with what it was computed from."""
    optimizers = {}
    for optimizer, plan in plans.items():
        gpu = smallest_gpu(plan.total)
        optimizers[optimizer.value] = {
            **dataclasses.asdict(plan),
            "total": plan.total,
            "needed_on_gpu": needed_bytes(plan.total),
            "smallest_gpu": gpu and {**dataclasses.asdict(gpu), "bytes": gpu.num_bytes},
        }
    return {
        "unit": "bytes",
        "model": {"name": name, **dataclasses.asdict(shape), "parameters": numel(shape.parameters())},
        "job": dataclasses.asdict(job),
        "optimizers": optimizers,
    }
