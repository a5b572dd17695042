"""Options that several commands share."""

import argparse

__all__ = ["add_picture_arguments", "at_least_one"]


def at_least_one(text: str) -> int:
    """An argument that counts something.

    Raises:
        argparse.ArgumentTypeError: for what is no whole number, or below 1.
    """
    if not text.lstrip("+-").isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def add_picture_arguments(parser: argparse.ArgumentParser, images: int) -> None:
    """Declare what every command that draws with a trained model takes.

    Args:
        parser: of the command.
        images: how many by default.
    """
    parser.add_argument("--config-file", required=True, help="YAML file or shipped name")
    parser.add_argument("--output", required=True, help="folder for the pictures")
    shown = f"how many (default: {images})"
    parser.add_argument("--images", type=at_least_one, default=images, help=shown)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE ..., such as MODEL.WEIGHTS model.pth"
    )
