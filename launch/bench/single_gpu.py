"""Full fine-tuning as `train.py --single-gpu` does it: peak memory beside the plan, speed, the optimizer's share.

    python launch/bench/single_gpu.py --model 7b --json 7b.json

Weights and tokens are random. The peak on a GPU is that of the CUDA allocator over the whole run; on a CPU it is that
of live tensors in one step.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.optim import Optimizer

LAUNCH = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(LAUNCH))

from bench.live_bytes import LiveBytes  # noqa: E402
from microadam_dist import MicroAdam, MicroAdamConfig  # noqa: E402
from microadam_dist.errors import MicroAdamError  # noqa: E402
from microadam_dist.optimizer.gradient_release import ReleasedGradient  # noqa: E402
from microadam_dist.planner import memory  # noqa: E402
from microadam_dist.planner.activations import default_loss_chunk  # noqa: E402
from microadam_dist.planner.shapes import read_shape  # noqa: E402
from training.callbacks import OptimizerClock, release_timed  # noqa: E402
from training.errors import UserError  # noqa: E402
from training.model import checkpointing_settings, has_liger, load_model  # noqa: E402
from training.options import Options, bits, fraction, resolve  # noqa: E402
from training.packing import byte_tokenizer  # noqa: E402
from training.summary import versions  # noqa: E402

MODELS = {"7b": "llama-2-7b", "13b": "llama-2-13b", "100m": "llama-100m"}
LR = 1e-5


class Choice(str, Enum):
    """Optimizers to measure."""

    microadam = "microadam"
    adamw = "adamw"
    adamw8bit = "adamw8bit"


PLANNED = {
    Choice.microadam: memory.Optimizer.microadam,
    Choice.adamw: memory.Optimizer.adamw,
    Choice.adamw8bit: memory.Optimizer.adamw_8bit,
}


class Run:
    """A model on the device, and its optimizer, which updates in the backward pass."""

    def __init__(self, options: Options, choice: Choice, config: MicroAdamConfig, batch: int) -> None:
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        torch.manual_seed(options.seed)
        self.model = load_model(options, byte_tokenizer(), self.device).train()
        self.model.config.use_cache = False
        checkpointing = checkpointing_settings(options)
        if checkpointing.pop("offload", False):
            self.model.activation_checkpointing_enable(checkpointing, offload=True)
        else:
            self.model.gradient_checkpointing_enable(checkpointing)
        if has_liger(options):
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(self.model, None)
        self.shape = (batch, options.seq_len)
        self.clock = OptimizerClock(self.device)
        self.most_gradients = 0
        self._counting = [param.register_post_accumulate_grad_hook(self._count) for param in self.model.parameters()]
        if choice is Choice.microadam:
            optimizer = MicroAdam(self.model.named_parameters(), lr=LR, **config.structural)
            release_timed(self.model, optimizer, self.clock)
            self.optimizers: list[Optimizer] = [optimizer]
        else:
            self.optimizers = release_any(self.model, adamw_class(choice), self.clock)

    def step(self) -> None:
        """Train on random tokens."""
        ids = torch.randint(self.model.config.vocab_size, self.shape, device=self.device)
        self.model(input_ids=ids, labels=ids).loss.backward()
        if isinstance(self.optimizers[0], MicroAdam):
            self.optimizers[0].step()

    def stop_counting(self) -> None:
        """Look no more how many gradients there are."""
        for hook in self._counting:
            hook.remove()

    def _count(self, _: torch.Tensor) -> None:
        grads = [param.grad for param in self.model.parameters()]
        alive = sum(grad is not None and not isinstance(grad, ReleasedGradient) for grad in grads)
        self.most_gradients = max(self.most_gradients, alive)

    def state_bytes(self) -> int:
        """Optimizer state without step counters; a tensor that parameters share counts once."""
        states = (state for optimizer in self.optimizers for state in optimizer.state.values())
        tensors = (
            tensor for state in states for name, tensor in state.items() if torch.is_tensor(tensor) and name != "step"
        )
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """The peak so far on a GPU, that of one more step on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        with LiveBytes() as live:
            self.step()
        return sum(param.nbytes for param in self.model.parameters()) + self.state_bytes() + live.peak


def adamw_class(choice: Choice) -> Callable[..., Optimizer]:
    """The AdamW to compare with.

    Raises:
        UserError: It is not installed.
    """
    if choice is Choice.adamw:
        return lambda params: torch.optim.AdamW(params, lr=LR, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"--optimizer adamw8bit is that of bitsandbytes: pip install bitsandbytes ({error})") from None
    return lambda params: AdamW8bit(params, lr=LR)


def release_any(model: torch.nn.Module, make: Callable[..., Optimizer], clock: OptimizerClock) -> list[Optimizer]:
    """One optimizer per parameter, stepped as soon as there is a gradient: gradient release for any optimizer."""
    optimizers = {param: make([param]) for param in model.parameters()}

    def update(param: torch.Tensor) -> None:
        clock.start()
        optimizers[param].step()
        clock.stop()
        param.grad = None

    for param in optimizers:
        param.register_post_accumulate_grad_hook(update)
    return list(optimizers.values())


def measure(options: Options, choice: Choice, config: MicroAdamConfig, batch: int, steps: int) -> dict[str, Any]:
    """Train, and compare with the plan."""
    run = Run(options, choice, config, batch)
    run.step()
    run.stop_counting()
    # The time of MicroAdam's step grows until its window is full.
    for _ in range(config.window_size if choice is Choice.microadam else 1):
        run.step()
    run.synchronize()
    before, start = run.clock.seconds(), time.perf_counter()
    for _ in range(steps):
        run.step()
    run.synchronize()
    seconds, optimizer_seconds = time.perf_counter() - start, run.clock.seconds() - before
    tokens, peak = steps * batch * options.seq_len, run.peak_bytes()
    chunk = default_loss_chunk(run.model.config.vocab_size)
    job = memory.Job(
        dtype=memory.Dtype.pure_bf16,
        batch=batch,
        seq=options.seq_len,
        config=config,
        gradient_release=True,
        activation_checkpointing=True,
        offload_activations=options.offload_activations,
        loss_chunk=chunk,
    )
    plan = memory.make_plan(read_shape(options.model_config), job)[PLANNED[choice]]
    return {
        "num_params": sum(param.numel() for param in run.model.parameters()),
        "loss": "liger" if has_liger(options) else f"chunks of {chunk}",
        "peak_bytes": peak,
        "planned_peak_bytes": plan.total,
        "planned_host_bytes": plan.host,
        "weight_bytes": sum(param.nbytes for param in run.model.parameters()),
        "planned_weight_bytes": plan.weights,
        "optimizer_bytes": run.state_bytes(),
        "planned_optimizer_bytes": plan.optimizer_state,
        "most_gradients_alive": run.most_gradients,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_without_optimizer": tokens / (seconds - optimizer_seconds),
        "optimizer_share": optimizer_seconds / seconds,
    }


def print_table(title: str, found: dict[str, Any]) -> None:
    """The sizes beside the plan, then the speed."""
    table = Table("", "measured", "planned", title=title)
    for name in ("weight", "optimizer", "peak"):
        sizes = (found[f"{kind}{name}_bytes"] / 2**20 for kind in ("", "planned_"))
        table.add_row(name, *(f"{size:,.1f} MiB" for size in sizes))
    table.add_row("gradients alive", str(found["most_gradients_alive"]), "1")
    table.add_row("speed", f"{found['tokens_per_second']:,.0f} tokens/s")
    table.add_row("  without the optimizer", f"{found['tokens_per_second_without_optimizer']:,.0f} tokens/s")
    table.add_row("  optimizer's share", f"{100 * found['optimizer_share']:.1f} %")
    Console().print(table)


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(MODELS)}, or a config.json.")],
    optimizer: Annotated[Choice, typer.Option(help="adamw and adamw8bit release gradients, too.")] = Choice.microadam,
    window_size: Annotated[int, typer.Option(help="Of MicroAdam.")] = MicroAdamConfig.window_size,
    density: Annotated[
        float, typer.Option(parser=fraction, metavar="FRACTION", help="Of MicroAdam: 0.01 or 1%.")
    ] = MicroAdamConfig.density,
    packed_window: Annotated[bool, typer.Option("--packed-window", help="Of MicroAdam.")] = False,
    ef_bits: Annotated[
        float, typer.Option(parser=bits, metavar="BITS", help="Of MicroAdam: 0, 1, 1.6, 2, 4 or 8.")
    ] = MicroAdamConfig.ef_bits,
    offload_activations: Annotated[
        bool, typer.Option("--offload-activations", help="What recomputation starts from waits in host memory.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, after those that fill the window.")] = 50,
    seq: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Measure one model with one optimizer."""
    path = LAUNCH.parent / "configs" / "models" / f"{MODELS[model]}.json" if model in MODELS else Path(model)
    console = Console(stderr=True)
    try:
        options, _ = resolve(
            Options(
                model_config=path,
                tokenizer="bytes",
                data=[],
                output=Path(),
                seq_len=seq,
                single_gpu=True,
                offload_activations=offload_activations,
            )
        )
        config = MicroAdamConfig(window_size=window_size, density=density, packed_window=packed_window, ef_bits=ef_bits)
        found = measure(options, optimizer, config, batch, steps)
    except (UserError, MicroAdamError) as error:
        console.print(f"[bold red]Error:[/] {error}")
        raise typer.Exit(2) from None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print_table(f"{path.stem}, {optimizer.value}, {batch} x {seq} tokens, {device}", found)
    if json_file:
        about = {
            "command": shlex.join(["python", "launch/bench/single_gpu.py", *sys.argv[1:]]),
            "device": device,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "versions": versions(),
        }
        json_file.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
