"""Options that several commands share."""

import argparse

__all__ = ["add_picture_arguments"]


def add_picture_arguments(parser: argparse.ArgumentParser, images: int) -> None:
    """Declare what every command that draws with a trained model takes.

    Args:
        parser: of the command.
        images: how many by default.
    """
    parser.add_argument("--config-file", required=True, help="YAML file or shipped name")
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--images", type=int, default=images, help=f"how many (default: {images})")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE ..., such as MODEL.WEIGHTS model.pth"
    )
