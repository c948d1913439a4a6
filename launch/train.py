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

import inspect
import os
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from training.environment import prepare_environment, quiet_libraries
from training.errors import UserError
from training.model import has_liger, load_model
from training.options import Dtype, OptimizerName, Options, resolve

if TYPE_CHECKING:  # imported where they are used: torch and transformers take seconds
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

IS_RANK_0 = os.environ.get("RANK", "0") == "0"
console = Console(quiet=not IS_RANK_0)


def train(options: Options) -> None:
    """Run one training from validated options to metrics.json."""
    options, ds_config = resolve(options)
    if not options.verbose:
        quiet_libraries()
    use_cpu = prepare_environment(deepspeed=ds_config is not None)
    args = training_arguments(options, ds_config, use_cpu)

    from transformers import set_seed

    from training import summary
    from training.callbacks import LossProgress, OptimizerTimer, StepTimer

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


def load_data(options: Options, args: TrainingArguments) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Tokenizer and packed datasets, `train_dataset` and `eval_dataset`: packed by one rank, mapped by all."""
    from training.packing import PackedBlocks, load_tokenizer, write_blocks

    tokenizer = load_tokenizer(options.tokenizer or options.model)
    folder = options.output / "packed"
    with args.main_process_first(desc="packing"):
        if args.local_process_index == 0:
            heldout = options.eval_data or options.eval_fraction
            write_blocks(folder, tokenizer, options.seq_len, options.data, heldout)
    return tokenizer, {f"{split}_dataset": PackedBlocks(folder / f"{split}.npy") for split in ("train", "eval")}


def build_trainer(
    options: Options,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    datasets: dict[str, Any],
) -> Trainer:
    """A Trainer that also evaluates at the end, without its progress bar."""
    from transformers import ProgressCallback, Trainer

    from microadam_dist.integrations.sharded import ShardedStateMixin
    from training.callbacks import EvaluateAtEnd, MarkComplete

    class MicroAdamTrainer(ShardedStateMixin, Trainer):
        """Its checkpoints hold the optimizer's state under FSDP1 and --shard-state, too."""

        def report_elastic(self, message: str) -> None:
            console.print(escape(message))

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
    from training.callbacks import has_steps_left, last_complete_checkpoint

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
