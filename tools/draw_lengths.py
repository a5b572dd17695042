"""Chart of schedules: AP over the images seen, and over minutes, a line per variant."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import dsrcnn  # before detectron2

# isort: split
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Rows = Sequence[dict[str, str]]
_LENGTH = "SOLVER.MAX_ITER"


def batch_size(config: str, opts: Sequence[str]) -> int:
    """Images of an iteration of an experiment."""
    return int(dsrcnn.load_cfg(config, [*opts, "MODEL.DEVICE", "cpu"]).SOLVER.IMS_PER_BATCH)


def draw_lengths(
    rows: Rows, output: str | Path, *, images: Callable[[str, Sequence[str]], int] = batch_size
) -> None:
    """Draw AP with NMS of variants that were trained for several lengths.

    Every point is a whole schedule of its length, its learning rate decayed to the end; points
    are means over seeds, with a dot for every seed.

    Args:
        rows: of ``tools/experiments.py``: ``set``, ``config``, ``opts``, ``nms``, ``iterations``,
            ``minutes``, ``machine`` and ``AP``. Only machines of the same name are comparable, so
            each is a line of its own.
        output: file to write.
        images: number of images of an iteration, given config and overrides.

    Raises:
        SystemExit: if no variant has two lengths.
    """
    lines: dict[tuple[str, str], dict[int, list[dict[str, str]]]] = defaultdict(dict)
    is_one_machine = len({row["machine"] for row in rows}) == 1
    for row in rows:
        if row["nms"] == "on":
            lengths = lines[row["set"], _variant(row, with_machine=not is_one_machine)]
            lengths.setdefault(int(row["iterations"]), []).append(row)
    lines = {key: lengths for key, lengths in lines.items() if len(lengths) > 1}
    if not lines:
        raise SystemExit(f"No variant has results of two lengths; run some with {_LENGTH}.")
    sets = list(dict.fromkeys(name for name, _ in lines))
    figure = Figure(figsize=(14, 4.5 * len(sets)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(sets), 2, squeeze=False, sharey="row")
    for (name, variant), lengths in lines.items():
        over_images, over_minutes = panels[sets.index(name)]
        groups = [members for _, members in sorted(lengths.items())]
        seen = [_images_seen(members[0], images) for members in groups]
        minutes = [mean(float(m["minutes"]) for m in members) for members in groups]
        _draw_line(over_images, seen, groups, variant)
        _draw_line(over_minutes, minutes, groups, variant)
        over_images.set(title=name, xlabel="images seen", ylabel="AP with NMS")
        over_minutes.set(title=name, xlabel="minutes")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    for axes in panels[:, 1]:  # beside the lines, which it would hide
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize="small")
    figure.savefig(output, dpi=110)


def words_of(row: dict[str, str]) -> list[str]:
    """Split the overrides of a row, which single spaces join; values may be empty."""
    return row["opts"].split(" ") if row["opts"] else []


def _variant(row: dict[str, str], *, with_machine: bool) -> str:
    """Config without its folder, overrides but the length, machine."""
    words = words_of(row)
    pairs = zip(words[::2], words[1::2], strict=True)
    rest = [f"{key.rsplit('.', 1)[-1]} {value}" for key, value in pairs if key != _LENGTH]
    machine = [row["machine"]] if with_machine else []
    return "\n".join([row["config"].rsplit("/", 1)[-1], ", ".join([*rest, *machine])]).strip()


def _images_seen(row: dict[str, str], images: Callable[[str, Sequence[str]], int]) -> int:
    return int(row["iterations"]) * images(row["config"], words_of(row))


def _draw_line(
    axes: Axes, x: Sequence[float], groups: Sequence[Sequence[dict[str, str]]], label: str
) -> None:
    values = [[float(m["AP"]) for m in members] for members in groups]
    (line,) = axes.plot(x, [mean(v) for v in values], marker="o", label=label)
    for position, of_seeds in zip(x, values, strict=True):
        axes.plot([position] * len(of_seeds), of_seeds, ".", color=line.get_color(), alpha=0.5)
