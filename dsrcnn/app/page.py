"""The page of ``dsrcnn app``, by gradio: tabs for images, assignments and videos."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from ..analysis.assignment import MATCHERS, Assignments
from ..errors import DataError, DsrcnnError
from ..inference import Detector, Result
from ..inference.videos import VIDEO_SUFFIXES
from .views import (
    COLUMNS,
    AssignmentView,
    count_stages,
    detect,
    detect_video,
    show,
    show_assignment,
)

_MODEL = "model"  # it serves one request at a time, whoever asks and whatever for
_HEIGHT = 480  # of pictures, in pixels
_BUTTONS: list[Literal["download", "share", "fullscreen"] | gr.Button] = [
    "download",
    "fullscreen",
]  # not "share", which uploads to a public server


def build_page(
    detector: Detector,
    samples: Sequence[str] = (),
    assignments: AssignmentView | None = None,
) -> gr.Blocks:
    """Build the page.

    Args:
        detector: what to show.
        samples: image files to choose from.
        assignments: labeled images, for the tab of assignments; None for no such tab.
    """
    stages = count_stages(detector)
    page = gr.Blocks(title="dsrcnn", analytics_enabled=False)
    with page:
        gr.Markdown(_title(detector))
        with gr.Tab("Images"):
            _image_tab(detector, samples, stages)
        if assignments is not None:
            with gr.Tab("Assignments") as tab:
                _assignment_tab(assignments, stages, tab)
        with gr.Tab("Videos"):
            _video_tab(detector)
    page.queue(default_concurrency_limit=1)
    return page


def _title(detector: Detector) -> str:
    name = detector.cfg.MODEL.META_ARCHITECTURE
    shown = ", ".join(detector.classes[:20]) + (", ..." if len(detector.classes) > 20 else "")
    return f"## dsrcnn: {name}\n`{detector.cfg.MODEL.WEIGHTS}` detects {shown}."


def _threshold(elem_id: str) -> gr.Slider:
    return gr.Slider(0, 1, 0.3, step=0.01, label="Threshold", elem_id=elem_id)


def _stage(stages: int, elem_id: str) -> gr.Slider:
    info = "Drag to see boxes move from stage to stage." if stages > 1 else None
    shown = stages > 1
    limit = max(stages, 2)  # a slider has two ends
    return gr.Slider(
        1, limit, stages, step=1, label="Stage", info=info, visible=shown, elem_id=elem_id
    )


def _image_tab(detector: Detector, samples: Sequence[str], stages: int) -> None:
    result = gr.State(None)
    with gr.Row():
        with gr.Column():
            source = gr.Image(
                type="filepath", label="Image", elem_id="image", height=_HEIGHT, buttons=[]
            )
            # Gradio opens the file otherwise, and shows errors of Pillow for damaged ones.
            folder = Path(source.GRADIO_CACHE)
            source.preprocess = partial(_uploaded, folder=folder)  # type: ignore[method-assign]
            threshold, stage = _threshold("threshold"), _stage(stages, "stage")
            if samples:
                gr.Examples([[path] for path in samples], source, label="Samples")
        with gr.Column():
            picture = gr.Image(
                label="Detections",
                format="jpeg",
                elem_id="detections",
                height=_HEIGHT,
                buttons=_BUTTONS,
            )
            summary = gr.Markdown(elem_id="summary")
            table = gr.Dataframe(
                headers=list(COLUMNS), interactive=False, max_height=240, elem_id="table"
            )
    shown = [picture, table, summary]

    @_errors_on_the_page()
    def update(result: Result | None, threshold: float, stage: int) -> list[Any]:
        return [None, [], ""] if result is None else [*show(result, threshold, stage)]

    @_errors_on_the_page()
    def start(path: str | None, threshold: float, stage: int) -> list[Any]:
        result = None if path is None else detect(detector, path)
        return [result, *update(result, threshold, stage)]

    inputs = [source, threshold, stage]
    source.change(start, inputs, [result, *shown], api_name="detect", concurrency_id=_MODEL)
    gr.on(
        [threshold.change, stage.change],
        update,
        [result, threshold, stage],
        shown,
        trigger_mode="always_last",  # of a slider that is dragged
        show_progress="hidden",
        api_visibility="private",
    )


def _uploaded(payload: Any, folder: Path) -> str | None:
    """Path of an upload or a sample, both in `folder`; requests may name any other file.

    Raises:
        gradio.Error: for another file.
    """
    if payload is None:
        return None
    path = Path(payload.path or "").resolve()
    if not (path.is_relative_to(folder.resolve()) and path.is_file()):
        raise gr.Error("The image is no upload.", print_exception=False)
    return str(path)


def _assignment_tab(view: AssignmentView, stages: int, tab: gr.Tab) -> None:
    current = gr.State(None)
    gr.Markdown(
        "Every object of a training image in its own color, thick, and the proposals that learn "
        "from it, thin in the same color."
    )
    with gr.Row():
        name = gr.Dropdown(view.names, value=view.names[0], label="Image", elem_id="labeled")
        matcher = gr.Radio([*MATCHERS], value="DLA", label="Matcher", elem_id="matcher")
        stage = _stage(stages, "assignment-stage")
    picture = gr.Image(
        label="Assignment", format="jpeg", elem_id="assignment", height=_HEIGHT, buttons=_BUTTONS
    )
    text = gr.Markdown(elem_id="assignment-summary")

    @_errors_on_the_page()
    def update(current: Assignments | None, matcher: str, stage: int) -> list[Any]:
        return [None, ""] if current is None else [*show_assignment(current, matcher, stage)]

    @_errors_on_the_page()
    def start(name: str, matcher: str, stage: int) -> list[Any]:
        current = view.assign(name)
        return [current, *update(current, matcher, stage)]

    inputs, outputs = [name, matcher, stage], [current, picture, text]
    name.change(start, inputs, outputs, api_name="assign", concurrency_id=_MODEL)
    tab.select(start, inputs, outputs, api_visibility="private", concurrency_id=_MODEL)
    gr.on(
        [matcher.change, stage.change],
        update,
        [current, matcher, stage],
        outputs[1:],
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )


def _video_tab(detector: Detector) -> None:
    with gr.Row():
        with gr.Column():
            # No preview: browsers play fewer videos than OpenCV reads.
            source = gr.File(file_types=[*VIDEO_SUFFIXES], label="Video", elem_id="video")
            threshold = _threshold("video-threshold")
            with gr.Row():
                go, stop = gr.Button("Detect", variant="primary"), gr.Button("Stop")
        with gr.Column():
            output = gr.Video(
                label="Detections",
                elem_id="video-detections",
                height=_HEIGHT,
                buttons=["download"],
            )
            text = gr.Markdown(elem_id="video-summary")

    def run(path: str | None, threshold: float) -> Iterator[list[Any]]:
        with _errors_on_the_page():
            if path is None:
                raise DataError("Upload a video first.")
            with tempfile.NamedTemporaryFile(
                dir=source.GRADIO_CACHE, suffix=".webm", delete=False
            ) as file:
                target = Path(file.name)  # in the folder that is deleted at the end
            for done, message in detect_video(detector, path, threshold, target):
                yield [None if done is None else str(done), message]

    job = go.click(
        run, [source, threshold], [output, text], api_name="video", concurrency_id=_MODEL
    )
    stop.click(lambda: "Stopped.", None, text, cancels=[job], api_visibility="private")


@contextmanager
def _errors_on_the_page() -> Iterator[None]:
    """Show errors of this package as messages on the page."""
    try:
        yield
    except DsrcnnError as error:
        raise gr.Error(str(error), print_exception=False) from error
