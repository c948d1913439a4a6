"""`train.py --single-gpu`: its loss, its gradients, its checkpoints, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.live_bytes import LiveBytes
from tests.launch.runs import LAUNCH, ROOT, TINY_LLAMA, assert_same_run, options
from tests.text import SEQ_LEN, batch, tiny_llama

VOCAB, CHUNK = TINY_LLAMA["vocab_size"], 100  # the last chunk is a shorter one


# ------------------------------------------------------------------ loss


def loss_and_gradients(dtype: torch.dtype, chunk: int | None, **inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    from training.chunked_loss import use_chunked_loss

    model = tiny_llama().to(dtype)
    if chunk is not None:
        use_chunked_loss(model, chunk)
    loss = model(input_ids=batch(0), **inputs).loss
    loss.backward()
    return loss.detach(), [param.grad for param in model.parameters()]


def some_labels() -> torch.Tensor:
    labels = batch(0)
    labels[0, :50] = -100  # a prompt
    return labels


@pytest.mark.parametrize("num_items", [None, 7])
def test_chunked_loss_is_the_plain_one(num_items: int | None) -> None:
    inputs = {"labels": some_labels(), "num_items_in_batch": num_items}
    expected, gradients = loss_and_gradients(torch.float32, None, **inputs)
    loss, chunked = loss_and_gradients(torch.float32, CHUNK, **inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(chunked, gradients, rtol=1e-5, atol=1e-5 * float(expected))


def test_chunked_loss_in_bf16() -> None:
    """As far from the fp32 gradients as the plain loss."""
    _, exact = loss_and_gradients(torch.float32, None, labels=some_labels())
    _, plain = loss_and_gradients(torch.bfloat16, None, labels=some_labels())
    _, chunked = loss_and_gradients(torch.bfloat16, CHUNK, labels=some_labels())
    for true, one, other in zip(exact, plain, chunked, strict=True):
        assert (other - true).norm() < 1.1 * (one - true).norm() + 2**-9 * true.norm()


class LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor with a column per token of the vocabulary that does not hold weights."""

    num_rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCAB:
                self.num_rows = max(self.num_rows, tensor.numel() // VOCAB)
        return outputs


@pytest.mark.parametrize(("chunk", "expected"), [(CHUNK, CHUNK), (None, 4 * SEQ_LEN)])
def test_logits_never_exist_whole(chunk: int | None, expected: int) -> None:
    with LargestLogits() as largest:
        loss_and_gradients(torch.bfloat16, chunk, labels=some_labels())
    assert largest.num_rows == expected


def test_logits_of_one_chunk_at_a_time() -> None:
    from training.chunked_loss import ChunkedCrossEntropy

    weight, peaks = torch.zeros(1000, 8, dtype=torch.bfloat16, requires_grad=True), []
    for num_chunks in (1, 4):
        hidden = torch.zeros(num_chunks * CHUNK, 8, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(len(hidden), dtype=torch.long)
        weight.grad = None
        with LiveBytes() as live:
            ChunkedCrossEntropy.apply(hidden, weight, targets, CHUNK).backward()
        peaks.append(live.peak - hidden.nbytes)  # its gradient
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_chunked_loss_needs_a_llama() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from training.chunked_loss import use_chunked_loss
    from training.errors import UserError

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(UserError, match="not 'gpt2': install liger-kernel"):
        use_chunked_loss(model, 8)


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, as Accelerate keeps its state and the script sets environment variables."""
    with ProcessPoolExecutor(1, get_context("spawn"), _start_worker) as pool:
        yield pool


def _start_worker() -> None:
    torch.set_num_threads(1)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU, too, runs are compared in every bit
    torch.utils.deterministic.fill_uninitialized_memory = False  # memory is measured


def _train(run: dict[str, Any], shard_size: str = "2GB") -> dict[str, Any]:
    """Train; returns what was seen on the way."""
    from transformers import Trainer, TrainerCallback

    import train
    from microadam_dist.optimizer.gradient_release import ReleasedGradient
    from training import model as model_module
    from training.options import Options

    seen: dict[str, Any] = {"alive": [], "saving": []}

    class CountGradients(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            def count(_: Any) -> None:
                grads = [param.grad for param in model.parameters()]
                alive = sum(grad is not None and not isinstance(grad, ReleasedGradient) for grad in grads)
                seen["alive"].append(alive)

            for param in model.parameters():
                param.register_post_accumulate_grad_hook(count)
            seen["dtypes"] = {param.dtype for param in model.parameters()}
            seen["attention"] = model.config._attn_implementation

    build, save = train.build_trainer, Trainer._save_checkpoint

    def build_trainer(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(CountGradients())
        return trainer

    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        save(self, *args, **kwargs)
        seen["saving"].append(_resident("VmHWM") - before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_trainer", build_trainer)
        patch.setattr(model_module, "SHARD_SIZE", shard_size)
        patch.setattr(Trainer, "_save_checkpoint", save_checkpoint)
        train.train(Options(**run))
    return seen


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def test_a_resumed_run_is_the_uninterrupted_one(text: Path, tmp_path: Path, worker: ProcessPoolExecutor) -> None:
    """With checkpoints in several files."""
    run = {"steps": 6, "save_steps": 3, "logging_steps": 1, "lr": 4e-3, "single_gpu": True}
    seen = worker.submit(_train, options(text, tmp_path / "straight", **run), "100KB").result()
    assert set(seen["alive"]) == {1} and len(seen["alive"]) == 6 * 12
    assert seen["dtypes"] == {torch.bfloat16} and seen["attention"] == "sdpa"
    metrics = json.loads((tmp_path / "straight" / "metrics.json").read_text())
    assert metrics["heldout_after"] < metrics["heldout_before"] - 0.1
    assert 0 < metrics["optimizer_seconds"] < metrics["seconds"]
    assert metrics["tokens_per_second_without_optimizer"] > metrics["tokens_per_second"]
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    worker.submit(_train, options(text, tmp_path / "resumed", resume=str(checkpoint), **run)).result()
    worker.submit(_train, options(text, tmp_path / "again", **run)).result()  # in one file, as assert_same_run reads it
    assert_same_run(tmp_path / "resumed", tmp_path / "again")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_takes_little_memory(text: Path, tmp_path: Path, worker: ProcessPoolExecutor) -> None:
    wide = TINY_LLAMA | {"hidden_size": 1664, "intermediate_size": 6656}
    (tmp_path / "model.json").write_text(json.dumps(wide))
    short = tmp_path / "text.txt"
    short.write_text(text.read_text()[:400])  # of weights this large a CPU takes long to make products in bf16
    run = options(short, tmp_path / "run", seq_len=8, steps=1, save_steps=1, single_gpu=True)
    seen = worker.submit(_train, run).result()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    kept = 2 * metrics["num_params"] + metrics["state"]["state_bytes"]
    assert kept > 100e6  # what else takes memory is little beside it
    assert seen["saving"][0] < 0.1 * kept


# ------------------------------------------------------------------ refusals

REFUSED = {
    "clip": ({"clip": 1.0}, "cannot clip by the global norm"),
    "accumulation": ({"grad_accum": 4}, "cannot accumulate gradients"),
    "optimizer": ({"optimizer": "adamw"}, "needs MicroAdam"),
    "dtype": ({"dtype": "fp16"}, "trains in pure-bf16|--dtype fp16 exclude each other"),
    "shard state": ({"shard_state": "touched"}, "--shard-state exclude each other"),
    "deepspeed": ({"deepspeed": ROOT / "configs/deepspeed/zero2_bf16.json"}, "--deepspeed exclude each other"),
}


def resolved(text: Path, **more: Any) -> Any:
    from training import options as module

    enums = {"optimizer": module.OptimizerName, "dtype": module.Dtype, "shard_state": module.Exchange}
    more = {name: enums[name](value) if name in enums else value for name, value in more.items()}
    return module.resolve(module.Options(**options(text, Path("none"), **more)))[0]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("flag", ["single_gpu", "gradient_release"])
def test_refused(flag: str, name: str, text: Path) -> None:
    from training.errors import UserError

    contradiction, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        resolved(text, **{flag: True}, **contradiction)
    assert "--" + flag.replace("_", "-") in str(error.value)


@pytest.mark.parametrize("variable", [{"RANK": "0"}, {"ACCELERATE_USE_FSDP": "true"}])
@pytest.mark.parametrize("flag", [{"single_gpu": True}, {"gradient_release": True}, {"loss_chunk": 8}])
def test_one_process(
    flag: dict[str, Any], variable: dict[str, str], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.errors import UserError

    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="is for one process"):
        resolved(text, **flag)


def test_offloading_without_checkpoints_of_activations(text: Path) -> None:
    from training.errors import UserError

    with pytest.raises(UserError, match="add that"):
        resolved(text, offload_activations=True)
    assert resolved(text, offload_activations=True, single_gpu=True).gradient_checkpointing


def test_loss_chunk_without_autocast(text: Path) -> None:
    from training.errors import UserError

    with pytest.raises(UserError, match="no mixed precision: add --dtype"):
        resolved(text, loss_chunk=8)
    assert resolved(text, loss_chunk=8, dtype="fp32").clip == 1


def test_what_the_preset_stands_for(text: Path) -> None:
    parts = {"dtype": "pure-bf16", "gradient_release": True, "gradient_checkpointing": True}
    assert dataclasses.replace(resolved(text, single_gpu=True), single_gpu=False) == resolved(text, **parts)
    assert resolved(text).clip == 1 and resolved(text, single_gpu=True).clip == 0


# ------------------------------------------------------------------ measuring script


def _measure(optimizer: str, model: str, seq: int, json_file: Path, **settings: Any) -> dict[str, Any]:
    sys.path.insert(0, str(LAUNCH / "bench"))
    import single_gpu

    chosen, settings = single_gpu.Choice(optimizer), {"window_size": 2, "density": 0.05, **settings}
    single_gpu.main(model, chosen, steps=2, seq=seq, batch=1, json_file=json_file, **settings)
    return json.loads(json_file.read_text())


def assert_as_planned(found: dict[str, Any]) -> None:
    assert found["most_gradients_alive"] == 1
    for name in ("weight_bytes", "optimizer_bytes"):
        assert found[name] == found[f"planned_{name}"]


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("microadam", {}),
        *(("microadam", {"ef_bits": bits, "window_size": 1}) for bits in (0, 1, 1.6, 2, 8)),
        ("microadam", {"offload_activations": True}),
        ("adamw", {}),
    ],
    ids=str,
)
def test_measured_as_planned(
    optimizer: str, settings: dict[str, Any], tmp_path: Path, worker: ProcessPoolExecutor
) -> None:
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps(TINY_LLAMA))
    found = worker.submit(_measure, optimizer, str(model), 64, tmp_path / "out.json", **settings).result()
    assert_as_planned(found)
    # Here host memory is that of the device.
    assert found["peak_bytes"] == pytest.approx(found["planned_peak_bytes"] + found["planned_host_bytes"], rel=0.1)
    assert 0 < found["optimizer_share"] < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("settings", [{}, {"ef_bits": 1.6, "offload_activations": True}], ids=str)
def test_on_a_gpu(settings: dict[str, Any], tmp_path: Path, worker: ProcessPoolExecutor) -> None:
    """The peak includes making the model; Liger-Kernel, where it is installed, has fewer logits than planned."""
    found = worker.submit(_measure, "microadam", "100m", 512, tmp_path / "out.json", **settings).result()
    assert_as_planned(found)
    assert found["peak_bytes"] < 1.1 * found["planned_peak_bytes"]
