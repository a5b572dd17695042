"""The rows of the package: a folder imports from its own row or from rows before it."""

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

from dsrcnn.modeling.matching import MATCHER_REGISTRY
from dsrcnn.modeling.proposals import PROPOSALS_REGISTRY

PACKAGE = REPOSITORY / "dsrcnn"
ROWS = [
    {"compat", "errors", "version", "structures", "utils", "config"},
    {"layers"},
    {"solver", "modeling", "data", "evaluation", "visualization"},
    {"engine"},
    {"inference", "export"},
    {"analysis"},
    {"app"},
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
                assert own in {
                    "modeling",
                    "engine",
                    "inference",
                    "export",
                    "analysis",
                    "app",
                    "cli",
                }


@pytest.mark.parametrize("part", ["matching", "losses"])
def test_matching_and_losses_depend_on_neither_heads_nor_proposals(part):
    allowed = ("dsrcnn.structures", "dsrcnn.errors", "dsrcnn.utils", "dsrcnn.config")
    for path in (PACKAGE / "modeling" / part).glob("*.py"):
        for name in imported_modules(path):
            assert name.startswith((*allowed, f"dsrcnn.modeling.{part}")), f"{path.name}: {name}"


def test_modeling_reads_the_config_only_where_it_builds():
    """Below `from_config` a model takes keyword arguments, not `cfg`."""
    for path in [*(PACKAGE / "modeling").rglob("*.py"), *(PACKAGE / "layers").rglob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            builds = function.name.startswith(("from_config", "build_", "check_config"))
            decorators = [d.id for d in function.decorator_list if isinstance(d, ast.Name)]
            if builds or "config_step" in decorators or function.name == "matcher_class":
                continue
            arguments = [a.arg for a in function.args.args + function.args.kwonlyargs]
            assert "cfg" not in arguments, f"{path.name}: {function.name}"


def registered_names() -> set[str]:
    """Names of this package's and Detectron2's architectures, heads, matchers and proposals."""
    registries = (META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, MATCHER_REGISTRY, PROPOSALS_REGISTRY)
    return {name for registry in registries for name, _ in registry}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_decided_by_the_name_of_an_architecture(path):
    """Classes decide, so that a subclass registered by a user is treated alike."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
            assert not constants & registered_names(), f"line {node.lineno}"
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)) and not exported(tree, node):
            names = [e.value for e in node.elts if isinstance(e, ast.Constant)]
            assert not set(names) & {name for name, _ in META_ARCH_REGISTRY}, f"line {node.lineno}"


def exported(tree: ast.Module, node: ast.AST) -> bool:
    """Whether `node` is the list of ``__all__``."""
    return any(isinstance(s, ast.Assign) and s.value is node for s in tree.body)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_only_command_lines_print(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    may_print = folder(path) == "cli" or path.name == "main.py"
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    prints = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert may_print or not prints
