"""DeepSpeed's tensor-fragment API: each parameter's own moments, or an error on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from microadam_dist import MicroAdam, UnsupportedLayoutError
from tests.deepspeed.engines import (
    SETTINGS,
    GivenGradients,
    base_optimizer,
    full_weights,
    initialize,
    make_config,
    train,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
MOMENTS = ("exp_avg", "exp_avg_sq")


class Vectors(GivenGradients):
    """One matrix on the Top-K path, whose blocks no rank boundary cuts, and parameters on the dense path.

    In ZeRO-1 and 2 the flat buffer is cut inside ``long``: ``first`` is whole on rank 0, ``last`` and ``small`` on
    rank 1. ZeRO-3 cuts all of them; ``long`` and ``last`` are padded there.
    """

    SHAPES = {"first": (96,), "big": (64, 128), "long": (9001,), "last": (127,), "small": (6, 8)}
    DENSE = ("first", "long", "last", "small")


class Case(NamedTuple):
    name: str
    stage: int
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = {}
    two_groups: bool = False
    set_first: bool = False  # before there is any state

    @property
    def has_masters(self) -> bool:
        return "bf16" not in self.config


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
MASTER_FREE = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
CASES = [
    *(Case(f"zero{stage}", stage) for stage in (1, 2, 3)),
    *(Case(f"zero{stage}-bf16", stage, torch.bfloat16) for stage in (1, 2, 3)),
    *(Case(f"zero{stage}-set-first", stage, set_first=True) for stage in (1, 3)),
    *(Case(f"zero{stage}-two-groups", stage, two_groups=True) for stage in (2, 3)),
    *(Case(f"zero{stage}-bf16-masters", stage, torch.bfloat16, MASTER_FREE) for stage in (1, 3)),
    *(Case(f"zero{stage}-offload", stage, config=OFFLOAD) for stage in (2, 3)),
    Case("zero2-round-robin", 2, config={"zero_optimization": {"round_robin_gradients": True}}),
    Case("zero3-sub-groups", 3, config={"zero_optimization": {"sub_group_size": 5000}}),
    Case("BF16_Optimizer", 1, torch.bfloat16, {"data_types": {"grad_accum_dtype": "fp32"}}),
]


def given(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The gradients of 4 steps; in fp32, values whose average over ranks is exact."""
    generator = torch.Generator().manual_seed(1)
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in Vectors.SHAPES.items()}
        for _ in range(4)
    ]


def moment_values(seed: int) -> dict[str, dict[str, Tensor]]:
    """Moments to set, of every parameter on the dense path."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {key: torch.rand(Vectors.SHAPES[name], generator=generator) for key in MOMENTS} for name in Vectors.DENSE
    }


def make_model(case: Case) -> Vectors:
    torch.manual_seed(0)
    return Vectors().to(case.dtype)


def make_engine(case: Case) -> Any:
    model = make_model(case)
    kwargs: dict[str, Any] = {}
    if case.two_groups:
        dense = [getattr(model, name).weight for name in Vectors.DENSE]
        kwargs["model_parameters"] = [{"params": [model.big.weight]}, {"params": dense[::-1], "lr": 3e-3}]
    return initialize(model, make_config(case.stage, case.dtype, **case.config), **kwargs)


class OneProcess:
    """The same training without an engine."""

    def __init__(self, case: Case) -> None:
        model = make_model(case)
        self.model = model.float() if case.has_masters else model
        self.params = {name: getattr(self.model, name).weight for name in Vectors.SHAPES}
        lrs = {name: 3e-3 if case.two_groups and name != "big" else 1e-2 for name in self.params}
        groups = [{"params": [param], "lr": lrs[name]} for name, param in self.params.items()]
        self.optimizer = MicroAdam(groups, **SETTINGS)

    def train(self, grads: dict[str, Tensor]) -> None:
        for name, param in self.params.items():
            param.grad = grads[name].to(param.dtype)
        self.optimizer.step()

    def set(self, moments: dict[str, dict[str, Tensor]]) -> None:
        for name, values in moments.items():
            state = self.optimizer.sharded.made_state(self.params[name])
            for key, value in values.items():
                state[key].copy_(value.flatten())

    def moments(self) -> dict[str, dict[str, Tensor]]:
        found = {}
        for name in Vectors.DENSE:
            state = self.optimizer.state[self.params[name]]
            found[name] = {key: state[key].clone() if state else torch.zeros(Vectors.SHAPES[name]) for key in MOMENTS}
        return found


def read_moments(engine: Any) -> dict[str, dict[str, Tensor]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    return {
        name: {key: safe_get_full_optimizer_state(getattr(engine.module, name).weight, key) for key in MOMENTS}
        for name in Vectors.DENSE
    }


def write_moments(engine: Any, moments: dict[str, dict[str, Tensor]]) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    for name, values in moments.items():
        for key, value in values.items():
            safe_set_full_optimizer_state(getattr(engine.module, name).weight, value, key)


def require_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, check_device=False)


def weights_of(plain: OneProcess, case: Case) -> dict[str, Tensor]:
    return {name: param.detach().to(case.dtype) for name, param in plain.params.items()}


def _set_and_step(rank: int, world_size: int, folder: str) -> None:
    for case in CASES:
        try:
            set_and_step(case, f"{folder}/{case.name}")
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from None


def set_and_step(case: Case, folder: str) -> None:
    engine, plain, grads = make_engine(case), OneProcess(case), given(case.dtype)
    require_equal(read_moments(engine), plain.moments())  # zeros
    if case.set_first:
        write_moments(engine, moment_values(1))
        plain.set(moment_values(1))
    for step, values in enumerate(grads):
        train(engine, [values])
        plain.train(values)
        require_equal(read_moments(engine), plain.moments())
        if step == 1:
            write_moments(engine, moment_values(2))
            plain.set(moment_values(2))
            require_equal(read_moments(engine), moment_values(2))
        if step == 2:
            engine.save_checkpoint(folder)
            write_moments(engine, moment_values(3))
            engine.load_checkpoint(folder)  # links the parameters to their fragments again
            require_equal(read_moments(engine), plain.moments())
    require_equal(full_weights(engine), weights_of(plain, case))
    engine.destroy()


def test_moments_are_read_and_set_as_in_one_process(tmp_path: Any) -> None:
    run_ranks(_set_and_step, 2, str(tmp_path))


def _local_parts(rank: int, world_size: int) -> None:
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_optimizer_state,
    )

    case = Case("zero3", 3)
    engine, plain, (first, second, *_) = make_engine(case), OneProcess(case), given(case.dtype)
    train(engine, [first])
    plain.train(first)
    moments = moment_values(2)
    plain_moments = plain.moments()
    for name in Vectors.DENSE:
        param = getattr(engine.module, name).weight
        assert param.ds_numel % 2 == (name in ("long", "last"))  # rank 1 has one element of padding
        numel = param.partition_numel()

        def part(whole: Tensor, numel: int = numel) -> Tensor:
            padded = torch.zeros(world_size * numel)
            padded[: whole.numel()] = whole.flatten()
            return padded[rank * numel : (rank + 1) * numel]

        for key in MOMENTS:
            require_equal(safe_get_local_optimizer_state(param, key), part(plain_moments[name][key]))
            safe_set_local_optimizer_state(param, part(moments[name][key]), key)
            require_equal(safe_get_local_optimizer_state(param, key), part(moments[name][key]))
        held = min(numel, param.ds_numel - rank * numel)
        require_equal(
            safe_get_local_fp32_param(param)[:held], part(plain.params[name].detach())[:held]
        )  # as DeepSpeed gives it
    plain.set(moments)
    train(engine, [second])
    plain.train(second)
    require_equal(full_weights(engine), weights_of(plain, case))
    engine.destroy()


def calls(engine: Any) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(parameter, key, call): all of what there is not."""
    from deepspeed import utils

    for name, key in [("big", "exp_avg"), ("big", "codes"), ("first", "codes"), ("last", "step"), ("long", "momentum")]:
        param = getattr(engine.module, name).weight
        value = torch.zeros(Vectors.SHAPES[name])
        yield name, key, lambda p=param, k=key: utils.safe_get_full_optimizer_state(p, k)
        yield name, key, lambda p=param, k=key, v=value: utils.safe_set_full_optimizer_state(p, v, k)
        if hasattr(param, "ds_id"):
            part = torch.zeros(param.partition_numel())
            yield name, key, lambda p=param, k=key: utils.safe_get_local_optimizer_state(p, k)
            yield name, key, lambda p=param, k=key, v=part: utils.safe_set_local_optimizer_state(p, v, k)
    first = engine.module.first.weight
    yield "first", "exp_avg", lambda: utils.safe_set_full_optimizer_state(first, torch.zeros(95), "exp_avg")


def _refuse(rank: int, world_size: int) -> list[list[str]]:
    messages = []
    for stage in (1, 2, 3):
        case = Case(f"zero{stage}", stage)
        engine, plain, grads = make_engine(case), OneProcess(case), given(case.dtype)
        for values in grads[:2]:  # also before there is any state
            before = copy.deepcopy(list(base_optimizer(engine).state.values()))
            found = []
            for name, key, call in calls(engine):
                with pytest.raises(UnsupportedLayoutError, match=rf"(?s){key}.*'{name}\.weight'") as error:
                    call()
                found.append(str(error.value))
            messages.append(found)
            require_equal(list(base_optimizer(engine).state.values()), before)
            train(engine, [values])  # hangs if a rank has begun to talk about something else
            plain.train(values)
        require_equal(full_weights(engine), weights_of(plain, case))
        engine.destroy()
    return messages


def test_what_there_is_not_is_refused_on_every_rank() -> None:
    ranks = run_ranks(_refuse, 2)
    assert ranks[0] == ranks[1]
    assert any("Top-K path" in message for message in ranks[0][0])


def _weights_and_gradients(rank: int, world_size: int) -> None:
    from deepspeed import utils

    for stage in (1, 2, 3):
        case = Case(f"zero{stage}", stage)
        engine, plain, (first, second, *_) = make_engine(case), OneProcess(case), given(case.dtype)
        params = {name: getattr(engine.module, name).weight for name in Vectors.SHAPES}
        train(engine, [first])
        plain.train(first)
        for name in ("first", "big"):  # DeepSpeed 0.19.8 cannot set what it has padded
            value = torch.full(Vectors.SHAPES[name], 0.5)
            utils.safe_set_full_fp32_param(params[name], value)
            plain.params[name].data.copy_(value)
        for name, param in params.items():
            require_equal(utils.safe_get_full_fp32_param(param), plain.params[name].detach())
        engine.backward(engine(second))
        for name, param in params.items():
            require_equal(utils.safe_get_full_grad(param), second[name])
        doubled = {**second, **{name: 2 * second[name] for name in ("first", "big")}}
        for name in ("first", "big"):
            utils.safe_set_full_grad(params[name], doubled[name])
        engine.step()
        plain.train(doubled)
        require_equal(full_weights(engine), weights_of(plain, case))
        engine.destroy()


def _what_deepspeed_gives(rank: int, world_size: int) -> None:
    _weights_and_gradients(rank, world_size)
    _local_parts(rank, world_size)


def test_weights_and_gradients_stay_what_deepspeed_gives_and_local_parts() -> None:
    run_ranks(_what_deepspeed_gives, 2)
