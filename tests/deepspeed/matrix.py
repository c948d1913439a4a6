"""The combinations of DeepSpeed options that are tested, and what is expected of each.

python -m tests.deepspeed.matrix > configs/deepspeed/MATRIX.md
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from microadam_dist import MicroAdam

from .engines import SETTINGS, GivenGradients, initialize

STAGES = (0, 1, 2, 3)
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = tuple(TORCH_DTYPES)


@dataclass(frozen=True)
class Feature:
    """An option, or a property of the model, that is combined with every stage and dtype it exists for.

    Attributes:
        config: Merged into the DeepSpeed configuration.
        traits: What the test does differently; see `make_engine`.
        stages, dtypes: Where DeepSpeed has it.
        error: None, or the words our error contains at `deepspeed.initialize`.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    traits: frozenset[str] = frozenset()
    stages: tuple[int, ...] = STAGES
    dtypes: tuple[str, ...] = DTYPES
    error: str | None = None


def zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": options}


def trait(*names: str) -> frozenset[str]:
    return frozenset(names)


_CPU = {"device": "cpu", "pin_memory": False}
_MASTER_FREE = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}

FEATURES = (
    Feature("plain"),
    Feature("gradient clipping", {"gradient_clipping": 0.1}),
    Feature("2 accumulation steps", {"gradient_accumulation_steps": 2}),
    Feature("clipping and accumulation", {"gradient_clipping": 0.1, "gradient_accumulation_steps": 2}),
    Feature("two param groups", traits=trait("two groups")),
    Feature("frozen parameter", traits=trait("frozen")),
    Feature("tied embeddings", traits=trait("tied")),
    Feature("parameter without gradient in some steps", traits=trait("missing gradients")),
    Feature("client optimizer", traits=trait("client")),
    Feature("round_robin_gradients", zero(round_robin_gradients=True), stages=(1, 2)),
    Feature("overlap_comm", zero(overlap_comm=True), stages=(1, 2, 3)),
    Feature("several sub-groups", zero(sub_group_size=7000), stages=(3,)),
    Feature("zero.Init", traits=trait("zero.Init"), stages=(3,)),
    Feature("offload_optimizer cpu", zero(offload_optimizer=_CPU), stages=(1, 2, 3)),
    Feature("offload_optimizer and offload_param cpu", zero(offload_optimizer=_CPU, offload_param=_CPU), stages=(3,)),
    Feature(
        "fp32 accumulation (BF16_Optimizer)",
        {"data_types": {"grad_accum_dtype": "fp32"}},
        stages=(1,),
        dtypes=("bf16",),
    ),
    Feature("torch_autocast", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, dtypes=("fp32",)),
    Feature(
        "model cast to bf16, no bf16 section (no master weights)",
        traits=trait("pre-cast"),
        stages=(0,),
        dtypes=("fp32",),
    ),
    Feature("bf16 master weights (no fp32 copy)", {"bf16": _MASTER_FREE}, stages=(1, 2, 3), dtypes=("bf16",)),
    Feature(
        "offload_optimizer ratio 0.5",
        zero(offload_optimizer={**_CPU, "ratio": 0.5}),
        stages=(3,),
        dtypes=("bf16",),
        error="offload_optimizer.ratio",
    ),
    Feature(
        "bf16 master weights with offload",
        {"bf16": _MASTER_FREE, **zero(offload_optimizer=_CPU)},
        stages=(1, 2, 3),
        dtypes=("bf16",),
        error="bf16_master_weights_and_grads",
    ),
    Feature(
        "bf16 master weights without bf16 states",
        {"bf16": {"bf16_master_weights_and_grads": True}},
        stages=(1, 2, 3),
        dtypes=("bf16",),
        error="bf16_optimizer_states",
    ),
    Feature(
        "elastic_checkpoint", zero(elastic_checkpoint=True), stages=(1, 2), dtypes=("bf16",), error="elastic_checkpoint"
    ),
    Feature("universal checkpoint", {"checkpoint": {"load_universal": True}}, dtypes=("bf16",), error="load_universal"),
    Feature(
        "offload_optimizer nvme",
        zero(offload_optimizer={"device": "nvme", "nvme_path": "/nonexistent"}),
        stages=(3,),
        dtypes=("bf16",),
        error="nvme",
    ),
)

# Name, and what happens at each stage.
BESIDE_TRAINING = (
    ("`engine.offload_states()`, `reload_states()`", "", "same bits", "same bits", "refused"),
    ("... of `lp_params`, `lp_grads`, `contiguous_grad_buffer`", "", "same bits", "same bits", "same bits"),
    ("`safe_get/set_full_optimizer_state`, dense path", "", "exact", "exact", "exact"),
    ("`safe_get/set_full_optimizer_state`, Top-K path", "", "refused", "refused", "refused"),
    ("`ds_to_universal`", "", *["fails: use `microadam reshard`"] * 3),
    ("`release_gradients`", *["refused"] * 4),
)


@dataclass(frozen=True)
class Row:
    """One combination."""

    stage: int
    dtype: str
    feature: Feature

    def __str__(self) -> str:
        return f"zero{self.stage}-{self.dtype}-{self.feature.name}"


def rows() -> Iterator[Row]:
    for feature in FEATURES:
        for stage in feature.stages:
            for dtype in feature.dtypes:
                yield Row(stage, dtype, feature)


def require_dtype(dtype: str) -> None:
    """Skip what DeepSpeed refuses on this device."""
    from deepspeed.accelerator import get_accelerator

    if dtype == "fp16" and not get_accelerator().is_fp16_supported():
        pytest.skip("this device has no fp16")


class TiedModel(GivenGradients):
    """The embedding is used twice; its gradients add up."""

    def __init__(self) -> None:
        super().__init__()
        self.head = type(self.embed)(1, 1)
        self.head.weight = self.embed.weight

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return super().forward(grads) + self.head(grads["embed"] * 0.5)


def make_engine(row: Row) -> Any:
    """The engine of a row."""
    import deepspeed

    traits = row.feature.traits
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "MicroAdam", "params": SETTINGS},
        **row.feature.config,
    }
    config["zero_optimization"] = {"stage": row.stage, **config.get("zero_optimization", {})}
    if row.dtype != "fp32":
        config[row.dtype] = {"enabled": True, **config.get(row.dtype, {})}
    if row.dtype == "fp16":
        config["fp16"]["loss_scale"] = 128.0
    torch.manual_seed(0)
    init = deepspeed.zero.Init(config_dict_or_path=config) if "zero.Init" in traits else contextlib.nullcontext()
    with init:
        model = TiedModel() if "tied" in traits else GivenGradients()
    if "pre-cast" in traits:
        model = model.bfloat16()
    if "frozen" in traits:
        model.up.weight.requires_grad_(False)
    kwargs: dict[str, Any] = {}
    if "two groups" in traits:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        kwargs["model_parameters"] = [
            {"params": matrices, "window_size": 2, "packed_window": True},
            {"params": vectors, "weight_decay": 0.0, "lr": 1e-3},
        ]
    if "client" in traits:
        kwargs["optimizer"] = MicroAdam(model.named_parameters(), **SETTINGS)
    return initialize(model, config, **kwargs)


def markdown() -> str:
    """The table of all combinations, one row per feature."""
    lines = [
        "# What works with DeepSpeed",
        "",
        "Every cell is run by `tests/deepspeed/test_matrix.py` on two ranks: the weights must be bit for bit those of",
        "one process that gets the same reduced gradients. fp16 is skipped on devices without it. *refused*: an error",
        "at `deepspeed.initialize` names the option and the remedy. Blank: DeepSpeed does not have it there.",
        "",
        "| | " + " | ".join(f"ZeRO-{stage}" for stage in STAGES) + " |",
        "|---|" + "---|" * len(STAGES),
    ]
    for feature in FEATURES:
        works = "refused" if feature.error else ", ".join(feature.dtypes)
        cells = [works if stage in feature.stages else "" for stage in STAGES]
        lines.append(f"| {feature.name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Every combination that works also resumes bit for bit on the same ranks (`tests/deepspeed/test_resume.py`).",
        "DeepSpeed 0.19.8 gives a parameter without gradient a zero gradient under ZeRO-1 and 2, none under stage 0,",
        "and its previous gradient under ZeRO-3.",
        "",
        "Beside training (`tests/deepspeed/test_limits.py`, `test_fragments.py`):",
        "",
        "| | " + " | ".join(f"ZeRO-{stage}" for stage in STAGES) + " |",
        "|---|" + "---|" * len(STAGES),
        *(f"| {name} | " + " | ".join(cells) + " |" for name, *cells in BESIDE_TRAINING),
        "",
        "DeepSpeed's MoE layers train in ZeRO-0 to 2 and resume on any number of ranks and with any `ep_size` through",
        "`microadam_dist.deepspeed.load_checkpoint`, not `microadam reshard` (`tests/deepspeed/test_experts.py`).",
        "*refused*: frozen experts under ZeRO-2, which DeepSpeed would restore on every rank as those of the first.",
        "",
        "A `PipelineModule` trains in ZeRO-0 and 1 and resumes through `engine.load_checkpoint` on the same ranks",
        "(`tests/deepspeed/test_pipelines.py`). *refused*: bf16 in ZeRO-0, whose checkpoints DeepSpeed cannot load.",
        "Checkpoints of pipelines, tensor parallelism and AutoEP cannot be loaded on other ranks.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
