"""What has to be set before a training starts: devices, ranks, the libraries' messages."""

from __future__ import annotations

import logging
import os
import socket
import warnings

from .errors import UserError


def quiet_libraries() -> None:
    """Keep the libraries' own messages off the terminal, errors excepted."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def prepare_environment(deepspeed: bool) -> bool:
    """Choose GPUs or CPU ranks, and make a plain `python` run a world of one.

    Returns:
        Whether to train on the CPU.

    Raises:
        UserError: more ranks on this machine than GPUs.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < num_gpus < num_ranks:
        raise UserError(f"{num_ranks} ranks for {num_gpus} GPU(s): start one rank per GPU")
    if "RANK" not in os.environ:
        if num_gpus:
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # or Trainer falls back on torch.nn.DataParallel
        if deepspeed:  # it looks for MPI otherwise
            world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(world, MASTER_PORT=str(free_port()))
    if num_gpus == 0:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise UserError(
                "accelerate launch does not start ranks for DeepSpeed without GPUs: use torchrun or deepspeed, with "
                "--deepspeed FILE.json"
            )
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed in any case
    if deepspeed:
        from microadam_dist.deepspeed import disable_shm_allreduce, register

        register()
        if num_gpus == 0:
            disable_shm_allreduce()
    return num_gpus == 0


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
