"""``dsrcnn app``: a page in the browser that shows what a trained detector does."""

import argparse
import os
import webbrowser
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ..analysis.images import evenly_spaced
from ..app.views import AssignmentView
from ..config import load_cfg
from ..data.files import image_files
from ..errors import DataError, DsrcnnError, MissingPackageError
from ..inference import Detector
from ..inference.results import import_supervision
from .options import add_detector_arguments, load_detector, positive_int, require_detector

_SAMPLES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "%(prog)s --model MODEL [options] [KEY VALUE ...]"
    add_detector_arguments(parser)
    text = "folder of labeled images, for the view of assignments (default: the data of the run)"
    parser.add_argument("--data", type=Path, metavar="FOLDER", help=text)
    text = "folder of images to offer (default: labeled images)"
    parser.add_argument("--samples", type=Path, metavar="FOLDER", help=text)
    text = "port on this machine (default: the first free one from 7860)"
    parser.add_argument("--port", type=positive_int, metavar="N", help=text)
    text = "largest file that can be uploaded, in megabytes (default: 100)"
    parser.add_argument("--limit", type=positive_int, default=100, metavar="MB", help=text)
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1")


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C or SIGTERM; returns 0."""
    require_detector(args)
    if find_spec("gradio") is None:
        raise MissingPackageError("dsrcnn app needs the package gradio: pip install 'dsrcnn[app]'")
    import_supervision()
    detector = load_detector(args, args.opts)
    view = _assignment_view(detector, args)
    samples = _samples(args.samples, view)

    from ..app.page import build_page  # takes gradio along
    from ..app.server import end_signals, serving

    build = partial(build_page, detector, samples, view)
    with end_signals() as ended, serving(build, port=args.port, limit=args.limit) as address:
        print(f"{address} (Ctrl-C ends it)", flush=True)
        if args.open:
            webbrowser.open(address)
        ended.wait()
    return 0


def _assignment_view(detector: Detector, args: argparse.Namespace) -> AssignmentView | None:
    """View of assignments, of ``--data`` or of the data of the run; None where there is none."""
    if args.data:
        return AssignmentView(detector, detector.cfg_with(args.data))
    config = Path(args.model) / "config.yaml" if os.path.isdir(args.model) else args.config
    try:
        if config is None:
            raise DataError("the data are not known; write --data.")
        return AssignmentView(detector, load_cfg(config, ["MODEL.WEIGHTS", "", *args.opts]))
    except DsrcnnError as error:
        print(f"No view of assignments: {error}")
        return None


def _samples(folder: Path | None, view: AssignmentView | None) -> list[str]:
    if folder is None:
        return view.paths[:_SAMPLES] if view else []
    if not folder.is_dir():
        raise DataError(f"--samples {folder} is no folder; write a folder of images.")
    files = image_files(folder)
    if not files:
        raise DataError(f"--samples {folder} has no image; write a folder of images.")
    return [files[i] for i in evenly_spaced(len(files), _SAMPLES)]
