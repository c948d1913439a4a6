"""What DeepSpeed has beside training: it works with the same bits, or an error comes before anything is lost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from microadam_dist import ConfigError, MicroAdam, UnsupportedLayoutError, release_gradients
from tests.deepspeed.engines import (
    SETTINGS,
    base_optimizer,
    full_weights,
    initialize,
    make_config,
    make_gradients,
    make_model,
    train,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
GRADIENTS = make_gradients(3)


def _engine(stage: int) -> Any:
    engine = initialize(make_model(), make_config(stage, torch.float32))
    train(engine, GRADIENTS[:1])
    return engine


def _finish(engine: Any) -> dict[str, Tensor]:
    train(engine, GRADIENTS[1:])
    weights = full_weights(engine)
    engine.destroy()
    return weights


def _offload(rank: int, world_size: int) -> None:
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Type

    weights_only = [Type.lp_params, Type.lp_grads, Type.contiguous_grad_buffer]
    for stage in (1, 2, 3):
        undisturbed, engine = _finish(_engine(stage)), _engine(stage)
        for include in (None, [Type.optim_states], [Type.hp_params], weights_only):
            if stage == 3 and include != weights_only:
                with pytest.raises(ConfigError, match="under ZeRO-3.*Nothing has been moved"):
                    engine.offload_states(include=include)
                assert not engine.optimizer.offloaded_states
            else:
                engine.offload_states(include=include)
                assert engine.optimizer.offloaded_states
            engine.reload_states()
        weights = _finish(engine)
        assert all(torch.equal(weight, weights[name]) for name, weight in undisturbed.items()), stage


def test_states_are_offloaded_and_reloaded_with_the_same_bits_or_refused() -> None:
    run_ranks(_offload, 2)


def _save(rank: int, world_size: int, folder: str) -> None:
    for stage in (1, 2, 3):
        engine = _engine(stage)
        engine.save_checkpoint(f"{folder}/{stage}", tag="last")
        engine.destroy()


def test_ds_to_universal_fails_and_writes_no_checkpoint(tmp_path: Path) -> None:
    """DeepSpeed gives no hook in it: the page on checkpoints and the matrix name what to use instead."""
    from deepspeed.checkpoint import ds_to_universal

    run_ranks(_save, 2, str(tmp_path))
    for stage in (1, 2, 3):
        for injects in (False, True):
            output = tmp_path / f"universal{stage}{injects}"
            workers = {"num_extract_workers": 1, "num_merge_workers": 1}
            args = argparse.Namespace(
                input_folder=str(tmp_path / str(stage) / "last"),
                output_folder=str(output),
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=injects,
                **workers,
            )
            expected = "exceeds dimension size" if stage == 3 or injects else "universal_checkpoint_info"
            with pytest.raises((AssertionError, RuntimeError), match=expected):
                ds_to_universal.main(args)
            assert not (output / "zero").exists()


def _release(rank: int, world_size: int) -> None:
    for stage in (0, 1, 2, 3):
        engine = _engine(stage)
        with pytest.raises(UnsupportedLayoutError, match="DeepSpeed holds this optimizer"):
            release_gradients(engine.module, base_optimizer(engine))
        if stage:
            with pytest.raises(ConfigError, match="under DeepSpeed gradients cannot be released"):
                release_gradients(engine.module, engine.optimizer)
        engine.destroy()
    model = make_model()
    with pytest.raises(UnsupportedLayoutError, match="DeepSpeed"):  # before DeepSpeed gets it
        release_gradients(model, MicroAdam(model.named_parameters(), **SETTINGS))


def test_gradients_are_not_released() -> None:
    run_ranks(_release, 2)
