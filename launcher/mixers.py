"""`leviathan mixers`: which there are, what each promises, whether it keeps that, and a file to begin one with."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from configs.errors import ConfigError, UsageError
from configs.load import build, read
from launcher.screen import Bar, make_table, make_terminal, one_line, told
from pretrain import mixer
from pretrain.amounts import short_number
from pretrain.certificate.costs import time_power
from pretrain.certificate.issue import PROMISES, Verdict, certify
from pretrain.certificate.trial import Candidate, Refused
from pretrain.mixer import Site, TokenMixer

SHOWN_SITE = Site(width=768, length=1024, layer=0, depth=12)
TEMPLATES = Path(__file__).with_name("templates")
_ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")
_MARKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("–", "dim")}
_WORDS = {True: ("kept", "green"), False: ("broken", "bold red"), None: ("not asked", "dim")}


# ---- which there are


@dataclass(frozen=True)
class MixerFacts:
    """One row of the table of mixers, all of it asked of the mixer itself at SHOWN_SITE with its default options."""

    name: str
    what: str
    equation: str
    source: str
    parameters: int
    flops_per_token: int
    state_bytes: int
    promises: dict[str, bool]


def mixer_facts(name: str, site: Site = SHOWN_SITE) -> MixerFacts:
    """What a mixer of the registry says of itself."""
    entry = mixer.REGISTRY.entry(name)
    part: Any = entry.part
    with torch.device("meta"):
        built: TokenMixer = mixer.make(name, {}, site)
    text = sys.modules[part.__module__].__doc__ or ""
    return MixerFacts(
        name,
        _first_sentence(text),
        _equation(text),
        _source(text),
        sum(parameter.numel() for parameter in built.parameters()),
        built.flops_per_token(site.length),
        built.state_bytes(site.length),
        {promise: bool(getattr(part, promise)) for promise in ("causal", "streams", "isolates")},
    )


def list_mixers() -> None:
    """Print the table of all token mixers."""
    terminal, site = make_terminal(), SHOWN_SITE
    title = f"one layer of width {site.width}, rows of {site.length:,} tokens, default options"
    table = make_table("mixer", "what it is", ">parameters", ">FLOPs/token", ">state", "promises", title=title)
    for name in mixer.REGISTRY.names():
        try:
            facts = mixer_facts(name)
        except (ImportError, ConfigError) as error:
            table.add_row(Text(name, style="bold"), Text(f"not usable here: {error}", style="yellow"))
            continue
        about = Text(facts.what)
        if facts.equation:
            about.append(f"\n{facts.equation}", style="cyan")
        if facts.source:
            about.append(f"\n{facts.source}", style="dim")
        about.append("\n")
        kept = [promise if held else f"not {promise}" for promise, held in facts.promises.items()]
        table.add_row(
            Text(name, style="bold"), about, short_number(facts.parameters), short_number(facts.flops_per_token),
            size_text(facts.state_bytes), "\n".join(kept),
        )  # fmt: skip
    terminal.print(table)
    terminal.print(
        "\nFLOPs of a forward pass, a multiply-add is 2; state: bytes (bf16) that decoding keeps after a whole row.\n"
        "Use one with model.mixers='[{name: NAME}]'; its options are in configs/mixers/NAME.yaml.\n"
        "leviathan mixers check NAME tries whether it keeps what it promises.",
        style="dim",
    )


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    found = re.match(r"(.*?[.:])(?:\s|$)", paragraph)
    return (found[1] if found else paragraph).rstrip(":.") + "."


def _equation(text: str) -> str:
    """The first indented lines of a docstring: its equation."""
    block = re.search(r"(?:^ {4}\S.*\n?)+", text, re.MULTILINE)
    return "\n".join(line.strip() for line in block[0].splitlines()) if block else ""


def _source(text: str) -> str:
    """Where the equation is from: what the docstring names as its source, or the first paper it cites."""
    stated = re.search(r"^Source: (.+?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    if stated is not None:
        return one_line(stated[1], 160)
    paper = _ARXIV.search(text)
    return f"arXiv {paper[1]}" if paper and paper[0] not in _first_sentence(text) else ""


def size_text(count: int) -> str:
    """Bytes, in KiB or MiB where they are many."""
    if count < 1 << 10:
        return f"{count} B"
    return f"{count / 1024:,.0f} KiB" if count < 1 << 20 else f"{count / (1 << 20):,.1f} MiB"


# ---- whether they keep it


def check_mixer(word: str, options: Sequence[str] = (), *, as_json: bool) -> None:
    """Print the certificate of a mixer, by name or by file. Raises Refused with the first promise that is broken.

    options: `key=value` words, where they differ from the defaults.
    """
    name, file = (Path(word).stem, word) if Path(word).suffix else (word, None)
    said = read([], options)
    build(mixer.REGISTRY.entry(name, file).config, said, (name,))
    candidate = Candidate(name, said.tree, file)
    verdicts = _certificates([candidate], quiet=as_json)[candidate.name]
    if isinstance(verdicts, ConfigError):
        raise verdicts
    if as_json:
        _print_json({candidate.name: verdicts})
    else:
        _print_one(candidate, verdicts)
    _refuse({candidate.name: verdicts})


def check_all(*, as_json: bool) -> None:
    """Print every mixer's certificate, a row each. Raises Refused with a line for each mixer that breaks a promise."""
    found = _certificates([Candidate(name) for name in mixer.REGISTRY.names()], quiet=as_json)
    there = {name: verdicts for name, verdicts in found.items() if not isinstance(verdicts, ConfigError)}
    if as_json:
        _print_json(there)
    else:
        terminal = make_terminal()
        table = make_table("mixer", *(promise.name for promise in PROMISES), ">kept")
        table.padding = (0, 1, 0, 0)
        for column in table.columns[1:-1]:
            column.overflow = "fold"  # a narrow terminal breaks the names of promises, not those of mixers
        table.columns[0].no_wrap = table.columns[-1].no_wrap = True
        for name, verdicts in there.items():
            table.add_row(Text(name, style="bold"), *(Text(*_MARKS[v.kept]) for v in verdicts), score(verdicts))
        terminal.print(table)
        for name, error in found.items():
            if isinstance(error, ConfigError):
                terminal.print(told(f"{name}: not usable here: {error}", "yellow"), soft_wrap=True)
    _refuse(there)


@cache
def certificate(name: str) -> tuple[Verdict, ...]:
    """The certificate of a mixer that comes along, with its default options; measured once a process."""
    return tuple(certify(Candidate(name)))


def score(verdicts: Sequence[Verdict]) -> str:
    """`13/14`: how many promises are kept, of those that are asked for."""
    asked = [verdict for verdict in verdicts if verdict.kept is not None]
    return f"{sum(verdict.kept is True for verdict in asked)}/{len(asked)}"


def mark(verdict: Verdict) -> str:
    """One character for a verdict."""
    return _MARKS[verdict.kept][0]


def _certificates(candidates: Sequence[Candidate], *, quiet: bool) -> dict[str, list[Verdict] | ConfigError]:
    """The certificates, or why a mixer cannot be tried here; with progress unless `quiet`."""
    if quiet:
        return _each(candidates, lambda done: None)
    total = len(candidates) * len(PROMISES)
    with Bar(make_terminal(), "certifying", show=lambda count: f"{count:,.0f} promises") as bar:
        return _each(candidates, lambda done: bar.update(done, total))


def _each(candidates: Sequence[Candidate], tell: Callable[[int], None]) -> dict[str, list[Verdict] | ConfigError]:
    found: dict[str, list[Verdict] | ConfigError] = {}
    for number, candidate in enumerate(candidates):
        verdicts: list[Verdict] = []
        tell(number * len(PROMISES))
        try:
            for verdict in certify(candidate):
                verdicts.append(verdict)
                tell(number * len(PROMISES) + len(verdicts))
            found[candidate.name] = verdicts
        except ConfigError as error:
            found[candidate.name] = error
    return found


def _print_one(candidate: Candidate, verdicts: Sequence[Verdict]) -> None:
    terminal, table = make_terminal(), make_table("promise", "verdict", ">measured", "")
    for verdict in verdicts:
        table.add_row(verdict.promise, Text(*_WORDS[verdict.kept]), _number(verdict.number), told(verdict.told))
    whole = all(verdict.kept is not False for verdict in verdicts)
    if whole:
        table.add_row("time", Text("not asked", style="dim"), "", time_power(candidate))
    terminal.print(table)
    line = f"\n{candidate.name} keeps {score(verdicts)} promises"
    terminal.print(told(line, "bold green" if whole else "bold red"), soft_wrap=True)


def _number(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if number == int(number) else f"{number:.1e}"


def _print_json(found: Mapping[str, Sequence[Verdict]]) -> None:
    rows = [{"mixer": name} | asdict(verdict) for name, verdicts in found.items() for verdict in verdicts]
    print(json.dumps(rows, ensure_ascii=False, indent=1))


def _refuse(found: Mapping[str, Sequence[Verdict]]) -> None:
    """Raise Refused with the first broken promise of each mixer; those after it often follow from it."""
    lines = []
    for name, verdicts in found.items():
        broken = [verdict for verdict in verdicts if verdict.kept is False]
        if broken:
            lines.append(f"{name} breaks the promise `{broken[0].promise}`: {broken[0].told}")
    if lines:
        raise Refused("\n".join(lines))


# ---- a file to begin one with


def new_mixer(name: str) -> None:
    """Write NAME.py, a mixer that works, and NAME.yaml, a configuration that uses it, here."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"{name!r} is no name for a mixer; use small letters, digits and _, for example my_mixer")
    if name in mixer.REGISTRY.names():
        raise UsageError(f"a mixer called {name} comes along; choose another name")
    files = {Path(f"{name}{suffix}"): TEMPLATES / f"mixer{suffix}" for suffix in (".py", ".yaml")}
    there = [str(path) for path in files if path.exists()]
    if there:
        raise UsageError(f"{' and '.join(there)} would be overwritten; choose another name, or move what is there")
    for path, template in files.items():
        path.write_text(template.read_text().replace("NAME", name))
    make_terminal().print(
        f"wrote {' and '.join(map(str, files))}\n"
        f"Next: leviathan mixers check {name}.py | leviathan data build data/embedded |"
        f" leviathan train data/embedded {name}.yaml",
        soft_wrap=True,
    )  # fmt: skip
