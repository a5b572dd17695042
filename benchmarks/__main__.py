"""Run one of the benchmarks: ``python -m benchmarks <name>``."""

import argparse
import sys
from collections.abc import Sequence

from benchmarks import (
    asag,
    crowdhuman,
    export,
    loader,
    matching,
    operators,
    prediction,
    recollection,
    speed,
    table,
    training,
)
from dsrcnn.errors import DsrcnnError

_BENCHMARKS = {
    "speed": speed,
    "table": table,
    "training": training,
    "loader": loader,
    "matching": matching,
    "operators": operators,
    "prediction": prediction,
    "export": export,
    "recollection": recollection,
    "asag": asag,
    "crowdhuman": crowdhuman,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark and return its exit status; bad input gives 2 and a message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure dsrcnn.")
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in _BENCHMARKS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except DsrcnnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
