"""Entry point of the ``dsrcnn`` program.

It imports nothing but the standard library, so help, version and unknown commands are answered at
once; importing the package takes seconds.
"""

import difflib
import sys
from collections.abc import Mapping, Sequence

COMMANDS = {
    "train": "train a detector",
    "eval": "evaluate a trained detector",
    "draw": "draw predictions, assignments, loss curves, ... of a run",
    "check-data": "check a dataset for broken files and boxes before training",
    "weights": "extract the weights of a checkpoint",
    "demo": "train on synthetic shapes, evaluate and draw, in a few minutes",
}
DRAWINGS = {
    "predictions": "detections beside ground truth",
    "augmented": "training images after augmentation",
    "assignment": "proposals assigned to each object, by stage and matcher",
    "proposals": "initial proposals, and how DPG mixes them from experts",
    "anchors": "anchors and probed patches of ASAG, by level",
    "recollection": "routes of SQR, and objects that the last stage loses again",
    "curves": "losses, AP and other scalars of a training",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit status: 0; 2 after invalid input and 1 if a process died, explained on stderr; 1 if
        ``check-data`` finds faults.
    """
    words = sys.argv[1:] if argv is None else argv
    status = answer(words)
    if status is None:
        from dsrcnn.cli.main import main as run

        status = run(words)
    return status


def answer(words: Sequence[str]) -> int | None:
    """Answer what needs no import; returns the exit status, None if there is more to do."""
    if words and words[0] == "--version":
        print(f"dsrcnn {_version()}")
        return 0
    if words and words[0] == "draw":
        return _choose("dsrcnn draw", "drawing", DRAWINGS, words[1:])
    return _choose("dsrcnn", "command", COMMANDS, words)


def _choose(
    program: str, kind: str, choices: Mapping[str, str], words: Sequence[str]
) -> int | None:
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, choices)) + 2
        print(f"usage: {program} <{kind}> [options] [KEY VALUE ...]\n")
        print("\n".join(f"  {name:<{width}}{text}" for name, text in choices.items()))
        print(f"\nOptions of a {kind}: {program} <{kind}> --help")
        return 0
    if words[0] in choices:
        return None
    close = difflib.get_close_matches(words[0], choices)
    advice = f"did you mean {', '.join(close)}?" if close else f"write one of {', '.join(choices)}."
    print(f"error: unknown {kind} {words[0]!r}; {advice}", file=sys.stderr)
    return 2


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("dsrcnn")
    except metadata.PackageNotFoundError:  # a clone that is not installed
        from pathlib import Path

        text = (Path(__file__).parent / "dsrcnn" / "version.py").read_text()
        return text.split('__version__ = "')[1].split('"')[0]


if __name__ == "__main__":
    sys.exit(main())
