"""``microadam plan``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from microadam_dist.cli.app import app
from microadam_dist.planner.engines import Engine

TINY = str(Path(__file__).parents[2] / "configs" / "models" / "byte-llama-1m.json")


def plan(*arguments: str) -> Result:
    # Wide enough that no message is broken into lines.
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "500", "HF_HUB_OFFLINE": "1"})


def test_table() -> None:
    result = plan("--model", "7b", "--dtype", "pure-bf16", "--gradient-release", "--activation-checkpointing")
    assert result.exit_code == 0, result.output
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in result.output.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["weights"]] == ["12.55"] * 3
    assert [cell.strip() for cell in rows["optimizer state"]] == ["3.53", "12.75", "25.10"]
    assert rows["smallest GPU"][0].strip() == "24 GB"


@pytest.mark.parametrize("engine", [engine for engine in Engine if engine is not Engine.single])
def test_every_engine(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = plan("--model", TINY, "--gpus", "3", "--engine", engine.value, "--json", str(file))
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert content["unit"] == "bytes" and content["job"]["gpus"] == 3 and content["job"]["engine"] == engine.value
    for optimizer in ("MicroAdam", "8-bit AdamW", "AdamW"):
        found = content["optimizers"][optimizer]
        resident = found["weights"] + found["master"] + found["optimizer_state"]
        phases = (
            found["gradients"] + found["activations"] + found["logits"] + found["working"] + found["buffers"],
            found["step_gradients"] + found["step_buffers"],
        )
        assert found["total"] == resident + max(phases)
        assert found["smallest_gpu"]["bytes"] >= found["needed_on_gpu"] > found["total"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"plan.{suffix}"
    assert plan("--model", "13b", "--engine", "zero2", "--gpus", "8", "--plot", str(file)).exit_code == 0
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in content


def test_model_folder_and_cached_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(Path(TINY).read_text())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = []
    for model in ("some/model", str(snapshot), TINY):
        assert plan("--model", model, "--json", str(tmp_path / "plan.json")).exit_code == 0
        found.append(json.loads((tmp_path / "plan.json").read_text())["optimizers"])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "no/such-model"], 1, "hf download no/such-model config.json"),
        (["--model", "not a model"], 1, "no such file or folder, not built in (7b, 13b,"),
        (["--model", "7b", "--engine", "zero4"], 2, "'zero4' is not one of 'single', 'ddp'"),
        (["--model", "7b", "--dtype", "bf61"], 2, "'bf61' is not one of 'fp32', 'bf16', 'pure-bf16'"),
        (["--model", "7b", "--windowsize", "2"], 2, "No such option: --windowsize"),
        (["--model", "7b", "--gpus", "0"], 2, "Invalid value for '--gpus'"),
        (["--model", "7b", "--density", "2"], 1, "density=2.0: expected a number in (0, 1]"),
        (["--model", "7b", "--ef-bits", "3"], 1, "ef_bits=3: expected one of"),
        (["--model", "7b", "--gpus", "8"], 1, "choose another engine"),
        (["--model", "7b", "--json", "/nonexistent/plan.json"], 1, "/nonexistent/plan.json"),
        (["--model", "7b", "--plot", "plan.doc"], 1, "--plot plan.doc: Format 'doc' is not supported"),
        ([], 2, "Missing option '--model'"),
    ],
)
def test_errors(arguments: list[str], code: int, message: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
