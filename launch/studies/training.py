"""One run of a study, from the settings to a JSON record."""

from __future__ import annotations

import functools
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, get_scheduler
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from microadam_dist.arithmetic.blocks import block_views
from microadam_dist.arithmetic.step import stored_error
from microadam_dist.config import MicroAdamConfig
from microadam_dist.layout import ShardSpan, StateLayout

from .config import OptimizerEntry, Run, Task
from .optimizers import build_optimizer, package_version, state_bytes
from .tasks import Problem

_CURVE_POINTS = 100
_METRICS = ("q", "omega")  # of `MicroAdam.metrics`


def train(run: Run, task: Task, entry: OptimizerEntry, folder: Path, device: str) -> dict[str, Any]:
    """Train once; the learning rate rises linearly and then follows a cosine to 0.

    Returns:
        The record of the run: settings, losses over time, validation and test loss at the end (None where the training
        loss stopped being finite), bytes of state, seconds.
    """
    start = time.perf_counter()
    torch.manual_seed(run.seed)
    problem = Problem(task, folder, device)
    model = problem.make_model()
    if entry.weights == "bf16":
        model.bfloat16()
        if device == "cpu":
            _multiply_in_fp32(model)
    optimizer = build_optimizer(entry.type, list(model.named_parameters()), run.lr, entry.settings)
    schedule = get_scheduler("cosine", optimizer, round(entry.warmup * task.steps), task.steps)
    interval = -(-task.steps // _CURVE_POINTS)
    curve, validation, trace, metrics, recent, step_seconds = [], [], [], [], [], []
    diverged = False
    for step, batch in zip(range(1, task.steps + 1), problem.batches(run.seed), strict=False):
        optimizer.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        recent.append(loss.item())
        if diverged := not math.isfinite(recent[-1]):
            break
        begin = time.perf_counter()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        step_seconds.append(time.perf_counter() - begin)
        schedule.step()
        if step % interval == 0 or step == task.steps:
            curve.append((step, statistics.fmean(recent)))
            recent = []
        if step % task.eval_every == 0 and step < task.steps:
            validation.append((step, problem.evaluate(model, "validation").loss))
        if getattr(optimizer, "metrics_every", 0) and step % optimizer.metrics_every == 0:
            metrics.append(optimizer.metrics)
        if task.trace_every and step % task.trace_every == 0:
            trace.append({"step": step, **_norms(optimizer), "state_bytes": state_bytes(optimizer)})
    record = {
        **run._asdict(),
        "task_settings": task.model_dump(),
        "optimizer_settings": entry.model_dump(exclude={"lr"}),
        "package": package_version(entry.type),
        "torch": f"torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "num_params": sum(param.numel() for param in model.parameters()),
        "weight_bytes": sum(param.nbytes for param in model.parameters()),
        "state_bytes": state_bytes(optimizer),
        "train_curve": curve,
        "validation_curve": validation,
        "trace": trace,
        "metrics": {name: statistics.fmean(m[name] for m in metrics) for name in _METRICS} if metrics else None,
        "step_ms": 1e3 * statistics.median(step_seconds) if step_seconds else None,
        "validation": None,
        "test": None,
        "diverged": diverged,
    }
    if not diverged:
        record["validation"] = problem.evaluate(model, "validation")._asdict()
        record["test"] = problem.evaluate(model, "test")._asdict()
        validation.append((task.steps, record["validation"]["loss"]))
        if not math.isfinite(record["validation"]["loss"]):
            record |= {"validation": None, "test": None, "diverged": True}
    return record | {"seconds": time.perf_counter() - start}


def _multiply_in_fp32(model: nn.Module) -> None:
    """Products of 16-bit matrices as units for bf16 have them: summed in fp32 and rounded once.

    That is what torch does as well, at a twentieth of the speed on a CPU without such units. Attention is computed in
    fp32 as a whole, and rounded.
    """
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            linear.forward = functools.partial(_linear, linear)  # type: ignore[method-assign]
    if isinstance(model, PreTrainedModel):
        AttentionInterface.register("sdpa_in_fp32", _attention)
        AttentionMaskInterface.register("sdpa_in_fp32", sdpa_mask)
        model.set_attn_implementation("sdpa_in_fp32")


def _linear(module: nn.Linear, inputs: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.float()
    return functional.linear(inputs.float(), module.weight.float(), bias).to(inputs.dtype)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)
    return output.to(query.dtype), None


def _norms(optimizer: Optimizer) -> dict[str, float]:
    """Norms over the parameters that have an error feedback: the gradient's and the decoded error's."""
    grad_square = error_square = 0.0
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            if "codes" in state:
                config = MicroAdamConfig.from_dict(group)
                layout = StateLayout((ShardSpan("", tuple(param.shape), 0, param.numel()),), config)
                flat = {name: tensor.view(-1) for name, tensor in state.items() if name != "step"}
                for run in layout.runs:
                    weights, grad = param.detach().view(-1), param.grad.view(-1)
                    views = block_views(layout, run, weights, grad, flat, range(run.rows))
                    error = stored_error(views, config)
                    error_square += 0.0 if error is None else float(error.square().sum())
            grad_square += float(param.grad.square().sum())
    return {"grad_norm": math.sqrt(grad_square), "error_norm": math.sqrt(error_square)}
