"""Tars from anywhere: read as text, refused where they are anything but that."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError
from tests.data_pipeline.memory import memory_to_read
from tests.data_pipeline.reading import make_tar, read_all, texts


def header(name: bytes, size: bytes = b"00000000001\0", kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[124:136], block[156:157], block[257:265] = size, kind, magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
BODY = b"x".ljust(512, b"\0")


def member(**keys: Any) -> bytes:
    return header(b"a.txt", **keys) + BODY + END


def extended(record: bytes) -> bytes:
    return header(b"p", b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0")


REFUSED = [
    (member(kind=b"1"), ["'a.txt' is a hard link"]),
    (member(kind=b"2"), ["'a.txt' is a symbolic link", "only plain files"]),
    (member(kind=b"3"), ["is a device"]),
    (member(kind=b"6"), ["is a pipe"]),
    (member(kind=b"S"), ["is a sparse file"]),
    (member(kind=b"Z"), ["of the unknown type b'Z'"]),
    (member(size=b"77777777777\0"), ["'a.txt' has 8,589,934,591 bytes; the limit is 67,108,864"]),
    (member(size=b"\x80" + b"\x7f" * 11), ["bytes; the limit is"]),
    (member(size=b"\xff" * 12), ["damaged (a member has the size"]),
    (member(size=b"-0000000001\0"), ["damaged (a member has the size"]),
    (member(size=b"0000000099z\0"), ["damaged (a member has the size"]),
    (member(kind=b"x", size=b"77777777777\0"), ["the limit is 65,536"]),
    (member(kind=b"L", size=b"77777777777\0"), ["the limit is 65,536"]),
    (member(kind=b"x"), ["an extended header that cannot be read"]),
    (extended(b"17 size=-1024000\n") + member(), ["the size '-1024000'"]),
    (extended(b"22 GNU.sparse.major=1\n") + member(), ["a sparse file"]),
    (member()[:-1024], ["cut off"]),
    (member()[:700], ["cut off"]),
    (b"", ["cut off"]),
    (gzip.compress(member()), ["cut off"]),
    (gzip.compress(os.urandom(4000) + member()), ["no plain tar"]),
    (b"garbage " * 200, ["no plain tar"]),
    (header(b"a.pkl") + BODY + END, ["'a.pkl' is neither .txt nor .json"]),
    (header(b"weights.pth") + BODY + END, ["'weights.pth' is neither .txt nor .json"]),
    (header(b"a.txt.pyd") + BODY + END, ["'a.txt.pyd' is neither"]),
    (header(b"noname") + BODY + END, ["'noname' is neither"]),
    (header(b"../../x\x1b[2J.pickle") + BODY + END, [r"x\x1b[2J.pickle"]),
]
"""Tars, and words of what is said of each."""


@pytest.mark.parametrize(("content", "words"), REFUSED, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_tar_with_anything_but_plain_text_is_refused(
    tmp_path: Path, says: Any, content: bytes, words: list[str]
) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_all(tmp_path / "a.tar")
    says(error, "a.tar", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_no_tar_takes_memory_for_what_it_only_says_to_hold(tmp_path: Path) -> None:
    tars = [tmp_path / f"{number}.tar" for number in range(len(REFUSED))]
    for tar, (content, _) in zip(tars, REFUSED):
        tar.write_bytes(content)
    said, kib = memory_to_read(*tars)
    assert all(line.startswith("refused: ") for line in said), said
    assert kib < 200_000


def test_nothing_in_a_tar_is_executed_or_extracted(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (canary,)

    for suffix in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "json", "txt"):
        make_tar(tmp_path / "a.tar", [(f"../x.{suffix}", pickle.dumps(Bomb()))])
        if suffix == "txt":
            assert [document.problem for document in read_all(tmp_path / "a.tar")] == ["unicode"]
            continue
        with pytest.raises(DataError):
            read_all(tmp_path / "a.tar")
    assert not canary.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_writer_are_read(tmp_path: Path, form: int) -> None:
    deep = "d" * 90 + "/" + "n" * 90 + ".txt"
    names = ["a.txt", deep, "b/c.txt"] + (["ü" * 120 + ".txt"] if form != tarfile.USTAR_FORMAT else [])
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("b/")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"hello"))
    assert [document.name for document in read_all(tmp_path / "a.tar")] == [f"a.tar/{name}" for name in names]


def test_a_json_beside_a_text_describes_it(tmp_path: Path) -> None:
    sample = [("1.json", b'{"id": 1}'), ("1.txt", b"one"), ("2.txt", b"two"), ("2.json", b"{}")]
    make_tar(tmp_path / "a.tar", [*sample, ("3.json", b'{"text": "three"}'), ("4.json", b'{"text": "four"}')])
    assert texts(tmp_path / "a.tar") == ["one", "two", "three", "four"]
    make_tar(tmp_path / "a.tar", [("5.json", b'{"id": 1}')])
    with pytest.raises(DataError, match=r"a\.tar: member '5\.json': no key 'text', found 'id'"):
        texts(tmp_path / "a.tar")


def test_every_flipped_bit_of_a_tar_header_is_found_or_harmless(tmp_path: Path) -> None:
    content = make_tar(tmp_path / "a.tar", [(f"{i}.txt", b"hello") for i in range(3)]).read_bytes()
    wanted, draw, found = read_all(tmp_path / "a.tar"), random.Random(0), 0
    for bit in draw.sample(range(3 * 1024 * 8), 300):
        at = bit // 8
        if at % 1024 >= 512:
            continue  # the text itself has no checksum in a tar
        damaged = bytearray(content)
        damaged[at] ^= 1 << bit % 8
        (tmp_path / "a.tar").write_bytes(damaged)
        try:
            # the blank that ends the checksum may be any blank
            assert read_all(tmp_path / "a.tar") == wanted
        except DataError:
            found += 1
    assert found > 100
