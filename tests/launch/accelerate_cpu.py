"""Accelerate on CPU ranks as it is on GPUs: by itself it takes no notice of an FSDP configuration there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def environment(config: Path, num_processes: int) -> dict[str, str]:
    """What ``accelerate launch --config_file`` gives to the processes it starts, beside what they have already."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch

    command = ["--config_file", str(config), "--num_processes", str(num_processes), "launch/train.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, prepared = launch.prepare_deepspeed_cmd_env(args)
    elif args.use_fsdp or args.multi_gpu:
        prepared = launch.prepare_multi_gpu_env(args)
    else:
        _, prepared = launch.prepare_simple_launcher_cmd_env(args)
    return {name: prepared[name] for name in prepared if name.startswith(("ACCELERATE_", "FSDP_"))}


def enable_fsdp() -> None:
    """Accelerate enables FSDP for the distributed type of several GPUs only: let CPU ranks pass for them."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FullStateDictConfig

    original = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU
            self.device = torch.device("cpu")  # FSDP1 takes "cpu:0" for another device

    PartialState.__init__ = init  # type: ignore[method-assign]

    # torch 2.13 frees weights that are on the CPU already before it "offloads" them, and dies.
    def offload_nothing(config: Any, offload_to_cpu: bool = False, rank0_only: bool = False) -> None:
        config.offload_to_cpu, config.rank0_only = False, rank0_only

    FullStateDictConfig.__init__ = offload_nothing  # type: ignore[assignment,method-assign]
