"""Documents, splits and rows of tokens."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import pandas as pd
import pytest
import torch
from companion.subject.compression import token_bytes
from companion.subject.train_lm import train_tokenizer

from jumprelu import corpus
from jumprelu.corpus import Tokens, as_tokens, load_texts, split_of, tokenize

BOS = 2


def document(number: int, words: int = 400) -> str:
    return f"# document {number}\n" + "".join(
        f"value_{number}_{i} = compute({i * number})\n" for i in range(words // 4)
    )


@pytest.fixture(scope="module")
def tokenizer():
    texts = datasets.Dataset.from_list([{"text": document(i)} for i in range(40)])
    return train_tokenizer(texts, vocab_size=400)


# ---- splits


def test_split_is_a_function_of_the_path_alone():
    # fixed for good: were these to change, the embedded model would be tested on what it was
    # trained on
    names = ["stdlib/abc.py", "torch/nn/functional.py", "sympy/core/expr.py", "rich/console.py"]
    assert [split_of(name) for name in names] == [split_of(name) for name in names]
    known = {"a/52.py": "test", "a/131.py": "test", "a/76.py": "validation", "a/0.py": "train"}
    assert {name: split_of(name) for name in known} == known


def test_split_shares():
    n = 20_000
    counts = Counter(split_of(f"package/module_{i}.py") for i in range(n))
    assert set(counts) == set(corpus.SPLITS)
    for split, percent in corpus.SPLITS.items():
        p = percent / 100
        assert abs(counts[split] / n - p) < 4 * (p * (1 - p) / n) ** 0.5, split


# ---- tokens


def test_rows_are_full_begin_with_bos_and_stay_within_a_document(tokenizer):
    texts = [{"text": document(i)} for i in range(5)]
    tokens = tokenize(texts, tokenizer, context_size=32)
    assert tokens.ids.shape[1] == 32 and tokens.ids.dtype == torch.int64
    assert (tokens.ids[:, 0] == BOS).all() and (tokens.ids[:, 1:] != BOS).all()
    pieces = token_bytes(tokenizer)
    for number in range(5):
        rows = tokens.ids[tokens.document == number]
        data = b"".join(pieces[i] for row in rows.tolist() for i in row[1:])
        text = texts[number]["text"].encode()
        assert text.startswith(data) and len(text) - len(data) < 31 * max(
            map(len, pieces)
        )  # only the short row is missing


TEXTS = [
    "tabs\t\tand\r\nlines\n\n\n",
    "naïve λ 漢字 🙂",
    "a <bos> b <eos><pad> c",
    "  \x00 \x7f 12345 __init__",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_give_back_the_exact_bytes(tokenizer, text):
    length = len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    row = tokenize([{"text": text}], tokenizer, context_size=1 + length)
    pieces = token_bytes(tokenizer)
    assert b"".join(pieces[i] for i in row.ids[0, 1:].tolist()) == text.encode()
    assert not set(row.ids[0, 1:].tolist()) & set(tokenizer.all_special_ids)


def test_rows_per_document_and_max_rows(tokenizer):
    texts = [{"text": document(i)} for i in range(6)]
    tokens = tokenize(texts, tokenizer, context_size=32, rows_per_document=2)
    assert tokens.document.tolist() == [d for d in range(6) for _ in range(2)]
    assert len(tokenize(texts, tokenizer, context_size=32, max_rows=5)) == 5


def test_order_of_a_dataset_depends_on_the_seed_alone(tokenizer):
    texts = datasets.Dataset.from_list([{"text": document(i)} for i in range(20)])
    first, again, other = (
        tokenize(texts, tokenizer, 32, max_rows=40, seed=seed).ids for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_document_fills_a_row(tokenizer):
    with pytest.raises(
        ValueError, match="no document has 255 tokens: choose a context_size below 256"
    ):
        tokenize([{"text": "short"}], tokenizer)


def test_tokens_take_rows_and_plain_tensors():
    tokens = as_tokens(torch.arange(12, dtype=torch.int32).reshape(4, 3))
    assert tokens.ids.dtype == torch.int64 and tokens.document.tolist() == [0, 1, 2, 3]
    part = tokens[torch.tensor([3, 1])]
    assert isinstance(part, Tokens) and part.document.tolist() == [3, 1] and len(tokens[:2]) == 2
    assert as_tokens(tokens) is tokens


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, dtype=torch.long), torch.zeros(2, 3), torch.zeros(0, 3).long(), [[1, 2]]]
)
def test_tokens_of_another_form(bad):
    with pytest.raises(ValueError, match=r"integer ids of shape \[n_rows, context_size\]"):
        as_tokens(bad)


# ---- local sources


def write_source(folder, kind: str, texts: list[str], column: str = "text"):
    folder.mkdir()
    if kind == "text":
        for i, text in enumerate(texts):
            (folder / f"{i}.txt").write_text(text)
    elif kind == "jsonl":
        half = len(texts) // 2
        for name, part in (("a", texts[:half]), ("b", texts[half:])):
            (folder / f"{name}.jsonl").write_text(
                "".join(json.dumps({column: text}) + "\n" for text in part)
            )
    else:
        pd.DataFrame({column: texts}).to_parquet(folder / "a.parquet")
    return folder


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_local_folders_are_divided_by_content(tmp_path, kind):
    texts = [document(i, words=20) for i in range(300)]
    source = str(write_source(tmp_path / kind, kind, texts))
    loaded = {split: [row["text"] for row in load_texts(source, split)] for split in corpus.SPLITS}
    assert sorted(sum(loaded.values(), [])) == sorted(texts)
    assert all(loaded.values())
    rows = list(load_texts(source, "test"))
    assert all(split_of(row["path"]) == "test" for row in rows)


def test_one_file_and_a_folder_of_it_are_the_same(tmp_path):
    folder = write_source(tmp_path / "source", "parquet", [document(i, 20) for i in range(60)])
    assert list(load_texts(str(folder), "train")) == list(
        load_texts(str(folder / "a.parquet"), "train")
    )


def test_errors_of_sources_say_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match="unknown split 'dev': expected one of test, validation, train"
    ):
        load_texts("installed", "dev")
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*missing"):
        load_texts(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="no such file or folder: missing.jsonl"):
        load_texts("missing.jsonl")
    with pytest.raises(ValueError, match="`text` column of strings, found columns .*'content'"):
        load_texts(str(write_source(tmp_path / "columns", "jsonl", ["a", "b"], column="content")))
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.jsonl").write_text("")
    for source in ("empty", "nothing.jsonl"):
        with pytest.raises(ValueError, match="no files with content: expected files of one kind"):
            load_texts(str(tmp_path / source))
    mixed = write_source(tmp_path / "mixed", "jsonl", ["a", "b"])
    (mixed / "readme.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"\['json', 'text'\].*expected files of one kind"):
        load_texts(str(mixed))


def test_empty_and_hidden_files_of_a_folder_are_left_out(tmp_path):
    folder = write_source(tmp_path / "source", "jsonl", [document(i, 20) for i in range(60)])
    expected = list(load_texts(str(folder), "train"))
    (folder / "c.jsonl").write_text("")
    (folder / ".gitattributes").write_text("*.jsonl text\n")
    assert list(load_texts(str(folder), "train")) == expected
