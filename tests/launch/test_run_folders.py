"""What a new run may overwrite, and what a run that goes on must have in common with its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.launch.runs import ROOT, assert_same_run, options, options_with_checkpoints, train
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.deepspeed
SAVED_AT, END = 3, 12


def run_of(text: Path, output: Path, **more: Any) -> dict[str, Any]:
    return options_with_checkpoints(text, output, **more)


# ------------------------------------------------------------------ folders


def checkpoint(folder: Path, step: int, steps: int = END) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": steps}))
    (path / "complete").touch()
    return path


def found(text: Path, output: Path, **more: Any) -> Path | None:
    from training.options import Options, resolve
    from training.resume import find_checkpoint

    return find_checkpoint(resolve(Options(**options(text, output, **{"steps": None, **more})))[0])


@pytest.mark.parametrize("file", ["checkpoint-3/weights", "metrics.json", "trainer_state.json", "model.safetensors"])
def test_a_used_folder_is_refused(file: str, text: Path, tmp_path: Path) -> None:
    from training.errors import UserError
    from training.resume import remove_results

    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"holds another run .{file.split('/')[0]}.: go on with it with --resume last"):
        found(text, tmp_path)
    assert (tmp_path / file).exists()
    assert found(text, tmp_path, overwrite=True) is None
    remove_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert found(text, tmp_path) is None


def test_what_a_failed_start_leaves_is_no_run(text: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "runs").mkdir()
    assert found(text, tmp_path) is None and found(text, tmp_path, resume="last") is None


def test_which_checkpoint(text: Path, tmp_path: Path) -> None:
    from training.errors import UserError

    three, six = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    (checkpoint(tmp_path, 9) / "complete").unlink()
    checkpoint(tmp_path / "x", 12).rename(tmp_path / "checkpoint-of-mine")
    assert found(text, tmp_path, resume="last") == six
    assert found(text, tmp_path, resume="last", steps=5) == three
    assert found(text, tmp_path, resume=str(three)) == three
    for more, message in (
        ({"resume": "last", "steps": 3}, "is finished, and no checkpoint in it has steps left. Give more --steps"),
        ({"resume": str(six), "steps": 6}, "that run is finished; give more --steps"),
        ({"resume": str(tmp_path / "checkpoint-1")}, "no checkpoint found"),
        ({"resume": str(six), "overwrite": True}, "--overwrite would remove --resume"),
        ({"resume": "last", "overwrite": True}, "--overwrite removes what --resume last goes on from"),
        ({"model_config": None, "model": str(six), "overwrite": True}, "--overwrite would remove --model"),
        ({"model_config": None, "model": str(tmp_path), "overwrite": True}, "--overwrite would remove --model"),
    ):
        with pytest.raises(UserError, match=message):
            found(text, tmp_path, **more)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.json").touch()
    with pytest.raises(UserError, match="holds another run"):
        found(text, tmp_path / "other", resume=str(six))
    with pytest.raises(UserError, match="the run in .*other is finished"):
        found(text, tmp_path / "other", resume="last")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"{}", b'{"global_step": "3", "max_steps": 12}'])
def test_a_damaged_checkpoint_is_named(content: bytes, text: Path, tmp_path: Path) -> None:
    from training.errors import UserError

    (checkpoint(tmp_path, 3) / "trainer_state.json").write_bytes(content)
    for resume in ("last", str(tmp_path / "checkpoint-3")):
        with pytest.raises(UserError, match="checkpoint-3/trainer_state.json"):
            found(text, tmp_path, resume=resume)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("auto"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("type params lr betas eps weight_decay enabled stage".split()), inner)
    ),
    max_leaves=8,
)
SECTIONS = "optimizer bf16 fp16 zero_optimization gradient_clipping train_micro_batch_size_per_gpu".split()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.binary(max_size=20) | st.dictionaries(st.sampled_from(SECTIONS), JSON).map(json.dumps).map(str.encode)
)
def test_any_deepspeed_json_is_resolved_or_refused(content: bytes, text: Path, tmp_path: Path) -> None:
    from training.errors import UserError
    from training.options import Options, resolve

    (tmp_path / "any.json").write_bytes(content)
    try:
        resolved, config = resolve(Options(**options(text, tmp_path, deepspeed=tmp_path / "any.json")))
    except UserError as error:
        assert "any.json" in str(error)
    else:
        assert isinstance(config, dict) and isinstance(resolved.lr, float) and isinstance(resolved.batch_size, int)


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize("config", [None, "zero2_bf16"])
def test_a_contradiction_stops_and_a_meant_one_goes_on(config: str | None, text: Path, tmp_path: Path) -> None:
    from training.options import Override

    deepspeed = {"deepspeed": config and ROOT / "configs" / "deepspeed" / f"{config}.json"}
    ranks = 2 if config else 1
    run_ranks(train, ranks, run_of(text, tmp_path / "straight", **deepspeed))
    saved = str(tmp_path / "straight" / f"checkpoint-{SAVED_AT}")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "And one line more.\n")
    other.with_name("model.json").write_text(text.with_name("model.json").read_text())
    changes = {"lr": 8e-3, "seq_len": 32, "schedule": "linear", "seed": 1, "weight_decay": 0.5}
    with pytest.raises(RankError) as stopped:
        run_ranks(train, ranks, run_of(text, tmp_path / "changed", resume=saved, **deepspeed, **changes))
    said = str(stopped.value)
    for part in ("lr 0.004, this run 0.008", "seq_len 64, this run 32", "schedule cosine, this run linear", "seed 0"):
        assert part in said
    assert "--override lr" in said and "weight_decay cannot change within a run" in said
    with pytest.raises(RankError, match="model .*/model.json, this run .*/model.json.*--override model"):
        run_ranks(train, ranks, run_of(other, tmp_path / "changed", resume=saved, **deepspeed))
    with pytest.raises(RankError, match="data .*text.txt, sha256 .*, this run .*other.txt, sha256 .*--override data"):
        moved = run_of(text, tmp_path / "changed", resume=saved, **deepspeed) | {"data": [str(other)]}
        run_ranks(train, ranks, moved)
    # The same text in another place is no contradiction, nor is one that is meant.
    copied = tmp_path / "copied.txt"
    copied.write_bytes(text.read_bytes())
    meant = run_of(text, tmp_path / "meant", resume=saved, lr=8e-3, override=[Override.lr], **deepspeed)
    run_ranks(train, ranks, meant | {"data": [str(copied)]})
    rates = [_learning_rates(tmp_path / name) for name in ("straight", "meant")]
    assert rates[0].keys() == rates[1].keys() == set(range(1, END + 1))
    for step in rates[0]:
        assert rates[1][step] == pytest.approx((1 if step <= SAVED_AT else 2) * rates[0][step], rel=1e-12), step
    assert min(rates[0].values()) < max(rates[0].values()) == pytest.approx(4e-3, rel=0.1)
    settings = json.loads((tmp_path / "meant" / f"checkpoint-{END}" / "run_settings.json").read_text())
    assert settings["lr"] == 8e-3 and settings["ranks"] == ranks


def _learning_rates(run: Path) -> dict[int, float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}


def test_an_overwritten_folder_holds_the_new_run_alone(text: Path, tmp_path: Path) -> None:
    run_ranks(train, 1, run_of(text, tmp_path / "run"))
    with pytest.raises(RankError, match="holds another run"):
        run_ranks(train, 1, run_of(text, tmp_path / "run", steps=6))
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.raises(RankError, match="one sequence of --seq-len 64 needs 64"):  # nothing is removed for it
        run_ranks(train, 1, run_of(text, tmp_path / "run", overwrite=True) | {"data": [str(short)]})
    assert (tmp_path / "run" / f"checkpoint-{END}").is_dir() and (tmp_path / "run" / "model.safetensors").is_file()
    run_ranks(train, 1, run_of(text, tmp_path / "run", steps=6, overwrite=True))
    run_ranks(train, 1, run_of(text, tmp_path / "alone", steps=6))
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_a_checkpoint_without_settings_goes_on(text: Path, tmp_path: Path) -> None:
    """As versions before have left them."""
    run_ranks(train, 1, run_of(text, tmp_path / "straight"))
    saved = tmp_path / "straight" / f"checkpoint-{SAVED_AT}"
    (saved / "run_settings.json").unlink()
    run_ranks(train, 1, run_of(text, tmp_path / "resumed", resume=str(saved)))
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")
