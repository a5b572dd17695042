"""``python -m benchmarks <name>``: run one of the benchmarks."""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.cli import (
    benchmark,
    benchmark_asag,
    benchmark_loader,
    benchmark_matching,
    benchmark_recollection,
    benchmark_training,
)
from dsrcnn.errors import DsrcnnError

_BENCHMARKS = {
    "speed": benchmark,
    "training": benchmark_training,
    "loader": benchmark_loader,
    "matching": benchmark_matching,
    "recollection": benchmark_recollection,
    "asag": benchmark_asag,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark and return its exit status; bad input gives 2 and a message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure dsrcnn.")
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in _BENCHMARKS.items():
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
