"""Stochastic rounding: the noise, by statistics; what it does to numbers; and to a training in bf16.

An ideal generator fails a limit of 6 standard deviations with a chance of 2e-9. There are fewer than 200 here, so that
all together raise a false alarm with a chance below 4e-7.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microadam_dist import ConfigError, MicroAdam, release_gradients
from microadam_dist.arithmetic.rounding import (
    NOISE_FACTOR,
    POSITION_FACTOR,
    counters,
    counters_from,
    mix,
    noise_of,
    round_weights,
    shape_key,
    step_key,
)

LIMIT = 6.0
NUM = 1 << 20
BF16 = torch.bfloat16


def uniform(noise: Tensor) -> Tensor:
    """Noise as numbers of mean 0 and variance 1."""
    return ((noise.double() + 0.5) / 65536 - 0.5) * math.sqrt(12)


def noise_at(positions: Tensor, seed: int = 0, step: int = 0, shape: tuple[int, ...] = (4096, 4096)) -> Tensor:
    return noise_of(counters(positions, step_key(seed, step), shape_key(shape)))


def noise_of_steps(position: int, num_steps: int, seed: int = 0) -> Tensor:
    keys = [step_key(seed, step) ^ shape_key((4096, 4096)) for step in range(num_steps)]
    signed = [x - (x >> 31 << 32) for x in map(mix, keys)]
    first = counters(torch.tensor([position]), 0, 0) - counters(torch.tensor([0]), 0, 0)
    return noise_of(first + torch.tensor(signed, dtype=torch.int32))


def deviation_of_counts(numbers: Tensor, num_cells: int) -> float:
    """Of how often each of the numbers below ``num_cells`` comes, in standard deviations of chi-square."""
    counts = numbers.bincount(minlength=num_cells).double()
    expected = len(numbers) / num_cells
    chi_square = float(((counts - expected) ** 2 / expected).sum()) / (num_cells - 1)
    variance = 2 / (9 * (num_cells - 1))
    return (chi_square ** (1 / 3) - (1 - variance)) / math.sqrt(variance)  # Wilson and Hilferty: nearly normal


def assert_independent(first: Tensor, second: Tensor) -> None:
    """Of the noise of many elements each: their product, that of their squares, and how often each pair comes."""
    x, y = uniform(first), uniform(second)
    size = math.sqrt(len(x))
    assert abs(float(x @ y)) / size < LIMIT
    assert abs(float((x * x - 1) @ (y * y - 1))) / 0.8 / size < LIMIT  # a square has variance 0.8
    assert abs(deviation_of_counts((first >> 10 << 6 | second >> 10).long(), 1 << 12)) < LIMIT


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_noise_is_uniform(step: int) -> None:
    noise = noise_at(torch.arange(NUM), step=step)
    assert 0 <= int(noise.min()) and int(noise.max()) < 2**16
    assert abs(float(uniform(noise).sum())) / math.sqrt(NUM) < LIMIT
    assert abs(deviation_of_counts(noise.long() >> 4, 1 << 12)) < LIMIT
    for bit in range(16):
        assert abs(int((noise >> bit & 1).sum()) - NUM / 2) / math.sqrt(NUM / 4) < LIMIT


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 16, 64, 256, 768, 1024, 2752, 4096, 8192, 11008])
def test_noise_of_elements_is_independent(distance: int) -> None:
    noise = noise_at(torch.arange(NUM + distance), seed=3, step=5)
    assert_independent(noise[:NUM], noise[distance:])


@pytest.mark.parametrize("other", [{"step": 1}, {"step": 2}, {"seed": 1}, {"shape": (4096, 4097)}, {"shape": (4096,)}])
def test_noise_depends_on_all_it_should(other: dict[str, Any]) -> None:
    places = torch.arange(NUM)
    assert_independent(noise_at(places), noise_at(places, **other))


@pytest.mark.parametrize("position", [0, 1, 4096, 10**9])
def test_noise_of_consecutive_steps_is_independent(position: int) -> None:
    noise = noise_of_steps(position, 1 << 16)
    assert abs(deviation_of_counts(noise.long() >> 8, 1 << 8)) < LIMIT
    for distance in (1, 2, 10):
        assert_independent(noise[:-distance], noise[distance:])
    assert torch.equal(noise[7:8], noise_at(torch.tensor([position]), step=7))


def test_every_noise_comes_equally_often() -> None:
    """So the mean is exact: the counter becomes the noise by one-to-one functions, and then by cutting off bits."""
    assert POSITION_FACTOR % 2 == 1 and NOISE_FACTOR % 2 == 1  # products with odd numbers are one-to-one
    rows = [1 << i ^ 1 << i >> 11 for i in range(32)]  # x ^ x >> 11 is linear in the bits; this finds its rank
    rank = 0
    while rows:
        pivot = rows.pop()
        rank += pivot != 0
        rows = [min(row, row ^ pivot) for row in rows]
    assert rank == 32


def test_positions_beyond_32_bits() -> None:
    far = torch.tensor([2**32 + 5, 2**40 + 5, 5])
    assert len(set(noise_at(far).tolist())) == 1


# ---------------------------------------------------------------- numbers


def by_chance(x: Tensor, step: int = 0) -> Tensor:
    places = counters(torch.arange(x.numel()), step_key(0, step), 0).view(x.shape)
    return round_weights(x, BF16, places)


def test_what_bf16_holds_never_changes() -> None:
    every = torch.arange(2**16, dtype=torch.int32).short().view(BF16)
    for step in range(20):
        rounded = by_chance(every.float(), step)
        assert torch.equal(rounded.isnan(), every.isnan())
        number = ~every.isnan()
        assert torch.equal(rounded[number].view(torch.int16), every[number].view(torch.int16))


def test_nan_stays_nan_whatever_its_bits() -> None:
    bits = [0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, -(2**31) + 0x7F800001, -(2**31) + 0x7FFF8000]
    nans = torch.tensor(bits, dtype=torch.int32).view(torch.float32).repeat(1000)
    assert nans.isnan().all() and by_chance(nans).isnan().all()


def test_rounds_to_one_of_the_neighbours() -> None:
    x = torch.randn(NUM) * torch.randn(NUM).mul(20).exp()
    rounded, low = by_chance(x), (x.view(torch.int32) & -65536).view(torch.float32)
    high = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    exact = x == low
    assert ((rounded == low) | (rounded == high))[~exact].all() and (rounded == x)[exact].all()


@pytest.mark.parametrize("rest", [0x0001, 0x0400, 0x4000, 0x8000, 0xC001, 0xFFFF])
@pytest.mark.parametrize("base", [0x3F800000, -(2**31) + 0x3F800000])
def test_mean_is_the_number(base: int, rest: int) -> None:
    """Of one number, at many places and over many steps."""
    x = torch.tensor([base + rest], dtype=torch.int32).view(torch.float32)
    chance = rest / 65536
    for places in (
        counters_from(counters(torch.tensor([0]), step_key(0, rest), 0), NUM),
        torch.cat([counters(torch.tensor([17]), step_key(5, step), 99) for step in range(1 << 14)]),
    ):
        rounded = round_weights(x.expand(len(places)).contiguous(), BF16, places)
        num_farther = int((rounded.view(torch.int16) & 1).sum())
        standard = math.sqrt(len(places) * chance * (1 - chance))
        assert abs(num_farther - len(places) * chance) < LIMIT * standard + 5  # few are not normally distributed


# ---------------------------------------------------------------- a training


def train(
    model: nn.Module, optimizer: MicroAdam, steps: range, release: bool = False, decay_only: bool = False
) -> list[Tensor]:
    handle = release_gradients(model, optimizer) if release else None
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        x = torch.randn(8, 128, generator=generator, dtype=BF16)
        (model(x) * (0.0 if decay_only else 1.0)).square().sum().backward()
        optimizer.step()
    if handle is not None:
        handle.remove()
    return [p.detach().clone() for p in model.parameters()]


def make_model(dtype: torch.dtype = BF16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 64)).to(dtype)


def trained(steps: range = range(4), **settings: Any) -> list[Tensor]:
    model = make_model()
    return train(model, MicroAdam(model.named_parameters(), **{"lr": 1e-3, "weight_decay": 0.1, **settings}), steps)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def test_auto_is_stochastic_for_bf16() -> None:
    assert same(trained(), trained(rounding="stochastic"))
    assert same(trained(backend="reference"), trained())
    assert not same(trained(), trained(rounding="nearest"))
    assert not same(trained(), trained(seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_auto_is_nearest_for_other_dtypes(dtype: torch.dtype) -> None:
    results = []
    for rounding in ("auto", "nearest", *(["stochastic"] if dtype == torch.float32 else [])):
        model = make_model(dtype)
        optimizer = MicroAdam(model.named_parameters(), lr=1e-2, weight_decay=0.1, rounding=rounding)
        for p in model.parameters():
            p.grad = p.detach().clone()
        optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(same(results[0], other) for other in results[1:])


def test_fp16_cannot_be_stochastic() -> None:
    param = nn.Parameter(torch.ones(64, 64, dtype=torch.float16))
    param.grad = torch.ones_like(param)
    optimizer = MicroAdam([("w", param)], rounding="stochastic")
    with pytest.raises(ConfigError, match=r"rounding='stochastic': parameter 'w' is fp16.*bf16 only.*'nearest'"):
        optimizer.step()
    assert int(optimizer.state[param]["step"] if optimizer.state else 0) == 0 and (param == 1).all()


def test_groups_have_their_own_rounding() -> None:
    def both(**second: Any) -> list[Tensor]:
        params = [nn.Parameter(torch.linspace(-1, 1, 4096).view(64, 64).to(BF16)) for _ in range(2)]
        optimizer = MicroAdam([{"params": [params[0]]}, {"params": [params[1]], **second}], lr=1e-4)
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + step)
            optimizer.step()
        return [p.detach() for p in params]

    assert same(*[[x] for x in both()])  # the same shape, seed and step
    for second in ({"rounding": "nearest"}, {"seed": 9}):
        first, other = both(**second)
        assert torch.equal(first, both()[0]) and not torch.equal(first, other)


@pytest.mark.parametrize("window_size", [1, 3])
def test_resume_in_the_middle(window_size: int) -> None:
    settings = {"lr": 1e-3, "weight_decay": 0.1, "window_size": window_size, "seed": 4}
    whole = trained(range(6), **settings)
    model = make_model()
    optimizer = MicroAdam(model.named_parameters(), **settings)
    train(model, optimizer, range(3))
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model = make_model()
    model.load_state_dict(weights)
    again = MicroAdam(model.named_parameters(), window_size=window_size)
    again.load_state_dict(state)
    assert (again.param_groups[0]["rounding"], again.param_groups[0]["seed"]) == ("auto", 4)
    assert same(whole, train(model, again, range(3, 6)))


def test_release_of_gradients() -> None:
    model = make_model()
    optimizer = MicroAdam(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    assert same(trained(), train(model, optimizer, range(4), release=True))


@pytest.mark.parametrize(("rounding", "lost"), [("nearest", True), ("stochastic", False)])
def test_weight_decay_survives(rounding: str, lost: bool) -> None:
    """100 steps that each take a 2000th part, a fifth of what rounding to nearest needs to see."""
    param = nn.Parameter(torch.linspace(0.5, 1.0, 1 << 16).view(256, 256).to(BF16))
    before = param.detach().double().sum()
    optimizer = MicroAdam([param], lr=5e-3, weight_decay=0.1, rounding=rounding)
    for step in range(100):
        param.grad = torch.zeros_like(param)
        param.grad[0, 0] = 1e-30 if step == 0 else 0.0  # else it would not count as a step
        optimizer.step()
    left = float(param.detach().double().sum() / before)
    assert left == pytest.approx(1.0 if lost else (1 - 5e-4) ** 100, abs=2e-4)


def test_small_updates_arrive() -> None:
    """Every step moves a weight by a hundredth of the distance of its neighbours in bf16."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        param = nn.Parameter(torch.full((256, 256), 1.5, dtype=BF16))
        optimizer = MicroAdam([param], lr=2.0**-7 / 100, density=1.0, betas=(0.0, 0.0), rounding=rounding)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[rounding] = float((1.5 - param.detach().double()).mean())
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(2.0**-7, rel=0.02)


def test_older_state_dict_is_of_rounding_to_nearest() -> None:
    model = make_model()
    optimizer = MicroAdam(model.named_parameters(), lr=1e-3, rounding="nearest")
    train(model, optimizer, range(2))
    older = copy.deepcopy(optimizer.state_dict())
    del older["param_groups"][0]["rounding"], older["param_groups"][0]["seed"]
    again = MicroAdam(copy.deepcopy(model).named_parameters(), seed=5)
    again.load_state_dict(older)
    assert (again.param_groups[0]["rounding"], again.param_groups[0]["seed"]) == ("nearest", 0)
