"""Text to packed token blocks: local files or a hub dataset, cut into sequences of one length.

Documents are tokenized, closed by the end-of-text token, laid end to end and cut: no padding, and a sequence may hold
parts of several documents. The tokens of a prompt count as context only (label -100).
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import UserError
from .sources import TEXT_SUFFIXES, is_path

IGNORED = -100
BATCH_DOCUMENTS = 1000


class Document(NamedTuple):
    """A text, and the prompt before it, which is context only."""

    text: str
    prompt: str = ""


class PackedBlocks(torch.utils.data.Dataset):
    """Packed sequences in a file that all ranks of a machine map instead of each holding a copy."""

    def __init__(self, path: Path) -> None:
        self.blocks = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids, labels = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": input_ids, "labels": labels}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the hub, or the built-in "bytes".

    Raises:
        UserError: there is none under this name.
    """
    if name == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in '{name}': {error}") from None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 single-byte symbols, token id = byte value, no merges, then end-of-text (256) and padding (257)."""
    # ByteLevel stands every byte for a printable character: itself where it is one, else the next from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def read_documents(sources: Iterable[str]) -> Iterator[Document]:
    """Documents of local files and folders (sorted by path) and of hub datasets, in the order given.

    Raises:
        UserError: a source that is neither, of an unknown format, not UTF-8, or with a line that is no document.
    """
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.suffix in (*TEXT_SUFFIXES, ".jsonl")]
            if not files:
                raise UserError(f"no {', '.join(TEXT_SUFFIXES)} or .jsonl file in {path}")
            yield from chain.from_iterable(map(_read_file, files))
        elif path.exists():
            yield from _read_file(path)
        elif is_path(source, is_text=True):
            raise UserError(f"no such file or folder: {source}")
        else:
            yield from _read_hub(source)


def _read_file(path: Path) -> Iterator[Document]:
    if path.suffix in TEXT_SUFFIXES:
        try:
            yield Document(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            line = 1 + error.object.count(b"\n", 0, error.start)
            raise UserError(f"{path}:{line}: {_no_utf8(error)}") from None
    elif path.suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _read_record(line, f"{path}:{number}")
    else:
        raise UserError(f"{path}: expected {', '.join(TEXT_SUFFIXES)} or .jsonl")


def _no_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"byte 0x{error.object[error.start]:02x} is not UTF-8: convert the file first, as with iconv -f latin1 -t utf-8"
    )


def _read_record(line: bytes, where: str) -> Document:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {_no_utf8(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    return _to_document(record, where)


def _to_document(record: object, where: str) -> Document:
    """Raises a UserError unless it has "text", or "prompt" and "response", and they are text."""
    expected = "expected an object with 'text', or with 'prompt' and 'response'"
    if not isinstance(record, dict):
        raise UserError(f"{where}: got a {type(record).__name__}, {expected}")
    names = ("text",) if "text" in record else ("response", "prompt")
    for name in names:
        if name not in record:
            raise UserError(f"{where}: {name!r} is missing among {list(record)}, {expected}")
        if not isinstance(record[name], str):
            raise UserError(f"{where}: {name!r} is a {type(record[name]).__name__}, expected text")
        try:
            record[name].encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: {name!r} has half a surrogate pair, {ascii(error.object[error.start])}"
            ) from None
    return Document(*(record[name] for name in names))


def _read_hub(name: str) -> Iterator[Document]:
    import datasets  # slow to import, and most runs read local files

    name, subset, split = (*name.split(":"), "", "")[:3]
    try:
        dataset = datasets.load_dataset(name, subset or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise UserError(f"'{name}' is neither a local path nor a dataset that the hub gives: {error}") from None
    for row, record in enumerate(dataset):
        yield _to_document(record, f"dataset '{name}', row {row}")


def pack(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, seq_len: int, title: str = "the data"
) -> np.ndarray:
    """Tokenize and cut; the incomplete last sequence and sequences without a token to predict are dropped.

    Args:
        title: What the documents are, for the message.

    Returns:
        (num_blocks, 2, seq_len) int32: input ids and labels.

    Raises:
        UserError: not enough text for one sequence.
    """
    ids, labels = array("i"), array("i")
    documents, num_documents = iter(documents), 0
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        num_documents += len(batch)
        for prompt, answer in _tokenize(batch, tokenizer):
            ids.extend(prompt + answer)
            labels.extend([IGNORED] * len(prompt) + answer)
    num_blocks = len(ids) // seq_len
    if not num_blocks:
        raise UserError(
            f"{title} has {num_documents} document(s) with {len(ids)} tokens in all, and one sequence of --seq-len "
            f"{seq_len} needs {seq_len}: give more text, or a smaller --seq-len"
        )
    blocks = np.stack([np.frombuffer(part, np.int32)[: num_blocks * seq_len] for part in (ids, labels)])
    blocks = blocks.reshape(2, num_blocks, seq_len).swapaxes(0, 1)
    # The first label of a sequence is never predicted: there is nothing before it.
    blocks = blocks[(blocks[:, 1, 1:] != IGNORED).any(axis=1)]
    if not len(blocks):
        raise UserError(
            f"{title} has {num_blocks} sequence(s) of --seq-len {seq_len}, all of prompts without a token of a "
            "response: give shorter prompts, or a larger --seq-len"
        )
    return blocks


def _tokenize(batch: list[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of prompt (if any) and text of each document; the start token, if any, opens the document."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(texts: list[str], special: bool) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]

    openings = encode([document.prompt or document.text for document in batch], special=True)
    answers = encode([document.text if document.prompt else "" for document in batch], special=False)
    for document, opening, answer in zip(batch, openings, answers, strict=True):
        yield (opening, answer + end) if document.prompt else ([], opening + end)


def write_blocks(
    folder: Path, tokenizer: PreTrainedTokenizerBase, seq_len: int, data: list[str], eval_source: list[str] | float
) -> None:
    """Pack training and held-out text into `train.npy` and `eval.npy`, and tell in `train.sha256` what was read.

    Args:
        eval_source: held-out text, or the fraction of the training sequences, the last ones, to hold out.

    Raises:
        UserError: unreadable or too little text, or no room for its tokens.
    """
    digest = hashlib.sha256()
    train = pack(_hashed(read_documents(data), digest), tokenizer, seq_len, f"--data {' '.join(data)}")
    if isinstance(eval_source, float):
        digest.update(str(eval_source).encode())
        num_eval = max(1, round(eval_source * len(train)))
        if num_eval == len(train):
            raise UserError(
                f"--data {' '.join(data)} has {len(train)} sequence(s) of --seq-len {seq_len}, and {num_eval} of them "
                "would be held out: give more text, a smaller --seq-len, or --eval-data"
            )
        train, heldout = train[:-num_eval], train[-num_eval:]
    else:
        heldout = pack(read_documents(eval_source), tokenizer, seq_len, f"--eval-data {' '.join(eval_source)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, blocks in (("train", train), ("eval", heldout)):
        # Written aside and renamed: the machines of a cluster may share the folder.
        scratch = folder / f"{name}.{os.getpid()}.tmp.npy"
        try:
            np.save(scratch, blocks)
            scratch.replace(folder / f"{name}.npy")
        except OSError as error:  # numpy's own, of a full disk, knows neither file nor reason
            raise UserError(f"{folder / name}.npy cannot be written: {error.strerror or error}") from None
        finally:
            scratch.unlink(missing_ok=True)
    (folder / "train.sha256").write_text(digest.hexdigest())


def _hashed(documents: Iterable[Document], digest: hashlib._Hash) -> Iterator[Document]:
    for document in documents:
        for part in document:
            content = part.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
        yield document
