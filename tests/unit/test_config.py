"""Settings: every bad one is refused by name before any state exists, and nothing has changed."""

import copy
import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from microadam_dist import BackendUnavailableError, ConfigError, MicroAdam, MicroAdamConfig
from microadam_dist.backends.select import BACKEND_NAMES
from microadam_dist.config import SETTING_NAMES, STRUCTURAL_SETTINGS

BAD_NUMBERS = [
    None,
    "fast",
    "",
    [1e-3],
    {},
    1j,
    math.nan,
    math.inf,
    -math.inf,
    "nan",
    10**400,
    torch.ones(2),
    np.ones(2),
]
BAD_INTEGERS = [None, "4", 4.0, math.nan, True, False, [4], torch.tensor(4), np.int64(4), np.float64(4)]

# setting -> (what the message must say is expected, bad values)
BAD_VALUES: dict[str, tuple[str, list[Any]]] = {
    "lr": (r"a number", [*BAD_NUMBERS, -1e-9, True, 1e39, torch.tensor(-1.0), np.float32(-1)]),
    "eps": (r"a number", [*BAD_NUMBERS, 0, 0.0, -1e-8, True, 1e-39, 5e-324, 1e39]),
    "weight_decay": (r"a number", [*BAD_NUMBERS, -0.1, True, 1e39]),
    "density": (r"a number", [*BAD_NUMBERS, 0, 0.0, -0.01, 1.0000001, 2, True]),
    "window_size": (r"an integer >= 1", [*BAD_INTEGERS, 0, -1]),
    "block_size": (r"a multiple of 8 in 64\.\.32768", [*BAD_INTEGERS, 0, 56, 63, 100, 32769, 32776, -64]),
    "bucket_size": (r"an even integer >= 2", [*BAD_INTEGERS, 0, 1, 63, -2]),
    "correction": ("'window', 'steps'", [None, "", "t", "Window", True, 1, ["steps"], np.ones(2)]),
    "rounding": ("'auto', 'nearest', 'stochastic'", [None, "", "up", "Nearest", True, 0, ["nearest"], np.ones(2)]),
    "seed": (r"an integer in 0\.\.2\*\*32 - 1", [*BAD_INTEGERS, -1, 2**32]),
    "ef_bits": (r"one of \(0, 1, 1\.6, 2, 4, 8\)", [None, "4", True, 1.5, 3, 16, -4]),
    "betas": (
        r"two numbers in \[0, 1\)",
        [
            None,
            0.9,
            "0.9, 0.999",
            (),
            (0.9,),
            (0.9, 0.99, 0.999),
            {0.9, 0.999},
            {0.9: 1, 0.999: 2},
            np.array([0.9, 0.999]),
        ],
    ),
}
BAD_BETAS = [1, 1.0, -0.1, 2, None, "high", math.nan, math.inf, 1j, False]


def bad_values() -> list:
    return [
        pytest.param(name, value, expected, id=f"{name}={repr(value)[:16]}")
        for name, (expected, values) in BAD_VALUES.items()
        for value in values
    ]


def make_param(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    param = nn.Parameter(torch.ones(shape or (32, 128), dtype=dtype))
    param.grad = torch.ones_like(param)
    return param


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize(("name", "value", "expected"), bad_values())
def test_bad_value_is_named(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        MicroAdam([make_param()], **{name: value})
    message = str(error.value)
    assert message.startswith(f"{name}=")
    got = message.removeprefix(f"{name}=").split(": expected")[0]
    assert got == repr(value) or got == repr(float(value))


@pytest.mark.parametrize(("name", "value", "expected"), bad_values())
def test_bad_value_in_a_group_or_changed_later_changes_nothing(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=.*expected {expected}"):
        MicroAdam([{"params": [make_param()], name: value}])

    first, second = make_param(), make_param()
    optimizer = MicroAdam([{"params": [first]}, {"params": [second]}])
    optimizer.param_groups[1][name] = value
    with pytest.raises(ConfigError, match=f"^{name}=.*expected {expected}"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(first, torch.ones(32, 128))


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("value", BAD_BETAS, ids=repr)
def test_bad_beta_is_named(position: int, value: Any) -> None:
    betas: list[Any] = [0.9, 0.999]
    betas[position] = value
    with pytest.raises(ConfigError, match=r"^betas(\[[01]\])?=.*expected (a|two) numbers?") as error:
        MicroAdam([make_param()], betas=betas)
    assert repr(value) in str(error.value) or repr(float(value)) in str(error.value)


@pytest.mark.parametrize(("name", "value", "expected"), bad_values())
def test_config_itself_takes_no_bad_value(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=.*expected {expected}"):
        MicroAdamConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0),
        ("lr", 1),
        ("lr", 1e38),
        ("betas", (0, 0.0)),
        ("betas", [0.9, 0.999999]),
        ("eps", 2.0**-126),
        ("weight_decay", 0),
        ("window_size", 1),
        ("window_size", 1000),
        ("density", 1),
        ("density", 1e-9),
        ("block_size", 64),
        ("block_size", 32768),
        ("bucket_size", 2),
        ("bucket_size", 70000),
        ("ef_bits", 0),
    ],
)
def test_edge_of_a_range_is_inside(name: str, value: Any) -> None:
    param = make_param()
    MicroAdam([param], **{name: value}, backend="reference").step()
    assert bool(param.isfinite().all())


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5]), "0.5", "5e-1"]
)
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "density"])
def test_number_may_come_as_string_tensor_or_numpy(name: str, value: Any) -> None:
    """JSON and YAML readers make strings of 1e-3; schedulers and DeepSpeed pass tensors and numpy numbers."""
    assert getattr(MicroAdamConfig.from_dict({name: value}), name) == 0.5

    params = [make_param(), make_param()]
    MicroAdam(params[:1], **{name: value}).step()
    MicroAdam(params[1:], **{name: 0.5}).step()
    assert torch.equal(*params)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "density"])
def test_number_given_as_string_is_a_number_in_the_group(name: str) -> None:
    """A scheduler multiplies it, a checkpoint compares it."""
    optimizer = MicroAdam([{"params": [make_param()], name: "0.5"}, {"params": [make_param()]}], **{name: "0.25"})
    assert [group[name] for group in optimizer.param_groups] == [0.5, 0.25]


def test_from_dict_leaves_other_keys_alone() -> None:
    assert MicroAdamConfig.from_dict({"params": [], "initial_lr": 3, "lr": 0.5, "betas": [0, 0.5]}) == MicroAdamConfig(
        lr=0.5, betas=(0.0, 0.5)
    )


def test_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(AttributeError):
        MicroAdamConfig().lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        MicroAdamConfig(1e-3)  # type: ignore[misc]


# ---------------------------------------------------------------- unknown names

MISSPELLED = {
    "m": "window_size",
    "k_init": "density",
    "quant_block_size": "bucket_size",
    "windw_size": "window_size",
    "denisty": "density",
    "blocksize": "block_size",
    "weigth_decay": "weight_decay",
    "beta": "betas",
    "ef_bit": "ef_bits",
}


@pytest.mark.parametrize(("name", "meant"), MISSPELLED.items())
def test_misspelled_setting(name: str, meant: str) -> None:
    expected = re.escape(f"unknown setting {name!r}: did you mean {meant!r}?")
    with pytest.raises(ConfigError, match=expected):
        MicroAdam([make_param()], **{name: 1})
    with pytest.raises(ConfigError, match=expected):
        MicroAdam([{"params": [make_param()], name: 1}])


@pytest.mark.parametrize("name", ["rho", "use_muon", "backends"])
def test_unknown_argument_lists_the_settings(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting '{name}'") as error:
        MicroAdam([make_param()], **{name: True})
    assert all(setting in str(error.value) for setting in (*SETTING_NAMES, "backend"))


OTHER_UPDATES = {
    **dict.fromkeys(("amsgrad", "maximize", "differentiable", "nesterov", "momentum"), True),
    **dict.fromkeys(("adam_w_mode", "adamw_mode", "decoupled_weight_decay", "bias_correction"), False),
}


@pytest.mark.parametrize(("name", "value"), OTHER_UPDATES.items())
def test_setting_that_asks_for_another_update_is_refused(name: str, value: bool) -> None:
    expected = f"{name}={value}: .+ Remove it"
    with pytest.raises(ConfigError, match=expected):
        MicroAdam([make_param()], **{name: value})
    with pytest.raises(ConfigError, match=expected):
        MicroAdam([{"params": [make_param()], name: value}])
    optimizer = MicroAdam([make_param()])
    optimizer.param_groups[0][name] = value
    optimizer.param_groups[0]["params"][0].grad = make_param().detach()
    with pytest.raises(ConfigError, match=expected):
        optimizer.step()
    assert not optimizer.state


ADAMW = {"amsgrad": False, "maximize": False, "foreach": None, "fused": True, "differentiable": False}
ADAMW |= {"decoupled_weight_decay": True}
DEEPSPEED_ADAM = {"torch_adam": True, "adam_w_mode": True, "bias_correction": True, "set_grad_none": True}


def test_adamw_settings_are_accepted_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="ignores") as warned:
        optimizer = MicroAdam([{"params": [make_param()], **ADAMW}], lr=1e-3, capturable=False, **DEEPSPEED_ADAM)
    (warning,) = warned
    assert all(name in str(warning.message) for name in (*ADAMW, *DEEPSPEED_ADAM))
    assert warning.filename == __file__
    with pytest.warns(UserWarning, match="ignores fused: "):
        optimizer.add_param_group({"params": [make_param()], "fused": False})


def test_groups_of_torchs_adamw() -> None:
    adamw = torch.optim.AdamW([make_param()], lr=0.5)
    with pytest.warns(UserWarning, match="ignores amsgrad"):
        optimizer = MicroAdam(adamw.param_groups)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.filterwarnings("error")
def test_what_torch_itself_adds_is_silent() -> None:
    optimizer = copy.deepcopy(MicroAdam([make_param()]))
    assert optimizer.defaults["differentiable"] is False  # Optimizer.__setstate__
    optimizer.add_param_group({"params": [make_param()]})
    optimizer.param_groups[0]["params"][0].grad = make_param().detach()
    optimizer.step()


def test_exchange_settings_where_they_do_not_apply() -> None:
    with pytest.raises(ConfigError, match="weight_exchange='touched' is given without shard_state"):
        MicroAdam([make_param()], weight_exchange="touched")
    optimizer = MicroAdam([make_param()], sparse_allgather=True)  # DeepSpeed may still come
    optimizer.param_groups[0]["params"][0].grad = make_param().detach()
    for _ in range(2):
        with pytest.raises(ConfigError, match="sparse_allgather=True is for DeepSpeed's ZeRO stages 1 and 2"):
            optimizer.step()
    assert not optimizer.state


def test_capturable_needs_the_cuda_backend() -> None:
    with pytest.raises(ConfigError, match="capturable=1: expected true or false"):
        MicroAdam([make_param()], capturable=1)
    with pytest.raises(ConfigError, match="capturable=True with backend='cpu'"):
        MicroAdam([make_param()], capturable=True, backend="cpu")
    with pytest.raises(BackendUnavailableError, match='backend="cuda"'):
        MicroAdam([make_param()], capturable=True)


@pytest.mark.parametrize(
    "name", ["initial_lr", "max_lr", "min_lr", "lr_scale", "swa_lr", "name", "layer", "max_momentum"]
)
def test_group_may_carry_keys_of_other_tools(name: str) -> None:
    assert MicroAdam([{"params": [make_param()], name: "theirs"}]).param_groups[0][name] == "theirs"


@pytest.mark.parametrize("name", ["cuda13", "", None, "Reference", ["reference"]])
def test_unknown_backend(name: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"backend={name!r}: expected one of {', '.join(BACKEND_NAMES)}")):
        MicroAdam([make_param()], backend=name)


def test_backend_is_not_a_group_setting() -> None:
    """It would be ignored there, and a named backend never falls back in silence."""
    with pytest.raises(ConfigError, match="backend"):
        MicroAdam([{"params": [make_param()], "backend": "reference"}])


# ---------------------------------------------------------------- groups


def test_group_overrides_the_defaults() -> None:
    own = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-6, "weight_decay": 0.25, "window_size": 3}
    own |= {"density": 0.5, "block_size": 64, "bucket_size": 32, "ef_bits": 2, "packed_window": True}
    own |= {"correction": "steps", "rounding": "nearest", "seed": 3}
    optimizer = MicroAdam([{"params": [make_param()], **own}, {"params": [make_param()]}], backend="reference")
    assert {name: optimizer.param_groups[0][name] for name in SETTING_NAMES} == own
    assert MicroAdamConfig.from_dict(optimizer.param_groups[1]) == MicroAdamConfig()


PACKABLE = {"packed_window": True, "window_size": 2}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"packed_window": 1}, "packed_window=1: expected true or false."),
        ({"window_size": 1}, "packed_window=True with window_size=1: a window of 1 is not stored"),
        ({"ef_bits": 0}, "packed_window=True with ef_bits=0: what 8 bits leave of a value"),
        ({"block_size": 4104}, "packed_window=True with block_size=4104: 12 bits name 4096 places."),
    ],
)
def test_a_window_that_cannot_be_packed(settings: dict[str, Any], expected: str) -> None:
    MicroAdamConfig(**PACKABLE)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        MicroAdam([make_param()], **PACKABLE | settings)


def test_paper_defaults() -> None:
    optimizer = MicroAdam([make_param()], **MicroAdam.paper_defaults())
    sizes = {"block_size": 4096, "bucket_size": 64, "ef_bits": 4}
    paper = MicroAdamConfig(window_size=10, density=0.01, correction="steps", **sizes)
    assert MicroAdamConfig.from_dict(optimizer.param_groups[0]) == paper


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtype(dtype: torch.dtype) -> None:
    bad = nn.Parameter(torch.ones(32, 128).to(dtype))
    with pytest.raises(ConfigError, match=f"parameter 'head.weight' is {dtype}; MicroAdam trains fp32, bf16, fp16"):
        MicroAdam([("body.weight", make_param()), ("head.weight", bad)])
    with pytest.raises(ConfigError, match=f"parameter '1' is {dtype}"):
        MicroAdam([make_param(), bad])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8, torch.complex64], ids=str)
def test_frozen_parameter_of_any_dtype_is_ignored(dtype: torch.dtype) -> None:
    frozen, trained = nn.Parameter(torch.ones(32, 128).to(dtype), requires_grad=False), make_param()
    optimizer = MicroAdam([("base", frozen), ("adapter", trained)])
    for _ in range(2):
        trained.grad = torch.ones_like(trained)
        optimizer.step()
    assert set(optimizer.state) == {trained} and frozen.eq(1).all()
    optimizer.load_state_dict(optimizer.state_dict())
    if dtype == torch.float64:  # thawed
        frozen.requires_grad_().grad = torch.ones_like(frozen)
        before = trained.clone()
        with pytest.raises(ConfigError, match="parameter 'base' is torch.float64"):
            optimizer.step()
        assert set(optimizer.state) == {trained} and torch.equal(trained, before)


class Junk:
    """Groups that must be refused; ``owned`` is a parameter the optimizer has already."""

    @staticmethod
    def groups(owned: nn.Parameter) -> dict[str, Any]:
        return {
            "bad value": {"params": [make_param()], "lr": -1},
            "bad structural value": {"params": [make_param()], "block_size": 100},
            "misspelled": {"params": [make_param()], "windowsize": 3},
            "original name": {"params": [make_param()], "m": 10},
            "float64": {"params": [make_param(), make_param(dtype=torch.float64)]},
            "duplicate": {"params": [make_param(), owned]},
            "no leaf": {"params": [make_param() * 2]},
            "not a tensor": {"params": ["weight"]},
            "unordered": {"params": {make_param()}},
            "no params": {"lr": 1e-3},
            "no dict": [make_param()],
            "names in one group only": {"params": [("weight", make_param())]},
        }


@pytest.mark.parametrize("kind", Junk.groups(make_param()))
def test_refused_group_leaves_the_optimizer_as_it_was(kind: str) -> None:
    optimizer, twin = (MicroAdam([make_param(), make_param(5)]) for _ in range(2))
    junk = Junk.groups(optimizer.param_groups[0]["params"][0])[kind]
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    with pytest.raises((ConfigError, TypeError, ValueError, KeyError)):
        optimizer.add_param_group(junk)
    assert optimizer.param_groups == groups
    assert not optimizer.state

    for each in (optimizer, twin):  # a refused group must not shift the names of what comes after it
        each.add_param_group({"params": [make_param(64, 64)], "lr": 0.5})
        each.step()
    assert optimizer.state_dict()["microadam"] == twin.state_dict()["microadam"]
    ours, theirs = (each.param_groups[1]["params"][0] for each in (optimizer, twin))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", STRUCTURAL_SETTINGS)
def test_structural_setting_cannot_change_once_state_exists(name: str) -> None:
    param = make_param()
    optimizer = MicroAdam([param], backend="reference")
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0][name] = {"density": 0.5, "block_size": 64, "ef_bits": 8}.get(name, 20)
    with pytest.raises(ConfigError, match=name):
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 1


def test_a_member_without_state_does_not_bring_another_structure_into_its_group() -> None:
    first, second = make_param(), make_param()
    optimizer = MicroAdam([first, second], backend="reference")
    second.grad = None
    optimizer.step()
    optimizer.param_groups[0]["density"] = 0.5
    first.grad, second.grad = None, first.grad
    with pytest.raises(ConfigError, match="density=0.5: the state of parameter '0' was made with 0.1"):
        optimizer.step()
    optimizer.param_groups[0]["density"] = 0.1
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (first, second)] == [1, 1]


# ---------------------------------------------------------------- num_kept


@pytest.mark.parametrize(
    ("density", "numel", "num_kept"),
    [
        (0.01, 100, 1),
        (0.01, 101, 2),
        (0.01, 1, 1),
        (0.01, 4096, 41),
        (0.01, 2752, 28),
        (0.05, 4096, 205),
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001 in float64
        (0.55, 100, 55),  # 0.55 * 100 is 55.00000000000001
        (0.1, 30, 3),
        (1e-05, 100000, 1),
        (1e-9, 32768, 1),
        (1, 64, 64),
        (1.0, 32768, 32768),
        (0.999, 1000, 999),
    ],
)
def test_num_kept(density: float, numel: int, num_kept: int) -> None:
    assert MicroAdamConfig(density=density).num_kept(numel) == num_kept


@given(digits=st.integers(1, 10**9), places=st.integers(0, 12), numel=st.integers(1, 32768))
def test_num_kept_is_the_ceiling_of_the_decimal_product(digits: int, places: int, numel: int) -> None:
    decimal = Decimal(digits).scaleb(-places)
    if not 0 < decimal <= 1:
        decimal = Decimal(digits).scaleb(-10)
    num_kept = MicroAdamConfig(density=float(decimal)).num_kept(numel)
    assert num_kept == math.ceil(Fraction(decimal) * numel)
    assert 1 <= num_kept <= numel
