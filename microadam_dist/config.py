"""The settings of one parameter group, validated. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .errors import ConfigError

SUPPORTED_EF_BITS = (0, 1, 1.6, 2, 4, 8)
ROUNDINGS = ("auto", "nearest", "stochastic")
CORRECTIONS = ("window", "steps")
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 64, 32768
MAX_PACKED_BLOCK_SIZE = 4096  # places that 12 bits can name
# Below the smallest normal fp32 number eps may round to zero, and 0 / (eps + sqrt(0)) would be NaN.
MIN_EPS = 2.0**-126
MAX_FP32 = (2 - 2.0**-23) * 2.0**127

# What the original implementation calls our settings; used in error messages only.
_ORIGINAL_NAMES = {"m": "window_size", "k_init": "density", "quant_block_size": "bucket_size"}


@dataclass(frozen=True, kw_only=True)
class MicroAdamConfig:
    """Settings of one parameter group.

    Args:
        lr: Learning rate, >= 0.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the square root of the second moment, > 0.
        weight_decay: Decoupled weight decay, >= 0.
        window_size: Number of sparse gradients the moments are computed from, >= 1. With 1 no window is stored.
        density: Fraction of each block that is kept, in (0, 1].
        block_size: Longest Top-K block, in elements; a multiple of 8 in 64..32768.
        bucket_size: Elements whose error-feedback codes share one range or scale; even, >= 2.
        ef_bits: Bits of one error-feedback code, of `SUPPORTED_EF_BITS`: 1.6 are five three-level codes in a byte; 0
            switches error feedback off.
        packed_window: Store the window in 12-bit indices and 8-bit values, see `window`; needs a window, error feedback
            and blocks of at most 4096.
        correction: What the sums over the window are divided by to become moments: "window", the weights that the slots
            in it have, so that the step of a steady coordinate is ``lr`` at any time; "steps", the paper's 1 - beta^t,
            with which it grows with the run, see `arithmetic.scalars`.
        rounding: How weights are rounded to their dtype after a step: "nearest"; "stochastic", see
            `arithmetic.rounding`, which is for bf16 and changes nothing for fp32; "auto" is "stochastic" where bf16
            weights are stepped, else "nearest".
        seed: Of stochastic rounding, in 0..2**32 - 1.

    Raises:
        ConfigError: A setting has the wrong type or is outside its range, or a window cannot be packed.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    window_size: int = 1
    density: float = 0.1
    block_size: int = 4096
    bucket_size: int = 64
    ef_bits: float = 4
    packed_window: bool = False
    correction: str = "window"
    rounding: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_float("lr", self.lr, "a number >= 0", lambda x: x >= 0)
        if not isinstance(self.betas, Sequence) or isinstance(self.betas, str) or len(self.betas) != 2:
            raise ConfigError(f"betas={self.betas!r}: expected two numbers in [0, 1).")
        for i, beta in enumerate(self.betas):
            _check_float(f"betas[{i}]", beta, "a number in [0, 1)", lambda x: 0 <= x < 1)
        _check_float("eps", self.eps, "a number > 0 that fp32 can hold (at least 1.2e-38)", lambda x: x >= MIN_EPS)
        _check_float("weight_decay", self.weight_decay, "a number >= 0", lambda x: x >= 0)
        _check_float("density", self.density, "a number in (0, 1]", lambda x: 0 < x <= 1)
        _check_int("window_size", self.window_size, "an integer >= 1", lambda n: n >= 1)
        _check_int(
            "block_size",
            self.block_size,
            f"a multiple of 8 in {MIN_BLOCK_SIZE}..{MAX_BLOCK_SIZE}",
            lambda n: MIN_BLOCK_SIZE <= n <= MAX_BLOCK_SIZE and n % 8 == 0,
        )
        _check_int("bucket_size", self.bucket_size, "an even integer >= 2", lambda n: n >= 2 and n % 2 == 0)
        _check_float("ef_bits", self.ef_bits, f"one of {SUPPORTED_EF_BITS}", lambda x: x in SUPPORTED_EF_BITS)
        check_flag("packed_window", self.packed_window)
        _check_choice("correction", self.correction, CORRECTIONS)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_int("seed", self.seed, "an integer in 0..2**32 - 1", lambda n: 0 <= n < 2**32)
        if self.packed_window:
            self._check_packed_window()

    def _check_packed_window(self) -> None:
        needed = {
            "window_size": (self.window_size > 1, "a window of 1 is not stored, so there is nothing to pack"),
            "ef_bits": (self.ef_bits > 0, "what 8 bits leave of a value has to stay in the error feedback"),
            "block_size": (self.block_size <= MAX_PACKED_BLOCK_SIZE, f"12 bits name {MAX_PACKED_BLOCK_SIZE} places"),
        }
        for name, (is_met, why) in needed.items():
            if not is_met:
                raise ConfigError(f"packed_window=True with {name}={getattr(self, name)}: {why}.")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> MicroAdamConfig:
        """Build a config from a mapping (a param group, DeepSpeed JSON); keys that are not settings are left alone.

        Raises:
            ConfigError: A setting has the wrong type or is outside its range, or one of another optimizer asks for
                another update.
        """
        for name, (value, why) in _ADAM_SETTINGS.items():
            if settings.get(name) not in (None, value):
                raise ConfigError(f"{name}={settings[name]!r}: {why}. Remove it.")
        known = {name: settings[name] for name in SETTING_NAMES if name in settings}
        for name in ("lr", "eps", "weight_decay", "density"):
            if name in known:
                known[name] = _as_float(name, known[name])
        if "betas" in known:
            betas = known["betas"]
            if not isinstance(betas, Sequence) or isinstance(betas, str):
                raise ConfigError(f"betas={betas!r}: expected two numbers in [0, 1).")
            known["betas"] = tuple(_as_float("betas", beta) for beta in betas)
        return cls(**known)

    def num_kept(self, numel: int) -> int:
        """Number of values kept from a block of ``numel`` elements: ``ceil(density * numel)``, exactly.

        The density is read as the decimal number the user wrote, so that 0.01 of 100 is 1 and not 2.
        """
        return _num_kept(self.density, numel)

    def __hash__(self) -> int:
        return hash((self.lr, self.window_size, self.density))  # to hash all settings takes longer than to compare them

    @functools.cached_property
    def structural(self) -> dict[str, Any]:
        """The settings that decide shapes of state tensors."""
        return {name: getattr(self, name) for name in STRUCTURAL_SETTINGS}


@functools.lru_cache(maxsize=1024)  # fractions are slow
def _num_kept(density: float, numel: int) -> int:
    return math.ceil(Fraction(str(density)) * numel)


SETTING_NAMES = tuple(field.name for field in dataclasses.fields(MicroAdamConfig))

# Arguments of `MicroAdam` that hold for all its groups.
OPTIMIZER_SETTING_NAMES = tuple("backend sparse_allgather shard_state weight_exchange capturable metrics_every".split())

_DECOUPLED = "weight decay is always decoupled from the gradient, as in AdamW"
_CORRECTED = "the moments are always corrected for their start at zero"

# Settings of torch's, DeepSpeed's and others' optimizers that would change the update -> their value here, and why.
_ADAM_SETTINGS: dict[str, tuple[bool, str]] = {
    "adam_w_mode": (True, _DECOUPLED),
    "adamw_mode": (True, _DECOUPLED),
    "decoupled_weight_decay": (True, _DECOUPLED),
    "weight_decouple": (True, _DECOUPLED),
    "bias_correction": (True, _CORRECTED),
    "correct_bias": (True, _CORRECTED),
    "amsgrad": (False, "no maximum of the second moments is kept"),
    "maximize": (False, "the loss is always minimized"),
    "differentiable": (False, "autograd cannot go through a step"),
    "nesterov": (False, "there is no Nesterov momentum"),
    "momentum": (False, "the momentum is the first of the betas"),
    "dampening": (False, "the momentum is the first of the betas"),
}

READ_NAMES = (*SETTING_NAMES, *_ADAM_SETTINGS)  # all that `MicroAdamConfig.from_dict` looks at

# Those that say how, not what an optimizer computes.
_ADAM_IMPLEMENTATIONS = frozenset("torch_adam fused foreach set_grad_none fp32_optimizer_states".split())

# The settings that decide shapes of state tensors; they cannot change once state exists.
STRUCTURAL_SETTINGS = ("window_size", "density", "block_size", "bucket_size", "ef_bits", "packed_window")
CHANGEABLE_SETTINGS = tuple(name for name in SETTING_NAMES if name not in STRUCTURAL_SETTINGS)


# Settings that state dicts of older versions lack, and what they mean there.
LATER_SETTINGS = {"packed_window": False, "correction": "steps", "rounding": "nearest", "seed": 0}


def structural_difference(settings: Mapping[str, Any], others: Mapping[str, Any]) -> str | None:
    """The first structural setting in which two param groups, or what `MicroAdamConfig.structural` gives, differ."""
    return next((name for name in STRUCTURAL_SETTINGS if settings[name] != others[name]), None)


def adam_settings(names: Iterable[str]) -> list[str]:
    """Those of the names that mean something to other Adams and nothing here; `from_dict` looks at their values."""
    return [name for name in names if name in _ADAM_SETTINGS or name in _ADAM_IMPLEMENTATIONS]


def reject_unknown_settings(names: Iterable[str], *, misspelled_only: bool = False) -> None:
    """Raise for names that are no setting, neither here nor of other Adams (see `adam_settings`).

    Args:
        names: Keys that were given beside the settings.
        misspelled_only: Let a key pass unless it looks like a setting written wrongly. Param groups carry keys of
            other tools (``initial_lr``, ``name``, ...), so only near misses are an error there.

    Raises:
        ConfigError: Names the key and the setting that was probably meant.
    """
    for name in names:
        if name in SETTING_NAMES or adam_settings([name]):
            continue
        if name in OPTIMIZER_SETTING_NAMES:
            raise ConfigError(
                f"{name!r} is a setting of the whole optimizer; give it to MicroAdam, not to a param group."
            )
        meant = _ORIGINAL_NAMES.get(name) or _nearest_setting(str(name))
        if meant is None and misspelled_only:
            continue
        everything = ", ".join((*SETTING_NAMES, *OPTIMIZER_SETTING_NAMES))
        hint = f"did you mean {meant!r}?" if meant else f"the settings are {everything}."
        raise ConfigError(f"unknown setting {name!r}: {hint}")


def _nearest_setting(name: str) -> str | None:
    """The setting that was probably meant; tags of users such as "no_weight_decay" or "lrs" are none."""
    close = difflib.get_close_matches(name, SETTING_NAMES, n=1, cutoff=0.8)
    return close[0] if close and len(name) >= 4 and abs(len(name) - len(close[0])) <= 2 else None


def _as_float(name: str, value: Any) -> float:
    # Some JSON and YAML readers turn 1e-3 into a string, and a learning rate may be a 0-dim tensor.
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ConfigError(f"{name}={value!r}: expected a number.") from None


def _check_float(name: str, value: float, expected: str, in_range: Callable[[float], bool]) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and abs(value) <= MAX_FP32 and in_range(value)):  # NaN is not <= anything
        raise ConfigError(f"{name}={value!r}: expected {expected}.")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={value!r}: expected {', '.join(map(repr, choices))}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a ConfigError unless it is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: expected true or false.")


def _check_int(name: str, value: int, expected: str, in_range: Callable[[int], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not in_range(value):
        raise ConfigError(f"{name}={value!r}: expected {expected}.")
