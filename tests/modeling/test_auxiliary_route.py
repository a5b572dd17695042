"""The auxiliary route of DLA: two cascades at once in training, nothing at inference."""

import copy
import logging
import math
import shutil

import pytest
import torch
from conftest import batch, quick_cfg, tiny_cfg, train
from detectors import (
    AUXILIARY,
    DLA,
    DPG,
    SIZES,
    SQR,
    deformable_detr_of,
    enable,
    model_of,
    options,
    train_step,
)
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dsrcnn.config import read_cfg
from dsrcnn.config.routes import with_dla_on_main_route
from dsrcnn.engine.checkpoint import Checkpointer
from dsrcnn.engine.ema import AveragedWeights
from dsrcnn.engine.eval_hooks import validation_losses
from dsrcnn.engine.resume import check_resume
from dsrcnn.errors import ConfigError, WeightsError
from dsrcnn.export.program import DetectionProgram
from dsrcnn.modeling.matching import (
    HungarianMatcher,
    OptimalTransportMatcher,
    SimOTAMatcher,
    build_matcher,
)
from dsrcnn.structures import Predictions, Targets
from dsrcnn.utils.training import use_training_context

INPUTS = batch(SIZES, [3, 2])


def adamixer_of(*opts, seed=0):
    """A tiny AdaMixer."""
    small = options("NUM_PROPOSALS", 8, "HIDDEN_DIM", 32, "NUM_HEADS", 2, "DIM_FEEDFORWARD", 32)
    small += [*options("NUM_CLASSES", 5), "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.DEVICE", "cpu"]
    torch.manual_seed(seed)
    return build_model(read_cfg("quick/adamixer_shapes", [*small, *opts]))


def move_apart(model):
    """Let the networks of the auxiliary route differ from those of the main one."""
    generator = torch.Generator().manual_seed(1)
    for stage in model.head.head_series:
        for parameter in stage.auxiliary.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            with torch.no_grad():
                parameter.add_(0.3 * parameter.abs().mean() * noise)
    return model


def swapped(state):
    """Weights of the auxiliary route in place of those of the main one."""
    extra = {k.replace(".auxiliary.", "."): v for k, v in state.items() if ".auxiliary." in k}
    return {k: extra.get(k, v) for k, v in state.items() if ".auxiliary." not in k}


def losses_and_gradients(model):
    torch.manual_seed(0)
    losses = model(INPUTS)
    sum(losses.values()).backward()
    return losses, {k: p.grad for k, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("build", "opts"), [
    (model_of, ()), (model_of, options("DLA.MATCHER", "SimOTAMatcher")), (model_of, DPG),
    (model_of, [*SQR, *options("NUM_HEADS", 4)]), (model_of, [*SQR, *options("SQR.CHUNK", 1)]),
    (model_of, options("USE_FOCAL", False)), (model_of, options("DLA.NORMALIZER", "gt")),
    (model_of, ("MODEL.ACTIVATION_CHECKPOINT", ("stages",))),
    (adamixer_of, ()), (adamixer_of, SQR),
    (deformable_detr_of, ()), (deformable_detr_of, SQR),
    (deformable_detr_of, ("MODEL.DeformableDETR.BOX_REFINEMENT", False)),
])  # fmt: skip
def test_both_routes_at_once_agree_with_two_cascades_one_after_the_other(build, opts):
    both = move_apart(build(*AUXILIARY, *opts).double())
    state = copy.deepcopy(both.state_dict())  # running statistics change in a step
    losses, gradients = losses_and_gradients(both)
    main = build(*opts).double()  # Hungarian matching
    main.load_state_dict({k: v for k, v in state.items() if ".auxiliary." not in k})
    plain = options("SQR.ENABLED", False)  # the auxiliary route is one group in any case
    other = build(*DLA, *opts, *plain).double()
    other.load_state_dict(swapped(state))
    (expected, of_main), (of_dla, of_other) = map(losses_and_gradients, (main, other))
    expected |= {f"{name}_aux": value for name, value in of_dla.items()}
    assert losses.keys() == expected.keys()
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    networks = own_networks(main)
    for name, gradient in gradients.items():
        if ".auxiliary." in name:
            wanted = of_other[name.replace(".auxiliary.", ".")]
        else:
            wanted = of_main[name] if name in networks else of_main[name] + of_other[name]
        tolerance = 1e-9 * max(1, wanted.abs().max().item())
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=tolerance)


def own_networks(model):
    """Names of the parameters of the stages' feed-forward networks."""
    return {
        f"head.head_series.{number}.{layer}.{name}"
        for number, stage in enumerate(model.head.head_series)
        for layer in stage.feed_forward_names
        for name, _ in getattr(stage, layer).named_parameters()
    }


def test_losses_of_two_proposals_are_those_computed_by_hand():
    """Two proposals of score 1/2, one on the object, the other on its upper half."""
    units = options("DLA.STATIC_UNITS", 2, "DLA.UNIT_STEP", 0.0, "DLA.MAX_POSITIVE_FRACTION", 1.0)
    model = model_of(*AUXILIARY, *units, *options("NUM_CLASSES", 1, "NUM_HEADS", 1))
    boxes = torch.tensor([[20.0, 20, 60, 60], [20, 20, 60, 40]]).view(1, 1, 2, 4)
    route = Predictions(torch.zeros(1, 1, 2, 1), boxes, torch.zeros(1, dtype=torch.long))
    truth = boxes[0, :, :1], torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1).bool()
    targets = Targets(*truth, torch.full((1, 4), 100.0))
    losses = model.losses(route._replace(auxiliary=route), targets, None)
    # Focal loss of a positive is 1/16 ln 2, of a negative 3/16 ln 2; the weights are 2, 5 and 2.
    ln2 = math.log(2)
    expected = {
        "loss_ce": 2 * (1 + 3) / 16 * ln2,  # a positive and a negative, one object
        "loss_bbox": 0.0,
        "loss_giou": 0.0,
        "loss_ce_aux": 2 * (1 + 1) / 16 * ln2 / 2,  # two positives, divided by their number
        "loss_bbox_aux": 5 * 0.2 / 2,  # the lower edge is 20 of 100 pixels off
        "loss_giou_aux": 2 * 0.5 / 2,  # half of the object
    }
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, abs=1e-6)


def test_weights_start_as_those_of_sparse_rcnn_and_the_auxiliary_networks_as_copies():
    plain, both = model_of().state_dict(), model_of(*AUXILIARY).state_dict()
    assert [k for k in both if ".auxiliary." not in k] == list(plain)
    assert all(torch.equal(both[k], v) for k, v in plain.items())
    extra = [k for k in both if ".auxiliary." in k]
    assert len(extra) == 2 * 6  # weights and biases of three layers in two stages
    assert all(torch.equal(both[k], plain[k.replace(".auxiliary.", ".")]) for k in extra)


def test_softmax_adds_no_tensor_to_weight_files_but_those_of_the_auxiliary_networks():
    plain, both = (model_of(*o, *options("USE_FOCAL", False)) for o in ([], AUXILIARY))
    assert [k for k in both.state_dict() if ".auxiliary." not in k] == list(plain.state_dict())


def test_without_the_auxiliary_route_its_key_changes_no_bit_of_training():
    results = []
    for opts in ([], options("DLA.ROUTE", "main")):
        losses, gradients = losses_and_gradients(model_of(*opts, *DLA))
        results.append([*losses.values(), *gradients.values()])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("build", [model_of, adamixer_of, deformable_detr_of])
def test_evaluation_is_that_of_sparse_rcnn_and_runs_no_auxiliary_network(build):
    plain, both = build().eval(), move_apart(build(*AUXILIARY)).eval()

    def refuse(*_):
        raise AssertionError("an auxiliary network runs in evaluation")

    for stage in both.head.head_series:
        for layer in stage.auxiliary.values():
            layer.register_forward_pre_hook(refuse)
    with torch.no_grad():
        expected, results = plain(INPUTS), both(INPUTS)
        stages, _ = both.raw_predictions(INPUTS, all_stages=True)
    for a, b in zip(expected, results, strict=True):
        a, b = a["instances"], b["instances"]
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert stages.auxiliary is None
    assert len(stages.stage) == len(both.head.head_series)


def test_the_context_of_validation_losses_leaves_the_auxiliary_route_out():
    plain, both = model_of(), model_of(*AUXILIARY)
    assert validation_losses(both, [INPUTS]) == validation_losses(plain, [INPUTS])
    with torch.no_grad():
        assert both.raw_predictions(INPUTS)[0].auxiliary is not None
        with use_training_context(recollect=False):
            assert both.raw_predictions(INPUTS)[0].auxiliary is None


def test_with_recollection_the_auxiliary_route_is_one_group_of_every_stage():
    model = model_of(*AUXILIARY, *SQR, *options("NUM_HEADS", 4))
    predictions, _ = model.raw_predictions(INPUTS)
    assert predictions.stage.tolist() == [0, 1, 1, 2, 2, 2, *[3] * 5]
    assert predictions.auxiliary.stage.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("opts", "threshold"), [
    (AUXILIARY, None), (DLA, 0.7), ([*AUXILIARY, *options("NMS.ENABLED", True)], 0.7),
    ([*AUXILIARY, *SQR], 0.7), ([*AUXILIARY, *SQR, *options("SQR.START", 2)], None),
])  # fmt: skip
def test_nms_is_off_unless_something_else_teaches_duplicates(opts, threshold):
    assert model_of(*opts).detection.nms_threshold == threshold


def test_the_routes_have_the_matchers_costs_and_divisors_of_sparse_rcnn_and_of_dla():
    costs = options("DLA.CLASS_COST", 7.0, "DLA.MATCHER", "SimOTAMatcher")
    model = model_of(*AUXILIARY, *costs)
    assert type(model.matcher) is HungarianMatcher
    assert type(model.auxiliary.matcher) is SimOTAMatcher
    weights = [m.costs.weights.class_ for m in (model.matcher, model.auxiliary.matcher)]
    assert weights == [2.0, 7.0]
    divisors = [c.normalizer for c in (model.criterion, model.auxiliary.criterion)]
    assert divisors == ["gt", "positives"]


def test_pictures_of_assignments_compare_both_matchers_of_a_model_with_two_routes():
    cfg = tiny_cfg(*AUXILIARY)
    kinds = [type(build_matcher(with_dla_on_main_route(cfg, enabled=x))) for x in (False, True)]
    assert kinds == [HungarianMatcher, OptimalTransportMatcher]


@pytest.mark.parametrize("opts", [
    (), SQR, DPG, [*SQR, *DPG], options("DROPOUT", 0.1), options("DLA.MATCHER", "HungarianMatcher"),
])  # fmt: skip
@pytest.mark.parametrize("half", [False, True])
def test_every_parameter_learns_from_any_number_of_objects(opts, half):
    model = model_of(*AUXILIARY, *opts)
    for counts in ([3, 2], [0, 1], [0, 0]):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert len(train_step(model, batch(SIZES, counts))) == 2 * 3 * 2


def test_two_stage_deformable_detr_has_candidates_and_both_routes():
    proposals = options("PROPOSALS.NAME", "EncoderQueries")
    losses = train_step(deformable_detr_of(*AUXILIARY, *proposals), INPUTS)
    assert {"loss_ce", "loss_ce_aux", "loss_ce_enc"} <= losses.keys()
    assert "loss_ce_enc_aux" not in losses


def test_without_deep_supervision_both_routes_have_a_loss_on_the_last_stage():
    losses = model_of(*AUXILIARY, *options("DEEP_SUPERVISION", False))(INPUTS)
    names = [f"loss_{kind}" for kind in ("ce", "bbox", "giou")]
    assert list(losses) == [*names, *(f"{name}_aux" for name in names)]


def test_only_the_auxiliary_route_logs_statistics_of_assignment():
    with EventStorage(19) as storage:
        both = model_of(*AUXILIARY)
        both(INPUTS)
        predictions, images = both.raw_predictions(INPUTS)
        targets = Targets.from_inputs(INPUTS, images.sizes)
        assignment = both.auxiliary.matcher(predictions.auxiliary, targets)
        logged = {k: v[0] for k, v in storage.latest().items() if k.startswith("dla/")}
    positives = (assignment >= 0).sum(dim=-1).float().mean(dim=-1)
    assert [logged["dla/positives_0"], logged["dla/positives"]] == pytest.approx(positives.tolist())
    assert "dla/units_mean" in logged


@pytest.fixture
def plain_file(tmp_path):
    """A checkpoint of Sparse R-CNN."""
    Checkpointer(model_of(seed=5), str(tmp_path)).save("plain")
    return str(tmp_path / "plain.pth")


@pytest.mark.parametrize("strict", [False, True])
def test_a_plain_checkpoint_starts_both_networks(plain_file, strict):
    model = model_of(*AUXILIARY)
    Checkpointer(model, strict=strict).load(plain_file)
    expected = model_of(seed=5).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name.replace(".auxiliary.", ".")]), name
    tensors = [p.data_ptr() for p in model.parameters()]
    assert len(set(tensors)) == len(tensors)  # no two share memory


def test_a_checkpoint_with_both_networks_loads_into_either_model(tmp_path, caplog):
    saved = move_apart(model_of(*AUXILIARY, seed=5))
    Checkpointer(saved, str(tmp_path)).save("both")
    for opts in (AUXILIARY, []):
        model = model_of(*opts)
        with caplog.at_level(logging.WARNING):
            Checkpointer(model, strict=True).load(str(tmp_path / "both.pth"))
        # Another test may have set the level of these loggers: only warnings count here.
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        for name, value in model.state_dict().items():
            assert torch.equal(value, saved.state_dict()[name])


def test_a_file_that_lacks_the_main_network_is_still_refused(plain_file):
    content = torch.load(plain_file)
    del content["model"]["head.head_series.1.linear1.weight"]
    torch.save(content, plain_file)
    with pytest.raises(WeightsError, match=r"Not in the file: head.head_series \(2\)"):
        Checkpointer(model_of(*AUXILIARY), strict=True).load(plain_file)


def test_the_average_of_weights_has_the_auxiliary_networks_too(plain_file):
    model = model_of(*AUXILIARY)
    average = AveragedWeights(model, decay=0.5)
    average.start()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    move_apart(model)
    average.update()
    name = "head.head_series.1.auxiliary.linear1.weight"
    now = average.weights()[name]
    decay = (1 + 1) / (10 + 1)
    torch.testing.assert_close(now, decay * before[name] + (1 - decay) * model.state_dict()[name])
    average.load_state_dict({"model": torch.load(plain_file)["model"], "updates": 3})


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    opts = [*AUXILIARY, "MODEL.EMA.ENABLED", True, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", "()"]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.ACCUMULATE", 2, "SOLVER.AMP.ENABLED", True]
    whole = train(quick_cfg(tmp_path / "whole", *opts))
    (tmp_path / "rest").mkdir()
    shutil.copy(tmp_path / "whole/model_0000001.pth", tmp_path / "rest")
    rest = train(quick_cfg(tmp_path / "rest", *opts), resume=True)
    assert rest.start_iter == 2
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_cannot_continue_with_another_route(tmp_path):
    opts = ["SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"]
    train(quick_cfg(tmp_path, *DLA, *opts))
    with pytest.raises(ConfigError, match=r"DLA.ROUTE is 'auxiliary', was 'main'"):
        check_resume(quick_cfg(tmp_path, *AUXILIARY, *opts))


def test_exported_programs_have_no_auxiliary_networks():
    model = model_of(*AUXILIARY).eval()
    program = DetectionProgram(model, (64, 96), model.detection, bgr=False)
    assert not [name for name, _ in program.named_parameters() if "auxiliary" in name]
    assert program(torch.zeros(1, 64, 96, 3, dtype=torch.uint8))[0].shape == (1, 8, 4)


@pytest.mark.parametrize(("opts", "words"), [
    (options("DLA.ROUTE", "auxiliary"), "ROUTE is 'auxiliary', but MODEL.SparseRCNN.DLA.ENABLED"),
    (enable("DLA", "ROUTE", "second"), "ROUTE is 'second'; write one of main, auxiliary"),
])  # fmt: skip
def test_a_route_that_learns_nothing_or_is_unknown_is_refused(opts, words):
    with pytest.raises(ConfigError, match=words):
        model_of(*opts)


def test_asag_has_no_cascade_and_refuses_the_auxiliary_route():
    cfg = read_cfg("quick/asag_s_shapes", ["MODEL.DEVICE", "cpu", *options("NUM_CLASSES", 5)])
    cfg.MODEL.SparseRCNN.DLA.ROUTE = "auxiliary"
    with pytest.raises(ConfigError, match=r"DLA.ROUTE is 'auxiliary', but ASAG has no cascade"):
        build_model(cfg)
