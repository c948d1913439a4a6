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
import inspect
import os
import shutil
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from training import resume
from training.environment import prepare_environment, quiet_libraries
from training.errors import OneLineErrors, UserError, fail
from training.model import checkpointing_settings, has_liger, load_model
from training.options import Dtype, OptimizerName, Options, Override, resolve
from training.sources import hub_names

if TYPE_CHECKING:  # imported where they are used: torch and transformers take seconds
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

IS_RANK_0 = os.environ.get("RANK", "0") == "0"
console = Console(quiet=not IS_RANK_0)


def train(options: Options) -> None:
    """Run one training from validated options to metrics.json."""
    options, ds_config = resolve(options)
    checkpoint = resume.find_checkpoint(options)
    for name in hub_names(options):
        console.print(f"{escape(name)}: no such file or folder here, so the Hugging Face hub is asked.", soft_wrap=True)
    if not options.verbose:
        quiet_libraries()
    use_cpu = prepare_environment(deepspeed=ds_config is not None)
    args = training_arguments(options, ds_config, use_cpu)

    from transformers import set_seed

    from training import summary
    from training.callbacks import LossProgress, MarkComplete, NewLearningRate, OptimizerTimer, StepTimer

    set_seed(args.seed)
    settings = run_settings(options, ds_config, args)
    if checkpoint:
        compared = resume.require_same(checkpoint, settings, options.override or [])
    with _together():
        tokenizer, datasets, settings["data"] = load_data(options, args)
        if checkpoint:
            resume.require_same(checkpoint, {"data": settings["data"]}, options.override or [])
    with _together():
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
    trainer.add_callback(MarkComplete({**settings, "engine": engine, "ranks": args.world_size}))
    if checkpoint:
        console.print(escape(resume.describe(checkpoint, compared)), soft_wrap=True)
        if Override.lr in (options.override or []):
            trainer.add_callback(NewLearningRate(options.lr))
    elif options.resume == "last":
        console.print(f"No checkpoint in {escape(str(options.output))}: starting anew.")
    with _together():
        if options.overwrite and args.local_process_index == 0:
            resume.remove_results(options.output)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if trainer.is_fsdp_enabled:  # checkpoints are sharded, the final weights are not
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.save_state()  # the whole log, for `microadam report`
    metrics = summary.collect(trainer, timer, optimizer_timer, tokens_a_step, engine, num_params)
    if IS_RANK_0:
        summary.report(metrics, options.output, console)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # destroys the process group


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What is wrong on any rank is raised on every rank: none goes on alone."""
    from microadam_dist.engines.collectives import raise_together

    with raise_together():
        try:
            yield
        except OSError as error:
            raise UserError(_describe(error)) from error


def _describe(error: OSError) -> str:
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename is not None else str(error)


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
        gradient_checkpointing_kwargs=checkpointing_settings(options) if options.gradient_checkpointing else None,
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


def run_settings(options: Options, ds_config: dict[str, Any] | None, args: TrainingArguments) -> dict[str, Any]:
    """What a run that goes on from a checkpoint must have in common with it, but for the data."""
    from microadam_dist import MicroAdamConfig

    optimizer = ds_config["optimizer"] if ds_config and "optimizer" in ds_config else {}
    kind = options.optimizer.value if options.optimizer else str(optimizer.get("type")).lower()
    params = {name: getattr(options, name) for name in ("lr", "betas", "eps", "weight_decay")}
    if kind == "microadam":
        config = MicroAdamConfig.from_dict(optimizer.get("params", options.microadam_settings))
        params |= {"correction": config.correction, "rounding": config.rounding}  # others decide shapes: see checkpoint
    samples = args.world_size * args.train_batch_size * args.gradient_accumulation_steps
    return resume.run_settings(options, params, kind, samples)


def load_data(options: Options, args: TrainingArguments) -> tuple[PreTrainedTokenizerBase, dict[str, Any], str]:
    """Tokenizer, packed datasets and what they were made of.

    The datasets are `train_dataset` and `eval_dataset`, packed by one rank and mapped by all.
    """
    from training.packing import PackedBlocks, load_tokenizer, write_blocks

    tokenizer = load_tokenizer(options.tokenizer or options.model)
    folder = options.output / "packed"
    with args.main_process_first(desc="packing"):
        if args.local_process_index == 0:
            heldout = options.eval_data or options.eval_fraction
            write_blocks(folder, tokenizer, options.seq_len, options.data, heldout)
    datasets = {f"{split}_dataset": PackedBlocks(folder / f"{split}.npy") for split in ("train", "eval")}
    digest = (folder / "train.sha256").read_text(encoding="utf-8")
    return tokenizer, datasets, f"{' '.join(options.data)}, sha256 {digest[:16]}"


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
    from training.callbacks import EvaluateAtEnd

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
        callbacks=[EvaluateAtEnd()],
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


def main(**values: Any) -> None:
    """Fully fine-tune a causal language model with MicroAdam, or with AdamW to compare."""
    options = Options(**values)
    try:
        train(options)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        fail(_describe(error), everywhere=True)
    except Exception as error:
        from microadam_dist.errors import MicroAdamError

        if isinstance(error, MicroAdamError):
            fail(str(error))
        if type(error).__name__ == "ValidationError" and options.deepspeed:  # pydantic's, from DeepSpeed
            wrong = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
            fail(f"{options.deepspeed}: {error.title}: {wrong}")
        if options.output.exists() and shutil.disk_usage(options.output).free < 1 << 20:
            fail(f"--output {options.output}: no space left on its disk ({error})", everywhere=True)
        raise


# Typer reads the options from the signature: the fields of `Options`.
main.__signature__ = inspect.signature(Options)
main.__annotations__ = typing.get_type_hints(Options, include_extras=True)

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=OneLineErrors)(main)
    app()
