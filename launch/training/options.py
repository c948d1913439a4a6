"""The options of `train.py`, and how they meet a DeepSpeed JSON: what the file fixes wins, a contradiction stops.

Imports neither torch nor transformers, so that `--help` and a mistyped path answer at once.
"""

import dataclasses
import difflib
import os
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Context, Option

from .errors import UserError
from .json_files import read_deepspeed, read_number


class OptimizerName(str, Enum):
    """Optimizers that the command line can build."""

    microadam = "microadam"
    adamw = "adamw"


class Exchange(str, Enum):
    """What DDP ranks with sharded state send each other after the step."""

    touched = "touched"
    newest = "newest"


class Correction(str, Enum):
    """What MicroAdam's moments are corrected by."""

    window = "window"
    steps = "steps"


class Rounding(str, Enum):
    """How MicroAdam rounds new weights to their dtype."""

    auto = "auto"
    nearest = "nearest"
    stochastic = "stochastic"


class Dtype(str, Enum):
    """Precision of weights and arithmetic."""

    fp32 = "fp32"
    bf16 = "bf16"
    pure_bf16 = "pure-bf16"
    fp16 = "fp16"


class Override(str, Enum):
    """What may be another than in the checkpoint that a run goes on from."""

    lr = "lr"
    schedule = "schedule"
    warmup = "warmup"
    seq_len = "seq-len"
    data = "data"
    model = "model"
    seed = "seed"
    batch = "batch"


def fraction(text: str | float) -> float:
    """``1%`` and ``0.01`` are the same."""
    if isinstance(text, float):
        return text  # a default: nothing is imported for it
    from microadam_dist.cli.settings import parse_density

    return parse_density(text)


def bits(text: str | float) -> float:
    """A whole number is an int, as in a JSON."""
    from microadam_dist.cli.settings import parse_bits

    return parse_bits(text)


def read_recipe(context: Context, path: Path | None) -> Path | None:
    """Take the options in a YAML file as defaults: what the command line says wins.

    Raises:
        BadParameter: The file is no mapping of names of options to values.
    """
    if path is None:
        return None
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadParameter(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise BadParameter(f"{path}: expected options and their values, such as 'ef_bits: 2'.")
    known = [field.name for field in dataclasses.fields(Options) if field.name != "recipe"]
    for name in recipe:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise BadParameter(f"{path}: no option '{name}'{f'; did you mean {close[0]!r}?' if close else ''}")
    context.default_map = recipe
    return path


_model, _data, _optimizer, _run, _output = (
    partial(Option, rich_help_panel=panel) for panel in ("Model", "Data", "Optimizer", "Run", "Output")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Every command-line option. `None` means "not given": a DeepSpeed JSON or `DEFAULTS` decides."""

    recipe: Annotated[
        Path | None,
        _model(is_eager=True, callback=read_recipe, help="YAML of options, see configs/single_gpu; those given win."),
    ] = None
    model: Annotated[str | None, _model(help="Local model folder or hub id.")] = None
    model_config: Annotated[Path | None, _model(help="Model config JSON: random initialisation.")] = None
    tokenizer: Annotated[
        str | None,
        _model(help="Folder, hub id, or 'bytes'. Default: the model's own."),
    ] = None
    data: Annotated[
        list[str],
        _data(
            help="Training text, repeatable: a .txt/.md/.py file, a .jsonl file ('text', or 'prompt' + 'response' with "
            "the prompt masked from the loss), a folder of them, or a hub dataset NAME[:SUBSET[:SPLIT]].",
        ),
    ]
    eval_data: Annotated[list[str] | None, _data(help="Held-out text, same forms as --data.")] = None
    eval_fraction: Annotated[
        float, _data(parser=fraction, metavar="FRACTION", help="Without --eval-data: held-out tail of the data.")
    ] = 0.05
    seq_len: Annotated[int, _data(min=2, help="Tokens in a packed sequence.")] = 1024
    optimizer: Annotated[
        OptimizerName | None,
        _optimizer(help="Default: the DeepSpeed JSON's, else microadam."),
    ] = None
    lr: Annotated[
        float | None,
        _optimizer(help="Peak learning rate. Default 6e-5, with AdamW 2e-5: MicroAdam wants three times AdamW's."),
    ] = None
    weight_decay: Annotated[float | None, _optimizer(help="Decoupled. Default 0.")] = None
    betas: Annotated[tuple[float, float] | None, _optimizer(help="Default 0.9 0.999.")] = None
    eps: Annotated[float | None, _optimizer(help="Default 1e-8.")] = None
    window_size: Annotated[int | None, _optimizer(help="MicroAdam: sparse gradients kept. Default 1.")] = None
    density: Annotated[
        float | None,
        _optimizer(parser=fraction, metavar="FRACTION", help="MicroAdam: kept of a gradient. Default 0.1, or 10%."),
    ] = None
    block_size: Annotated[int | None, _optimizer(help="MicroAdam: elements in a Top-K block. Default 4096.")] = None
    bucket_size: Annotated[int | None, _optimizer(help="MicroAdam: elements sharing one scale. Default 64.")] = None
    packed_window: Annotated[
        bool | None, _optimizer("--packed-window", help="MicroAdam: a window in 12-bit indices and 8-bit values.")
    ] = None
    ef_bits: Annotated[
        float | None,
        _optimizer(parser=bits, metavar="BITS", help="MicroAdam: error feedback, 0, 1, 1.6, 2, 4 or 8. Default 4."),
    ] = None
    correction: Annotated[
        Correction | None,
        _optimizer(
            help="MicroAdam: of the moments, by what the window weighs or by the number of steps, as the paper."
        ),
    ] = None
    rounding: Annotated[
        Rounding | None,
        _optimizer(help="MicroAdam: of new weights. Default auto: stochastic where bf16 weights have no fp32 copy."),
    ] = None
    shard_state: Annotated[
        Exchange | None,
        _optimizer(help="MicroAdam under DDP: share the state among the ranks, and what they exchange after the step."),
    ] = None
    clip: Annotated[float | None, _optimizer(help="Global gradient norm, 0 is off. Default 1.")] = None
    schedule: Annotated[str, _optimizer(help="A transformers scheduler name.")] = "cosine"
    warmup: Annotated[float, _optimizer(min=0, help="Warm-up steps, or below 1 a fraction of the run.")] = 0.1
    deepspeed: Annotated[
        Path | None,
        _run(
            envvar="ACCELERATE_DEEPSPEED_CONFIG_FILE",
            show_envvar=False,
            help="DeepSpeed JSON; the optimizer comes from it. Default: the one in the file of accelerate launch.",
        ),
    ] = None
    steps: Annotated[int | None, _run(min=1, help="Optimizer steps; else --epochs.")] = None
    epochs: Annotated[float, _run(help="Passes over the data.")] = 1.0
    batch_size: Annotated[int | None, _run(min=1, help="Sequences per rank and micro-batch. Default 1.")] = None
    grad_accum: Annotated[int | None, _run(min=1, help="Micro-batches per optimizer step. Default 1.")] = None
    dtype: Annotated[
        Dtype | None,
        _run(
            help="bf16 and fp16: mixed, fp32 weights; pure-bf16: bf16 weights, no fp32 copy. "
            "Default: the DeepSpeed JSON's, else bf16.",
        ),
    ] = None
    gradient_checkpointing: Annotated[bool, _run("--gradient-checkpointing", help="Recompute activations.")] = False
    offload_activations: Annotated[
        bool,
        _run(
            "--offload-activations", help="With --gradient-checkpointing: what it keeps of a layer is in host memory."
        ),
    ] = False
    single_gpu: Annotated[
        bool,
        _run(
            "--single-gpu",
            help="The least memory on one GPU: --dtype pure-bf16 --gradient-release --gradient-checkpointing, the "
            "model made or loaded on the GPU, Liger-Kernel where it is installed, else a --loss-chunk of 16 million "
            "logits.",
        ),
    ] = False
    gradient_release: Annotated[
        bool,
        _run(
            "--gradient-release",
            help="One process, or FSDP2: update weights in the backward pass and free each gradient.",
        ),
    ] = False
    loss_chunk: Annotated[int | None, _run(min=1, help="One process: tokens whose logits exist at a time.")] = None
    seed: Annotated[int, _run()] = 0
    resume: Annotated[str | None, _run(help="A checkpoint folder, or 'last': newest one in --output, if any.")] = None
    override: Annotated[
        list[Override] | None,
        _run(help="With --resume: what is meant to be another than in the checkpoint; repeatable."),
    ] = None
    overwrite: Annotated[
        bool, _run("--overwrite", help="Remove the checkpoints and weights of another run from --output.")
    ] = False
    output: Annotated[Path, _output(help="Folder for final weights, metrics and logs.")]
    eval_steps: Annotated[int | None, _output(min=1, help="Held-out loss every N steps too.")] = None
    save_steps: Annotated[int | None, _output(min=1, help="Checkpoint every N steps too.")] = None
    logging_steps: Annotated[int, _output(min=1, help="Log the loss every N steps.")] = 10
    metrics_every: Annotated[
        int | None,
        _output(min=1, help="MicroAdam: log how well gradients are compressed every N steps; see 'microadam report'."),
    ] = None
    verbose: Annotated[bool, _output("--verbose", help="Show the libraries' logs.")] = False
    local_rank: Annotated[int, Option("--local_rank", hidden=True, help="Appended by the deepspeed launcher.")] = -1

    @property
    def microadam_settings(self) -> dict[str, Any]:
        """The MicroAdam-only settings that were given."""
        names = "window_size density block_size bucket_size packed_window ef_bits correction rounding metrics_every"
        given = {name: value for name in names.split() if (value := getattr(self, name)) is not None}
        settings = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
        if self.shard_state is not None:
            settings |= {"shard_state": True, "weight_exchange": self.shard_state.value}
        return settings


DEFAULTS: dict[str, Any] = {
    "lr": 6e-5,  # three times ADAMW_LR
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "batch_size": 1,
    "grad_accum": 1,
    "clip": 1.0,
}

ADAMW_LR = 2e-5

_JSON_KEYS = {
    "lr": ("optimizer", "params", "lr"),
    "weight_decay": ("optimizer", "params", "weight_decay"),
    "betas": ("optimizer", "params", "betas"),
    "eps": ("optimizer", "params", "eps"),
    "batch_size": ("train_micro_batch_size_per_gpu",),
    "grad_accum": ("gradient_accumulation_steps",),
    "clip": ("gradient_clipping",),
}


def resolve(options: Options) -> tuple[Options, dict[str, Any] | None]:
    """Check the options and fill the ones not given.

    Returns:
        The options without a `None` among those of `DEFAULTS`, and the DeepSpeed configuration with the same values
        written in (`None` without `--deepspeed`).

    Raises:
        UserError: a missing file, or an option that contradicts another or the DeepSpeed JSON.
    """
    _check_files(options)
    if options.override and options.resume is None:
        raise UserError("--override is for a run that goes on: give --resume, too, or drop it")
    if options.overwrite and options.resume == "last":
        raise UserError("--overwrite removes what --resume last goes on from: give one of them")
    options = _resolve_one_process(options)
    config = read_deepspeed(options.deepspeed) if options.deepspeed else None
    optimizer = config.setdefault("optimizer", {}) if config and "optimizer" in config else None
    values: dict[str, Any] = {"dtype": _dtype(options, config)}
    if optimizer is None:
        values["optimizer"] = options.optimizer or OptimizerName.microadam
    else:
        _merge_optimizer(options, optimizer)
    if values.get("optimizer") is OptimizerName.adamw:
        _refuse_microadam_settings(options, "--optimizer adamw")
    kind = values["optimizer"].value if optimizer is None else str(optimizer.get("type"))
    defaults = DEFAULTS if kind.lower() == "microadam" else DEFAULTS | {"lr": ADAMW_LR}
    for name, keys in _JSON_KEYS.items():
        values[name] = _merge(options, config, defaults, name, keys)
    return dataclasses.replace(options, **values), config


def _resolve_one_process(options: Options) -> Options:
    """What --single-gpu stands for, and what gradient release and a chunked loss rule out."""
    if options.single_gpu:
        if options.dtype not in (None, Dtype.pure_bf16):
            raise UserError(f"--single-gpu trains in pure-bf16: drop --dtype {options.dtype.value}")
        options = dataclasses.replace(
            options, dtype=Dtype.pure_bf16, gradient_release=True, gradient_checkpointing=True
        )
    if options.offload_activations and not options.gradient_checkpointing:
        raise UserError("--offload-activations moves what --gradient-checkpointing keeps: add that")
    for name in ("single_gpu", "gradient_release", "loss_chunk"):
        if getattr(options, name) and not (name == "gradient_release" and _is_fsdp2()):
            _require_one_process(options, _flag(name))
    if options.loss_chunk and options.dtype not in (Dtype.pure_bf16, Dtype.fp32):
        raise UserError("--loss-chunk has no mixed precision: add --dtype pure-bf16 or fp32")
    if not options.gradient_release:
        return options
    return _resolve_release(options, "--single-gpu" if options.single_gpu else "--gradient-release")


def _is_fsdp2() -> bool:
    """Whether ``accelerate launch`` has started this with FSDP2, where gradients are complete when they appear."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") == "2"


def _require_one_process(options: Options, flag: str) -> None:
    fsdp2 = "; it also works under configs/accelerate/fsdp2.yaml" if flag == "--gradient-release" else ""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError(f"{flag} is for one process without FSDP: start it with python{fsdp2}")
    if "RANK" in os.environ:  # one rank, too, would be wrapped in DDP, whose buckets are as large as all gradients
        raise UserError(f"{flag} is for one process without ranks: start it with python, not torchrun{fsdp2}")
    if options.deepspeed:
        raise UserError(f"{flag} and --deepspeed exclude each other: DeepSpeed reduces gradients and owns the weights")


def _resolve_release(options: Options, flag: str) -> Options:
    """No clipping by default; what needs all gradients, or an optimizer that steps them together, is refused."""
    freed = "each gradient is freed as soon as its weight is updated"
    if options.clip:
        raise UserError(f"{flag} cannot clip by the global norm (--clip {options.clip}), as {freed}: use --clip 0")
    if (options.grad_accum or 1) > 1:
        raise UserError(
            f"{flag} cannot accumulate gradients (--grad-accum {options.grad_accum}), as {freed}: use --batch-size"
        )
    if options.optimizer not in (None, OptimizerName.microadam):
        raise UserError(f"{flag} needs MicroAdam, which updates one weight at a time: drop --optimizer adamw")
    if options.dtype is Dtype.fp16:
        raise UserError(
            f"{flag} and --dtype fp16 exclude each other: the loss is scaled, and all gradients are looked at"
        )
    if options.shard_state:
        raise UserError(f"{flag} and --shard-state exclude each other: the state is shared among DDP's ranks")
    return dataclasses.replace(options, clip=0.0)


def _check_files(options: Options) -> None:
    if (options.model is None) == (options.model_config is None):
        raise UserError("give either --model (folder or hub id) or --model-config (JSON, random initialisation)")
    if options.model_config and not options.tokenizer:
        raise UserError("--model-config has no tokenizer of its own: add --tokenizer FOLDER, a hub id, or 'bytes'")
    for path in filter(None, (options.model_config, options.deepspeed)):
        if not path.is_file():
            raise UserError(f"no such file: {path}")
    if not 0 < options.eval_fraction < 1:
        raise UserError(f"--eval-fraction {options.eval_fraction}: expected a number between 0 and 1")


def _dtype(options: Options, config: dict[str, Any] | None) -> Dtype:
    """The DeepSpeed JSON's precision where it states one, else the option's."""
    if config is None:
        return options.dtype or Dtype.bf16
    enabled = {dtype: config.get(dtype.value, {}).get("enabled", False) for dtype in (Dtype.bf16, Dtype.fp16)}
    if "auto" in enabled.values():
        return options.dtype or Dtype.bf16
    fixed = next((dtype for dtype, on in enabled.items() if on), Dtype.fp32)
    if options.dtype is Dtype.pure_bf16 and fixed is Dtype.fp32:
        return Dtype.pure_bf16  # DeepSpeed trains the weights as they come, without a copy
    if options.dtype not in (None, fixed):
        raise UserError(f"--dtype {options.dtype.value} contradicts {options.deepspeed}, which trains in {fixed.value}")
    return fixed


def _merge_optimizer(options: Options, optimizer: dict[str, Any]) -> None:
    """Check --optimizer against the JSON's optimizer and write the MicroAdam settings into it."""
    kind = str(optimizer.get("type"))
    if options.optimizer and options.optimizer.value != kind.lower():
        raise UserError(
            f'--optimizer {options.optimizer.value} contradicts "type": "{kind}" in {options.deepspeed}: '
            "drop the option or use another JSON"
        )
    params = optimizer.setdefault("params", {})
    if kind.lower() != "microadam":
        return _refuse_microadam_settings(options, f'"type": "{kind}" in {options.deepspeed}')
    for name, value in options.microadam_settings.items():
        if params.setdefault(name, value) != value:
            raise _contradiction(options, name, value, params[name])


def _refuse_microadam_settings(options: Options, reason: str) -> None:
    for name in options.microadam_settings:
        raise UserError(f"{_flag(name)} is a setting of MicroAdam, but the optimizer is not: {reason}")


def _merge(
    options: Options, config: dict[str, Any] | None, defaults: dict[str, Any], name: str, keys: tuple[str, ...]
) -> Any:
    """Value of one option: the JSON's unless "auto" or absent, the option's, the default; written into the JSON."""
    given = getattr(options, name)
    value = defaults[name] if given is None else given
    if config is None or (keys[0] == "optimizer" and "optimizer" not in config):
        return value
    *parents, key = keys
    node = config
    for parent in parents:
        node = node[parent]
    fixed = node.get(key, "auto")
    if fixed == "auto":
        node[key] = list(value) if isinstance(value, tuple) else value
        return value
    fixed = read_number(options.deepspeed, keys, fixed, type(defaults[name]))
    if given is not None and given != fixed:
        raise _contradiction(options, name, given, fixed)
    return fixed


def _contradiction(options: Options, name: str, given: Any, fixed: Any) -> UserError:
    return UserError(f"{_flag(name)} {given} contradicts {fixed} in {options.deepspeed}: drop the option or edit it")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
