"""ASAG as a detector."""

import pytest
import torch
from conftest import batch
from detectron2.modeling import build_model

from dsrcnn.config import check_config, read_cfg
from dsrcnn.errors import ConfigError

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
    """They have different numbers of queries, of which the padding must not be seen."""
    fixed = [f"{KEY}ANCHORS.INFERENCE_LEVEL", "P5P6", f"{KEY}ANCHORS.MAX", 500]
    model = small_anchors(model_of(*fixed, f"{KEY}ANCHORS.OUTPUT", 0.0, kind=kind)).eval()
    inputs = batch([(96, 96), (96, 96)], [0, 0])
    with torch.no_grad():
        everything, _ = model.anchors(*model.extract(inputs)[:2])
        output = everything.scores.amin(dim=1).mean().item()  # between the worst of both images
        model.generator.rule = model.generator.rule._replace(output=output)
        predictions, _, _ = model.predict(inputs)
        assert not predictions.mask.all()
        together = model(inputs)
        for image, record in enumerate(inputs):
            alone, _, _ = model.predict([record])
            valid = predictions.mask[image]
            assert alone.mask.all()
            torch.testing.assert_close(
                predictions.boxes[0, image][valid], alone.boxes[0, 0], rtol=1e-4, atol=1e-2
            )
            found, expected = together[image]["instances"], model([record])[0]["instances"]
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)


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
    model = model_of(f"{KEY}GUIDED_ITERS", 2, f"{KEY}ANCHORS.HIGH", 0.99, f"{KEY}ANCHORS.LOW", 0.0)
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
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch(SIZES, [2, 1]))
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert torch.isfinite(sum(losses.values()))


def test_suppression_is_among_the_best_scores_as_published():
    model = model_of("MODEL.SparseRCNN.NMS.ENABLED", True, "TEST.DETECTIONS_PER_IMAGE", 4).eval()
    with torch.no_grad():
        found = model(batch([(96, 96)], [0]))[0]["instances"]
    assert 0 < len(found) <= 4
    assert model_of().nms_threshold is None


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.SparseRCNN.DLA.ENABLED", True], "DLA"),
        (["MODEL.SparseRCNN.DPG.ENABLED", True], "DPG"),
        (["MODEL.SparseRCNN.SQR.ENABLED", True], "SQR"),
        (["MODEL.SparseRCNN.USE_FOCAL", False], "USE_FOCAL"),
        (["MODEL.COMPILE", True], "MODEL.COMPILE False"),
        (["MODEL.CHECKPOINT.STAGES", True], "MODEL.CHECKPOINT.STAGES False"),
        ([f"{KEY}DECODER", "DETR"], "AdaMixer, SparseRCNN"),
        ([f"{KEY}USED_HEAD", 4], "from 0 to 3"),
        ([f"{KEY}NUM_DECODERS", 0], "NUM_DECODERS"),
        ([f"{KEY}SMALL_OBJECT_WEIGHT", 0.5], "SMALL_OBJECT_WEIGHT"),
        ([f"{KEY}TRAIN_PATCHES", -1], "TRAIN_PATCHES"),
        ([f"{KEY}DN.NUM", 0], "DN"),
        ([f"{KEY}ANCHORS.INFERENCE_LEVEL", "P2P6"], "P4P6"),
        ([f"{KEY}ANCHORS.LOW", 0.8], "LOW 0.8"),
        ([f"{KEY}ANCHORS.MAX", 2], "ANCHORS.MAX"),
        ([f"{KEY}ANCHORS.MAX_PATCHES", -1], "MAX_PATCHES"),
        ([f"{KEY}ANCHORS.CELLS", 0], "CELLS"),
        ([f"{KEY}ANCHORS.OVERLAP", 1.5], "OVERLAP"),
        (["MODEL.ADAMIXER.GROUPS", 3], "GROUPS"),
    ],
)
def test_what_makes_no_sense_is_refused(opts, message):
    with pytest.raises(ConfigError, match=message):
        check_config(cfg_of(*opts))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"], "POOLER_TYPE ROIAlign"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"]], "p2, p3, p4, p5"),
    ],
)
def test_parts_that_do_not_fit_are_refused(opts, message):
    with pytest.raises(ConfigError, match=message):
        model_of(*opts)
