"""Checkpoints with one thing wrong, drawn at random.

The bytes of files are cut, changed, lost or exchanged; or what is in a file is changed and saved again, so that its
checksums are right: another version, another model, other settings, a key that is missing.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Keys whose contents nobody loads, and values that say nothing about whether a checkpoint fits.
_NOT_LOADED = ("ds_config", "param_slice_mappings", "loss_scaler")
_OTHER_SETTINGS: dict[str, list[Any]] = {
    "density": [0.05, 0.3, 1.0],
    "window_size": [1, 2, 4],
    "block_size": [64, 128, 512],
    "bucket_size": [32, 128],
    "ef_bits": [0, 1.6, 2, 8],
    "packed_window": [True, False],
}


def damage_files(chance: random.Random, files: list[Path], of_ranks: list[tuple[Path, Path]]) -> str:
    """Change bytes; returns what was done.

    Args:
        files: One of these is damaged.
        of_ranks: Pairs of files of the same kind from two ranks.
    """
    kinds = [_flip, _flip, _cut, _lose, *([_exchange, _copy_over] if of_ranks else [])]
    kind = chance.choice(kinds)
    if kind in (_exchange, _copy_over):
        return kind(chance, *chance.choice(of_ranks))
    return kind(chance, chance.choice(files))


def _flip(chance: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    # The tensors are most of a file: every other time the directory at its end, or the pickle at its beginning.
    end = chance.random()
    first, last = 0, len(content) - 1
    if end < 0.25:
        first = max(0, last - 3000)
    elif end < 0.5:
        last = min(last, 3000)
    position, bit = chance.randint(first, last), chance.randrange(8)
    content[position] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {position} of {path.name} is flipped"


def _cut(chance: random.Random, path: Path) -> str:
    content = path.read_bytes()
    length = chance.randrange(len(content))
    path.write_bytes(content[:length])
    return f"{path.name} is cut to {length} of {len(content)} bytes"


def _lose(chance: random.Random, path: Path) -> str:
    path.unlink()
    return f"{path.name} is missing"


def _exchange(chance: random.Random, one: Path, other: Path) -> str:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{one.name} and {other.name} are exchanged"


def _copy_over(chance: random.Random, one: Path, other: Path) -> str:
    if chance.random() < 0.5:
        one, other = other, one
    shutil.copyfile(one, other)
    return f"{other.name} is a copy of {one.name}"


def damage_content(chance: random.Random, saved: Any) -> str:
    """Change what `torch.load` has given, in place; returns what was done."""
    kinds: list[Callable[[random.Random, Any], str | None]] = [
        _other_version,
        _missing_key,
        _renamed,
        _reshaped,
        _other_tensor,
        _other_settings,
        _other_settings,
        _other_interval,
        _impossible_number,
        _impossible_indices,
    ]
    while True:
        if done := chance.choice(kinds)(chance, saved):
            return done


def _walk(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any, Any]]:
    """(path, container, key, value) of everything in nested dictionaries and lists."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in list(items):
        if key not in _NOT_LOADED:
            yield (*path, key), node, key, value
            yield from _walk(value, (*path, key))


def _title(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _choose(chance: random.Random, saved: Any, fits: Callable[[Any, Any, Any], bool]) -> Any:
    """(path, container, key, value) of something that can be replaced; None if there is nothing that fits."""
    found = [
        (path, node, key, value)
        for path, node, key, value in _walk(saved)
        if isinstance(node, MutableMapping | MutableSequence) and fits(node, key, value)
    ]
    return chance.choice(found) if found else None


def _replace(chance: random.Random, saved: Any, fits: Callable[[Any, Any, Any], bool], new: Any) -> str | None:
    if (found := _choose(chance, saved, fits)) is None:
        return None
    path, node, key, value = found
    node[key] = replaced = new(value)
    described = f"{replaced.dtype} {tuple(replaced.shape)}" if isinstance(replaced, Tensor) else repr(replaced)[:60]
    return f"{_title(path)} is {described}"


def _other_version(chance: random.Random, saved: Any) -> str | None:
    other = chance.choice([0, 2, "1", None, 1.5, [1]])
    return _replace(chance, saved, lambda node, key, value: key == "format", lambda value: other)


def _missing_key(chance: random.Random, saved: Any) -> str | None:
    # From every mapping alike: those of names and settings are large.
    nodes = {id(node): (path, node) for path, node, _, _ in _walk(saved) if isinstance(node, MutableMapping)}
    path, node = chance.choice(list(nodes.values()))
    key = chance.choice([key for key in node if key not in _NOT_LOADED])
    del node[key]
    return f"{_title((*path[:-1], key))} is missing"


def _renamed(chance: random.Random, saved: Any) -> str | None:
    """A parameter has another name: in all places, or in one."""
    in_all_places = chance.random() < 0.5

    def rename(node: Any) -> Any:
        if isinstance(node, dict):
            renamed = {new if key == name else key: rename(value) for key, value in node.items()}
            node.clear()
            node.update(renamed)
        elif isinstance(node, list):
            node[:] = map(rename, node)
        elif isinstance(node, tuple) and type(node) is tuple:
            return tuple(map(rename, node))
        return new if isinstance(node, str) and node == name else node

    names = sorted({key for _, _, key, _ in _walk(saved) if isinstance(key, str) and key.endswith(".weight")})
    names += sorted({value for _, _, _, value in _walk(saved) if isinstance(value, str) and value.endswith(".weight")})
    if not names:
        return None
    name = chance.choice(names)
    new = name.replace(".weight", ".other")
    if in_all_places:
        rename(saved)
        return f"{name} is {new} everywhere"
    places = [node for _, node, key, _ in _walk(saved) if key == name and isinstance(node, dict)]
    places += [value for _, _, key, value in _walk(saved) if key == "spans"]
    place = chance.choice(places)
    rename(place)
    return f"{name} is {new} in one place"


def _reshaped(chance: random.Random, saved: Any) -> str | None:
    """A parameter has another shape, in the description or as a tensor."""
    if chance.random() < 0.5:
        return _replace(
            chance,
            saved,
            lambda node, key, value: isinstance(value, Tensor) and value.numel() > 1,
            lambda value: chance.choice([value.flatten()[:-1], torch.cat([value.flatten()] * 2), value.unsqueeze(0)]),
        )
    return _replace(
        chance,
        saved,
        lambda node, key, value: isinstance(value, torch.Size) and len(value) > 1,
        lambda value: torch.Size((*value[:-1], value[-1] + 1)),
    )


def _other_tensor(chance: random.Random, saved: Any) -> str | None:
    """A tensor has another dtype, or is none."""
    return _replace(
        chance,
        saved,
        lambda node, key, value: isinstance(value, Tensor) and value.numel() > 1,
        lambda value: chance.choice([value.to(torch.float64), value.to(torch.int16), None, 1, value.tolist()]),
    )


def _other_settings(chance: random.Random, saved: Any) -> str | None:
    """Structural settings: in the groups, in the description of the state, or in both."""
    name = chance.choice(list(_OTHER_SETTINGS))
    places = [node for _, node, key, _ in _walk(saved) if key == name and isinstance(node, dict)]
    if not places:
        return None
    in_all_places = chance.random() < 0.5
    chosen = places if in_all_places else [chance.choice(places)]
    value = chance.choice([other for other in _OTHER_SETTINGS[name] if any(other != p[name] for p in chosen)])
    if all(place[name] == value for place in chosen):
        return None
    for place in chosen:
        place[name] = value
    return f"{name}={value} in {len(chosen)} of {len(places)} places"


def _other_interval(chance: random.Random, saved: Any) -> str | None:
    """What a tensor holds is described wrongly."""

    def other(span: tuple[Any, ...]) -> tuple[Any, ...]:
        fqn, shape, *interval = span
        what = chance.randrange(4)
        change = chance.choice([-1, 1, 8, -8, 64])
        if what == 3:
            return (fqn, (shape[0] + 1, *shape[1:]), *interval)
        interval[what] += change
        return (fqn, shape, *interval)

    return _replace(
        chance, saved, lambda node, key, value: isinstance(value, tuple) and len(value) == 5 and value[1:], other
    )


def _impossible_number(chance: random.Random, saved: Any) -> str | None:
    names = ("step", "lr", "betas", "eps", "dp_world_size", "params", "weight_decay", "rank")
    if chance.random() < 0.3:
        wrong = [torch.tensor(-1), torch.tensor(2.5), torch.zeros(2), "x", None]
        return _replace(chance, saved, lambda node, key, value: key == "step", lambda value: chance.choice(wrong))
    other: list[Any] = [-7, "x", None, [[1]], float("nan"), {}]
    return _replace(chance, saved, lambda node, key, value: key in names, lambda value: chance.choice(other))


def _impossible_indices(chance: random.Random, saved: Any) -> str | None:
    return _replace(
        chance, saved, lambda node, key, value: key == "indices", lambda value: torch.full_like(value, 0xFF)
    )
