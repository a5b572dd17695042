"""Reading of configs: a path or a shipped name, plus ``KEY VALUE`` overrides."""

import ast
import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from detectron2.config import CfgNode, downgrade_config, get_cfg, upgrade_config

from ..errors import ConfigError, plain_system_errors
from .defaults import add_dsrcnn_config
from .files import read_yaml
from .rules import RUN, check_table, check_types, shortened, value_of
from .validate import check_config, choose_device

_LOGGER = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]
# Beside the package in a clone, inside it in a wheel.
_CONFIGS = next(
    (p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir()), _PACKAGE
)
_UNKNOWN = "key: "  # in the message of yacs about a key that does not exist
_TYPES = re.compile(r"with values \(.* vs\. (.*)\) for config key: (.+)", re.DOTALL)
_INT_FOR_FLOAT = "(<class 'float'> vs. <class 'int'>)"  # about an integer for a float


def shipped_configs() -> list[str]:
    """List the names of the shipped configs, such as ``quick/sparse_rcnn_shapes``."""
    return sorted(str(p.relative_to(_CONFIGS).with_suffix("")) for p in _CONFIGS.rglob("*.yaml"))


def find_config(path_or_name: str | Path) -> Path:
    """Return the file of a path or a shipped name.

    Raises:
        ConfigError: if there is no such file; it lists similar names.
    """
    if not isinstance(path_or_name, (str, os.PathLike)):
        raise ConfigError(
            f"The config file is {path_or_name!r}; write a path or a shipped name, as text."
        )
    path = Path(path_or_name)
    if os.path.isfile(path):  # unlike `Path.is_file`, False for names that are too long
        return path
    name = str(path_or_name).removeprefix("configs/").removesuffix(".yaml")
    shipped = _CONFIGS / f"{name}.yaml"
    if os.path.isfile(shipped):
        return shipped
    if os.path.exists(path):
        return path  # a folder or a pipe, which `read_yaml` refuses
    close = difflib.get_close_matches(name, shipped_configs(), n=3, cutoff=0.4)
    raise ConfigError(
        f"Config file {str(path_or_name)!r} does not exist. Write a path to a YAML file or a "
        f"shipped name, such as: {', '.join(close or shipped_configs())}."
    )


def read_cfg(path_or_name: str | Path, opts: Sequence[object] = ()) -> CfgNode:
    """Merge defaults, file and overrides ``KEY, VALUE, KEY, VALUE ...``, and check types.

    Files are read without running code from them; see `read_yaml`.

    Raises:
        ConfigError: if the file cannot be read, a key is unknown or a value has another type.
    """
    path = find_config(path_or_name)
    if not isinstance(opts, Sequence):
        raise ConfigError(f"Overrides are {opts!r}; write a list KEY, VALUE, ..., or leave it out.")
    if isinstance(opts, str) or len(opts) % 2:
        words = opts.split() if isinstance(opts, str) else [*map(str, opts)]
        words = [word if word.isprintable() else repr(word) for word in words]
        raise ConfigError(
            f"Overrides come in pairs KEY VALUE, as a list, but there are {len(words)} words: "
            f"{' '.join(words)}."
        )
    loaded = read_yaml(path)
    cfg = add_dsrcnn_config(get_cfg())
    try:
        _merge_file(cfg, CfgNode(loaded), path)
        cfg.merge_from_list(_like_defaults(cfg, opts))
    except (KeyError, AssertionError) as error:
        raise ConfigError(_explain(cfg, str(error.args[0]), path)) from error
    except (TypeError, AttributeError) as error:  # yacs looks up a key in a value, not a node
        known = set(config_keys(cfg))
        unknown = [str(key) for key in opts[0::2] if key not in known]
        text = f"{_UNKNOWN}{unknown[0]}" if unknown else "a config file holds lines KEY: VALUE."
        raise ConfigError(_explain(cfg, text, path)) from error
    except (RecursionError, MemoryError) as error:
        raise ConfigError(f"{path} or an override has a value that is nested too deep.") from error
    except ValueError as error:
        raise ConfigError(_explain_type(cfg, str(error), path)) from error
    check_types(cfg)
    check_table(cfg, RUN)
    return cfg


def _merge_file(cfg: CfgNode, loaded: CfgNode, path: Path) -> None:
    """Merge the content of a file into `cfg`, upgraded from Detectron2's first version."""
    # Detectron2 guesses alike.
    is_old = "WEIGHT" in _node(loaded, "MODEL") or "AUG_ON" in _node(loaded, "TEST")
    version = loaded.get("VERSION", 1 if is_old else cfg.VERSION)
    for key in loaded:
        *nodes, name = key.split(".")
        if nodes:
            raise ConfigError(
                f"{path}: keys of a file are nested; write {name} below {': '.join(nodes)}:."
            )
    if type(version) is not int or version not in (1, cfg.VERSION):
        raise ConfigError(
            f"{path} is a v{version} config; Detectron2 reads v1 and v{cfg.VERSION}. Write VERSION "
            f"{cfg.VERSION}."
        )
    if version == cfg.VERSION:
        _quote_texts(loaded, cfg)
        cfg.merge_from_other_cfg(loaded)
        return
    _LOGGER.warning("%s is a v1 config; it is upgraded to v%d.", path, cfg.VERSION)
    old = downgrade_config(cfg, to_version=version)
    _quote_texts(loaded, old)
    old.merge_from_other_cfg(loaded)
    upgraded = upgrade_config(old)
    cfg.clear()
    cfg.update(upgraded)


def _node(cfg: CfgNode, name: str) -> CfgNode:
    node = cfg.get(name)
    return node if isinstance(node, CfgNode) else CfgNode()


def _quote_texts(loaded: CfgNode, cfg: CfgNode) -> None:
    """Quote values of a file, in place, that are text and that yacs would read as another type."""
    for key, value in loaded.items():
        default = cfg.get(key)
        if isinstance(value, CfgNode) and isinstance(default, CfgNode):
            _quote_texts(value, default)
        elif isinstance(value, str) and isinstance(default, str):
            loaded[key] = _as_text(value)


def _as_text(value: str) -> str:
    """Quote a text that looks like a Python value, such as the name ``2024_06_12`` of a folder."""
    try:
        is_text = isinstance(ast.literal_eval(value), str)
    except (ValueError, SyntaxError):  # no Python value
        return value
    return value if is_text else repr(value)


def _like_defaults(cfg: CfgNode, opts: Sequence[object]) -> list[object]:
    """Turn words that yacs refuses into the type of the default.

    ``UNIT_STEP 0`` becomes 0.0, ``NORM_TYPE inf`` infinity, and ``OUTPUT_DIR 12`` "12".
    """
    words = list(opts)
    for index in range(0, len(words), 2):
        default: object = cfg
        for part in str(words[index]).split("."):
            default = default.get(part) if isinstance(default, CfgNode) else None
        word = words[index + 1]
        if isinstance(word, bool) or not isinstance(word, (str, int, float)):
            continue
        if isinstance(default, float) and re.fullmatch(r"[+-]?(\d+|inf)", str(word)):
            words[index + 1] = float(word)
        elif isinstance(default, str):
            words[index + 1] = _as_text(str(word))
    return words


def _explain(cfg: CfgNode, text: str, path: Path) -> str:
    """Explain an error of yacs; for an unknown key, with the most similar known keys."""
    where = f"{path}, its _BASE_ or the overrides"
    if _UNKNOWN not in text:
        return f"{where} cannot be used: {text}"
    key = text.rsplit(_UNKNOWN, 1)[-1].strip()
    close = difflib.get_close_matches(key, list(config_keys(cfg)), n=3, cutoff=0.6)
    text = f"Unknown config key {key!r} (in {where})."
    if close:
        text += f" Did you mean {', '.join(close)}?"
    if path.name == "config.yaml":  # of a run
        text += " If it is a key of an earlier version, delete its line; CHANGELOG.md names these."
    return text


def _explain_type(cfg: CfgNode, text: str, path: Path) -> str:
    """Explain an error of yacs about a value of another type than its default."""
    where = f"{path}, its _BASE_ or the overrides"
    match = _TYPES.search(text)
    if match is None:
        return f"{where} cannot be used: {shortened(text)}"
    value, key = match.groups()
    try:
        default = value_of(cfg, key)
    except KeyError:  # a key of Detectron2's first version
        return f"{key} is {shortened(value)} (in {where}); write a value of another type."
    expected = f"a value such as {shortened(repr(default))}"
    if isinstance(default, CfgNode):
        expected = f"its keys, such as {key}.{next(iter(default))}"
    hint = " Write the number with a decimal point." if _INT_FOR_FLOAT in text else ""
    if isinstance(default, str):
        hint = " Text that looks like a number or a date stands in quotes."
    return f"{key} is {shortened(value)} (in {where}); write {expected}.{hint}"


def config_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    """List the keys of a config, those of sections included."""
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from config_keys(value, f"{prefix}{name}.")


# Overrides that name no data, for a config whose data are not needed and maybe not there.
NO_DATA: tuple[object, ...] = (
    *("DATASETS.TRAIN", (), "DATASETS.TEST", (), "DATASETS.CUSTOM.NAME", ""),
    *("DATASETS.CUSTOM.FOLDER", "", "DATASETS.CUSTOM.TRAIN_JSON", ""),
    *("DATASETS.CUSTOM.TEST_JSON", "", "DATASETS.CUSTOM.CLASSES", ()),
)
DATASET_KEYS = ("DATASETS.TRAIN", "DATASETS.TEST")  # `DATASETS.CUSTOM` replaces their values
_STEPS: list[Callable[[CfgNode], None]] = []


def config_step(step: Callable[[CfgNode], None]) -> Callable[[CfgNode], None]:
    """Register the decorated function, which completes every config at load time, in place.

    Steps run in the order of registration, after the file and the overrides are merged and before
    the config is checked: they register datasets, count classes, look up pixel statistics.
    """
    _STEPS.append(step)
    return step


def load_cfg(path_or_name: str | Path, opts: Sequence[object] = ()) -> CfgNode:
    """Return a config that is ready to build a model, a trainer or a predictor, not frozen.

    The dataset of ``DATASETS.CUSTOM`` is registered, ``NUM_CLASSES 0`` is resolved, the device is
    the CPU if CUDA is not available, and a timm backbone gets the pixel statistics of its weights.

    Args:
        path_or_name: YAML file or shipped name, such as ``coco/sparse_rcnn_R50_300pro_3x``.
        opts: ``KEY, VALUE, KEY, VALUE ...``.

    Raises:
        ConfigError: if the file does not exist, a key is unknown or a value is invalid.
        DataError: if the annotations of ``DATASETS.CUSTOM`` cannot be read.
    """
    cfg = read_cfg(path_or_name, opts)
    named = {key: tuple(value_of(cfg, key)) for key in DATASET_KEYS if key in opts[0::2]}
    choose_device(cfg)
    with plain_system_errors(f"The data or weights that {path_or_name} names cannot be read"):
        for step in _STEPS:
            step(cfg)
    _use_named_datasets(cfg, named)
    check_config(cfg)
    return cfg


def _use_named_datasets(cfg: CfgNode, named: dict[str, tuple[str, ...]]) -> None:
    """Leave out datasets that overrides leave out; refuse others than ``DATASETS.CUSTOM`` names."""
    for key, names in named.items():
        part = key.rsplit(".", 1)[-1]
        used = tuple(cfg.DATASETS[part])
        if not names:
            cfg.DATASETS[part] = ()
        elif names != used:
            raise ConfigError(
                f"{key} is {names!r}, but the data of this config are those of DATASETS.CUSTOM, "
                f"{used!r}. Write DATASETS.CUSTOM.{part}_SPLIT or {part}_JSON for other data, or "
                "DATASETS.CUSTOM.FOLDER '' and NAME '' for registered datasets."
            )
