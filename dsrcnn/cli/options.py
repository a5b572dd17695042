"""Options that several commands share."""

import argparse
from pathlib import Path

from ..engine.resume import best_weights
from ..errors import ConfigError
from ..inference.detector import Detector, load

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


def fraction(text: str) -> float:
    """Parse an argument that is a number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:  # NaN included
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def add_model_arguments(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """Declare the arguments that `find_model` reads, with `weights` if it needs them."""
    text = "output folder of a training run, with its config"
    more = " and its best or last weights" if weights else ""
    parser.add_argument("run", nargs="?", metavar="RUN", help=text + more)
    text = "YAML file or shipped name instead of RUN"
    more = "; write MODEL.WEIGHTS, too" if weights else ""
    parser.add_argument("--config-file", metavar="FILE", help=text + more)
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
        opts += ["MODEL.WEIGHTS", str(best_weights(folder))]
    return str(folder / "config.yaml"), [*opts, *args.opts]


def add_detector_arguments(parser: argparse.ArgumentParser, *, more: str = "") -> None:
    """Declare the arguments that `load_detector` reads; `more` ends the help of ``--model``."""
    text = (
        "output folder of a training run, or a weight file (others than this package's: --config)"
    )
    parser.add_argument("--model", metavar="MODEL", help=text + more)
    text = "YAML file or shipped name, for weight files without config"
    parser.add_argument("--config", metavar="FILE", help=text)


def require_detector(args: argparse.Namespace) -> None:
    """Raise a `ConfigError` if no model is named."""
    if not args.model:
        raise ConfigError("write --model, the output folder of a training run or a weight file.")


def load_detector(args: argparse.Namespace, opts: list[str]) -> Detector:
    """Load the model of the arguments; see `load`."""
    require_detector(args)
    model, weights = (args.config, args.model) if args.config else (args.model, None)
    return load(model, weights, device=args.device, opts=opts)


def output_path(args: argparse.Namespace, name: str) -> Path:
    """Return ``--output``, by default `name` in the run folder.

    Raises:
        ConfigError: if there is neither.
    """
    if args.output is None and not args.run:
        raise ConfigError(
            f"there is no run folder to write {name} to; write --output, where it should go."
        )
    return args.output or Path(args.run) / name
