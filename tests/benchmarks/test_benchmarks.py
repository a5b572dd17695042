import csv
import re
import shutil
import time
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, TINY, batch, tiny_cfg
from detectron2.modeling import build_model

import dsrcnn
from benchmarks import speed
from benchmarks.__main__ import main
from benchmarks.loader import PIPELINES, share_of_waiting
from benchmarks.matching import assign_by_loop, make_scene
from benchmarks.operators import check, count_operators, read_stored
from benchmarks.recollection import Step, Variant, flops_of, flops_per_second, peak_memory_of
from benchmarks.speed import Measurement, compare, format_table
from benchmarks.speed import Variant as Model
from benchmarks.training import OPTIONS, format_options
from benchmarks.worker import OPTIMIZATIONS, Shape, undo
from dsrcnn.config import read_cfg
from dsrcnn.config.load import find_config, load_cfg
from dsrcnn.data import DetectionMapper, build_train_loader
from dsrcnn.data.samplers import Draw
from dsrcnn.errors import ConfigError
from dsrcnn.modeling.matching import CostSettings, OptimalTransportMatcher, UnitRule

ADAMIXER = ["--config-file", "quick/adamixer_shapes"]
DYNAMIC_RCNN = ["--config-file", "quick/dynamic_rcnn_shapes"]
DEFORMABLE_DETR = ["--config-file", "quick/deformable_detr_shapes"]
SHAPES = ["--config-file", "quick/sparse_rcnn_shapes"]
SMALL = [*map(str, TINY), "MODEL.SparseRCNN.NUM_CLASSES", "0", "INPUT.AUG.MOSAIC.SIZE", "64"]
SMALL += ["SOLVER.IMS_PER_BATCH", "2"]
RECOLLECTION = ["recollection", *SHAPES, "--repeats", "1", "--images", "1", "--size", "64", "64"]
ASAG = ["asag", "--baseline", "quick/sparse_rcnn_shapes", "--repeats", "1"]
ASAG += ["--size", "64", "96", "--queries", "10", "--patches", "2"]


def rows_of(text):
    """The rows of all tables in a text, without headers, as cells by the first cell."""
    lines = [*text.splitlines(), ""]
    rows = [a for a, b in pairwise(lines) if a[:2] == "| " and b[:2] not in ("|:", "|-")]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    return {first: rest for first, *rest in cells}


def step_of():
    opts = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    return Step(load_cfg("quick/sparse_rcnn_shapes", opts), Shape(2, 64, 64, 2))


@pytest.mark.parametrize("names", [*[[n] for n in OPTIMIZATIONS], list(OPTIMIZATIONS)])
def test_undoing_an_optimization_changes_no_number(names):
    model, inputs = build_model(tiny_cfg()), batch([(64, 96), (96, 64)], [3, 2])
    expected = model(inputs)
    undo(model, names)
    losses = model(inputs)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-4)


def test_two_variants_are_measured_in_turn_by_part(capsys):
    # The second runs from a checkout, here this one.
    second = ["--against-checkout", str(REPOSITORY), "--against-without", "norms,optimizer"]
    size = ["--images", "1", "--size", "64", "64", "--objects", "2", "--repeats", "2"]
    opts = [*map(str, TINY), "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    config = ["--config-file", "coco/sparse_rcnn_R50_100pro_3x"]
    assert main(["speed", *config, *second, *size, "--mode", "train", "--set", *opts]) == 0
    rows = {name: [float(x) for x in row] for name, row in rows_of(capsys.readouterr().out).items()}
    for variant in (0, 1):
        parts = {name: row[variant] for name, row in rows.items()}
        assert parts["backbone"] + parts["head"] < parts["forward"]
        total = parts["forward"] + parts["backward"] + parts["optimizer"]
        assert total == pytest.approx(parts["step"], rel=0.01)  # medians of two rounds are means
        assert parts["peak memory (MiB)"] > 0
    assert len(rows["step"]) == 3  # with the factor


def test_variants_run_from_the_checkout_they_name(tmp_path):
    shutil.copytree(REPOSITORY / "dsrcnn", tmp_path / "dsrcnn")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    config = "coco/sparse_rcnn_R50_100pro_3x"
    opts = [*map(str, TINY), "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    variants = [Model("A", config, opts), Model("B", config, opts, str(tmp_path))]
    measured = compare(variants, mode="inference", shape=Shape(1, 64, 64, 2), repeats=1)
    places = [Path(m.package).parents[1] for m in measured]
    assert places == [REPOSITORY, tmp_path]
    assert [m.device for m in measured] == ["CPU", "CPU"]


def test_no_variant_is_measured_while_another_is_built(monkeypatch):
    events = []

    @contextmanager
    def started(variant, options):
        yield variant.name

    def answer(worker, variant):
        events.append(f"{worker} is ready")
        return {"device": "CPU", "package": ""}

    monkeypatch.setattr(speed, "_started", started)
    monkeypatch.setattr(speed, "_answer", answer)
    monkeypatch.setattr(speed, "_ask", lambda worker, _: events.append(worker) or {"step": 1.0})
    variants = [Model("A", ""), Model("B", "")]
    compare(variants, mode="train", shape=Shape(1, 64, 64, 2), repeats=2)
    assert events == ["A is ready", "B is ready", "A", "B", "A", "B"]


def test_ratios_pair_rounds_that_are_neighbors_in_time():
    # B is always twice as slow although the machine slows down in between.
    first = [{"iteration": t, "peak memory (MiB)": 100.0} for t in (1.0, 10.0, 2.0)]
    second = [{"iteration": 2 * r["iteration"], "peak memory (MiB)": 50.0} for r in first]
    measured = [Measurement(Model(n, "c"), r) for n, r in (("a", first), ("b", second))]
    assert rows_of(format_table(measured))["iteration"] == ["2000.0", "4000.0", "2.00"]
    assert rows_of(format_options(measured))["b"] == ["4.000", "2.00", "50", "0.50"]


def test_a_variant_that_cannot_start_is_named():
    with pytest.raises(ConfigError, match="'A' could not be measured"):
        compare([Model("A", "no/such")], mode="inference", shape=Shape(1, 64, 64, 2), repeats=1)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_training_is_a_valid_config(name):
    read_cfg("quick/sparse_rcnn_shapes", OPTIONS[name])


@pytest.mark.slow
def test_options_of_training_and_the_loader_are_measured(capsys):
    shape = ["--size", "64", "64", "--objects", "2", "--repeats", "2", "--threads", "1"]
    options = ["--options", "float32", "checkpoint", "--loader"]
    assert main(["training", *SHAPES, *shape, *options, "--set", *SMALL]) == 0
    rows = rows_of(printed := capsys.readouterr().out)
    assert list(rows) == ["float32", "checkpoint"]
    assert [float(rows["float32"][i]) for i in (1, 3)] == [1.0, 1.0]
    assert all(float(cell) > 0 for row in rows.values() for cell in row)
    assert float(re.search(r"loader: ([\d.]+) images/s", printed)[1]) > 0


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_gives_images(name):
    cfg = load_cfg("quick/sparse_rcnn_shapes", [*SMALL, *PIPELINES[name]])
    assert build_train_loader(cfg).dataset[Draw(0, 1)]["image"].shape[0] == 3


@pytest.mark.slow
def test_pipelines_are_measured_beside_each_other_with_waiting(capsys):
    chosen = ["--pipelines", "plain", "mosaic-mixup", "--workers", "0", "--batches", "2"]
    counts = ["--repeats", "2", "--iterations", "2"]
    assert main(["loader", *SHAPES, *chosen, *counts, "--set", *SMALL]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["plain", "mosaic-mixup"]
    assert float(rows["plain"][1]) == 1.0
    assert float(rows["mosaic-mixup"][1]) > 0
    assert all(0 < float(row[2].rstrip("%")) < 100 for row in rows.values())


@pytest.mark.slow
def test_training_waits_longer_for_a_slower_loader(monkeypatch):
    opts = [*SMALL, "DATALOADER.NUM_WORKERS", "0"]
    fast = share_of_waiting("quick/sparse_rcnn_shapes", opts, 2)
    load = DetectionMapper.__call__

    def load_slowly(self, record):
        time.sleep(0.5)
        return load(self, record)

    monkeypatch.setattr(DetectionMapper, "__call__", load_slowly)
    assert 0 < fast < share_of_waiting("quick/sparse_rcnn_shapes", opts, 2) < 1


@pytest.mark.parametrize("static_units", [0, 3])
@pytest.mark.parametrize("objects", [1, 5, 60, 90, 120])
def test_the_batched_matcher_equals_the_loop(objects, static_units):
    """Full focal costs, a background cost and one Sinkhorn loop per problem: a second method."""
    predictions, targets = make_scene(6, 2, 100, objects, 12, torch.device("cpu"))
    targets.mask[1, objects // 2 :] = False  # images with different numbers of objects
    rule = UnitRule(num_stages=6, static_units=static_units)
    assignment = OptimalTransportMatcher(costs=CostSettings(), units=rule)(predictions, targets)
    expected = assign_by_loop(predictions, targets, rule)
    # Rounding may tip a tie; there are more of them where every proposal has its object.
    assert (assignment != expected).sum() <= (2 if objects < 100 else 12)
    assert (expected >= 0).sum() >= 6 * min(objects, 100) * 0.9


def test_matchers_are_measured_with_a_factor(capsys):
    sizes = ["--stages", "2", "--images", "1", "--proposals", "20", "--objects", "3"]
    assert main(["matching", *sizes, "--repeats", "3"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["transport, batched", "transport, loop", "Hungarian"]
    assert float(rows["transport, loop"][1]) == 1.0


@pytest.mark.slow
def test_variants_of_recollection_are_measured_beside_the_plain_cascade(capsys):
    chosen = ["start-1", "loop-1", "official-1", "checkpoint-1", "checkpoint-1-chunk-1", "dense"]
    options = ["--objects", "2", "--set", "MODEL.SparseRCNN.NUM_HEADS", "5"]
    assert main([*RECOLLECTION, "--variants", *chosen, *options]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"at [1-9]\d* GFLOP/s", printed)
    rows = {name: [float(x) for x in row] for name, row in rows_of(printed).items()}
    assert list(rows) == ["plain", *chosen]
    assert [row[0] for row in rows.values()] == [5, 19, 19, 19, 19, 19, 31]
    assert rows["plain"][3] == rows["plain"][4] == 1.0
    for name, (groups, seconds, bound, ratio, share, _) in rows.items():
        assert 0 < bound < seconds, name
        assert share == pytest.approx(ratio * 5 / groups, abs=0.02), name
    bound = {name: row[2] for name, row in rows.items()}
    assert bound["start-1"] == bound["loop-1"] == bound["official-1"] < bound["checkpoint-1"]
    assert bound["start-1"] == pytest.approx(bound["plain"] * 19 / 5, rel=0.03)
    peak = {name: row[-1] for name, row in rows.items()}
    assert peak["plain"] < peak["start-1"] < peak["dense"]
    assert peak["checkpoint-1-chunk-1"] < peak["checkpoint-1"] < peak["start-1"]


def test_a_product_of_two_numbers_counts_as_two_operations():
    first, second = torch.ones(3, 4, requires_grad=True), torch.ones(4, 5, requires_grad=True)
    assert flops_of(lambda: first @ second) == 2 * 3 * 4 * 5
    assert flops_of(lambda: (first @ second).sum().backward()) == 3 * 2 * 3 * 4 * 5
    assert 1e7 < flops_per_second(torch.device("cpu"), size=64) < 1e14


def test_groups_multiply_as_much_in_a_batch_as_one_by_one():
    step, names = step_of(), ("plain", "start-1", "loop-1", "checkpoint-1")
    variants = [Variant.from_name(name, 3) for name in names]
    plain, batched, loop, recomputed = (flops_of(partial(step.run, v)) for v in variants)
    assert batched == loop
    assert batched == pytest.approx(plain * 6 / 3, rel=0.02)  # 1, 2 and 3 groups
    assert batched < recomputed < 4 / 3 * batched


def test_a_loop_that_pools_as_the_official_head_computes_the_same():
    step, names = step_of(), ("start-1", "loop-1", "official-1")
    batched, loop, official = (step.losses(Variant.from_name(name, 3)) for name in names)
    torch.testing.assert_close(loop, batched, rtol=1e-5, atol=0)
    torch.testing.assert_close(official, batched, rtol=1e-5, atol=0)


def test_peak_memory_is_the_largest_sum_of_live_tensors():
    block = 1 << 18  # float32 numbers: 1 MiB

    def run():
        first = torch.ones(4 * block)
        second = torch.ones(2 * block)  # 6 MiB
        del first
        return torch.ones(3 * block) + second[: 3 * block].sum()  # 2 + 3 + 3

    assert peak_memory_of(run, on_gpu=False) == pytest.approx(8 * 2**20, rel=0.01)


def test_asag_is_measured_by_level_beside_a_cascade_and_its_patches_in_all_ways(capsys):
    configs = ["--configs", "quick/asag_a_shapes", "quick/asag_s_shapes"]
    assert main([*ASAG, *configs, "--set", "MODEL.DEVICE", "cpu"]) == 0
    rows = rows_of(capsys.readouterr().out)
    patches = {int(name): rows.pop(name) for name in list(rows) if name.isdigit()}
    names = [f"quick/asag_{kind}_shapes, {k}P6" for kind in "as" for k in ("P5", "P4", "P3")]
    assert list(rows) == ["quick/sparse_rcnn_shapes", *names]
    assert rows["quick/sparse_rcnn_shapes"][0] == "10"
    assert rows["quick/sparse_rcnn_shapes"][4:] == ["1.00", "1.00"]
    assert all(0 < int(row[0]) <= 10 for row in rows.values())
    assert all(float(cell) > 0 for row in rows.values() for cell in row)
    assert list(patches) == [1, 5, 15, 60]
    for row in patches.values():
        loop, together, ratio = map(float, row[:3])
        assert ratio == pytest.approx(loop / together, rel=0.2)


@pytest.mark.parametrize("proposals", ["LearnedQueries", "EncoderQueries"])
def test_the_cascade_beside_asag_may_be_deformable_detr_with_its_encoder(
    capsys, tmp_path, proposals
):
    baseline = str(tmp_path / "baseline.yaml")
    base = find_config("quick/deformable_detr_shapes")
    node = f"MODEL:\n  SparseRCNN:\n    PROPOSALS:\n      NAME: {proposals}\n"
    Path(baseline).write_text(f"_BASE_: {base}\n{node}")
    words = ["--baseline", baseline, "--configs", "quick/asag_s_shapes"]
    assert main([*ASAG, *words, "--set", "MODEL.DEVICE", "cpu"]) == 0
    queries, _, proposing, decoding, *ratios = rows_of(capsys.readouterr().out)[baseline]
    assert queries == "10"
    assert ratios == ["1.00", "1.00"]
    assert float(proposing) > 0.2 * float(decoding)  # layers of the encoder


@pytest.mark.parametrize(("arguments", "message"), [
    ([*RECOLLECTION, "--variants", "start-0"], "'start-0'; write dense, start-<stage>"),
    ([*RECOLLECTION, "--variants", "start-9"], "'start-9'; write a stage from 1 to 3"),
    ([*RECOLLECTION, *DYNAMIC_RCNN], "GeneralizedRCNN, which has no cascade"),
    ([*RECOLLECTION, *DEFORMABLE_DETR], "DeformableDETR, whose cascade reads encoded tokens"),
    ([*RECOLLECTION, *ADAMIXER, "--variants", "official-1"], "pools no RoIs; write loop"),
    ([*ASAG, "--configs", "quick/sparse_rcnn_shapes"], "is no config of ASAG"),
    (["training", *SHAPES, "--options", "float8"], "'float8' (choose from float32, bf16,"),
    (["loader", *SHAPES, "--pipelines", "fancy"], "'fancy' (choose from plain,"),
    (["matching", "--objects", "0"], "'0' is not a number of at least 1"),
])  # fmt: skip
def test_bad_input_is_refused_with_one_message(arguments, message, capsys):
    try:
        status = main(arguments)
    except SystemExit as end:  # of argparse
        status = end.code
    assert status == 2
    printed = capsys.readouterr().err
    assert message.replace("'", "") in printed.replace("'", "")  # Python 3.13 quotes no choices


def test_prediction_is_compared_with_a_loop(model_file, photos, capsys):
    pytest.importorskip("supervision")
    words = ["prediction", str(model_file), str(photos), "--count", "6", "--repeats", "1"]
    assert main([*words, "--batches", "1", "2", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.count("| predict, batch 2 ") == 2
    rows = [row for row in text.splitlines() if row.startswith("| DefaultPredictor, loop")]
    assert [row.split("|")[2].strip() for row in rows] == ["no", "yes"]
    assert [row.split("|")[4].strip() for row in rows] == ["1.00", "1.00"]


@pytest.mark.parametrize("name", ["prediction", "export"])
def test_benchmarks_of_a_folder_without_images_are_refused(model_file, tmp_path, capsys, name):
    assert main([name, str(model_file), str(tmp_path)]) == 2
    assert "has no image" in capsys.readouterr().err


def test_an_exported_file_is_compared_with_its_model(model_file, photos, capsys, monkeypatch):
    """With a file made beforehand: exporting takes long."""
    pytest.importorskip("onnxruntime")

    class Exported:
        def predict(self, image):
            assert image.shape == (64, 96, 3)

    def export(self, path, images):
        info = SimpleNamespace(padded_height=64, padded_width=96)
        return SimpleNamespace(info=info)

    monkeypatch.setattr(dsrcnn.Detector, "export", export)
    monkeypatch.setattr("dsrcnn.load_exported", lambda path: Exported(), raising=False)
    monkeypatch.setattr("benchmarks.export.find_spec", lambda name: None)
    words = ["export", str(model_file), str(photos), "--threads", "1", "--repeats", "2"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "Network input 64 x 96" in text
    assert "| onnxruntime " in text


def test_one_image_dispatches_few_operators_and_moves_nothing_to_the_device():
    """Launches are the limit on GPUs: 1407 before norms, pooling and box decoding were fused."""
    count = count_operators("coco/sparse_rcnn_R50_100pro_3x", [], height=64, width=96)
    assert 300 < count.total <= 550
    half = count_operators("coco/sparse_rcnn_R50_100pro_3x", [], height=64, width=96, half=True)
    assert half.casts <= 50  # between bfloat16 and float32, and to indices
    # Constants are made once; what the host waits for is the number of detections.
    waits = {"_local_scalar_dense": 0, "nonzero": 1, "lift_fresh": 1}  # sizes of the image
    assert {name: count.by_name[name] for name in waits} == waits
    assert count.by_name["arange"] == 0
    assert count.by_place["dsrcnn/layers/norm.py forward"] == 53  # convolutions


def test_operators_are_listed_by_place_and_name(capsys):
    assert main(["operators", *SHAPES, "--size", "64", "64"]) == 0
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert int(rows["convolution"][0]) > 20
    assert int(rows["dsrcnn/structures/boxes.py apply_deltas"][0]) == 27  # of three stages
    assert re.search(r"\d+ operators, \d+ of them conversions$", text.strip())


def test_no_config_dispatches_more_operators_than_are_stored():
    rows = read_stored()
    if rows[0].torch != torch.__version__.split("+")[0]:
        pytest.skip(f"counts are those of torch {rows[0].torch}")
    assert len(rows) >= 5
    assert not check(rows[2:])  # the first two are counted above
    fewer = [rows[2]._replace(operators=rows[2].operators - 1)]
    assert check(fewer) == [
        f"{rows[2].config}, float32: {rows[2].operators} operators and {rows[2].conversions} "
        f"conversions, stored {rows[2].operators - 1} and {rows[2].conversions}"
    ]


OFFICIAL = """
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone

@META_ARCH_REGISTRY.register()
class SparseRCNN(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)

    def forward(self, inputs):
        return self.backbone(torch.stack([x["image"].float() for x in inputs]))
"""


@pytest.mark.slow
def test_the_table_has_the_official_code_beside_ours(tmp_path, capsys):
    (tmp_path / "sparsercnn").mkdir()
    (tmp_path / "sparsercnn/__init__.py").touch()
    (tmp_path / "sparsercnn/detector.py").write_text(OFFICIAL)
    words = ["table", *SHAPES, "--official", str(tmp_path), "--output", str(tmp_path / "out")]
    words += ["--batches", "1", "--train-batches", "--repeats", "1", "--size", "64", "64"]
    words += ["--variants", "bf16", "--threads", "1"]
    assert main([*words, "--set", "MODEL.DEVICE", "cpu"]) == 0
    with (tmp_path / "out/speed.csv").open(newline="") as file:
        ours, official, half = csv.DictReader(file)
    assert (ours["variant"], official["variant"]) == ("ours", "official")
    assert float(ours["factor"]) == 1.0
    assert float(official["factor"]) == pytest.approx(
        float(official["ms"]) / float(ours["ms"]), rel=1e-3
    )
    assert int(ours["operators"]) > int(official["operators"]) > 30  # it has no head
    assert float(ours["products alone"]) > 0
    assert int(half["conversions"]) > int(ours["conversions"])  # counted as it is measured
    assert all(float(row["rest"]) >= 0 for row in (ours, official, half))
    assert (tmp_path / "out/speed.png").stat().st_size > 10_000
    assert "| official" in capsys.readouterr().out


def test_a_worker_that_stopped_before_it_is_asked_is_named(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(speed, "_WORKER", tmp_path / "worker.py")
    variant = speed.Variant("B", "quick/sparse_rcnn_shapes", ())
    with speed._started(variant, []) as worker:
        worker.wait()
        with pytest.raises(ConfigError, match="Variant 'B' could not be measured"):
            speed._ask(worker, variant)


def test_a_folder_without_the_official_code_is_named(tmp_path, capfd):
    words = ["speed", *SHAPES, "--mode", "inference", "--against-official", str(tmp_path)]
    assert main([*words, "--repeats", "1", "--size", "64", "64"]) == 2
    assert "has no sparsercnn/detector.py" in capfd.readouterr().err
