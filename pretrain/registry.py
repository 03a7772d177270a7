"""Parts that are found by name: the name is the file's, and only the file that is asked for is imported.

So a part that needs a library which is not installed breaks nothing but itself, and adding one is adding a file.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from configs.errors import ConfigError
from configs.load import Layers, build
from configs.schema import Config
from configs.strict_yaml import Key

P = TypeVar("P")


@dataclass(frozen=True)
class Entry(Generic[P]):
    """A registered part: its name, the class of its options, the class itself."""

    name: str
    config: type[Config]
    part: Callable[[Any, Any], P]


class Registry(Generic[P]):
    """All parts of one kind: the files of one folder, and files of the user's own."""

    def __init__(self, kind: str, folder: Path, package: str) -> None:
        self._kind, self._folder, self._package = kind, folder, package
        self._entries: dict[str, Entry[P]] = {}
        """By the full name of the module, so that a file of the user's own never stands for one that comes along."""
        self._files: dict[str, str] = {}
        """The module that was last made of a file of the user's own, by the file's stem."""

    def register(self, config: type[Config]) -> Callable[[type[P]], type[P]]:
        """Decorate a class: it is registered under the name of its file, with `config` as the class of its options."""

        def add(part: type[P]) -> type[P]:
            module = part.__module__
            self._entries[module] = Entry(module.rpartition(".")[2], config, part)
            return part

        return add

    def names(self) -> list[str]:
        """Every part that comes with the package."""
        return sorted(p.stem for p in self._folder.glob("*.py") if p.stem != "__init__")

    def entry(self, name: str, file: str | None = None) -> Entry[P]:
        """Import one part's file, and no other. Raises ConfigError for a name that does not exist."""
        if file is not None:
            return self._own(Path(file))
        module = f"{self._package}.{name}"
        if module not in self._entries:
            if name not in self.names():
                if name in self._files:
                    return self._entries[self._files[name]]
                near = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(self.names())}"
                raise ConfigError(f"no {self._kind} is called {name!r}; {hint}")
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"the {self._kind} {name!r} needs {error.name}, which is not installed here; install it, or choose"
                    f" another {self._kind}"
                ) from None
        return self._entries[module]

    def options(self, name: str, options: Mapping[str, Any], file: str | None = None, where: Key = ()) -> Config:
        """`options` checked by the part's own configuration; `where` is the key they stand under, for errors."""
        return build(self.entry(name, file).config, Layers(dict(options)), where or (name,))

    def make(self, name: str, options: Mapping[str, Any], site: Any, file: str | None = None) -> P:
        """Build a part for `site`."""
        return self.entry(name, file).part(self.options(name, options, file), site)

    def _own(self, path: Path) -> Entry[P]:
        """The part that a file of the user's own registers; a file that has changed is another one."""
        if not path.is_file() or path.suffix != ".py":
            raise ConfigError(f"the {self._kind} file {path} cannot be read; give a path to a .py file")
        code = path.read_bytes()
        digest = hashlib.sha256(f"{path.resolve()}\n".encode() + code).hexdigest()[:16]
        module = f"leviathan_user_{self._kind}_{digest}.{path.stem}"
        if module not in sys.modules:
            spec = importlib.util.spec_from_file_location(module, path)
            assert spec is not None
            sys.modules[module] = importlib.util.module_from_spec(spec)
            try:
                # not by the spec's loader, which takes a compiled form by its time of change
                exec(compile(code, str(path), "exec", dont_inherit=True), vars(sys.modules[module]))
            except (Exception, SystemExit) as error:
                del sys.modules[module]
                told = f"{type(error).__name__}: {error}".splitlines()[0]
                raise ConfigError(f"the {self._kind} file {path} fails{line_of(error, path)} ({told})") from None
        if module not in self._entries:
            raise ConfigError(
                f"the {self._kind} file {path} registers no {self._kind}; decorate its class with @register(Config)"
            )
        self._files[path.stem] = module
        return self._entries[module]


def line_of(error: BaseException, path: Path) -> str:
    """` in line N`: where in a file an error arose, or nothing if elsewhere."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f" in line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" in line {lines[-1]}" if lines else ""
