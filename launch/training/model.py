"""The model that is trained: read or made, with a loss that fits the device."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

from .errors import UserError
from .json_files import read_json
from .options import Dtype, Options

if TYPE_CHECKING:  # imported where they are used: torch and transformers take seconds
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_REASON = 300  # characters: transformers lists all kinds of models that it knows
SHARD_SIZE = "2GB"  # of a file of the weights


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
                fields = read_json(options.model_config)
                config = AutoConfig.for_model(fields.pop("model_type"), **fields)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
            else:
                model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **attention)
    except UserError:
        raise
    except Exception as error:  # transformers and its configurations raise many kinds
        reason = f"{error}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(f"cannot make a causal language model from '{source}': {reason[:MAX_REASON]}") from None
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, more than the vocab_size of '{source}'")
    if options.single_gpu:  # safetensors gathers a file on the host: not the whole model at once
        model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size=SHARD_SIZE)
    if has_liger(options):
        require_liger(model)
    elif options.loss_chunk or options.single_gpu:
        from microadam_dist.planner.activations import default_loss_chunk

        from .chunked_loss import use_chunked_loss

        use_chunked_loss(model, options.loss_chunk or default_loss_chunk(model.config.vocab_size))
    return model


def checkpointing_settings(options: Options) -> dict[str, bool]:
    """What Trainer takes as ``gradient_checkpointing_kwargs``.

    Raises:
        UserError: This transformers cannot move activations to host memory.
    """
    import torch
    from transformers import PreTrainedModel

    if options.offload_activations and not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        raise UserError("--offload-activations needs a newer transformers: pip install 'transformers>=5.23,<6'")
    # On a CPU they are in host memory already, and transformers would ask for pinned memory.
    offload = options.offload_activations and torch.cuda.is_available()
    return {"use_reentrant": False} | ({"offload": True} if offload else {})


def has_liger(options: Options) -> bool:
    """Whether Liger-Kernel computes the loss, and more, instead of `chunked_loss`."""
    import torch
    from transformers.utils import is_liger_kernel_available

    wanted = options.single_gpu and options.loss_chunk is None
    return wanted and torch.cuda.is_available() and is_liger_kernel_available()


def require_liger(model: PreTrainedModel) -> None:
    """Refuse what Liger-Kernel leaves as it is, in silence.

    Raises:
        UserError: a kind of model that it does not know.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"--single-gpu: Liger-Kernel has nothing for '{kind}'; its logits would exist whole")
