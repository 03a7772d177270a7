"""The generated parts of the documentation: `python -m launcher.tables FILE…` writes them where their marks stand.

    <!-- table: mixers -->
    …
    <!-- end -->

What stands between the marks is replaced; a test fails where it is not what would be written.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from configs.errors import UsageError
from configs.load import load
from launcher.mixers import SHOWN_SITE, certificate, mark, mixer_facts, score, size_text
from pretrain import mixer
from pretrain.amounts import short_number
from pretrain.certificate.issue import PROMISES
from pretrain.config import RunConfig
from pretrain.cost import cost_of
from pretrain.models.build import build

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "data_pipeline", "pretrain", "launcher", "benchmarks")
BYTES_VOCAB = 257
_PART = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Tables = Mapping[str, Callable[[], str]]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns whose heading begins with `>` are set to the right."""
    names = [name.removeprefix(">") for name in head]
    rule = ["---:" if name.startswith(">") else "---" for name in head]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (names, rule, *rows))


def mixers() -> str:
    """Every mixer: what it is, what it costs, what it promises, and how much of its certificate it keeps."""
    rows = []
    for name in mixer.REGISTRY.names():
        facts = mixer_facts(name)
        kept = [promise for promise, held in facts.promises.items() if held]
        rows.append([f"`{name}`", facts.what, short_number(facts.parameters), short_number(facts.flops_per_token),
                     size_text(facts.state_bytes), ", ".join(kept), score(certificate(name))])  # fmt: skip
    table = markdown(["mixer", "what it is", ">parameters", ">FLOPs a token", ">decoding state", "promises",
                      ">certificate"], rows)  # fmt: skip
    return (
        f"{table}\n\nOne layer of width {SHOWN_SITE.width}, rows of {SHOWN_SITE.length:,} tokens, default options;"
        " forward pass, a multiply-add is 2; state in bf16 after a whole row."
    )


def certificates() -> str:
    """Every mixer's certificate: a row each, a column a promise."""
    names = mixer.REGISTRY.names()
    rows = [[f"`{name}`", *map(mark, certificate(name)), score(certificate(name))] for name in names]
    return markdown(["mixer", *(promise.name for promise in PROMISES), ">kept"], rows)


def promises() -> str:
    """What each promise is, and the flag that takes it back."""
    rows = [[promise.name, promise.says, f"`{promise.flag}`" if promise.flag else ""] for promise in PROMISES]
    return markdown(["promise", "is", "asked for by"], rows)


def models() -> str:
    """Every model preset and what it costs, with the vocabulary of bytes."""
    rows = []
    for path in sorted((ROOT / "configs/models").glob("*.yaml")):
        config = load(RunConfig, [path]).model
        model = build(config, BYTES_VOCAB)
        cost = cost_of(model)
        mixed = ", ".join(f"{part.name} ×{part.options.get('heads', '?')} heads" for part in config.mixers)
        if config.ensemble.modules:
            mixed += f", in {len(config.ensemble.modules)} modules of two models"
        elif not any(isinstance(module, mixer.TokenMixer) for module in model.modules()):
            mixed = config.stack.name
        depth = f"{config.depth} ×{config.wrap.passes}" if config.wrap.passes > 1 else str(config.depth)
        rows.append([
            f"`models/{path.stem}`", mixed, str(config.width), depth, str(config.length), f"{cost.parameters:,}",
            short_number(cost.flops_per_token), size_text(cost.state_bytes),
        ])  # fmt: skip
    return markdown(["preset", "mixer", ">width", ">depth", ">length", ">parameters", ">training FLOPs a token",
                     ">decoding state"], rows)  # fmt: skip


def files() -> str:
    """Every file and the first sentence it says about itself."""
    rows = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            if said and path.stem != "__init__":
                first = " ".join(said.split("\n\n")[0].split())
                rows.append([f"`{path.relative_to(ROOT)}`", re.split(r"(?<=\.) ", first, maxsplit=1)[0].rstrip(".")])
    return markdown(["file", "what it says of itself"], rows)


TABLES: Tables = {
    "mixers": mixers, "certificates": certificates, "promises": promises, "models": models, "files": files,
}  # fmt: skip


def filled(text: str, tables: Tables = TABLES) -> str:
    """`text` with every marked part made anew. Raises UsageError for a mark that names no table."""

    def part(found: re.Match[str]) -> str:
        if found[2] not in tables:
            raise UsageError(f"no table is called {found[2]!r}; there is {', '.join(tables)}")
        return f"{found[1]}{tables[found[2]]()}\n{found[3]}"

    return _PART.sub(part, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        document = Path(name)
        document.write_text(filled(document.read_text()))
