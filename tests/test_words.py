"""The language of the package: docstrings, names and spelling."""

import ast
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = sorted((REPOSITORY / "dsrcnn").rglob("*.py"))
CODE = [*PACKAGE, *sorted((REPOSITORY / "benchmarks").rglob("*.py"))]
CODE += [*sorted((REPOSITORY / "tools").glob("*.py")), *sorted(REPOSITORY.glob("*.py"))]
TESTS = [p for p in sorted((REPOSITORY / "tests").rglob("*.py")) if p != Path(__file__)]
PAGES = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
PAGES += [REPOSITORY / "datasets/README.md"]
# British spellings of words that occur in this field.
BRITISH = re.compile(
    r"\b\w*(colour|centre|neighbour|behaviour|favour|grey|artefact|labell|modell|cancell|licence"
    r"|(normal|standard|general|optim|initial|regular|parametr|synchron|visual|summar|recogn|organ"
    r"|penal|minim|maxim|util|stabil|quant|real|special|emphas|categor|token|serial)is(e[sd]?|ing"
    r"|ation|ations)\b)\w*",
    re.IGNORECASE,
)


def documented(path: Path):
    """Name and docstring of the module and of every class and function in it."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            yield getattr(node, "name", path.name), ast.get_docstring(node)


def named(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(REPOSITORY)))


@named(CODE)
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    for name, text in documented(path):
        assert not text.startswith("What "), f"{name}: {text.splitlines()[0]}"
        assert "Letters:" not in text, f"{name}: write Notation:"


@named([*CODE, *TESTS, *PAGES])
def test_spelling_is_american(path):
    assert not {m[0] for m in BRITISH.finditer(path.read_text())}
