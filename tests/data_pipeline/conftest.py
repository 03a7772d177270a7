"""Small corpora and folders of shards that the tests of the data pipeline share."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.errors import LeviathanError
from data_pipeline.config import DataConfig, SourceConfig
from tests.data_pipeline.building import jsonl
from tests.data_pipeline.store import Store, many_shards

Text = Callable[[int, int], str]


@pytest.fixture
def prose() -> Text:
    """prose(seed, words): the same sentences for the same seed."""

    def make(seed: int, words: int) -> str:
        draw = random.Random(seed)
        known = ["the", "of", "läuft", "water", "seven", "Moby", "whale,", "sea.\n", "ahead", "日本", "if (x)\n    y"]
        return " ".join(draw.choice(known) + str(draw.randrange(50)) for _ in range(words))

    return make


@pytest.fixture
def config() -> Callable[..., DataConfig]:
    """config(source=path, ..., key=value): a data configuration; sources are given by name as path or SourceConfig."""

    def make(sources: dict[str, str | Path | SourceConfig], **keys: object) -> DataConfig:
        made = {n: s if isinstance(s, SourceConfig) else SourceConfig(path=str(s)) for n, s in sources.items()}
        return DataConfig(sources=made, **keys)

    return make


@pytest.fixture
def hashes() -> Callable[[Path], dict[str, str]]:
    """hashes(folder): the sha256 of every file in it, without the records of the build."""

    def make(folder: Path) -> dict[str, str]:
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return make


@pytest.fixture
def tale(tmp_path: Path, prose: Callable[[int, int], str]) -> Path:
    """A source of two files: 400 documents, of which every tenth is told twice, and 20 long ones."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [prose(n, 20 + n % 30) for n in range(400)]
    texts[9::10] = texts[4:204:5]
    jsonl(folder / "a.jsonl", texts)
    (folder / "b.txt").write_text("<|>".join(prose(10_000 + n, 900) for n in range(20)))
    return folder


@pytest.fixture
def data(tale: Path, config: Callable[..., DataConfig]) -> DataConfig:
    """Some twenty slices of two sources."""
    source = SourceConfig(path=str(tale), separator="<|>")
    return config({"tale": source, "again": source}, shard_mib=0.04, heldout=0.05)


@pytest.fixture
def says() -> Callable[..., None]:
    """says(error, words...): a message is one sentence without a traceback, and holds these words."""

    def check(error: pytest.ExceptionInfo[LeviathanError], *words: str) -> None:
        text = str(error.value)
        assert "\n" not in text
        assert error.value.__cause__ is None
        for word in words:
            assert word in text, f"{word!r} is not in {text!r}"

    return check


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of many small shards."""
    return many_shards(corpus, tmp_path_factory.mktemp("many"))


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The same folder behind a web server that fails as it is told."""
    with Store(folder).running(monkeypatch) as store:
        yield store
