"""Text to token ids and back, without loss: bytes, or a sentencepiece vocabulary (known to this file alone).

A tokenizer is named by a spec (`bytes`, `sp:4096`, `sp-bpe:4096`, a `.model` file) and identified by a sha256. Shards
carry that hash, so text that was encoded by one tokenizer is never read with another.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError, DataError
from data_pipeline.files import write_whole
from data_pipeline.shards import token_dtype

HEADER = "tokenizer.json"
MODEL = "tokenizer.model"
MAX_VOCAB = 1 << 20

# sentencepiece adds up scores in float32 from the start of its input, so in a long text the best and the second best
# way to cut a word are no longer told apart. Shorter pieces cost nothing and give every word the same ids everywhere.
SPAN = 4096
LONGEST_SPAN = 4 * SPAN

_TRAINED = re.compile(r"sp(-bpe)?:([0-9]{1,9})")
_WORD_END = re.compile(r"(?<! ) ")
_SPACE = "\u2581"  # sentencepiece's sign for a space
_UNTRAINABLE = dict.fromkeys((0, 0x2581, 0x2585))  # a text with one of these is dropped whole by the trainer
_THREADS = 4  # the sum of their results depends on how many they are, so it is the same number everywhere
_REPLACEMENT = "\ufffd".encode()


class Tokenizer(ABC):
    """What turns text into ids below `vocab` and back.

    spec: how it was asked for. vocab: number of ids. eod: the id that ends a document; no text encodes to it.
    sha256: its identity. byte_lengths: (vocab,) int64, the bytes of text that each id stands for; 0 for eod.
    Tokenizers can be pickled.
    """

    spec: str
    vocab: int
    eod: int
    sha256: str

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, without eod, in the smallest little-endian type that holds the vocabulary.

        Raises UnicodeEncodeError for a lone surrogate, which is no text.
        """

    @abstractmethod
    def _pieces(self) -> list[bytes]:
        """The bytes of text each id stands for."""

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of `ids`; eod says nothing, and bytes that are no UTF-8 become U+FFFD. Never raises for any ints."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes of `ids`. An id outside the vocabulary (a model may have spare ones) gives U+FFFD."""
        table = self._table
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return b"".join([table[i] if 0 <= i < self.vocab else _REPLACEMENT for i in numbers])

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """(vocab,) int64: the bytes of text that each id stands for."""
        return np.array([len(piece) for piece in self._table], dtype=np.int64)

    @functools.cached_property
    def _table(self) -> list[bytes]:
        return self._pieces()

    def files(self) -> dict[str, bytes]:
        """What `load` reads, by the names it has in a folder of shards, in the order in which it is written."""
        header = {"spec": self.spec, "sha256": self.sha256, "vocab": self.vocab}
        return {HEADER: (json.dumps(header, indent=1) + "\n").encode()}

    def save(self, folder: Path) -> None:
        """Write its files into a folder of this machine; `load_folder` reads them."""
        for name, content in self.files().items():
            write_whole(folder / name, content)


class ByteTokenizer(Tokenizer):
    """Every byte of UTF-8 is a token: ids 0 to 255, and 256 ends a document."""

    spec = "bytes"
    vocab = 257
    eod = 256
    sha256 = hashlib.sha256(b"leviathan tokenizer: bytes 0-255, end of document 256").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text`, as u16."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(token_dtype(self.vocab))

    def _pieces(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)] + [b""]


class PieceTokenizer(Tokenizer):
    """A sentencepiece model; its eos id ends a document.

    With a model that we trained (byte fallback, identity normalization, no added prefix) decode(encode(text)) == text
    for every text: U+2581, which sentencepiece takes for a space, is encoded by its bytes. A model from elsewhere is
    as lossless as it was made: normalization, a vocabulary without byte fallback, or removed spaces stay as they are.
    """

    def __init__(self, spec: str, model: bytes, where: str) -> None:
        """`where` names the model in errors. Raises DataError when it cannot be read or has no end-of-text id."""
        self.spec, self.model = spec, model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = _processor(model, where)
        self.vocab = int(self._processor.vocab_size())
        self.eod = int(self._processor.eos_id())
        if self.eod < 0:
            raise DataError(
                f"the sentencepiece model {where} has no eos id, which ends a document here; train it with --eos_id=1"
            )
        self._dtype = token_dtype(self.vocab)
        self._adds_space = self._joined("x").startswith(_SPACE)
        # only a model that leaves spaces alone gives the same ids for a text and for its parts
        self._cuts = not self._adds_space and self._joined("  x ") == f"{_SPACE * 2}x{_SPACE}"
        self._space_sign = self._ids_of_space_sign()

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`; long texts are cut where a word ends (`cut`), each piece is encoded by itself."""
        parts = text.split(_SPACE) if self._space_sign is not None else [text]
        arrays: list[np.ndarray] = []
        for number, part in enumerate(parts):
            if number and self._space_sign is not None:
                arrays.append(self._space_sign)
            spans = cut(part) if self._cuts else [part]
            try:
                # one by one: given a list, sentencepiece starts a thread for every call, even when it is to use one
                arrays += [self._processor.encode(span, return_type="numpy") for span in spans]
            except (RuntimeError, TypeError):
                part.encode()  # says what and where, if it is a lone surrogate
                raise
        return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).astype(self._dtype)

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes of `ids`, without the space that some models put before every text."""
        content = super().decode_bytes(ids)
        return content.removeprefix(b" ") if self._adds_space else content

    def files(self) -> dict[str, bytes]:
        """`tokenizer.model`, then `tokenizer.json`, which says that both are there."""
        return {MODEL: self.model, **super().files()}

    def __reduce__(self) -> tuple[Any, ...]:
        return PieceTokenizer, (self.spec, self.model, self.spec)

    def _pieces(self) -> list[bytes]:
        sp = self._processor
        out = []
        for i in range(self.vocab):
            if sp.is_byte(i):
                out.append(bytes([int(sp.id_to_piece(i)[1:-1], 16)]))
            elif sp.is_unknown(i):
                out.append(_REPLACEMENT)
            elif sp.is_control(i):
                out.append(b"")
            else:
                out.append(sp.id_to_piece(i).replace(_SPACE, " ").encode())
        return out

    def _joined(self, text: str) -> str:
        return "".join(self._processor.encode(text, return_type=str))

    def _ids_of_space_sign(self) -> np.ndarray | None:
        """The ids of the three bytes of U+2581, where the vocabulary has bytes."""
        sp = self._processor
        ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        return np.array(ids, dtype=np.int32) if self._cuts and all(sp.is_byte(i) for i in ids) else None


def cut(text: str) -> list[str]:
    """Cut a text into spans of about SPAN characters, each but the first beginning with the space between two words.

    A span never exceeds LONGEST_SPAN; joined, they are the text.
    """
    spans, start = [], 0
    while len(text) - start > SPAN:
        space = _WORD_END.search(text, start + SPAN, start + LONGEST_SPAN)
        if space is None and len(text) - start <= LONGEST_SPAN:
            break
        end = space.start() if space else start + LONGEST_SPAN
        spans.append(text[start:end])
        start = end
    spans.append(text[start:])
    return spans


def check_spec(spec: str) -> None:
    """Raise ConfigError unless `spec` names a tokenizer that can be made or read."""
    trained = _TRAINED.fullmatch(spec)
    if spec == "bytes" or (trained and 1 <= int(trained[2]) <= MAX_VOCAB):
        return
    if trained:
        raise ConfigError(
            f"data.tokenizer is {spec!r}; a vocabulary has 1 to {MAX_VOCAB:,} pieces, for example sp:4096"
        )
    if not spec.endswith(".model"):
        raise ConfigError(f"data.tokenizer is {spec!r}; {_meant(spec)}")
    if not Path(spec).expanduser().is_file():
        raise ConfigError(f"data.tokenizer is {spec!r}, and there is no such file; check the path")


def is_trained(spec: str) -> bool:
    """Whether `make` trains this tokenizer on a sample of text."""
    return _TRAINED.fullmatch(spec) is not None


def make(spec: str, sample: Iterable[str]) -> Tokenizer:
    """The tokenizer that `spec` names; `sample` is read only when the spec says that one is to be trained.

    The same sample gives the same tokenizer, on every machine with the same version of sentencepiece.
    Raises ConfigError for a wrong spec or a sample that does not suit it, DataError for an unreadable model file.
    """
    check_spec(spec)
    if spec == "bytes":
        return ByteTokenizer()
    trained = _TRAINED.fullmatch(spec)
    if trained:
        return PieceTokenizer(spec, _train(spec, "bpe" if trained[1] else "unigram", int(trained[2]), sample), spec)
    path = Path(spec).expanduser()
    try:
        return PieceTokenizer(path.name, path.read_bytes(), spec)
    except OSError as error:
        raise ConfigError(f"data.tokenizer: {spec} cannot be read ({error.strerror}); check its permissions") from None


def load(header: bytes, model: bytes | None, where: str) -> Tokenizer:
    """The tokenizer that `save` wrote: the bytes of `tokenizer.json` and of `tokenizer.model` (None: there is none).

    `where` names the folder in errors. Raises DataError when either part is damaged or they do not belong together.
    """
    try:
        content = json.loads(header)
        spec, sha256, vocab = str(content["spec"]), str(content["sha256"]), int(content["vocab"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where}/{HEADER} is damaged (not what was written); build or copy the shards again") from None
    if spec != "bytes" and model is None:
        raise DataError(f"{where} has {HEADER} of the tokenizer {spec!r} but no {MODEL}; copy it to where it belongs")
    if model is not None and spec != "bytes" and (found := hashlib.sha256(model).hexdigest()) != sha256:
        raise _other(where, f"a model with sha256 {found[:12]}…", f"sha256 {sha256[:12]}…")
    tokenizer = ByteTokenizer() if model is None or spec == "bytes" else PieceTokenizer(spec, model, f"{where}/{MODEL}")
    if (tokenizer.sha256, tokenizer.vocab) != (sha256, vocab):
        found = f"{tokenizer.vocab} ids with sha256 {tokenizer.sha256[:12]}…"
        raise _other(where, found, f"{vocab} ids with sha256 {sha256[:12]}…")
    return tokenizer


def load_folder(folder: Path) -> Tokenizer:
    """The tokenizer saved in a local folder. Raises DataError when it is missing or damaged."""
    try:
        header = (folder / HEADER).read_bytes()
        model = (folder / MODEL).read_bytes() if (folder / MODEL).exists() else None
    except OSError as error:
        raise DataError(
            f"no tokenizer in {folder} ({error.strerror}: {Path(error.filename).name}); build the shards again,"
            " or copy the tokenizer beside them"
        ) from None
    return load(header, model, str(folder))


def _other(where: str, found: str, stated: str) -> DataError:
    return DataError(
        f"the tokenizer in {where} is not the one that was saved: found {found}, {HEADER} says {stated};"
        " build or copy the shards again"
    )


def _meant(spec: str) -> str:
    """The nearest spec that exists."""
    word, _, size = spec.partition(":")
    known = {"bytes": "bytes", "byte": "bytes", "utf8": "bytes", "sp": "sp", "spm": "sp", "unigram": "sp"}
    known |= {"sentencepiece": "sp", "sp-unigram": "sp", "sp-bpe": "sp-bpe", "bpe": "sp-bpe", "spbpe": "sp-bpe"}
    letters = re.sub(r"[-_]?[0-9]+$", "", word.lower())
    near = difflib.get_close_matches(letters, known, n=1, cutoff=0.6)
    if not near:
        return "known are `bytes`, `sp:4096` (unigram), `sp-bpe:4096`, or the path of a sentencepiece .model file"
    digits = re.search(r"[0-9]+", size or word)
    meant = known[near[0]]
    return f"did you mean {meant if meant == 'bytes' else f'{meant}:{digits[0] if digits else 4096}'!r}?"


def _processor(model: bytes, where: str) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        good = processor.LoadFromSerializedProto(model)
    except (RuntimeError, ValueError):
        good = False
    if not good or not processor.vocab_size():
        raise DataError(f"{where} is no sentencepiece model, or a damaged one ({len(model):,} bytes); copy it again")
    return processor


def _training_spans(sample: Iterable[str]) -> Iterator[str]:
    for text in sample:
        for span in cut(text):
            clean = span.encode("utf-8", "ignore").decode().translate(_UNTRAINABLE)
            if clean:
                yield clean


def _train(spec: str, kind: str, vocab: int, sample: Iterable[str]) -> bytes:
    """The bytes of a sentencepiece model: lossless, and quiet while it is made."""
    import sentencepiece

    spans = list(_training_spans(sample))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(spans),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # indentation becomes one token instead of one for each space: 3.3 bytes a token of Python, not 2.0
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            shuffle_input_sentence=False,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=_THREADS,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise ConfigError(_training_failed(spec, str(error), sum(map(len, spans)))) from None
    return model.getvalue()


def _training_failed(spec: str, message: str, characters: int) -> str:
    """sentencepiece's C++ message as a sentence with a way out."""
    name = spec.partition(":")[0]
    begin = f"data.tokenizer is {spec!r}, but"
    more = "or give more text (data.sources, data.tokenizer_sample_mib)"
    if high := re.search(r"set it to a value <= ([0-9]+)", message):
        return (
            f"{begin} the sample of {characters:,} characters is too small for it: at most {high[1]} pieces fit;"
            f" write {name}:{high[1]} {more}"
        )
    if low := re.search(r"smaller than required_chars\. ([0-9]+) vs ([0-9]+)", message):
        return f"{begin} the 256 bytes and the characters of the sample need at least {low[2]}; write {name}:{low[2]}"
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return f"{begin} there is no text to train it on; check data.sources"
    return f"{begin} sentencepiece cannot train it ({message.strip().splitlines()[-1]}); try another size, {more}"
