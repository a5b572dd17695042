"""ASAG as a detector."""

from dataclasses import replace

import pytest
import torch
from conftest import SMALL, batch, coco_options, train
from detectors import SIZES, train_step
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dsrcnn.config import load_cfg, read_cfg
from dsrcnn.engine.checkpoint import Checkpointer
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import WeightsError
from dsrcnn.structures import Predictions
from dsrcnn.utils.training import use_training_context

KEY = "MODEL.ASAG."
DENOISING = [f"{KEY}DN.ENABLED", True, f"{KEY}DN.NUM", 7]
ALWAYS_PROBE = [f"{KEY}ANCHORS.LOW", 0.0, f"{KEY}ANCHORS.HIGH", 1.0]
SELECTIVE = [f"{KEY}ANCHORS.OUTPUT", 0.4, f"{KEY}ANCHORS.LOW", 0.3, f"{KEY}ANCHORS.HIGH", 0.8]


def model_of(*opts, kind="a"):
    torch.manual_seed(0)
    small = ["MODEL.DEVICE", "cpu", "MODEL.SparseRCNN.NUM_CLASSES", 5]
    return build_model(read_cfg(f"quick/asag_{kind}_shapes", [*small, *opts]))


def with_small_anchors(model):
    """Untrained anchors are half a patch large; smaller ones are inside of small images."""
    for net in (model.generator.proj_all, model.generator.proj_patch):
        net.layers[2].bias.data.view(-1, 5)[:, :4] -= 2.0
    return model


@pytest.mark.parametrize("kind", ["a", "s"])
@pytest.mark.parametrize("opts", [[], DENOISING], ids=["plain", "denoising"])
@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [0, 0]])
def test_all_losses_are_named_and_reach_every_parameter_also_without_objects(kind, opts, counts):
    model = model_of(*opts, kind=kind)
    losses = train_step(model, batch(SIZES, counts))
    parts = ["_anchor", "_rpn", "_0", "_1", "_2", ""]
    names = {f"loss_{x}{part}" for x in ("ce", "bbox", "giou") for part in parts}
    if opts:
        names |= {f"dn_loss_{x}_{i}" for x in ("ce", "bbox", "giou") for i in range(5)}
    assert set(losses) == names
    assert model.all_parameters_get_gradients
    assert any(counts) or all(value == 0 for name, value in losses.items() if "bbox" in name)


@pytest.mark.parametrize("size", [(224, 224), (96, 320), (33, 47)])
def test_images_of_any_size_are_probed_in_training_and_inference(size):
    model = with_small_anchors(model_of(*ALWAYS_PROBE))
    positions = []
    model.generator.register_forward_hook(lambda *x: positions.extend(p[2] for p in x[2][2]))
    assert torch.isfinite(sum(model(batch([size], [2])).values()))
    with torch.no_grad():
        instances = model.eval()(batch([size], [0]))[0]["instances"]
    assert len(positions) == 4  # two levels each
    assert all((x >= 0).all() for x in positions)
    assert len(instances)
    assert torch.isfinite(instances.pred_boxes.tensor).all()


def test_patches_have_as_many_anchors_as_configured():
    numbers = [f"{KEY}ANCHORS.FIXED", 12, f"{KEY}ANCHORS.PROBED", 7]
    model = with_small_anchors(model_of(*ALWAYS_PROBE, *numbers)).eval()
    outputs = []
    model.generator.register_forward_hook(lambda *x: outputs.extend(x[2]))
    with torch.no_grad():
        model(batch([(224, 224)], [0]))
    _, fixed, probed = outputs
    assert fixed.quarters.shape == (1, 4, 12, 5)
    assert fixed.whole.shape == (1, 1, 12, 5)
    assert [p.predictions.shape[1:] for p in probed] == [(7, 5)] * 2


@pytest.mark.parametrize("kind", ["a", "s"])
def test_padding_of_a_batch_does_not_change_predictions(kind):
    """The images differ in size, in patches and in queries."""
    model = with_small_anchors(model_of(*SELECTIVE, kind=kind)).eval()
    with torch.no_grad():
        images = model.preprocess_image(batch([(96, 160), (160, 96), (128, 128)], [0, 0, 0]))
        features = model.extract_features(images)
        features[-1][1] *= 3.0  # untrained, all images have the same anchors
        anchors, probed = model.anchors(features, images.sizes)
        assert len(probed) == 2
        assert not anchors.mask.all()
        together = model.decode(features, anchors)
        for image in range(3):
            one = [x[image : image + 1] for x in features]
            anchors_alone, _ = model.anchors(one, images.sizes[image : image + 1])
            alone, valid = model.decode(one, anchors_alone), anchors.mask[image]
            torch.testing.assert_close(anchors.boxes[image, valid], anchors_alone.boxes[0])
            boxes, logits = (x[0, image, valid] for x in (together.boxes, together.logits))
            torch.testing.assert_close(boxes, alone.boxes[0, 0], rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(logits, alone.logits[0, 0], rtol=1e-3, atol=1e-3)


def test_padded_queries_are_no_detections():
    model = model_of().eval()
    inputs = batch([(96, 96), (96, 96)], [0, 0])
    with torch.no_grad():
        predictions, images = model.raw_predictions(inputs)
        mask = torch.ones(2, predictions.logits.shape[2], dtype=torch.bool)
        mask[1, 3:] = False
        logits = predictions.logits.clone()
        logits[:, 1, 3:] = 9.0  # confident padding
        changed = predictions._replace(logits=logits, mask=mask)
        instances = model.postprocess(changed, images, inputs)[1]["instances"]
    assert 0 < len(instances) <= 15  # three queries of five classes
    assert instances.scores.max() < 0.9


def test_levels_unused_in_inference_are_not_trained():
    model = model_of(f"{KEY}ANCHORS.INFERENCE_LEVEL", "P5P6")
    assert not model.all_parameters_get_gradients
    sum(model(batch(SIZES, [2, 1])).values()).backward()
    assert model.generator.proj_patch.layers[0].weight.grad is None
    model.eval()
    with torch.no_grad():
        images = model.preprocess_image(batch(SIZES, [0, 0]))
        _, probed = model.anchors(model.extract_features(images), images.sizes)
    assert not probed


def test_first_iterations_probe_around_objects_and_iterations_are_saved():
    model = model_of(f"{KEY}GUIDED_PART", 0.02, "SOLVER.MAX_ITER", 100)
    guided = []
    model.generator.register_forward_pre_hook(lambda _, x: guided.append(x[2].guided))
    for _ in range(3):
        model(batch(SIZES, [2, 1]))
    assert guided == [True, True, False]
    assert model.state_dict()["iteration"] == 3
    with torch.no_grad():  # batch norm statistics are being estimated
        model(batch(SIZES, [2, 1]))
    assert model.iteration == 3


def test_parts_of_a_batch_are_normalized_by_the_whole_batch():
    model = model_of()
    inputs = batch(SIZES, [3, 1])
    normalizers = model.loss_normalizers([inputs[:1], inputs[1:]])
    assert (normalizers.num_targets, normalizers.num_images) == (4, 2)
    losses = []
    for value in (None, normalizers):
        with torch.random.fork_rng(), use_training_context(normalizers=value, ends_iteration=False):
            losses.append(model(inputs[:1])["loss_bbox"])
    assert model.iteration == 0
    torch.testing.assert_close(losses[1] * 4, losses[0] * 3)


def test_everything_behind_the_backbone_runs_in_float32_under_autocast():
    model = model_of()
    inputs, features = [], []

    def record(_, args):
        first = args[0][0] if isinstance(args[0], list) else args[0]
        inputs.append((first.dtype, torch.is_autocast_enabled("cpu")))

    for part in (model.generator, model.initializer, model.decoders):
        part.register_forward_pre_hook(record)
    model.backbone.register_forward_hook(lambda *x: features.extend(x[2].values()))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch(SIZES, [2, 1]))
    assert features[0].dtype == torch.bfloat16
    assert inputs == [(torch.float32, False)] * 3
    assert torch.isfinite(sum(losses.values()))


@pytest.mark.parametrize("period", [0, 1])
def test_statistics_of_anchors_are_logged(period):
    model = model_of("LOG.PERIOD", period)
    with EventStorage() as storage:
        model(batch(SIZES, [2, 1]))
    logged = {name.removeprefix("asag/"): value for name, (value, _) in storage.latest().items()}
    assert set(logged) == set(["anchors", "location_score", "patches_p4", "patches_p3"] * period)
    assert not period or (0 < logged["anchors"] <= 60 and 0 < logged["location_score"] < 1)


def test_nms_runs_among_the_best_scores_as_published():
    """Of the two best scores one is a duplicate; the third box is none, but does not count."""
    model = model_of("MODEL.SparseRCNN.NMS.ENABLED", True, "TEST.DETECTIONS_PER_IMAGE", 2).eval()
    boxes = torch.tensor([[10.0, 10, 50, 50], [11, 10, 50, 50], [60, 60, 90, 90]])
    logits = torch.full((1, 1, 3, 5), -9.0)
    logits[0, 0, :, 2] = torch.tensor([2.0, 1.0, 0.0])
    predictions = Predictions(logits, boxes.view(1, 1, 3, 4), torch.zeros(1))
    inputs = batch([(96, 96)], [0])
    images = model.preprocess_image(inputs)
    instances = model.postprocess(predictions, images, inputs)[0]["instances"]
    assert instances.pred_boxes.tensor.tolist() == [[10, 10, 50, 50]]
    model.detection = replace(model.detection, candidates=None)  # as in cascades
    assert len(model.postprocess(predictions, images, inputs)[0]["instances"]) == 2
    assert model_of().detection.nms_threshold is None


def test_denoising_queries_do_not_change_other_losses():
    plain, denoising = model_of(), model_of(*DENOISING)
    denoising.load_state_dict(plain.state_dict())
    losses = []
    for model in (plain, denoising):
        torch.manual_seed(1)
        losses.append(model(batch(SIZES, [3, 1])))
    torch.testing.assert_close({name: losses[1][name] for name in losses[0]}, losses[0])


@pytest.mark.parametrize("kind", ["a", "s"])
def test_one_decoder_trains_with_a_single_override_wherever_the_config_uses_another(kind):
    model = model_of(f"{KEY}USED_HEAD", 2, f"{KEY}NUM_DECODERS", 1, kind=kind)
    losses = train_step(model, batch(SIZES, [2, 1]))
    assert set(losses) == {
        f"loss_{x}{part}" for x in ("ce", "bbox", "giou") for part in ("_anchor", "_rpn", "")
    }
    assert len(model.decoders.stages) == 1
    assert all(len(x["instances"]) for x in model.eval()(batch(SIZES, [0, 0])))


@pytest.mark.parametrize("head", [2, -1])
def test_one_decoder_takes_the_used_one_of_a_file_with_four(tmp_path, head):
    opts = [f"{KEY}USED_HEAD", head]
    four = model_of(*opts).eval()
    torch.save({"model": four.state_dict()}, tmp_path / "four.pth")
    one = model_of(*opts, f"{KEY}NUM_DECODERS", 1).eval()
    Checkpointer(one, strict=True).load(str(tmp_path / "four.pth"))
    inputs = batch(SIZES, [0, 0])
    with torch.no_grad():
        a, b = (model.raw_predictions(inputs)[0] for model in (four, one))
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.boxes, b.boxes)
    torch.save({"model": one.state_dict()}, tmp_path / "one.pth")
    Checkpointer(one, strict=True).load(str(tmp_path / "one.pth"))
    with pytest.raises(WeightsError, match="do not fit"):
        Checkpointer(four, strict=True).load(str(tmp_path / "one.pth"))


@pytest.mark.parametrize("kind", ["a", "s"])
def test_the_run_of_a_model_with_one_decoder_trains_and_evaluates(tmp_path, kind):
    opts = ["OUTPUT_DIR", str(tmp_path / "run"), f"{KEY}NUM_DECODERS", "1", f"{KEY}USED_HEAD", "2"]
    data = coco_options(tmp_path / "data")
    trainer = train(load_cfg(f"quick/asag_{kind}_shapes", [*SMALL, *data, *opts]))
    assert trainer.iter == 2
    results = Trainer.test(trainer.cfg, trainer.model)
    assert "AP" in results["bbox"]


@pytest.mark.parametrize("head", [1, -1])
def test_losses_are_named_after_their_decoder_not_after_the_used_one(head):
    model = model_of(f"{KEY}USED_HEAD", head)
    torch.nn.init.constant_(model.decoders.stages[1].fc_cls.bias, 0.0)
    losses = model(batch(SIZES, [2, 1]))
    assert losses["loss_ce_1"] > 5 * losses["loss_ce"]
