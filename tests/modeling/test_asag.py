"""ASAG as a detector."""

import pytest
import torch
from conftest import batch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dsrcnn.config import read_cfg
from dsrcnn.structures import Predictions

SIZES = [(64, 96), (96, 64)]
KEY = "MODEL.ASAG."
DENOISING = [f"{KEY}DN.ENABLED", True, f"{KEY}DN.NUM", 7]
EAGER = [f"{KEY}ANCHORS.LOW", 0.0, f"{KEY}ANCHORS.HIGH", 1.0]  # probes wherever it can


def cfg_of(*opts, kind="a"):
    small = ["MODEL.DEVICE", "cpu", "MODEL.SparseRCNN.NUM_CLASSES", 5]
    return read_cfg(f"quick/asag_{kind}_shapes", [*small, *opts])


def model_of(*opts, kind="a"):
    torch.manual_seed(0)
    return build_model(cfg_of(*opts, kind=kind))


def small_anchors(model):
    """Untrained anchors are half a patch; smaller ones are inside of small images."""
    for net in (model.generator.proj_all, model.generator.proj_patch):
        net.layers[2].bias.data.view(-1, 5)[:, :4] -= 2.0
    return model


@pytest.mark.parametrize("kind", ["a", "s"])
@pytest.mark.parametrize("opts", [[], DENOISING], ids=["plain", "denoising"])
def test_every_loss_has_its_name_and_every_parameter_learns(kind, opts):
    model = model_of(*opts, kind=kind)
    losses = model(batch(SIZES, [3, 1]))
    parts = ["_anchor", "_rpn", "_0", "_1", "_2", ""]
    names = {f"loss_{x}{part}" for x in ("ce", "bbox", "giou") for part in parts}
    if opts:
        names |= {f"dn_loss_{x}_{i}" for x in ("ce", "bbox", "giou") for i in range(5)}
    assert set(losses) == names
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert model.trains_every_parameter


@pytest.mark.parametrize("opts", [[], DENOISING], ids=["plain", "denoising"])
@pytest.mark.parametrize("counts", [[0, 0], [0, 2]])
def test_images_without_objects_train(opts, counts):
    model = model_of(*opts)
    losses = model(batch(SIZES, counts))
    total = sum(losses.values())
    assert torch.isfinite(total)
    if not any(counts):
        assert all(value == 0 for name, value in losses.items() if "bbox" in name)
    total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", [(224, 224), (96, 320), (33, 47)])
def test_images_of_all_sizes_train_and_are_detected_in(size):
    model = small_anchors(model_of(*EAGER))
    losses = model(batch([size], [2]))
    assert torch.isfinite(sum(losses.values()))
    model.eval()
    with torch.no_grad():
        found = model(batch([size], [0]))[0]["instances"]
    assert len(found)
    assert torch.isfinite(found.pred_boxes.tensor).all()


@pytest.mark.parametrize("kind", ["a", "s"])
def test_images_of_a_batch_are_detected_in_as_each_by_itself(kind):
    """They differ in size, in patches and in queries; padding must not be seen."""
    rule = [f"{KEY}ANCHORS.OUTPUT", 0.4, f"{KEY}ANCHORS.LOW", 0.3, f"{KEY}ANCHORS.HIGH", 0.8]
    model = small_anchors(model_of(*rule, kind=kind)).eval()
    inputs = batch([(96, 160), (160, 96), (128, 128)], [0, 0, 0])
    with torch.no_grad():
        features, sizes, _ = model.extract(inputs)
        # Untrained, all images look the same: as many anchors, and as many worth a look.
        features[-1][1] *= 3.0
        anchors, probed = model.anchors(features, sizes)
        assert len(probed) == 2
        assert not anchors.mask.all()
        together = model.decode(features, anchors)
        for image in range(3):
            one = [x[image : image + 1] for x in features]
            own, _ = model.anchors(one, sizes[image : image + 1])
            alone, valid = model.decode(one, own), anchors.mask[image]
            torch.testing.assert_close(anchors.boxes[image, valid], own.boxes[0])
            torch.testing.assert_close(
                together.boxes[0, image, valid], alone.boxes[0, 0], rtol=1e-4, atol=1e-2
            )
            torch.testing.assert_close(
                together.logits[0, image, valid], alone.logits[0, 0], rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("kind", ["a", "s"])
def test_images_of_one_size_are_detected_in_alone_as_in_a_batch(kind):
    rule = [f"{KEY}ANCHORS.OUTPUT", 0.4, f"{KEY}ANCHORS.LOW", 0.3, f"{KEY}ANCHORS.HIGH", 0.8]
    model = small_anchors(model_of(*rule, kind=kind)).eval()
    inputs = batch([(96, 160)] * 3, [0, 0, 0])
    with torch.no_grad():
        together = [x["instances"] for x in model(inputs)]
        for record, found in zip(inputs, together, strict=True):
            own = model([record])[0]["instances"]
            assert len(own) == len(found) > 0
            torch.testing.assert_close(own.scores, found.scores, rtol=1e-4, atol=1e-5)
            # Equal scores may change places, so sums are compared.
            totals = [x.pred_boxes.tensor.sum(dim=0) for x in (own, found)]
            torch.testing.assert_close(*totals, rtol=1e-4, atol=0.5)


def test_only_real_queries_are_detections():
    model = model_of().eval()
    inputs = batch([(96, 96), (96, 96)], [0, 0])
    with torch.no_grad():
        predictions, _, sizes = model.predict(inputs)
        count = predictions.logits.shape[2]
        mask = torch.ones(2, count, dtype=torch.bool)
        mask[1, 3:] = False
        logits = predictions.logits.clone()
        logits[:, 1, 3:] = 9.0  # padding that is sure of itself
        changed = predictions._replace(logits=logits, mask=mask)
        found = model.postprocess(changed, sizes, inputs)[1]["instances"]
    assert 0 < len(found) <= 15  # three queries of five classes
    assert found.scores.max() < 0.9


def test_levels_that_inference_does_not_use_are_not_trained():
    model = model_of(f"{KEY}ANCHORS.INFERENCE_LEVEL", "P5P6")
    assert not model.trains_every_parameter
    sum(model(batch(SIZES, [2, 1])).values()).backward()
    assert model.generator.proj_patch.layers[0].weight.grad is None
    model.eval()
    with torch.no_grad():
        features, sizes, _ = model.extract(batch(SIZES, [0, 0]))
        _, probed = model.anchors(features, sizes)
    assert not probed


def test_patches_are_guided_by_objects_at_first_and_the_count_is_saved():
    model = model_of(f"{KEY}GUIDED_PART", 0.02, "SOLVER.MAX_ITER", 100)
    guided = []
    lessons_seen = lambda _, inputs: guided.append(inputs[2].guided)  # noqa: E731
    model.generator.register_forward_pre_hook(lessons_seen)
    for _ in range(3):
        model(batch(SIZES, [2, 1]))
    assert guided == [True, True, False]
    assert model.state_dict()["iteration"] == 3
    with torch.no_grad():
        model(batch(SIZES, [2, 1]))
    assert model.iteration == 3  # norms are being estimated


def test_published_mistakes_come_with_their_switch():
    plain, official = model_of(), model_of(f"{KEY}OFFICIAL_QUIRKS", True)
    assert (plain.generator.layernorm[0].weight == 1).all()
    assert not plain.criterion.flip_as_corners
    assert official.generator.layernorm[0].weight.abs().max() < 0.17
    assert official.criterion.flip_as_corners


def test_inference_uses_the_decoder_that_is_asked_for():
    inputs = batch(SIZES, [0, 0])
    found = []
    for head in (1, 3, -1):
        model = model_of(f"{KEY}USED_HEAD", head).eval()
        torch.nn.init.normal_(model.decoders.stages[1].fc_cls.weight)
        with torch.no_grad():
            found.append(model.predict(inputs)[0].logits)
    assert found[0].shape[0] == 1
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_parts_of_a_batch_know_the_objects_of_all_parts():
    model = model_of()
    inputs = batch(SIZES, [3, 1])
    counts = model.loss_normalizers([inputs[:1], inputs[1:]])
    assert counts.objects == 4
    assert counts.images == 2
    losses = model(inputs[:1], normalizers=counts, ends_iteration=False)
    assert model.iteration == 0
    torch.manual_seed(1)
    alone = model(inputs[:1], ends_iteration=False)["loss_bbox_anchor"]
    torch.manual_seed(1)
    shared = model(inputs[:1], normalizers=counts, ends_iteration=False)["loss_bbox_anchor"]
    torch.testing.assert_close(shared * 4, alone * 3)
    assert torch.isfinite(sum(losses.values()))


def test_half_precision_ends_at_the_features():
    model = model_of()
    seen = []

    def look(_, inputs):
        first = inputs[0][0] if isinstance(inputs[0], list) else inputs[0]
        seen.append((first.dtype, torch.is_autocast_enabled("cpu")))

    for part in (model.generator, model.initializer, model.decoders):
        part.register_forward_pre_hook(look)
    features = []
    model.backbone.register_forward_hook(lambda *x: features.extend(x[2].values()))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch(SIZES, [2, 1]))
    assert features[0].dtype == torch.bfloat16
    assert seen == [(torch.float32, False)] * 3
    assert torch.isfinite(sum(losses.values()))


def test_the_training_log_tells_anchors_and_patches():
    model = model_of(f"{KEY}LOG_PERIOD", 1)
    with EventStorage() as storage:
        model(batch(SIZES, [2, 1]))
        found = {name: value for name, (value, _) in storage.latest().items()}
    names = {"anchors", "location_score", "patches_p4", "patches_p3"}
    assert {name for name in found if name.startswith("asag/")} == {f"asag/{x}" for x in names}
    assert 0 < found["asag/anchors"] <= 60
    assert 0 < found["asag/location_score"] < 1
    assert model_of(f"{KEY}LOG_PERIOD", 0).log is None


def test_suppression_is_among_the_best_scores_as_published():
    """Of two scores that count, one is a duplicate; the third would be none, but does not count."""
    model = model_of("MODEL.SparseRCNN.NMS.ENABLED", True, "TEST.DETECTIONS_PER_IMAGE", 2).eval()
    boxes = torch.tensor([[10.0, 10, 50, 50], [11, 10, 50, 50], [60, 60, 90, 90]])
    logits = torch.full((1, 1, 3, 5), -9.0)
    logits[0, 0, :, 2] = torch.tensor([2.0, 1.0, 0.0])
    predictions = Predictions(logits, boxes.view(1, 1, 3, 4), torch.zeros(1))
    found = model.postprocess(predictions, [(96, 96)], batch([(96, 96)], [0]))[0]["instances"]
    assert found.pred_boxes.tensor.tolist() == [[10, 10, 50, 50]]
    model.candidates = None  # as the cascades here do
    found = model.postprocess(predictions, [(96, 96)], batch([(96, 96)], [0]))[0]["instances"]
    assert len(found) == 2
    assert model_of().nms_threshold is None


def test_denoising_queries_change_no_other_loss():
    plain, denoising = model_of(), model_of(*DENOISING)
    denoising.load_state_dict(plain.state_dict())
    inputs = batch(SIZES, [3, 1])
    expected, found = [], []
    for model, losses in ((plain, expected), (denoising, found)):
        torch.manual_seed(1)
        losses.append(model(inputs))
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, msg=name)
    assert set(found[0]) - set(expected[0])


def test_a_batch_without_any_patch_to_learn_from_trains():
    model = model_of(f"{KEY}TRAIN_PATCHES", 0, f"{KEY}GUIDED_PART", 0.5)
    losses = model(batch(SIZES, [0, 0]))
    sum(losses.values()).backward()
    assert torch.isfinite(sum(losses.values()))
    assert model.generator.proj_patch.layers[0].weight.grad is not None


def test_losses_are_named_after_the_decoder_whichever_is_used():
    inputs = batch(SIZES, [2, 1])
    found = []
    for head in (1, -1):
        model = model_of(f"{KEY}USED_HEAD", head)
        torch.nn.init.constant_(model.decoders.stages[1].fc_cls.bias, 0.0)
        found.append(model(inputs))
    assert all(losses["loss_ce_1"] > 5 * losses["loss_ce"] for losses in found)
