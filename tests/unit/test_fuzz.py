"""Whatever is in a file that we parse, it is read or refused with an error of ours: no traceback from inside."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microadam_dist.checkpoint.format import describe_layouts, read_layouts
from microadam_dist.config import MicroAdamConfig
from microadam_dist.errors import MicroAdamError
from microadam_dist.layout import ShardSpan, StateLayout
from microadam_dist.planner.shapes import read_shape
from tests.amount import amount

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))  # as Python does for a script there

LAYOUT = StateLayout((ShardSpan("layer.weight", (64, 128), 128, 256),), MicroAdamConfig(window_size=3, density=0.1))
SETTINGS = {"lr": 1e-3, "betas": [0.9, 0.999], "ef_bits": 4, "block_size": 4096, "density": 0.1, "rounding": "auto"}
MODEL = json.loads((ROOT / "configs" / "models" / "llama-2-7b.json").read_text())
DEEPSPEED = json.loads((ROOT / "configs" / "deepspeed" / "zero2_bf16.json").read_text())

numbers = st.sampled_from([0, 1, -1, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=5) | st.sampled_from(["4", "1e-3", "auto", "😀", "\0"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """The value with up to three places changed, or taken away."""
    content = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if draw(st.booleans()) and isinstance(place[key], (dict, list)) and place[key]:
                place = place[key]
                continue
            if draw(st.integers(0, 3)) == 0:
                del place[key]
            else:
                place[key] = draw(values)
            break
    return content


def reads(read: Callable[[], Any], errors: tuple[type[Exception], ...]) -> None:
    try:
        read()
    except errors as error:
        assert str(error)


@settings(deadline=None, max_examples=amount(1000))
@given(entry=changed(describe_layouts({0: LAYOUT}, 0, 2)) | values)
def test_description_of_state(entry: Any) -> None:
    reads(lambda: read_layouts(entry), (MicroAdamError,))


@settings(deadline=None, max_examples=amount(1000))
@given(group=changed(SETTINGS))
def test_settings(group: Any) -> None:
    reads(lambda: MicroAdamConfig.from_dict(group), (MicroAdamError,))


@settings(deadline=None, max_examples=amount(1000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=(changed(MODEL) | values).map(json.dumps).map(str.encode) | st.binary(max_size=30))
def test_model_configurations(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    reads(lambda: read_shape(path), (MicroAdamError,))


@settings(deadline=None, max_examples=amount(1000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=(changed(DEEPSPEED) | values).map(json.dumps).map(str.encode) | st.binary(max_size=30))
def test_deepspeed_configurations(content: bytes, tmp_path: Path) -> None:
    from training.errors import UserError
    from training.options import Options, resolve

    path = tmp_path / "zero.json"
    path.write_bytes(content)
    options = Options(model_config=path, tokenizer="bytes", data=[], output=tmp_path / "run", deepspeed=path)
    reads(lambda: resolve(options), (MicroAdamError, UserError))


records = changed({"text": "hello"}) | changed({"prompt": "a", "response": "b"}) | values
lines = records.map(json.dumps).map(str.encode) | st.binary(max_size=20)


@settings(deadline=None, max_examples=amount(1000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(lines, max_size=4).map(b"\n".join), suffix=st.sampled_from([".jsonl", ".txt"]))
def test_training_text(content: bytes, suffix: str, tmp_path: Path) -> None:
    from training.errors import UserError
    from training.packing import byte_tokenizer, pack, read_documents

    path = tmp_path / f"book{suffix}"
    path.write_bytes(content)
    reads(lambda: pack(read_documents([str(path)]), byte_tokenizer(), 8), (UserError,))


NESTED = b"[" * 100_000


@pytest.mark.parametrize("content", [NESTED, b'{"a":' * 100_000, b"\xff\xfe", b"", b"null"])
def test_files_that_are_no_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(MicroAdamError, match=r"config\.json"):
        read_shape(path)


def test_a_nested_line_and_recipe(tmp_path: Path) -> None:
    from typer import BadParameter

    from training.errors import UserError
    from training.options import read_recipe
    from training.packing import read_documents

    path = tmp_path / "book.jsonl"
    path.write_bytes(NESTED)
    with pytest.raises(UserError, match=r"book\.jsonl:1"):
        list(read_documents([str(path)]))
    with pytest.raises(BadParameter, match=r"book\.jsonl"):
        read_recipe(None, path)  # type: ignore[arg-type]
