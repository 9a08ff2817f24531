"""The texts of the embedded language model: which documents are taken."""

from __future__ import annotations

import datasets
import pytest

from jumprelu.corpus import SPLITS, load_texts, split_of
from jumprelu.subject import texts as subject_texts
from jumprelu.subject.texts import installed_files


def document(number: int) -> str:
    return f"# document {number}\n" + "".join(
        f"value_{number}_{i} = compute({i * number})\n" for i in range(100)
    )


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The default corpus over files of our own: a function that writes documents and loads every
    split."""
    monkeypatch.setenv("JUMPRELU_CACHE", str(tmp_path / "cache"))

    def load(texts: dict[str, str]) -> dict[str, datasets.Dataset]:
        files = []
        for name, text in texts.items():
            path = tmp_path / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            files.append((name, str(path)))
        monkeypatch.setattr(subject_texts, "installed_files", lambda: sorted(files))
        return {split: load_texts("installed", split) for split in SPLITS}

    return load


def test_installed_corpus_divides_every_document_once_and_keeps_one_of_each_content(installed):
    texts = {f"package/module_{i}.py": document(i) for i in range(200)}
    copies = {f"package/zcopy_{i}.py": document(i) for i in range(50)}
    loaded = installed(texts | copies)
    paths = [row["path"] for split in loaded.values() for row in split]
    assert sorted(paths) == sorted(
        texts
    )  # the first path keeps the content, whatever split its copy would be in
    assert all(split_of(row["path"]) == name for name, split in loaded.items() for row in split)
    assert min(len(split) for split in loaded.values()) > 0


def test_installed_corpus_leaves_out_short_long_and_foreign_documents(installed):
    odd = {"p/short.py": "x = 1\n", "p/long.py": "x = 1\n" * 50_000, "p/greek.md": "λόγος " * 500}
    kept = {f"p/module_{i}.py": document(i) for i in range(100)}
    loaded = installed(kept | odd)
    assert {row["path"] for split in loaded.values() for row in split} == set(kept)


def test_installed_files_are_named_without_the_place_of_installation():
    names = [name for name, _ in installed_files()]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert "stdlib/abc.py" in names and any(name.startswith("torch/") for name in names)
    assert not [name for name in names if name.startswith("/") or "site-packages" in name]
