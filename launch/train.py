"""Full fine-tuning of a causal language model with MicroAdam: one process, DDP, DeepSpeed or FSDP.

    python launch/train.py --model MODEL --data book.txt --output runs/book
    torchrun --nproc_per_node 2 launch/train.py ...
    torchrun --nproc_per_node 2 launch/train.py ... --deepspeed configs/deepspeed/zero3_bf16.json
    deepspeed --num_gpus 2 launch/train.py ... --deepspeed configs/deepspeed/zero2_bf16.json
    accelerate launch --config_file configs/accelerate/fsdp2.yaml launch/train.py ...
    python launch/train.py ... --single-gpu                             # the least memory on one GPU

Ranks take GPUs where there are some, else they are CPU processes over gloo.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import socket
import typing
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from settings import Dtype, OptimizerName, Options, UserError, resolve

if TYPE_CHECKING:  # imported where they are used: torch and transformers take seconds
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

IS_RANK_0 = os.environ.get("RANK", "0") == "0"
LOSS_CHUNK = 512  # of a 7B Llama, so that recomputing one of its layers takes more memory than the logits
SHARD_SIZE = "2GB"  # of a file of the weights
console = Console(quiet=not IS_RANK_0)


def train(options: Options) -> None:
    """Run one training from validated options to metrics.json."""
    options, ds_config = resolve(options)
    if not options.verbose:
        quiet_libraries()
    use_cpu = prepare_environment(deepspeed=ds_config is not None)
    args = training_arguments(options, ds_config, use_cpu)

    from transformers import set_seed

    import summary
    from callbacks import LossProgress, OptimizerTimer, StepTimer

    set_seed(args.seed)
    tokenizer, datasets = load_data(options, args)
    model = load_model(options, tokenizer, args.device)
    # Counted now: engines replace the parameters by shards.
    num_params = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    tokens_a_step = args.world_size * args.train_batch_size * args.gradient_accumulation_steps * options.seq_len
    timer, optimizer_timer = StepTimer(), OptimizerTimer(args.device, options.gradient_release)
    trainer = build_trainer(options, args, model, tokenizer, datasets)
    trainer.add_callback(timer)
    trainer.add_callback(optimizer_timer)
    trainer.add_callback(LossProgress(timer, tokens_a_step))
    engine = find_engine(trainer, ds_config)
    trainer.train(resume_from_checkpoint=find_checkpoint(options))
    if trainer.is_fsdp_enabled:  # checkpoints are sharded, the final weights are not
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.save_state()  # the whole log, for `microadam report`
    metrics = summary.collect(trainer, timer, optimizer_timer, tokens_a_step, engine, num_params)
    if IS_RANK_0:
        summary.report(metrics, options.output, console)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # destroys the process group


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
        raise UserError(f"{num_ranks} ranks for {num_gpus} GPU(s): start one rank a GPU")
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


def training_arguments(options: Options, ds_config: dict[str, Any] | None, use_cpu: bool) -> TrainingArguments:
    """Translate the options; under DeepSpeed this also starts the process group."""
    from transformers import SchedulerType, TrainingArguments

    if options.schedule not in list(SchedulerType):
        raise UserError(f"--schedule {options.schedule}: expected one of {', '.join(SchedulerType)}")
    return TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_epsilon=options.eps,
        max_grad_norm=options.clip,
        warmup_steps=options.warmup,
        lr_scheduler_type=options.schedule,
        bf16=options.dtype is Dtype.bf16,
        fp16=options.dtype is Dtype.fp16,
        gradient_checkpointing=options.gradient_checkpointing,
        use_liger_kernel=has_liger(options),
        seed=options.seed,
        eval_on_start=True,
        eval_strategy="steps" if options.eval_steps else "no",
        eval_steps=options.eval_steps,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        logging_steps=options.logging_steps,
        log_level="info" if options.verbose else "error",
        report_to="tensorboard",
        disable_tqdm=False,
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        deepspeed=ds_config,
    )


def has_liger(options: Options) -> bool:
    """Whether Liger-Kernel computes the loss, and more, instead of `chunked_loss`."""
    import torch
    from transformers.utils import is_liger_kernel_available

    wanted = options.single_gpu and options.loss_chunk is None
    return wanted and torch.cuda.is_available() and is_liger_kernel_available()


def load_data(options: Options, args: TrainingArguments) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Tokenizer and packed datasets, `train_dataset` and `eval_dataset`: packed by one rank, mapped by all."""
    from data import PackedBlocks, load_tokenizer, write_blocks

    tokenizer = load_tokenizer(options.tokenizer or options.model)
    folder = options.output / "packed"
    with args.main_process_first(desc="packing"):
        if args.local_process_index == 0:
            heldout = options.eval_data or options.eval_fraction
            write_blocks(folder, tokenizer, options.seq_len, options.data, heldout)
    return tokenizer, {f"{split}_dataset": PackedBlocks(folder / f"{split}.npy") for split in ("train", "eval")}


def load_model(options: Options, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
    """The pre-trained model, or a randomly initialised one; under --single-gpu on the device from the start.

    Raises:
        UserError: no such model, or a tokenizer with more tokens than the model has.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # Mixed precision without DeepSpeed keeps fp32 weights; DeepSpeed casts and keeps its own fp32 copy.
    half = {Dtype.pure_bf16: torch.bfloat16}
    if options.deepspeed:
        half |= {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}
    dtype = half.get(options.dtype, torch.float32)
    source = options.model_config or options.model
    attention = {"attn_implementation": "sdpa"} if options.single_gpu else {}
    try:
        with device if options.single_gpu else contextlib.nullcontext():
            if options.model_config:
                fields = json.loads(options.model_config.read_text(encoding="utf-8"))
                config = AutoConfig.for_model(fields.pop("model_type"), **fields)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
            else:
                model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **attention)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot make a causal language model from '{source}': {error}") from None
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, more than the vocab_size of '{source}'")
    if options.single_gpu:  # safetensors gathers a file on the host: not the whole model at once
        model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size=SHARD_SIZE)
    if has_liger(options):
        require_liger(model)
    elif options.loss_chunk or options.single_gpu:
        from chunked_loss import use_chunked_loss

        use_chunked_loss(model, options.loss_chunk or LOSS_CHUNK)
    return model


def require_liger(model: PreTrainedModel) -> None:
    """Refuse what Liger-Kernel leaves as it is, in silence.

    Raises:
        UserError: a kind of model that it does not know.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"--single-gpu: Liger-Kernel has nothing for '{kind}'; its logits would exist whole")


def build_trainer(
    options: Options,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    datasets: dict[str, Any],
) -> Trainer:
    """A Trainer that also evaluates at the end, without its progress bar."""
    from transformers import ProgressCallback, Trainer

    from callbacks import EvaluateAtEnd, MarkComplete
    from microadam_dist.integrations.sharded import ShardedStateMixin

    class MicroAdamTrainer(ShardedStateMixin, Trainer):
        """Its checkpoints hold the optimizer's state under FSDP1 and --shard-state, too."""

        def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
            # Trainer logs it even without clipping.
            return None if options.gradient_release else super()._get_grad_norm(*args, **kwargs)

    trainer = MicroAdamTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_and_settings(options) if options.optimizer else None,
        callbacks=[EvaluateAtEnd(), MarkComplete()],
        **datasets,
    )
    trainer.remove_callback(ProgressCallback)
    if options.metrics_every:
        from microadam_dist.integrations.hf import MetricsCallback

        trainer.add_callback(MetricsCallback(trainer))
    return trainer


def find_engine(trainer: Trainer, ds_config: dict[str, Any] | None) -> str:
    """What trains, for the summary.

    Raises:
        UserError: Accelerate has taken no notice of what it was launched with, as it does without GPUs.
    """
    if ds_config is not None:
        return f"ZeRO-{ds_config.get('zero_optimization', {}).get('stage', 0)}"
    if trainer.is_fsdp_enabled:
        return f"FSDP{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError(
            "Accelerate uses FSDP on GPUs only, and would train with DDP here: launch with torchrun instead"
        )
    return "DDP" if trainer.args.world_size > 1 else "one process"


def optimizer_and_settings(options: Options) -> tuple[type, dict[str, Any]]:
    """Class and keyword arguments for Trainer."""
    kwargs = {name: getattr(options, name) for name in ("lr", "betas", "eps", "weight_decay")}
    if options.optimizer is OptimizerName.adamw:
        import torch

        return torch.optim.AdamW, kwargs
    from microadam_dist import MicroAdam

    return MicroAdam, kwargs | options.microadam_settings


def find_checkpoint(options: Options) -> str | None:
    """Checkpoint folder to resume from; None to start anew.

    Raises:
        UserError: there is none, or the run is finished.
    """
    if options.resume is None:
        return None
    from callbacks import has_steps_left, last_complete_checkpoint

    if options.resume == "last":
        checkpoint = last_complete_checkpoint(options.output, options.steps)
        if checkpoint is None:
            console.print(f"No checkpoint with steps left in {options.output}: starting anew.")
        return checkpoint and str(checkpoint)
    checkpoint = Path(options.resume)
    if not (checkpoint / "trainer_state.json").is_file():
        raise UserError(f"--resume {options.resume}: no checkpoint found (was the run started with --save-steps?)")
    if not has_steps_left(checkpoint, options.steps):
        raise UserError(f"--resume {options.resume}: that run is finished; give more --steps to go on")
    return options.resume


def main(**values: Any) -> None:
    """Fully fine-tune a causal language model with MicroAdam, or with AdamW to compare."""
    try:
        train(Options(**values))
    except Exception as error:
        from microadam_dist.errors import MicroAdamError

        if not isinstance(error, (UserError, MicroAdamError)):
            raise
        Console(stderr=True, quiet=not IS_RANK_0).print(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None


# Typer reads the options from the signature: the fields of `Options`.
main.__signature__ = inspect.signature(Options)
main.__annotations__ = typing.get_type_hints(Options, include_extras=True)

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
