"""What is trained: a Llama on text, a CNN or a ViT on digits; three splits, training, validation and test."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.errors import UserError
from training.packing import IGNORED, Document, byte_tokenizer, pack, read_documents
from training.sample_texts import python_reference, stdlib_source, torch_docstrings

from .config import DigitsTask, Pretraining, Task, TextTask, content_key

MODEL_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "models" / "byte-llama-1m.json"
TEXTS = {
    "stdlib": lambda: stdlib_source(3_000_000),
    "python-reference": python_reference,
    "torch-docstrings": lambda: torch_docstrings(1_000_000),
}
SPLITS = ("train", "validation", "test")

# Text is dealt out in chunks of this many sequences, 8 of 10 for training: every part of it is in all three splits.
_CHUNK = 16
_EVAL_BATCH = 16
_DIGITS_SPLIT = (0.6, 0.2, 0.2)


class Losses(NamedTuple):
    """Mean loss in nats per token or image, and the fraction of right predictions."""

    loss: float
    accuracy: float


def prepare_data(task: Task, folder: Path) -> str:
    """Write the splits of a task as .npy files, unless they are there, and return the hash of what is in them.

    Raises:
        UserError: No data.
    """
    hashes = [_prepare_splits(task, folder)]
    if isinstance(task, TextTask) and task.pretrain:
        hashes.append(_prepare_splits(_pretraining_task(task, task.pretrain), folder))
    return content_key(*hashes)


def _prepare_splits(task: Task, folder: Path) -> str:
    target = _data_folder(task, folder)
    stamp = target / "sha256"
    if not stamp.is_file():
        splits = _text_splits(task) if isinstance(task, TextTask) else _digits_splits()
        target.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        for name, array in zip(SPLITS, splits, strict=True):
            np.save(target / f"{name}.npy", array)
            digest.update(array.tobytes())
        stamp.write_text(digest.hexdigest())
    return stamp.read_text()


def _data_folder(task: Task, folder: Path) -> Path:
    source = [_version(task.data), task.seq_len] if isinstance(task, TextTask) else "digits"
    return folder / "data" / content_key(source)


def _version(data: str) -> list[object]:
    """Changes when the text does, so that no old copy of it is used."""
    if data in TEXTS:
        return [data, sys.version, torch.__version__]
    path = Path(data)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [data, *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())]


def _text_splits(task: TextTask) -> list[np.ndarray]:
    """(num_sequences, 2, seq_len) int32 each: input ids and labels."""
    if task.data in TEXTS:
        documents = iter([Document(TEXTS[task.data]())])
    else:
        documents = read_documents([task.data])
    blocks = pack(documents, byte_tokenizer(), task.seq_len)
    part = np.arange(len(blocks)) // _CHUNK % 10
    splits = [blocks[part < 8], blocks[part == 8], blocks[part == 9]]
    if not all(map(len, splits)):
        raise UserError(f"{task.data}: {len(blocks)} sequences of {task.seq_len} bytes, {10 * _CHUNK} are needed")
    return splits


def _digits_splits() -> list[np.ndarray]:
    """(num_images, 65) float32 each: 64 pixels and the digit."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('the digits are scikit-learn\'s: pip install -e ".[study]"') from None
    images, digits = load_digits(return_X_y=True)
    rows = np.concatenate([images / 16, digits[:, None]], axis=1, dtype=np.float32)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    edges = np.cumsum([round(fraction * len(rows)) for fraction in _DIGITS_SPLIT[:2]])
    return np.split(rows, edges)


class Problem:
    """A task with its data.

    Args:
        task: Its settings.
        folder: Output folder of the study, after `prepare_data` has been there.
        device: Where the model and what it reads lie.
    """

    def __init__(self, task: Task, folder: Path, device: str) -> None:
        self.task, self.folder, self.device = task, folder, device
        if device == "cuda":
            torch.set_float32_matmul_precision("high")
        self._splits = {name: np.load(_data_folder(task, folder) / f"{name}.npy", mmap_mode="r") for name in SPLITS}

    def make_model(self) -> nn.Module:
        """The model at its starting point: pre-trained, or random from torch's current seed."""
        if isinstance(self.task, DigitsTask):
            model = make_cnn() if self.task.model == "cnn" else make_vit()
            return model.to(self.device)
        model = make_llama(self.task.model)
        if self.task.pretrain:
            path = pretrained_path(self.task, self.folder, self.device)
            model.load_state_dict(torch.load(path, map_location="cpu"))
        return model.to(self.device)

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Training batches without end: epoch after epoch, each in its own order."""
        rows, size = self._splits["train"], self.task.batch_size
        order = np.random.default_rng(seed)
        while True:
            shuffled = order.permutation(len(rows))
            for start in range(0, len(rows) - size + 1, size):
                yield torch.from_numpy(rows[np.sort(shuffled[start : start + size])])

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean loss of a batch."""
        logits, targets = self._predict(model, batch)
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> Losses:
        """Mean over a split, "validation" or "test"."""
        rows = self._splits[split]
        if isinstance(self.task, TextTask):
            rows = rows[: self.task.eval_sequences]
        loss = hits = total = 0.0
        for start in range(0, len(rows), _EVAL_BATCH):
            logits, targets = self._predict(model, torch.from_numpy(np.array(rows[start : start + _EVAL_BATCH])))
            logits = logits.float()  # a sum in bf16 is wrong by 0.2 %
            loss += float(functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            hits += int((logits.argmax(1) == targets).sum())
            total += int((targets != IGNORED).sum())
        return Losses(loss / total, hits / total)

    def _predict(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) and targets (n,)."""
        batch = batch.to(self.device)
        if isinstance(self.task, TextTask):
            input_ids, labels = batch.long().unbind(1)
            return model(input_ids=input_ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        images = batch[:, :-1].view(-1, 1, 8, 8)
        logits = model(images)
        return logits if isinstance(logits, Tensor) else logits.logits, batch[:, -1].long()


def pretrained_path(task: TextTask, folder: Path, device: str) -> Path:
    """Where the weights are that a fine-tuning task begins with."""
    assert task.pretrain
    how = _pretraining_task(task, task.pretrain)
    identity = [how.model_dump(), task.pretrain.lr, _data_folder(how, folder).name]
    identity += [device] if device != "cpu" else []
    return folder / "pretrained" / f"{content_key(identity)}.pt"


def pretrain(task: TextTask, folder: Path, device: str) -> None:
    """Train the starting point of a fine-tuning task, unless it is there."""
    path = pretrained_path(task, folder, device)
    if path.is_file() or task.pretrain is None:
        return
    torch.manual_seed(0)
    problem = Problem(_pretraining_task(task, task.pretrain), folder, device)
    model = problem.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.pretrain.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.pretrain.steps)
    for _, batch in zip(range(task.pretrain.steps), problem.batches(seed=0), strict=False):
        optimizer.zero_grad()
        problem.loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    path.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _pretraining_task(task: TextTask, how: Pretraining) -> TextTask:
    return TextTask(
        kind="text",
        data=how.data,
        model=task.model,
        seq_len=task.seq_len,
        batch_size=how.batch_size,
        steps=how.steps,
        eval_every=how.steps,
    )


def make_llama(changes: dict[str, int]) -> nn.Module:
    """A byte-level Llama, with changes to the shape in configs/models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**json.loads(MODEL_CONFIG.read_text()), **changes}))


def make_cnn() -> nn.Module:
    """Three convolutions and two linear layers, 0.19 million parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def make_vit() -> nn.Module:
    """A ViT with 16 patches of 2 x 2 pixels, 0.23 million parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_labels=10,
        )
    )
