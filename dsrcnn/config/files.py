"""Safe reading of config files: plain YAML in local files, with ``_BASE_``.

Detectron2's own reader runs Python that a file asks for by ``!!python/...`` tags and fetches a
``_BASE_`` from the network.
"""

import copy
import logging
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

_LOGGER = logging.getLogger(__name__)
_BASE = "_BASE_"
_TAGS = "tag:yaml.org,2002:"
_PYTHON = f"{_TAGS}python/"
_KEY_TAGS = (f"{_TAGS}str", f"{_TAGS}merge")
# Limits well above any config that is known; a file could take minutes or all memory without them.
_MAX_BYTES = 5_000_000
_MAX_NODES = 100_000  # with every alias replaced by what it stands for
_MAX_DEPTH = 40
_MAX_FILES = 50
# Errors of PyYAML's constructors for values that do not fit their tag, such as ``!!int ""``.
_BAD_VALUES = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a config file and the files that its ``_BASE_`` names, without running code.

    Values of a file replace those of its bases. A base is a local path relative to the file, or a
    list of them, where later ones replace earlier ones.

    Raises:
        ConfigError: naming the file, if it or a base cannot be used.
    """
    return _read(Path(path), (), [])


def check_yaml(text: str, where: str) -> None:
    """Check that a text would be read as a config file.

    Raises:
        ConfigError: naming `where`.
    """
    _check_size(text.encode(), where)
    _parse(text, where)


def _check_size(content: bytes, where: str) -> None:
    if len(content) > _MAX_BYTES:
        raise ConfigError(
            f"{where} has more than {_MAX_BYTES} bytes, the limit of a config file. Shorten "
            "it, for example DATASETS.CUSTOM.CLASSES."
        )


def _read(path: Path, parents: tuple[Path, ...], files: list[Path]) -> dict[str, Any]:
    """Read `path`, a base of the last of `parents`; `files` collects everything read."""
    files.append(path)
    names = " -> ".join(f"{p}" for p in (*parents, path))
    where = f"Config file {path}" + (f" ({_BASE} of {names})" if parents else "")
    if os.path.realpath(path) in map(os.path.realpath, parents):
        raise ConfigError(f"{where} is its own {_BASE}; remove one of these lines.")
    if len(files) > _MAX_FILES:
        raise ConfigError(f"{where}: more than {_MAX_FILES} files by {_BASE}; write fewer.")
    content = _parse(_read_text(path, where), where)
    merged: dict[str, Any] = {}
    if _BASE in content:
        bases = content.pop(_BASE)
        for base in bases if isinstance(bases, list) else [bases]:
            merged = _merge(
                merged, _read(_base_path(base, path, where), (*parents, path), files), where
            )
    return _merge(merged, content, where)


def _base_path(base: object, path: Path, where: str) -> Path:
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        raise ConfigError(f"{where}: {_BASE} is {base!r}; write the path of a YAML file.")
    if re.match(r"[A-Za-z][\w+.-]*://", base):
        raise ConfigError(
            f"{where}: {_BASE} is {base!r}, an address; bases are local files only. Download it "
            "and write its path."
        )
    return path.parent / os.path.expanduser(base)


def _read_text(path: Path, where: str) -> str:
    try:
        mode = os.stat(path).st_mode  # before opening: a named pipe would wait for its writer
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "a device")
            raise ConfigError(f"{where} is {kind}; write the path of a YAML file.")
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{where} does not exist; correct the path.") from error
    except (OSError, ValueError) as error:  # ValueError for names with a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{where} cannot be read: {reason}.") from error
    _check_size(content, where)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is no UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); save "
            "it as UTF-8."
        ) from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is not None:
                _check_node(root, where)
            content = None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deep; write at most {_MAX_DEPTH} levels.") from (
            error
        )
    except (yaml.YAMLError, *_BAD_VALUES) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        kind = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise ConfigError(f"{where} {kind}; a config file holds lines KEY: VALUE.")
    return content


def _check_node(root: yaml.Node, where: str) -> None:
    """Refuse tags that run code, keys that are no names or contradict, and trees that explode."""
    sizes: dict[int, int] = {}  # by node; 0 while its children are visited

    def visit(node: yaml.Node, depth: int) -> int:
        line = f"line {node.start_mark.line + 1}"
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise ConfigError(f"{where}, {line}: a value contains itself by an alias (*).")
            return sizes[id(node)]
        if node.tag.startswith(_PYTHON):
            raise ConfigError(
                f"{where}, {line}: the tag !!{node.tag.removeprefix(_TAGS)} asks to run Python "
                "code, which config files may not. Write the value itself."
            )
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{where}, {line}: nested too deep; write at most {_MAX_DEPTH}.")
        sizes[id(node)] = 0
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, where)
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        size = 1 + sum(visit(child, depth + 1) for child in children)
        if size > _MAX_NODES:
            raise ConfigError(f"{where}, {line}: more than {_MAX_NODES} values; it is no config.")
        sizes[id(node)] = size
        return size

    visit(root, 0)


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    seen: dict[str, tuple[int, yaml.Node]] = {}  # line and value by key
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag.startswith(_PYTHON):
            continue  # `visit` refuses it
        if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
            shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "of several values"
            raise ConfigError(
                f"{where}, line {line}: the key {shown} is no name; keys are words such as SOLVER."
            )
        if key.value in seen:
            first, other = seen[key.value]
            problem = (
                f"{where}: the key {key.value} stands on line {first} and again on line {line}"
            )
            if not _is_same_scalar(value, other):
                raise ConfigError(f"{problem}; remove one.")
            # An official config has such a line. No value is lost by it.
            _LOGGER.warning("%s, with the same value; remove one.", problem)
        seen[key.value] = line, value


def _is_same_scalar(a: yaml.Node, b: yaml.Node) -> bool:
    is_scalar = isinstance(a, yaml.ScalarNode) and isinstance(b, yaml.ScalarNode)
    return is_scalar and (a.tag, a.value) == (b.tag, b.value)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a copy of `below` with the values of `above`, nodes merged key by key."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict):
            node = merged.get(key, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"{where}: {key} is a node with keys, but its {_BASE} has the value {node!r}; "
                    "correct one of them."
                )
            merged[key] = _merge(node, value, where)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
