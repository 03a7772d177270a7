"""The shape of the code is a test: arrows, doors, sizes, one YAML a mixer. Read with `ast`; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "data_pipeline", "pretrain", "launcher")
MAY_IMPORT = {
    "configs": set(),
    "data_pipeline": {"configs"},
    "pretrain": {"configs", "data_pipeline"},
    "launcher": {"configs", "data_pipeline", "pretrain"},
}
INSIDE_PRETRAIN = {
    # room: what it may not import
    "ops": ("pretrain.mixers", "pretrain.channels", "pretrain.models", "pretrain.engine", "pretrain.trainer"),
    "correlation": ("pretrain.mixers", "pretrain.channels", "pretrain.models", "pretrain.engine", "pretrain.trainer"),
    "mixers": ("pretrain.mixers", "pretrain.channels", "pretrain.models", "pretrain.engine", "pretrain.trainer"),
    "channels": ("pretrain.mixers", "pretrain.channels", "pretrain.models", "pretrain.engine", "pretrain.trainer"),
    "stacks": ("pretrain.mixers.", "pretrain.channels.", "pretrain.models", "pretrain.engine", "pretrain.trainer"),
    "models": ("pretrain.mixers.", "pretrain.channels.", "pretrain.stacks.", "pretrain.engine", "pretrain.trainer"),
}
DOORS = {
    "deepspeed": {"pretrain/engine_deepspeed.py", "pretrain/ops/expert_parallel.py"},
    "wandb": {"pretrain/metrics.py"},
    "torch.distributed": {"pretrain/parallel.py"},
    "ray": {"launcher/on_ray.py", "launcher/ray_rank.py", "data_pipeline/on_ray.py"},
    "webdataset": {"data_pipeline/shards.py"},
    "sentencepiece": {"data_pipeline/tokenizer.py"},
    "matplotlib": {"pretrain/plots.py"},
    "typer": {"launcher/cli.py", "launcher/cli_data.py", "launcher/cli_words.py"},
}
HEAVY = {"torch", "deepspeed", "ray", "wandb", "webdataset", "matplotlib", "pyarrow"}
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
LINES, FUNCTION_LINES, ARGUMENTS = 400, 60, 8
TRAIN_ARGUMENTS = 10
"""The signature of train() says all that training needs, and is the only one that may be longer."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


over_sources = pytest.mark.parametrize("path", SOURCES, ids=name)


@over_sources
def test_imports_go_one_way(path):
    package = name(path).split("/")[0]
    for module in imported(ast.parse(path.read_text())):
        top = module.split(".")[0]
        if top in PACKAGES and top != package:
            assert top in MAY_IMPORT[package], f"{package} may not import {module}"
        assert top not in ("tests", "benchmarks"), f"{name(path)} may not import {module}"


@over_sources
def test_inside_pretrain_models_stand_on_mixers_and_mixers_on_ops(path):
    parts = name(path).split("/")
    if parts[0] != "pretrain" or parts[1] not in INSIDE_PRETRAIN or path.stem == "__init__":
        return
    for module in imported(ast.parse(path.read_text())):
        for closed in INSIDE_PRETRAIN[parts[1]]:
            assert not module.startswith(closed), f"{name(path)} may not import {module}"


@over_sources
def test_each_library_has_one_door(path):
    for module in imported(ast.parse(path.read_text())):
        for library, doors in DOORS.items():
            if module == library or module.startswith(library + "."):
                assert name(path) in doors, f"{library} is imported only in {', '.join(sorted(doors))}"


@over_sources
def test_files_functions_and_signatures_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= LINES, f"{name(path)} is longer than {LINES} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} in {name(path)} is too long"
            count = (
                len(node.args.args)
                + len(node.args.kwonlyargs)
                - (node.args.args[:1] != [] and is_self(node.args.args[0]))
            )
            limit = TRAIN_ARGUMENTS if node.name == "train" and path.stem == "trainer" else ARGUMENTS
            assert count <= limit, f"{node.name} in {name(path)} takes {count} arguments"


def is_self(argument: ast.arg) -> bool:
    return argument.arg in ("self", "cls")


@over_sources
def test_every_file_and_public_thing_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{name(path)} has no first sentence"
    methods_of_parts = {
        "forward",
        "initial_state",
        "flops_per_token",
        "halved_flops_per_token",
        "state_bytes",
        "param_groups",
        "measure_names",
        "figures",
        "settle",
        "stream",
        "training_outputs",
        "segments",
        "as_expert",
    }
    of_models = {"logits", "decode", "recompute", "begin_step"}
    engines = {"step", "evaluate", "state", "load"}
    teams = {"place", "start", "ended", "beats", "frozen", "host", "who", "send", "end", "close"}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            told_elsewhere = path.parent.name in ("mixers", "channels", "stacks")
            assert ast.get_docstring(node) or told_elsewhere, f"{node.name} in {name(path)} has no docstring"
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    kept = inner.name in methods_of_parts | of_models | engines | teams or path.parent.name == "mixers"
                    assert ast.get_docstring(inner) or kept, (
                        f"{node.name}.{inner.name} in {name(path)} has no docstring"
                    )


@over_sources
def test_there_is_no_left_over_work_and_no_shell(path):
    text = path.read_text()
    for word in ("TODO", "FIXME", "XXX", "NotImplementedError", "shell=True", "os.system", "os.fork", "yaml.load("):
        assert word not in text, f"{name(path)} says {word}"


def test_no_test_forks():
    """Threads of torch leave locks behind that nobody in a forked process opens."""
    here = Path(__file__)
    for path in (path for path in sorted(here.parent.rglob("*.py")) if path != here):
        for word in ("os.fork", 'get_context("fork")', 'set_start_method("fork")'):
            assert word not in path.read_text(), f"{name(path)} says {word}"


def test_every_mixer_has_one_yaml_and_back():
    files = {p.stem for p in (ROOT / "pretrain/mixers").glob("*.py")} - {"__init__"}
    assert files == {p.stem for p in (ROOT / "configs/mixers").glob("*.yaml")}


def test_no_part_is_named_outside_its_own_file():
    """Nobody asks for a mixer's name to decide something: it is asked what it promises."""
    names = {p.stem for p in (ROOT / "pretrain/mixers").glob("*.py")} - {"__init__"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                for side in [node.left, *node.comparators]:
                    is_name = isinstance(side, ast.Constant) and side.value in names
                    assert not is_name or path.stem == side.value, (
                        f"{name(path)}:{node.lineno} branches on a mixer's name"
                    )


def test_the_command_line_starts_without_heavy_libraries():
    """Whatever the command line imports at its top, transitively, is light."""
    seen, queue = set(), ["launcher.cli", "launcher.on_local", "launcher.prepare", "launcher.train"]
    while queue:
        module = queue.pop()
        path = ROOT / (module.replace(".", "/") + ".py")
        if module in seen or not path.exists():
            continue
        seen.add(module)
        for node in ast.parse(path.read_text()).body:
            names = imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else []
            for found in names:
                assert found.split(".")[0] not in HEAVY, f"{module} imports {found} at its top"
                queue += [found] if found.split(".")[0] in PACKAGES else []
    assert len(seen) > 10


def test_packages_are_listed_by_hand():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        name(p.parent).replace("/", ".")
        for package in (*PACKAGES, "slurm")
        for p in (ROOT / package).rglob("__init__.py")
    }
    assert set(listed) == there
