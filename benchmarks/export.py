"""Time of one image on a CPU: a trained model, its ONNX file in onnxruntime, and in OpenVINO."""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tabulate import tabulate

import dsrcnn
from benchmarks.speed import measure_in_turn, median_ratio
from benchmarks.worker import at_least_one
from dsrcnn.data.images import read_image
from dsrcnn.errors import DataError
from dsrcnn.inference.sources import image_files

_BLOCK = 5  # images


def openvino_runner(path: Path, threads: int) -> Callable[[np.ndarray], object]:
    """Return a function that runs an ONNX file in OpenVINO with float32."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(path, "CPU", settings)
    return lambda image: model([image[None]])


def seconds_of_block(call: Callable[[], object]) -> float:
    """Time an image, the median of five after one.

    The threads of another runtime still wait for work on their cores during the first.
    """
    call()
    times = []
    for _ in range(_BLOCK):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="run folder or weight file with a config")
    parser.add_argument("images", type=Path, help="folder; its first image is timed")
    parser.add_argument("--threads", nargs="*", type=at_least_one, default=[1, 2], metavar="N")
    parser.add_argument("--repeats", type=at_least_one, default=5, metavar="N")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY VALUE", help="overrides")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    files = image_files(args.images)
    if not files:
        raise DataError(f"{args.images} has no image; write a folder of images.")
    image = read_image({"file_name": files[0]}, "RGB")
    detector = dsrcnn.load(args.model, device="cpu", opts=args.set)
    before, rows = torch.get_num_threads(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export = detector.export(path, images=files[:1])
        try:
            for threads in args.threads:
                torch.set_num_threads(threads)
                exported = dsrcnn.load_exported(path)
                runs: dict[str, Callable[[], object]] = {
                    "model": lambda: detector.predict(image),
                    "onnxruntime": lambda exported=exported: exported.predict(image),  # type: ignore[misc]
                }
                if find_spec("openvino"):
                    runner = openvino_runner(path, threads)
                    runs["OpenVINO"] = lambda runner=runner: runner(image)  # type: ignore[misc]
                blocks = {name: partial(seconds_of_block, call) for name, call in runs.items()}
                timed = measure_in_turn(blocks, args.repeats)
                for name, values in timed.items():
                    ratio = median_ratio(timed["model"], values)
                    rows.append([threads, name, f"{1e3 * median(values):.0f}", f"{ratio:.2f}"])
        finally:
            torch.set_num_threads(before)
    size = f"{export.info.padded_height} x {export.info.padded_width}"
    print(f"\nNetwork input {size}, {args.repeats} rounds of {_BLOCK} images, medians; CPU\n")
    print(tabulate(rows, ["threads", "", "ms", "ratio"], "pipe", disable_numparse=True))
