"""Options that several commands share."""

import argparse
from pathlib import Path

from ..engine.resume import newest_first
from ..errors import ConfigError, WeightsError

_LARGEST = 1_000_000  # of numbers of pixels, images and the like


def positive_int(text: str) -> int:
    """Parse an argument that is a number from 1 to a million.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    digits = text.removeprefix("+").lstrip("0")
    is_number = digits.isdecimal() and len(digits) <= len(str(_LARGEST))
    if not is_number or int(digits) > _LARGEST:
        shown = text if len(text) <= 20 else f"{text[:20]}..."
        message = f"{shown!r} is not a number of at least 1 and at most {_LARGEST}"
        raise argparse.ArgumentTypeError(message)
    return int(digits)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `find_model` reads."""
    text = "output folder of a training run, with its config and its best or last weights"
    parser.add_argument("run", nargs="?", metavar="RUN", help=text)
    text = "YAML file or shipped name instead of RUN; write MODEL.WEIGHTS, too"
    parser.add_argument("--config-file", metavar="FILE", help=text)
    parser.usage = f"{parser.prog} (RUN | --config-file FILE) [options] [KEY VALUE ...]"


def find_model(args: argparse.Namespace, *, weights: bool = True) -> tuple[str, list[str]]:
    """Return the config file and the overrides of a model, with `weights` if it needs them.

    Raises:
        ConfigError: if there is neither a run folder nor a config file.
        WeightsError: if the run folder has no weights.
    """
    if args.config_file:
        stray = [args.run] if args.run else []  # `read_cfg` reports it
        return args.config_file, [*stray, *args.opts]
    if not args.run:
        raise ConfigError("write RUN, the output folder of a training run, or --config-file.")
    folder = Path(args.run)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder / 'config.yaml'} does not exist. Write the output folder of a training run, "
            "or --config-file."
        )
    opts = ["OUTPUT_DIR", str(folder)]  # the folder may have been moved
    if weights and "MODEL.WEIGHTS" not in args.opts:
        opts += ["MODEL.WEIGHTS", str(_best_weights(folder))]
    return str(folder / "config.yaml"), [*opts, *args.opts]


def _best_weights(folder: Path) -> Path:
    """Return the best model of a run, or else the final or the last one."""
    files = [folder / "model_best.pth", folder / "model_final.pth"]
    for file in [*files, *map(Path, newest_first(folder))]:
        if file.is_file():
            return file
    raise WeightsError(f"{folder} has no model_*.pth. Write MODEL.WEIGHTS <checkpoint>.")


def output_path(args: argparse.Namespace, name: str) -> Path:
    """Return ``--output``, by default `name` in the run folder.

    Raises:
        ConfigError: if there is neither.
    """
    if args.output is None and not args.run:
        raise ConfigError("write --output, where the pictures go.")
    return args.output or Path(args.run) / name
