"""Finding and opening the files a source names: a path, a folder, a glob, or a URL of a few trusted schemes.

What a URL carries besides its address (a password, a signature in its query) never appears in a name or a message.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit

from configs.errors import ConfigError, DataError, LeviathanError

RECORDS = ".build"
"""The folder that a folder of shards has in it; what lies beside it is no text."""

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tar")

Doing = Literal["read", "written"]

SILENCE_S = 60.0
"""The longest that a server may send nothing."""
BLOCK = 8 << 20
CONNECT_S = 4.0
"""The longest that one try to reach a store may take; it is tried some times."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_EXTRAS = {"s3": "s3", "gs": "gcs"}
_REASONS = {
    "NoCredentialsError": "no credentials",
    "DefaultCredentialsError": "no credentials",
    "EndpointConnectionError": "no answer",
    "ConnectTimeoutError": "no answer",
    "ClientConnectorError": "no answer",
    "FSTimeoutError": "no answer",
}
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Input:
    """One file to read. `name` is relative to what was asked for; `size` is None where a server does not tell it."""

    path: str
    name: str
    size: int | None


@dataclass(frozen=True)
class Found:
    """The files that a path names, in a stable order, and how many were passed over as of an unknown kind."""

    inputs: list[Input]
    skipped: int


def is_url(path: str) -> bool:
    """Whether `path` begins with a scheme; a local file with a colon in its name is written ./like:this."""
    return _SCHEME.match(path) is not None


def public(path: str) -> str:
    """`path` as it may be shown: a URL without user, password, query and fragment."""
    if not is_url(path):
        return path
    try:
        parts = urlsplit(path)
    except ValueError:
        return "the URL"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if host else f"{parts.scheme}:…"


def find(path: str) -> Found:
    """The files that `path` names. Raises ConfigError for what is never read, DataError when there is nothing."""
    if path.startswith("-"):
        raise ConfigError(f"the path {path!r} begins like an option; write ./{path} if it is a file")
    found = _find_remote(path) if is_url(path) else _find_local(path)
    if not found.inputs:
        passed = f"the {found.skipped:,} files there end otherwise" if found.skipped else "there are no files"
        raise DataError(f"{public(path)} holds none of {', '.join(SUFFIXES)} ({passed}); check the path")
    return found


def can_jump(path: str) -> bool:
    """Whether an input can be read from its middle: a web server need not know how, a store does."""
    return not is_url(path) or scheme_of(path) in _EXTRAS


def open_input(path: str, size: int | None, block: int = BLOCK) -> BinaryIO:
    """The bytes of an input, to be read from the start. Raises DataError when it has another size by now.

    block: bytes that are asked of a store at a time.
    """
    if not is_url(path):
        return _open_local(path, size)
    with explained(path):
        if can_jump(path):
            file: BinaryIO = filesystem(path).open(path, "rb", block_size=block)
            return _unchanged(file, path, getattr(file, "size", None), size)
        # files are streamed from their start; where no size is given it is asked for first, and every failure to tell
        # it becomes "not found"
        return filesystem(path).open(path, "rb", block_size=0, size=size or 1)


def open_seekable(path: str, size: int | None) -> BinaryIO:
    """An input in which one can jump, as Parquet needs."""
    if is_url(path):
        with explained(path):
            return filesystem(path).open(path, "rb")
    return _open_local(path, size)


@contextlib.contextmanager
def explained(path: str, what: Doing = "read") -> Iterator[None]:
    """Turn what goes wrong while `path` is read or written into one sentence, which shows no secrets of a URL."""
    try:
        yield
    except LeviathanError:
        raise
    except OSError as error:
        raise DataError(f"{public(path)} cannot be {what} ({_reason(path, error)}); {_remedy(path)}") from None
    except Exception as error:
        if not is_url(path):
            raise
        # every store has exceptions of its own, and their texts hold the whole URL
        raise DataError(f"{public(path)} cannot be {what} ({_reason(path, error)}); {_remedy(path)}") from None


def suffix_of(name: str) -> str | None:
    """The known suffix that `name` ends with."""
    lower = name.lower()
    return max((suffix for suffix in SUFFIXES if lower.endswith(suffix)), key=len, default=None)


def _find_local(path: str) -> Found:
    here = Path(path).expanduser()
    try:
        if here.is_dir():
            return _walk(here)
        if here.is_file():
            return Found([_explicit(str(here), here.name, here.stat().st_size)], 0)
        if not here.exists() and glob.has_magic(path):
            return _expand(str(here))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    if here.exists():
        raise DataError(f"{path} is neither a file nor a folder; name a file, a folder or a glob")
    raise DataError(f"no such file or folder: {path}; {_near(here)}")


def _walk(folder: Path) -> Found:
    """Every file below `folder` of a known suffix. Not read: what is hidden, linked folders, folders of shards."""
    inputs, skipped = [], 0

    def stop(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=stop):
        if RECORDS in folders:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(parent, name)
            if name.startswith(".") or suffix_of(name) is None or not path.is_file():
                skipped += 1
                continue
            inputs.append(Input(str(path), path.relative_to(folder).as_posix(), path.stat().st_size))
    return Found(sorted(inputs, key=lambda i: os.fsencode(i.name)), skipped)


def _expand(pattern: str) -> Found:
    """The files that a glob matches; `**` stands for any depth. Names are relative to what stands before the glob."""
    fixed = Path(*_before_magic(Path(pattern).parts))
    inputs, skipped = [], 0
    for match in glob.iglob(pattern, recursive=True):
        path = Path(match)
        if not path.is_file():
            continue
        if suffix_of(match) is None:
            skipped += 1
            continue
        inputs.append(Input(match, path.relative_to(fixed).as_posix(), path.stat().st_size))
    return Found(sorted(inputs, key=lambda i: os.fsencode(i.name)), skipped)


def _before_magic(parts: tuple[str, ...]) -> list[str]:
    """The leading parts of a path that hold no wildcard."""
    out: list[str] = []
    for part in parts:
        if glob.has_magic(part):
            break
        out.append(part)
    return out


def _explicit(path: str, name: str, size: int | None) -> Input:
    if suffix_of(name) is None:
        raise DataError(f"{public(path)} is of a kind that is not read here; known are {', '.join(SUFFIXES)}")
    return Input(path, name, size)


def _near(missing: Path) -> str:
    try:
        names = [child.name for child in missing.parent.iterdir()]
    except OSError:
        return "check the path"
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.6)
    return f"did you mean {missing.parent / near[0]}?" if near else "check the path"


def _open_local(path: str, size: int | None) -> BinaryIO:
    with explained(path):
        file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    return _unchanged(file, path, os.fstat(file.fileno()).st_size, size)


def _unchanged(file: BinaryIO, path: str, found: int | None, size: int | None) -> BinaryIO:
    if size is not None and found is not None and found != size:
        file.close()
        raise DataError(
            f"{public(path)} changed while it was being read: {found:,} bytes, {size:,} when the build was planned;"
            " build again when it is finished"
        )
    return file


def scheme_of(url: str) -> str:
    """The scheme of a URL that may be read."""
    scheme = url.partition(":")[0].lower()
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        raise ConfigError(f"{public(url)} is no URL; check it") from None
    if scheme not in ("https", "http", "s3", "gs") or not url[len(scheme) :].startswith("://"):
        raise ConfigError(
            f"{scheme}: is not read from ({public(url)}); known are https://, s3:// and gs://, and a local file with"
            " a colon in its name is written ./like:this"
        )
    if "::" in parts.path + parts.query or not host:
        raise ConfigError(f"{public(url)} is no plain URL; write https://host/file, s3://bucket/key or gs://bucket/key")
    if scheme == "http" and host not in _LOCAL_HOSTS:
        raise ConfigError(f"{public(url)} would be read unprotected; use https:// (http:// is for this machine only)")
    return scheme


def filesystem(url: str) -> Any:
    """fsspec's file system for a URL; raises ConfigError where its package is not installed."""
    import fsspec

    scheme = scheme_of(url)
    try:
        return fsspec.filesystem(scheme, **_options(scheme))
    except ImportError:
        extra = _EXTRAS.get(scheme)
        install = f"pip install 'leviathan-pretrain[{extra}]'" if extra else "pip install 'fsspec[http]'"
        raise ConfigError(f"{public(url)} needs a package that is not installed; run `{install}`") from None


def _options(scheme: str) -> dict[str, Any]:
    """How long is waited for whom: by default some wait minutes for what does not answer, or give up what is slow."""
    if scheme == "s3":
        # s3fs tries five times what this tries three times
        retries = {"mode": "standard", "total_max_attempts": 3}
        config = {"connect_timeout": CONNECT_S, "read_timeout": SILENCE_S, "retries": retries}
        # a large object is sent in parts of 50 MiB, and as many of them are in memory
        return {"config_kwargs": config, "max_concurrency": 2}
    import aiohttp

    if scheme == "gs":
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback of all that it gives up
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        return {"requests_timeout": timeout}
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE_S)}}


def _find_remote(url: str) -> Found:
    """One object, or for s3:// and gs:// also a glob or, ending in /, all below a prefix."""
    scheme = scheme_of(url)
    fs = filesystem(url)
    if scheme in _EXTRAS and (glob.has_magic(url) or url.endswith("/")):
        with explained(url):
            found = fs.glob(url, detail=True) if glob.has_magic(url) else fs.find(url, detail=True)
        return _listed(scheme, url, found)
    name = urlsplit(url).path.rpartition("/")[2]
    _explicit(url, name, None)
    with explained(url):
        return Found([Input(url, name, fs.info(url).get("size"))], 0)


def _listed(scheme: str, url: str, found: dict[str, dict[str, Any]]) -> Found:
    address = url.partition("://")[2]
    fixed = "/".join(_before_magic(tuple(address.rstrip("/").split("/")))) + "/"
    files = {key: info for key, info in found.items() if info.get("type") == "file"}
    known = [key for key in sorted(files) if suffix_of(key)]
    inputs = [Input(f"{scheme}://{key}", key.removeprefix(fixed), files[key].get("size")) for key in known]
    return Found(inputs, len(files) - len(known))


def _reason(path: str, error: Exception) -> str:
    if not is_url(path):
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    status, name = getattr(error, "status", None), type(error).__name__
    if isinstance(error, FileNotFoundError):
        return "not found"
    # what one store tells with an exception of its own, another has only words for
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and str(error).startswith("Forbidden")):
        return "permission denied"
    return f"status {status}" if isinstance(status, int) else _REASONS.get(name, name)


def _remedy(path: str) -> str:
    return "check the address, the network and your credentials" if is_url(path) else "check the file"
