"""Text that every machine has: the same at every reading."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline import corpora, embedded
from data_pipeline.config import SourceConfig
from tests.data_pipeline.reading import MIB, texts


@pytest.mark.parametrize("name", ["stdlib", "headers", "docs", "unicode"])
def test_embedded_text_is_the_same_at_every_reading(name: str) -> None:
    plan = corpora.plan("s", SourceConfig(path=name), MIB // 4)
    assert plan == corpora.plan("s", SourceConfig(path=name), MIB // 4)
    first = list(corpora.read(plan.slices[0]))
    assert first == list(corpora.read(plan.slices[0]))
    names = [document.name for document in first + list(corpora.read(plan.slices[-1]))]
    assert len(set(names)) == len(names) > 1
    assert not any(name.startswith("/") or ".." in name or "site-packages" in name for name in names)
    assert sum(len(document.text) for document in first) > MIB // 16


def test_the_documentation_is_prose_under_the_names_of_things() -> None:
    wanted = ("textwrap.py", "pydoc_data/topics.py")
    parts = [part for part in embedded.parts_of("docs") if part.name in wanted]
    found = {document.name: document.text for part in parts for document in embedded.read_part(part)}
    assert "textwrap.wrap\n\nWrap a single paragraph of text" in found["textwrap.py"]
    assert "def wrap(" not in found["textwrap.py"]
    assert found["pydoc_data/topics.py/truth"].startswith("Truth Value Testing")


def test_characters_are_listed_by_name() -> None:
    plan = corpora.plan("s", SourceConfig(path="unicode"), 64 * MIB)
    found = {document.name: document.text for part in plan.slices for document in corpora.read(part)}
    assert "U+0041 A LATIN CAPITAL LETTER A\n" in found["U+0000"]
    assert "U+1F600 😀 GRINNING FACE\n" in found["U+1F600"]
    assert "U+D800" not in found


def test_a_file_with_the_name_of_an_embedded_corpus_is_written_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "a.txt").write_text("mine")
    assert texts("./stdlib") == ["mine"]
