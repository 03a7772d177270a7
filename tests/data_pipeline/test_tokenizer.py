from __future__ import annotations

import io
import itertools
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from data_pipeline import tokenizer as tokenizers
from data_pipeline.tokenizer import ByteTokenizer, PieceTokenizer, Tokenizer, cut, load, load_folder, make

SAMPLE = [
    f"def f{i}(x):\n    return x * {i} # the {w} of a whale\n\tпривет {w}\n"
    for i, w in enumerate(["water", "sea", "of", "sailing", "whale", "ahead"] * 60)
]
SPECS = ["bytes", "sp:400", "sp-bpe:400"]
HARD = "\u2581\u2585 \t\n\r\0a</s><unk><s><0x41><0x0A>é😀\u3000\u200d\ufeff\u0301\U0010ffff\uffff\x7f\x85\u00a0ﬁ"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(HARD), max_size=60)


@pytest.fixture(scope="module", params=SPECS)
def made(request: pytest.FixtureRequest) -> Tokenizer:
    return make(request.param, SAMPLE)


@pytest.fixture(scope="module")
def pieces() -> PieceTokenizer:
    made = make("sp:400", SAMPLE)
    assert isinstance(made, PieceTokenizer)
    return made


@given(text=TEXTS, times=st.sampled_from([1, 1, 1, 700]))
@example(text=HARD, times=1)
@example(text="", times=1)
@example(text=" ", times=20_000)
@example(text="x", times=20_000)
@settings(max_examples=150, deadline=None)
def test_every_text_comes_back_and_its_bytes_are_counted(made: Tokenizer, text: str, times: int) -> None:
    text *= times
    ids = made.encode(text)
    assert ids.dtype == np.dtype("<u2")
    assert made.decode(ids) == text
    assert int(made.byte_lengths[ids].sum()) == len(text.encode())
    assert made.eod not in ids


@given(ids=st.lists(st.integers() | st.integers(-5, 500)))
@settings(max_examples=100, deadline=None)
def test_no_ids_make_decode_raise(made: Tokenizer, ids: list[int]) -> None:
    made.decode(ids)


@given(text=TEXTS.map(lambda text: text * 300))
@settings(max_examples=60, deadline=None)
def test_a_long_text_is_cut_between_words(text: str) -> None:
    spans = cut(text)
    assert "".join(spans) == text
    assert all(len(span) <= tokenizers.LONGEST_SPAN for span in spans)
    for before, span in itertools.pairwise(spans):
        assert len(before) >= tokenizers.SPAN
        assert (span[0] == " " and before[-1] != " ") or len(before) == tokenizers.LONGEST_SPAN


def test_the_ids_of_a_text_are_those_of_its_spans(pieces: PieceTokenizer) -> None:
    text = " ".join(SAMPLE)
    assert np.array_equal(pieces.encode(text), np.concatenate(pieces.encode_many(cut(text))))
    assert len(cut(text)) > 1


def test_the_end_of_a_document_says_nothing_and_stands_for_no_bytes(made: Tokenizer) -> None:
    ids = [*made.encode("a b"), made.eod, *made.encode("c")]
    assert made.decode(ids) == "a bc"
    assert made.byte_lengths[made.eod] == 0
    assert made.byte_lengths.shape == (made.vocab,) and made.byte_lengths.dtype == np.int64


def test_bytes_that_are_no_text_decode_to_the_replacement_sign() -> None:
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert ByteTokenizer().decode_bytes(np.array([0x61, 0xFF])) == b"a\xff"


def test_a_lone_surrogate_is_refused(made: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        made.encode("a\ud800")


@pytest.mark.parametrize("spec", ["sp:400", "sp-bpe:400"])
def test_the_same_sample_gives_the_same_model(spec: str) -> None:
    first, second = make(spec, SAMPLE), make(spec, iter(SAMPLE))
    assert first.sha256 == second.sha256
    assert first.sha256 != make(spec, SAMPLE[:-1]).sha256
    assert first.vocab == 400


def test_no_line_of_the_sample_is_too_long_to_learn_from() -> None:
    made = make("sp-bpe:284", ["x" * 50_000 + " " + "zygote " * 3000])
    assert len(made.encode(" zygote zygote")) <= 3


def test_indentation_is_one_token() -> None:
    made = make("sp-bpe:400", SAMPLE)
    assert len(made.encode("    return")) <= 3


def test_training_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    make("sp:300", SAMPLE)
    with pytest.raises(ConfigError):
        make("sp:90000", SAMPLE)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["sp", "sp-bpe"])
def test_a_sample_that_is_too_small_names_the_largest_vocabulary_that_fits(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"at most [0-9]+ pieces fit; write {kind}:[0-9]+ or give more") as error:
        make(f"{kind}:50000", SAMPLE)
    fits = str(error.value).partition(f"write {kind}:")[2].split()[0]
    assert make(f"{kind}:{fits}", SAMPLE).vocab == int(fits)


@pytest.mark.parametrize("kind", ["sp", "sp-bpe"])
def test_a_vocabulary_that_is_too_small_names_the_smallest(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"need at least [0-9]+; write {kind}:[0-9]+$") as error:
        make(f"{kind}:200", SAMPLE)
    fits = str(error.value).rpartition(":")[2]
    assert make(f"{kind}:{fits}", SAMPLE).vocab == int(fits)


@pytest.mark.parametrize("sample", [[], [""], ["\0"]])
def test_no_text_to_train_on_is_said(sample: list[str]) -> None:
    with pytest.raises(ConfigError, match="there is no text to train it on"):
        make("sp:300", sample)


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        ("byte", "did you mean 'bytes'?"),
        ("spm:8000", "did you mean 'sp:8000'?"),
        ("sp4096", "did you mean 'sp:4096'?"),
        ("bpe:32000", "did you mean 'sp-bpe:32000'?"),
        ("unigram", "did you mean 'sp:4096'?"),
        ("sp:-4", "did you mean 'sp:4'?"),
        ("gpt2-tokenizer", "known are `bytes`"),
        ("", "known are `bytes`"),
        ("nothing/here.model", "no such file"),
        ("sp:0", "1 to 1,048,576"),
        ("sp:99999999", "1 to 1,048,576"),
    ],
)
def test_a_wrong_spec_is_answered_with_the_right_one(spec: str, answer: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(spec, SAMPLE)
    assert answer in str(error.value) and "data.tokenizer" in str(error.value)


def test_what_was_saved_is_loaded(made: Tokenizer, tmp_path: Path) -> None:
    made.save(tmp_path)
    found = load_folder(tmp_path)
    assert (found.spec, found.sha256, found.vocab, found.eod) == (made.spec, made.sha256, made.vocab, made.eod)
    assert np.array_equal(found.encode(HARD), made.encode(HARD))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_tokenizer_can_be_sent_to_a_worker(made: Tokenizer) -> None:
    sent = pickle.loads(pickle.dumps(made))
    assert np.array_equal(sent.encode(HARD), made.encode(HARD)) and sent.sha256 == made.sha256


def test_every_flipped_bit_of_a_model_is_found(pieces: PieceTokenizer, tmp_path: Path) -> None:
    pieces.save(tmp_path)
    header, draw = (tmp_path / tokenizers.HEADER).read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(pieces.model)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        with pytest.raises(DataError, match=r"tokenizer in here is not the one that was saved: found .* says sha256"):
            load(header, bytes(damaged), "here")


@pytest.mark.parametrize("header", [b"", b"[]", b"{}", b"\xff", b'{"spec": "bytes", "sha256": "x", "vocab": null}'])
def test_a_damaged_header_is_said(header: bytes) -> None:
    with pytest.raises(DataError, match=r"here/tokenizer\.json is damaged"):
        load(header, None, "here")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, pieces: PieceTokenizer) -> None:
    header = {"spec": "bytes", "sha256": ByteTokenizer.sha256, "vocab": 256}
    with pytest.raises(DataError, match="found 257 ids"):
        load(json.dumps(header).encode(), None, "here")
    with pytest.raises(DataError, match=r"no tokenizer\.model"):
        load(json.dumps({"spec": "sp:400", "sha256": pieces.sha256, "vocab": 400}).encode(), None, "here")
    with pytest.raises(DataError, match=r"no tokenizer in .*tokenizer\.json"):
        load_folder(tmp_path)


def foreign(**options: object) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE), model_writer=model, vocab_size=60, minloglevel=3, **options
    )
    return model.getvalue()


def test_a_model_from_elsewhere_keeps_its_ways(tmp_path: Path) -> None:
    (tmp_path / "mine.model").write_bytes(foreign())
    made = make(str(tmp_path / "mine.model"), [])
    assert made.spec == "mine.model" and made.eod == 2
    # it removes repeated spaces and puts one before each text, as it was trained to; the one in front is not text
    assert made.decode(made.encode("the  whale")) == "the whale"
    assert made.decode(made.encode("§")) == "\ufffd"
    made.save(tmp_path)
    assert load_folder(tmp_path).sha256 == made.sha256


def test_a_model_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.model").write_bytes(foreign(eos_id=-1))
    with pytest.raises(DataError, match=r"mine\.model has no eos id.*train it with --eos_id"):
        make(str(tmp_path / "mine.model"), [])


@pytest.mark.parametrize("content", [b"", b"garbage", b"\0" * 100, None])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes | None, pieces: PieceTokenizer) -> None:
    (tmp_path / "mine.model").write_bytes(pieces.model[:2000] if content is None else content)
    with pytest.raises(DataError, match=r"mine\.model is no sentencepiece model, or a damaged one"):
        make(str(tmp_path / "mine.model"), [])


def test_importing_costs_neither_sentencepiece_nor_torch() -> None:
    modules = "data_pipeline.tokenizer, data_pipeline.corpora, data_pipeline.plan, data_pipeline.build, sys"
    wanted = "[m for m in ('sentencepiece', 'torch', 'webdataset', 'fsspec') if m in sys.modules]"
    done = subprocess.run([sys.executable, "-c", f"import {modules}; print({wanted})"], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
