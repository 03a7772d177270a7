"""Text from a model: the rules of sampling, whole characters, the same text for the same seed, nothing recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.errors import DataError, UsageError
from data_pipeline.tokenizer import ByteTokenizer, make
from launcher.texts import write_text
from pretrain.config import ModelConfig
from pretrain.generate import Sampling, choose, generate
from pretrain.init import initialise
from pretrain.layout import Layout
from pretrain.models.build import build
from pretrain.run_folder import RunFolder
from pretrain.trained import Trained, load_trained
from tests.conftest import leviathan
from tests.data_pipeline.test_tokenizer import foreign
from tests.small_run import small_config, train_small

GREEDY = Sampling(temperature=0)
PROMPT = "the sea holds"


@pytest.fixture(scope="module")
def run(shards: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_small(small_config(tmp_path_factory.mktemp("generate"), shards, corpus))


@pytest.fixture(scope="module")
def trained(run: RunFolder) -> Trained:
    return load_trained(run)


def written(trained: Trained, sampling: Sampling, tokens: int = 24, prompt: str = PROMPT) -> str:
    return "".join(generate(trained.model, trained.dataset.tokenizer, prompt, tokens=tokens, sampling=sampling))


def test_the_likeliest_text_is_what_the_training_form_says_token_by_token(trained):
    told = written(trained, GREEDY, tokens=12)
    ids = list(PROMPT.encode())
    for _ in range(12):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            ids.append(int(trained.model.logits(tokens, Layout.single(1, len(ids)))[0, -1].argmax()))
    assert told == bytes(ids[len(PROMPT) :]).decode()


def test_a_seed_names_a_text(trained):
    warm = Sampling(temperature=1.0, seed=3)
    assert written(trained, warm) == written(trained, warm)
    assert written(trained, warm) != written(trained, Sampling(temperature=1.0, seed=4))


@pytest.mark.parametrize("sampling", [Sampling(top_k=1, seed=9), Sampling(top_p=1e-9, seed=9)])
def test_a_choice_of_one_is_the_likeliest(trained, sampling):
    assert written(trained, sampling) == written(trained, GREEDY)


def drawn(logits: list[float], sampling: Sampling, count: int = 400) -> list[float]:
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(0)
    draws = [choose(torch.tensor(logits, dtype=torch.float64), sampling, generator) for _ in range(count)]
    return [draws.count(token) / count for token in range(len(logits))]


LOGITS = [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(top_k=2), {2, 3}),
        (Sampling(top_k=9), {0, 1, 2, 3}),
        # softmax of 0..3 is 0.03, 0.09, 0.24, 0.64
        (Sampling(top_p=0.64), {3}),
        (Sampling(top_p=0.65), {2, 3}),
        (Sampling(top_p=0.9), {1, 2, 3}),
        (Sampling(top_k=3, top_p=0.8), {2, 3}),
    ],
)
def test_only_what_the_rule_allows_is_drawn(sampling, possible):
    odds = drawn(LOGITS, sampling)
    assert {token for token, share in enumerate(odds) if share > 0} == possible


def test_temperature_sharpens_and_flattens():
    cold, warm, hot = (drawn(LOGITS, Sampling(temperature=t))[3] for t in (0.5, 1.0, 5.0))
    assert cold > warm > hot
    assert warm == pytest.approx(0.64, abs=0.08)
    assert hot == pytest.approx(0.36, abs=0.08)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match="must not be negative"):
        Sampling(**wrong)


class Parrot:
    """A model that says given bytes, whatever it reads."""

    def __init__(self, ids: list[int]) -> None:
        self.device, self._ids = torch.device("cpu"), ids

    def initial_state(self, rows: int) -> int:
        return 0

    def decode(self, tokens_BT: torch.Tensor, state: int) -> tuple[torch.Tensor, int]:
        logits = torch.zeros(1, tokens_BT.shape[1], 257)
        logits[0, -1, self._ids[state]] = 1.0
        return logits, state + 1


def said(ids: list[int], tokens: int) -> list[str]:
    return list(generate(Parrot(ids), ByteTokenizer(), "x", tokens=tokens, sampling=GREEDY))  # type: ignore[arg-type]


def test_every_piece_is_whole_characters():
    pieces = said(list("é€a".encode()), 6)
    assert pieces == ["", "é", "", "", "€", "a", ""]


def test_a_character_that_never_ends_is_shown_as_such():
    assert "".join(said([0xE2, 0x82], 2)) == "\ufffd"


def test_the_end_of_a_document_ends_the_text():
    assert "".join(said([*b"ab", 256, *b"cd"], 5)) == "ab"


def test_an_empty_prompt_begins_a_document(trained):
    assert written(trained, GREEDY, prompt="") == written(trained, GREEDY, prompt="\n")


def test_learned_positions_end_where_their_table_ends():
    config = ModelConfig.model_validate_json('{"width": 16, "depth": 1, "length": 8, "positions": "learned"}')
    model = build(config, 257).to_empty(device="cpu")
    initialise(model, 0)
    with pytest.raises(UsageError, match="learned positions for 8 tokens"):
        list(generate(model.eval(), ByteTokenizer(), "1234", tokens=8, sampling=Sampling(seed=1)))


def test_the_command_line_writes_prompt_and_text_and_records_nothing(run, trained):
    before = sorted((path, path.stat().st_mtime_ns) for path in run.path.rglob("*"))
    done = leviathan("generate", run.path, "--prompt", PROMPT, "--tokens", 24, "--temperature", 0, "--step", 12)
    assert (done.code, done.err) == (0, "")
    assert done.out == PROMPT + written(trained, GREEDY) + "\n"
    assert sorted((path, path.stat().st_mtime_ns) for path in run.path.rglob("*")) == before


def test_a_terminal_is_not_steered_by_what_a_model_writes(run, monkeypatch, capsys):
    monkeypatch.setattr("launcher.texts.generate", lambda *_, **__: iter(["a\x1b[2J", "b\n"]))
    for terminal, text in ((True, "x\\x1b aa\\x1b[2Jb\n\n"), (False, "x\x1b aa\x1b[2Jb\n\n")):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        write_text(str(run.path), "x\x1b a", step=None, tokens=2, sampling=GREEDY)
        assert capsys.readouterr().out == text


def test_no_tokens_and_no_such_checkpoint_are_sentences(run):
    with pytest.raises(UsageError, match="--tokens 0 leaves nothing to write"):
        write_text(str(run.path), PROMPT, step=None, tokens=0, sampling=GREEDY)
    with pytest.raises(DataError, match="has no checkpoint of step 7; there is 12, 10, 5"):
        write_text(str(run.path), PROMPT, step=7, tokens=1, sampling=GREEDY)


def test_a_tokenizer_that_knows_no_line_end_begins_a_text_all_the_same(trained, tmp_path):
    (tmp_path / "mine.model").write_bytes(foreign())
    tokenizer = make(str(tmp_path / "mine.model"), [])
    assert not len(tokenizer.encode("\n")), "or there is nothing to see here"
    for prompt in ("", "  "):
        assert list(generate(trained.model, tokenizer, prompt, tokens=3, sampling=GREEDY))
    with pytest.raises(UsageError, match=r"leaves nothing of the prompt .*; give one with a letter"):
        list(generate(trained.model, tokenizer, "\u200b", tokens=3, sampling=GREEDY))
