"""``dsrcnn <command>``: one program for what is not training.

Commands import what only they need when they run.
"""

import argparse
import sys
from collections.abc import Sequence

from ..errors import DsrcnnError
from . import (
    anchors,
    assignment,
    check_data,
    curves,
    demo,
    draw,
    draw_augmented,
    proposals,
    recollection,
    weights,
)

__all__ = ["main"]

_COMMANDS = (
    demo,
    check_data,
    curves,
    draw,
    draw_augmented,
    assignment,
    proposals,
    anchors,
    recollection,
    weights,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit status: 0, or 2 after bad input, which is explained on stderr; `check_data` gives 1
        for data that should be mended.
    """
    parser = argparse.ArgumentParser(prog="dsrcnn", description="Sparse detectors for Detectron2.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in _COMMANDS:
        name = module.__name__.rsplit(".", 1)[-1].replace("_", "-")
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except DsrcnnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
