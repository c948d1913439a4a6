"""From text to packed sequences: every byte is there once, prompts are context only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
        ("bad.jsonl", b'{"question": 1}', "bad.jsonl:1: 'response' is missing among"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": ', "broken.jsonl:2: not JSON: Expecting value"),
        ("list.jsonl", b"\n\n[1]", "list.jsonl:3: got a list, expected an object"),
        ("null.jsonl", b'{"prompt": null, "response": "a"}', "null.jsonl:1: 'prompt' is a NoneType, expected text"),
        ("latin.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}', "latin.jsonl:2: byte 0xe9 is not UTF-8"),
        ("latin.md", b"fine\r\n\ncaf\xe9", "latin.md:3: byte 0xe9 is not UTF-8"),
        ("half.jsonl", b'{"text": "a\\ud800"}', r"half.jsonl:1: 'text' has half a surrogate pair, '\\ud800'"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl:1: not JSON: "),
        ("long.jsonl", b"9" * 10_000, "long.jsonl:1: not JSON: Exceeds the limit"),
        ("short.txt", b"x", r"the data has 1 document\(s\) with 2 tokens in all, and .* --seq-len 8 needs 8"),
        ("empty.jsonl", b"\n", r"the data has 0 document\(s\) with 0 tokens in all"),
        ("prompt.jsonl", b'{"prompt": "123456789", "response": ""}', r"1 sequence\(s\) of --seq-len 8, all of prompts"),
        ("table.csv", b"1,2", "table.csv: expected .txt, .md, .py or .jsonl"),
    ],
)
def test_bad_data_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    from training.errors import UserError

    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        pack([tmp_path / name], seq_len=8)


def test_too_little_to_hold_some_out(tmp_path: Path) -> None:
    from training.errors import UserError
    from training.packing import byte_tokenizer, write_blocks

    (tmp_path / "few.txt").write_text("x" * 14)
    for eval_source, message in ((0.05, "has 1 sequence.s. of --seq-len 8, and 1 of them"), (["few.txt"], "no such")):
        with pytest.raises(UserError, match=message):
            write_blocks(tmp_path / "packed", byte_tokenizer(), 8, [str(tmp_path / "few.txt")], eval_source)
    assert not (tmp_path / "packed").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
RECORDS = JSON | st.dictionaries(st.sampled_from(["text", "prompt", "response"]), JSON, max_size=3)
LINES = st.binary(max_size=20) | RECORDS.map(lambda record: json.dumps(record).encode())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=4))
def test_any_file_is_read_or_refused_by_its_line(lines: list[bytes], tmp_path: Path) -> None:
    from training.errors import UserError
    from training.packing import byte_tokenizer, pack, read_documents

    file = tmp_path / "any.jsonl"
    file.write_bytes(b"\n".join(lines))
    try:
        documents = list(read_documents([str(file)]))
    except UserError as error:
        assert str(error).startswith(f"{file}:")
    else:
        assert all(isinstance(part, str) for document in documents for part in document)
        ending = [document._replace(text=document.text + "12345678") for document in documents]
        assert not documents or len(pack(ending, byte_tokenizer(), 8))


@pytest.mark.parametrize(
    ("name", "is_text", "expected"),
    [
        ("owner/name", True, False),
        ("owner/name:subset:train", True, False),
        ("name", True, False),
        ("meta-llama/Llama-3.1-8B", False, False),
        ("none.csv", True, True),
        ("./none", False, True),
        ("/none", False, True),
        ("a/b/c", False, True),
        ("folder/none", True, True),
        ("", True, True),
        ("two words", False, True),
    ],
)
def test_the_hub_is_not_asked_for_a_path(
    name: str, is_text: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.sources import is_path

    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_path(name, is_text) == expected
