"""Write docs/CONFIG.md from the comments of dsrcnn/config/defaults.py.

Usage: ``python tools/config_docs.py``. A test checks that the page is up to date.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from dsrcnn.config import add_dsrcnn_config

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "dsrcnn/config/defaults.py"
PAGE = ROOT / "docs/CONFIG.md"
DETECTRON2 = "https://detectron2.readthedocs.io/en/latest/modules/config.html"
INTRODUCTION = f"""# Config keys

Every key that this package adds to [Detectron2's]({DETECTRON2}), with its default. Set keys in a
YAML file, or as `KEY VALUE` on the command line. This page is generated from the comments of
`dsrcnn/config/defaults.py` by `python tools/config_docs.py`.
"""


def comments_by_key() -> dict[str, str]:
    """Collect the comment of every key and node, by dotted key."""
    text = SOURCE.read_text()
    lines = text.splitlines()
    comments: dict[str, str] = {}
    for function in ast.parse(text).body:
        if isinstance(function, ast.FunctionDef) and function.name.startswith("_add_"):
            for key, statement in _assignments(function.body, {"cfg": ""}):
                if comment := _comment_of(statement, lines):
                    comments.setdefault(key, comment)
    return comments


def _assignments(body: list[ast.stmt], nodes: dict[str, str]) -> Iterator[tuple[str, ast.stmt]]:
    """Dotted keys that statements assign to, where `nodes` maps variables to dotted nodes."""
    for statement in body:
        if isinstance(statement, ast.For) and isinstance(statement.iter, ast.Tuple):
            for element in statement.iter.elts:
                for inner in statement.body:
                    yield f"{nodes['node']}.{ast.literal_eval(element)}.PROB", inner
        elif isinstance(statement, ast.Assign):
            targets = statement.targets
            keys = [_dotted(t, nodes) for t in targets if isinstance(t, ast.Attribute)]
            if not keys and isinstance(statement.value, ast.Attribute):
                keys = [_dotted(statement.value, nodes)]  # node = cfg.SOLVER
            for target in targets:
                if isinstance(target, ast.Name):
                    nodes[target.id] = keys[0]
            yield keys[0], statement


def _dotted(expression: ast.expr, nodes: dict[str, str]) -> str:
    if isinstance(expression, ast.Name):
        return nodes[expression.id]
    assert isinstance(expression, ast.Attribute)
    prefix = _dotted(expression.value, nodes)
    return f"{prefix}.{expression.attr}" if prefix else expression.attr


def _comment_of(statement: ast.stmt, lines: list[str]) -> str:
    """Comment behind a statement, otherwise the one above it."""
    first = lines[statement.lineno - 1]
    if "  # " in first:
        return first.split("  # ", 1)[1].strip()
    above = []
    number = statement.lineno - 2
    while lines[number].strip().startswith("# "):
        above.insert(0, lines[number].strip()[2:])
        number -= 1
    return " ".join(above)


def added_keys(cfg: CfgNode, base: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of `cfg` that `base` lacks, or whose default differs, with their values."""
    for name, value in cfg.items():
        key = f"{prefix}{name}"
        if isinstance(value, CfgNode):
            yield from added_keys(value, base.get(name, CfgNode()), f"{key}.")
        elif name not in base or base[name] != value:
            yield key, value


def nodes_read(text: str) -> set[str]:
    """Dotted names that a module reads of configs, such as ``INPUT.AUG.WARP`` of ``cfg``.

    Variables that stand for a node (``node = cfg.INPUT``) are followed within their function.
    """
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return {name for part in (tree, *functions) for name in _nodes_read(part)}


def _nodes_read(part: ast.AST) -> Iterator[str]:
    variables = {"cfg": ""}
    for node in ast.walk(part):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                variables |= dict(_node_variables(target, node.value, variables))
    for node in ast.walk(part):
        if isinstance(node, ast.Attribute) and (name := _node_name(node, variables)):
            yield name


def _node_variables(
    target: ast.expr, value: ast.expr, variables: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Variables that an assignment gives nodes, with their dotted names."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for pair in zip(target.elts, value.elts, strict=False):
            yield from _node_variables(*pair, variables)
    elif isinstance(target, ast.Name) and (name := _node_name(value, variables)):
        yield target.id, name


def _node_name(expression: ast.expr, variables: dict[str, str]) -> str | None:
    """Dotted name of an expression below a config, None for any other."""
    if isinstance(expression, ast.Name):
        return variables.get(expression.id)
    if not isinstance(expression, ast.Attribute):
        return None
    if expression.attr in ("cfg", "_cfg"):  # of self
        return ""
    parent = _node_name(expression.value, variables)
    return None if parent is None else f"{parent}.{expression.attr}".lstrip(".")


def readers_by_node() -> dict[str, list[str]]:
    """Files that read keys of a node, by its dotted name."""
    readers: dict[str, list[str]] = {}
    for path in sorted((ROOT / "dsrcnn").rglob("*.py")):
        if path.parent.name != "config":
            for name in nodes_read(path.read_text()):
                readers.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return readers


def page() -> str:
    """Text of the page."""
    readers = readers_by_node()
    comments = comments_by_key()
    sections: dict[str, list[str]] = {}
    for key, value in added_keys(add_dsrcnn_config(get_cfg()), get_cfg()):
        node, _, name = key.rpartition(".")
        if node.startswith("INPUT.AUG"):
            node, name = "INPUT.AUG", key.removeprefix("INPUT.AUG.")
        if node == "MODEL.SparseRCNN.PROPOSALS":
            node, name = "MODEL.SparseRCNN", f"PROPOSALS.{name}"
        shown = repr(value) if len(repr(value)) < 60 else "(see the file)"
        row = f"| `{name}` | `{shown}` | {comments.get(key, '')} |"
        sections.setdefault(node, []).append(row)
    parts = [INTRODUCTION]
    for node, rows in sections.items():
        parts.append(f"## {f'`{node}`' if node else 'Top level'}\n")
        if comments.get(node):
            files = readers.get(node, [])
            parts.append(f"{comments[node]}\n")
            parts.append(f"Read by {', '.join(f'`{file}`' for file in files)}.\n")
        parts.append("\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
