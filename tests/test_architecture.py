"""The rows of the package: a folder imports from its own row or from rows before it."""

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "dsrcnn"
ROWS = [
    {"compat", "errors", "version", "structures", "utils", "config"},
    {"layers"},
    {"solver", "modeling", "data", "evaluation", "visualization"},
    {"engine"},
    {"inference", "export"},
    {"analysis"},
    {"cli"},
]
ROW = {name: index for index, names in enumerate(ROWS) for name in names}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported_modules(path: Path) -> list[str]:
    """Absolute names of the package's modules that a file imports, wherever in the file."""
    package = ["dsrcnn", *path.relative_to(PACKAGE).parent.parts]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [n for n in names if n.startswith("dsrcnn.")]


def folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_folder_has_a_row():
    assert {folder(p) for p in FILES} <= set(ROW)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = folder(path)
    for name in imported_modules(path):
        target = name.split(".")[1]
        if target in ROW:
            assert ROW[target] <= ROW[own], f"{own} imports {name}"
            if target == "modeling":
                assert own in {"modeling", "engine", "inference", "export", "analysis", "cli"}


@pytest.mark.parametrize("part", ["matching", "losses"])
def test_matching_and_losses_know_neither_heads_nor_proposals(part):
    for path in (PACKAGE / "modeling" / part).glob("*.py"):
        for name in imported_modules(path):
            allowed = ("dsrcnn.structures", "dsrcnn.errors", f"dsrcnn.modeling.{part}")
            assert name.startswith(allowed), f"{path.name} imports {name}"


def test_the_config_is_read_in_from_config_only():
    """Below `from_config` a model knows keyword arguments, not `cfg`. Builders choose by name."""
    for path in [*(PACKAGE / "modeling").rglob("*.py"), *(PACKAGE / "layers").rglob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and not function.name.startswith(
                ("from_config", "build_")
            ):
                arguments = [a.arg for a in function.args.args + function.args.kwonlyargs]
                assert "cfg" not in arguments, f"{path.name}: {function.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_only_command_lines_print(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    may_print = folder(path) == "cli" or path.name in {"main.py"}
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    prints = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert may_print or not prints
