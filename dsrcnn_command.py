"""Entry point of the ``dsrcnn`` program.

It imports nothing but the standard library, so help, version and unknown commands are answered at
once; importing the package takes seconds.
"""

import difflib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

COMMANDS = {
    "train": "train a detector",
    "eval": "evaluate a trained detector",
    "predict": "detect objects in images, folders, videos",
    "export": "write a trained detector to ONNX and other formats",
    "app": "show a trained detector in the browser",
    "draw": "draw predictions, assignments, loss curves, ... of a run",
    "check-data": "check a dataset for broken files and boxes before training",
    "analyze": "parameters, multiply-adds, memory and seconds of a model, by part",
    "doctor": "check the installation, and say what to do about problems",
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


# Parts of the errors of `import dsrcnn` in damaged installations.
_IMPORT_CURES = {
    "Detectron2 is not installed": "See docs/INSTALL.md.",
    "torchvision": "Reinstall torch and torchvision in one command from one index.",
    "libGL": "pip uninstall opencv-python, then pip install opencv-python-headless.",
    "cv2": "pip uninstall opencv-python, then pip install --force-reinstall opencv-python-headless",
    "No module named": "Install dsrcnn again, with its dependencies (docs/INSTALL.md).",
}
_VERSIONS = ("torch", "torchvision", "pb1-detectron2", "detectron2", "opencv-python-headless")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit status: 0; 2 after invalid input and 1 if a process died, explained on stderr; 1 if
        ``check-data`` or ``doctor`` finds faults; 128 plus a signal's number after that signal.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        status = answer(words)
    except OSError as error:
        return drop_output(error)
    if status is None:
        with quiet_interrupts():
            try:
                from dsrcnn.cli.main import main as run
            except Exception as error:
                if words[0] != "doctor":
                    raise
                return end_output(_report_import(error, as_json="--json" in words))
        return run(words)
    return end_output(status)


@contextmanager
def quiet_interrupts() -> Iterator[None]:
    """End the process at Ctrl-C with one line and status 130, as while modules are imported.

    Modules in the middle of an import print tracebacks of the exception, or catch it.
    """

    def stop(*_: object) -> None:
        os.write(2, b"Interrupted.\n")
        os._exit(128 + signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or handled
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def escape_unprintable() -> None:
    """Print characters that the encoding of the terminal lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_output(status: int) -> int:
    """Write what is left of the output and return `status`, or that of `drop_output`."""
    if sys.stdout is None:  # closed by the caller
        return status
    try:
        sys.stdout.flush()
        return status
    except OSError as error:
        return drop_output(error)


def drop_output(error: OSError) -> int:
    """Drop all further output after an error of stdout, so that the program can end normally.

    Returns:
        Exit status: 141 for a closed pipe, as in shells; 2 for other errors, explained on stderr.
    """
    with suppress(OSError, ValueError):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    print(f"error: Output cannot be written: {error.strerror}.", file=sys.stderr)
    return 2


def _report_import(error: Exception, *, as_json: bool) -> int:
    """Let ``dsrcnn doctor`` answer where the package cannot be imported; returns 1."""
    text = f"{type(error).__name__}: {error}"
    cures = (cure for part, cure in _IMPORT_CURES.items() if part in text)
    cure = next(cures, "See docs/INSTALL.md, By symptom.")
    versions = {name: _installed(name) or "not installed" for name in _VERSIONS}
    checks = [{"name": k, "status": "ok", "text": v, "cure": ""} for k, v in versions.items()]
    checks += [{"name": "import dsrcnn", "status": "problem", "text": text, "cure": cure}]
    if as_json:
        print(json.dumps({"problems": 1, "checks": checks}, indent=2))
    else:
        print("\n".join(f"{check['name']}  {check['text']}" for check in checks[:-1]))
        print(f"\nproblem: import dsrcnn: {text.rstrip('.')}. {cure}")
    return 1


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


def _installed(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _version() -> str:
    if version := _installed("dsrcnn"):
        return version
    from pathlib import Path  # a clone that is not installed

    text = (Path(__file__).parent / "dsrcnn" / "version.py").read_text()
    return text.split('__version__ = "')[1].split('"')[0]


if __name__ == "__main__":
    sys.exit(main())
