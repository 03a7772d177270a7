"""Parts that are found by name: the name is the file's, and only the file that is asked for is imported.

So a part that needs a library which is not installed breaks nothing but itself, and adding one is adding a file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
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

    def register(self, config: type[Config]) -> Callable[[type[P]], type[P]]:
        """Decorate a class: it is registered under the name of its file, with `config` as the class of its options."""

        def add(part: type[P]) -> type[P]:
            name = part.__module__.rpartition(".")[2]
            self._entries[name] = Entry(name, config, part)
            return part

        return add

    def names(self) -> list[str]:
        """Every part that comes with the package."""
        return sorted(p.stem for p in self._folder.glob("*.py") if p.stem != "__init__")

    def entry(self, name: str, file: str | None = None) -> Entry[P]:
        """Import one part's file, and no other. Raises ConfigError for a name that does not exist."""
        if file is not None:
            return self._own(Path(file))
        if name not in self._entries:
            if name not in self.names():
                near = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(self.names())}"
                raise ConfigError(f"no {self._kind} is called {name!r}; {hint}")
            importlib.import_module(f"{self._package}.{name}")
        return self._entries[name]

    def options(self, name: str, options: Mapping[str, Any], file: str | None = None, where: Key = ()) -> Config:
        """`options` checked by the part's own configuration; `where` is the key they stand under, for errors."""
        return build(self.entry(name, file).config, Layers(dict(options)), where or (name,))

    def make(self, name: str, options: Mapping[str, Any], site: Any, file: str | None = None) -> P:
        """Build a part for `site`."""
        return self.entry(name, file).part(self.options(name, options, file), site)

    def _own(self, path: Path) -> Entry[P]:
        """A part from a file of the user's own, registered under the file's stem."""
        module = f"leviathan_user_{self._kind}.{path.stem}"
        loaded = sys.modules.get(module)
        if loaded is None or Path(str(loaded.__file__)).resolve() != path.resolve():
            spec = importlib.util.spec_from_file_location(module, path)
            if spec is None or spec.loader is None or not path.is_file():
                raise ConfigError(f"the {self._kind} file {path} cannot be read; give a path to a .py file")
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[module] = loaded
            spec.loader.exec_module(loaded)
        if path.stem not in self._entries:
            raise ConfigError(f"{path} registers no {self._kind}; decorate its class with @register(Config)")
        return self._entries[path.stem]
