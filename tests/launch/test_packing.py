"""From text to packed sequences: every byte is there once, prompts are context only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

END, IGNORED = 256, -100


def pack(sources: list[Path], seq_len: int) -> tuple[list[int], list[int]]:
    from training.packing import byte_tokenizer, read_documents
    from training.packing import pack as pack_documents

    blocks = pack_documents(read_documents(map(str, sources)), byte_tokenizer(), seq_len)
    assert blocks.shape[1:] == (2, seq_len)
    return blocks[:, 0].flatten().tolist(), blocks[:, 1].flatten().tolist()


def test_text_is_packed_byte_by_byte(tmp_path: Path) -> None:
    texts = {"b.md": "zwei\n", "a.txt": "één", "sub/c.py": "x = 1\n", "ignored.bin": "no"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = [*"één".encode(), END, *b"zwei\n", END, *b"x = 1\n", END]
    ids, labels = pack([tmp_path], seq_len=len(expected) // 2)
    assert ids == labels == expected[: len(ids)]


def test_prompts_are_masked_from_the_loss(tmp_path: Path) -> None:
    records = [{"prompt": "2+2=", "response": "4"}, {"text": "plain"}, {"prompt": "say ", "response": "hello"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    ids, labels = pack([tmp_path / "data.jsonl"], seq_len=11)
    expected_ids = [*b"2+2=4", END, *b"plain", END, *b"say hello", END]
    expected_labels = [*[IGNORED] * 4, *b"4", END, *b"plain", END, *[IGNORED] * 4, *b"hello", END]
    assert (ids, labels) == (expected_ids[:22], expected_labels[:22])


def test_byte_tokenizer_survives_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from training.packing import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(map(chr, range(1, 300)))
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"question": 1}', "bad.jsonl:1"),
        ("broken.jsonl", '{"text": "fine"}\n{"text": ', "broken.jsonl:2"),
        ("short.txt", "x", "not enough"),
        ("table.csv", "1,2", "table.csv"),
    ],
)
def test_bad_data_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    from training.errors import UserError

    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        pack([tmp_path / name], seq_len=8)
