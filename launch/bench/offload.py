"""The optimizer step of ZeRO-Offload: MicroAdam next to AdamW, in real DeepSpeed engines over gloo.

python launch/bench/offload.py --stages 1,2,3 --ranks 2

Everything here lies in host memory, also what DeepSpeed offloads: on a machine without a GPU only the step itself, on
DeepSpeed's flat fp32 shards, is what it is with one; its copies to and from the GPU are not shown.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from microadam_dist.bench.measure import describe
from microadam_dist.bench.workload import ROW_NUMEL, parse_numel, parse_setting
from microadam_dist.cli.settings import with_percent
from microadam_dist.deepspeed import disable_shm_allreduce
from microadam_dist.diagnostics.environment import versions
from microadam_dist.errors import ConfigError, MicroAdamError

NUM_MATRICES = 16
LR, WEIGHT_DECAY = 1e-3, 0.01


class Holder(nn.Module):
    """One matrix whose gradient is the tensor passed in."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, ROW_NUMEL))

    def forward(self, grad: Tensor) -> Tensor:
        return (self.weight * grad).sum()


class Model(nn.Module):
    """Some matrices."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Holder(numel // ROW_NUMEL // NUM_MATRICES) for _ in range(NUM_MATRICES))

    def forward(self, grad: Tensor) -> Tensor:
        return torch.stack([part(grad) for part in self.parts]).sum()


def ds_config(stage: int, optimizer: dict[str, Any]) -> dict[str, Any]:
    """bf16 weights and gradients; master weights and optimizer in host memory."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "optimizer": optimizer,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,  # lets torch's AdamW run
    }


def optimizers(settings: str, deepspeed_cpu_adam: bool) -> dict[str, dict[str, Any]]:
    """Name -> the optimizer section of the configuration."""
    common = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    found = {"torch AdamW fused": {"type": "AdamW", "params": {"torch_adam": True, "fused": True, **common}}}
    if deepspeed_cpu_adam:
        found["DeepSpeedCPUAdam"] = {"type": "AdamW", "params": common}
    for text in settings.split(","):
        config = parse_setting(text, WEIGHT_DECAY)
        found[f"MicroAdam {text}"] = {"type": "MicroAdam", "params": {**common, **config.structural}}
    return found


class TimedEngine:
    """A DeepSpeed engine, and the seconds of its steps."""

    def __init__(self, numel: int, config: dict[str, Any]) -> None:
        import deepspeed

        model = Model(numel)
        self.engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
        self.optimizer_seconds: list[float] = []
        self.engine_seconds: list[float] = []
        self._clock: list[float] = []  # ZeRO-3 calls the optimizer once for each of its sub-groups
        self.engine.basic_optimizer.register_step_pre_hook(lambda *_: self._clock.append(-time.perf_counter()))
        self.engine.basic_optimizer.register_step_post_hook(lambda *_: self._clock.append(time.perf_counter()))

    def step(self, grad: Tensor) -> None:
        """Take one training step."""
        self.engine.backward(self.engine(grad))
        self._clock.clear()
        start = time.perf_counter()
        self.engine.step()
        self.engine_seconds.append(time.perf_counter() - start)
        self.optimizer_seconds.append(sum(self._clock))


def run_rank(
    rank: int, folder: str, ranks: int, stages: list[int], chosen: dict[str, Any], numel: int, repeats: int
) -> None:
    """One rank: stage after stage, the optimizers step in turn; rank 0 writes the rows."""
    import torch.distributed as dist
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    disable_shm_allreduce()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    warmup = 1 + max(optimizer["params"].get("window_size", 1) for optimizer in chosen.values())  # windows are full
    rows = []
    for stage in stages:
        engines = {name: TimedEngine(numel, ds_config(stage, optimizer)) for name, optimizer in chosen.items()}
        for _ in range(warmup + repeats):
            grad = torch.randn(numel // ROW_NUMEL // NUM_MATRICES, ROW_NUMEL, dtype=torch.bfloat16)
            for timed in engines.values():
                timed.step(grad)
        scale = 1e9 * ranks / numel
        for name, timed in engines.items():
            own, whole = timed.optimizer_seconds[warmup:], timed.engine_seconds[warmup:]
            row = {"stage": stage, "optimizer": name, "optimizer_ns_median": scale * statistics.median(own)}
            rows.append(
                row | {"optimizer_ns_min": scale * min(own), "engine_ns_median": scale * statistics.median(whole)}
            )
            timed.engine.destroy()
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    # DeepSpeed keeps the process groups alive, and so gloo's threads. One that still lets go of the last collective's
    # tensors while the interpreter shuts down would abort this process (CPython before 3.14): it ends here.
    os._exit(0)


def main(
    stages: Annotated[str, typer.Option(help="ZeRO stages.")] = "1,2,3",
    ranks: Annotated[int, typer.Option(min=1, help="Processes; the cores are shared between them.")] = 1,
    numel: Annotated[str, typer.Option(help="Parameters of the model, all ranks together.")] = "16M",
    settings: Annotated[str, typer.Option(help="MicroAdam's window_size/density.")] = "10/1%,2/5%,1/10%",
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each engine.")] = 10,
    deepspeed_cpu_adam: Annotated[
        bool, typer.Option("--deepspeed", help="Also DeepSpeedCPUAdam; compiles its op.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Time the optimizer step inside DeepSpeed ZeRO with offload_optimizer, in nanoseconds per parameter of a rank."""
    console = Console()
    try:
        size = parse_numel(numel).numel
        if size % (NUM_MATRICES * ROW_NUMEL):
            raise ConfigError(f"--numel {numel}: expected a multiple of {NUM_MATRICES * ROW_NUMEL}.")
        chosen = optimizers(",".join(map(with_percent, settings.split(","))), deepspeed_cpu_adam)
    except MicroAdamError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    os.environ["DS_ACCELERATOR"] = "cpu"
    numbers = [int(stage) for stage in stages.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (folder, ranks, numbers, chosen, size, repeats), nprocs=ranks)
        rows = json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))
    table = Table(title=f"ZeRO-Offload, {numel} parameters, {ranks} ranks, everything in host memory; ns per parameter")
    for title in ("stage", "optimizer", "optimizer step", "minimum", "engine.step()"):
        table.add_column(title, justify="left" if title == "optimizer" else "right", no_wrap=True)
    for row in rows:
        cells = (f"{row[key]:.2f}" for key in ("optimizer_ns_median", "optimizer_ns_min", "engine_ns_median"))
        table.add_row(str(row["stage"]), row["optimizer"], *cells)
    console.print(table)
    if json_file:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "device": describe(torch.device("cpu")),
            "versions": versions(),
            "numel": size,
            "ranks": ranks,
            "rows": rows,
        }
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
