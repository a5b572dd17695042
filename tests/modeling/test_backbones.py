"""Networks of timm, and necks."""

import copy
import math

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_backbone, build_model

from dsrcnn.config import check_config, load_cfg
from dsrcnn.errors import ConfigError, WeightsError
from dsrcnn.layers.activation_checkpoint import checkpoint_blocks
from dsrcnn.modeling.backbone.build import use_pixel_statistics
from dsrcnn.modeling.backbone.necks import BiFPN
from dsrcnn.modeling.backbone.timm_backbone import TimmBackbone, pixel_statistics
from dsrcnn.modeling.freeze import freeze_modules
from dsrcnn.solver import build_optimizer

timm = pytest.importorskip("timm")
save_file = pytest.importorskip("safetensors.torch").save_file

NECKS = ["FPN", "PAFPN", "BiFPN", "ChannelMapper"]
# ResNet, EfficientNet, MobileNetV3, ConvNeXt, Swin (channels last), RegNet, wide ResNet
FAMILIES = [
    *("test_resnet", "test_efficientnet", "mobilenetv3_small_050", "test_convnext"),
    *("swin_tiny_patch4_window7_224", "regnetx_002"),
]
RESNETS = ["resnet34", "resnext50_32x4d", "wide_resnet50_2", "resnet152"]


def with_timm(name, neck="FPN", *opts):
    options = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", name]
    return tiny_cfg(*options, "MODEL.NECK.NAME", neck, "MODEL.BACKBONE.FREEZE_AT", 0, *opts)


def two_steps(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(2):
        losses = model(batch([(64, 96), (96, 64)], [2, 1]))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(torch.isfinite(v) for v in losses.values())


@pytest.mark.parametrize("neck", NECKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_with_every_neck(name, neck):
    model = build_model(with_timm(name, neck))
    two_steps(model)
    reached = [p.grad is not None for p in model.parameters() if p.requires_grad]
    assert all(reached) == model.all_parameters_get_gradients
    model.eval()(batch([(64, 96)], [0]))


@pytest.mark.parametrize("neck", NECKS)
def test_detectron2s_resnets_train_with_every_neck(neck):
    options = ["MODEL.BACKBONE.NAME", "build_resnet_neck_backbone", "MODEL.NECK.NAME", neck]
    two_steps(build_model(tiny_cfg(*options)))


@pytest.mark.parametrize("name", ["efficientnet_b3", "swin_tiny_patch4_window7_224"])
def test_maps_of_large_networks_have_their_shapes_and_gradients(name):
    backbone = TimmBackbone(name)
    levels = backbone(torch.randn(1, 3, 256, 224))
    shapes = backbone.output_shape()
    for (key, level), stride in zip(levels.items(), (4, 8, 16, 32), strict=True):
        assert level.shape == (1, shapes[key].channels, 256 // stride, 224 // stride)
    sum(level.mean() for level in levels.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_of_all_kinds_have_four_levels(name):
    with torch.device("meta"):
        shapes = TimmBackbone(name).output_shape()
    assert [s.stride for s in shapes.values()] == [4, 8, 16, 32]


def test_the_deepest_map_of_every_stride_is_taken():
    info = timm.create_model("vgg11", features_only=True).feature_info  # two maps of stride 32
    backbone = TimmBackbone("vgg11")
    assert [s.channels for s in backbone.output_shape().values()] == info.channels()[2:]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("count", range(6))
def test_frozen_parts_keep_parameters_and_statistics(name, count):
    backbone = TimmBackbone(name, freeze_at=count)
    frozen = [p for part in backbone.parts()[:count] for unit in part for p in unit.parameters()]
    others = [p for part in backbone.parts()[count:] for unit in part for p in unit.parameters()]
    assert not any(p.requires_grad for p in frozen)
    assert all(p.requires_grad for p in others)
    assert len(frozen) + len(others) == len(list(backbone.parameters()))
    assert bool(frozen) == (count > 0)
    before = copy.deepcopy(backbone.state_dict())
    levels = backbone.train()(torch.randn(2, 3, 64, 64))
    assert levels["res5"].requires_grad == bool(others)
    changed = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert bool(changed) == (count < 5 and "convnext" not in name)  # layer norms have none


@pytest.mark.parametrize("norm", ["", "SyncBN"])
def test_freezing_by_name_keeps_activations_in_norms_of_timm(norm):
    model = build_model(with_timm("test_efficientnet", "FPN", "MODEL.TIMM.NORM", norm))
    expected = copy.deepcopy(model).eval().backbone(torch.ones(1, 3, 64, 64))["p2"]
    freeze_modules(model, ["backbone.bottom_up"])
    level = model.train().backbone(torch.ones(1, 3, 64, 64))["p2"]
    torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["FrozenBN", "SyncBN", "GN"])
@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "mobilenetv3_small_050"])
def test_norms_are_replaced_by_name(name, norm):
    backbone = TimmBackbone(name, norm=norm)
    kinds = {type(m).__name__ for m in backbone.modules() if "Norm" in type(m).__name__}
    assert any(word in kind for kind in kinds for word in {"GN": ["Group"]}.get(norm, [norm[:4]]))
    assert "BatchNorm2d" not in kinds


@pytest.mark.parametrize("norm", ["FrozenBN", "SyncBN"])
def test_a_frozen_network_may_have_the_name_of_any_norm(norm):
    backbone = TimmBackbone("test_efficientnet", norm=norm, freeze_at=5)
    assert not any(p.requires_grad for p in backbone.parameters())


def test_group_norms_keep_activations_in_norms_of_timm():
    backbone = TimmBackbone("test_efficientnet", norm="GN")
    norm = backbone.body.bn1
    x = torch.randn(2, norm[0].num_channels, 8, 8)
    torch.testing.assert_close(norm(x), torch.nn.functional.silu(norm[0](x)))
    assert norm[0].num_groups == math.gcd(32, norm[0].num_channels)


def test_freezing_at_minus_one_freezes_nothing():
    assert all(p.requires_grad for p in TimmBackbone("test_resnet", freeze_at=-1).parameters())


def test_networks_with_unknown_parts_can_be_used_unfrozen():
    assert all(p.requires_grad for p in TimmBackbone("hiera_tiny_224").parameters())


@pytest.mark.parametrize("content", [b"", b"broken", None])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_weight_files_and_those_of_another_network_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    if content is not None:
        path.write_bytes(content)
    else:
        save = torch.save if suffix == ".pth" else save_file
        save(timm.create_model("test_convnext").state_dict(), path)
    words = "do not fit 'test_resnet'" if content is None else r"cannot be read \(.+\)"
    with pytest.raises(WeightsError, match=rf"weights.* {words}"):
        TimmBackbone("test_resnet", weights=str(path))


@pytest.mark.parametrize(("name", "words"), [
    ("build_timm_backbone", "a neck, such as"), ("build_timm_backbones", "write one of .*build_"),
])  # fmt: skip
def test_backbones_that_do_not_fit_are_refused(name, words):
    cfg = with_timm("test_resnet", "FPN", "MODEL.BACKBONE.NAME", name)
    with pytest.raises(ConfigError, match=words):
        check_config(cfg) or build_model(cfg)


def test_checkpointing_with_stochastic_depth_keeps_gradients():
    cfg = with_timm("test_convnext", "FPN", "MODEL.TIMM.DROP_PATH", 0.3)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        cfg.MODEL.ACTIVATION_CHECKPOINT = ("backbone",) if checkpointing else ()
        model = build_model(cfg)
        torch.manual_seed(1)
        sum(model(batch([(64, 64)], [2])).values()).backward()
        gradients.append([p.grad for p in model.backbone.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("name", "blocks"), [
    ("resnet18d", 8),  # a deep stem with activations in place
    ("hrnet_w18_small", 8),  # blocks of several resolutions, in lists
])  # fmt: skip
def test_checkpointing_keeps_gradients_of_networks_with_other_stages(name, blocks):
    torch.manual_seed(0)
    backbone, x = TimmBackbone(name), torch.randn(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            assert checkpoint_blocks(backbone) >= blocks
        backbone.zero_grad()
        sum(feature.sum() for feature in backbone(x).values()).backward()
        gradients.append([p.grad.clone() for p in backbone.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_backbone_without_blocks_cannot_be_checkpointed():
    cfg = with_timm("vgg11", "FPN", "MODEL.ACTIVATION_CHECKPOINT", ("backbone",))
    with pytest.raises(ConfigError, match="no residual blocks in stages; leave 'backbone' out"):
        build_model(cfg)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_a_local_file_of_timms_weights_is_loaded(tmp_path, name):
    whole = timm.create_model(name)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone(name, weights=str(tmp_path / "weights.pth")).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        expected = whole.eval().forward_intermediates(x, intermediates_only=True)[-1]
        torch.testing.assert_close(backbone(x)["res5"], expected)


def test_weights_of_a_whole_model_replace_those_of_timm():
    options = ["MODEL.TIMM.PRETRAINED", True, "MODEL.TIMM.WEIGHTS", "/nothing.pth"]
    build_backbone(with_timm("test_resnet", "FPN", *options, "MODEL.WEIGHTS", "model.pth"))


@pytest.mark.parametrize(("name", "options", "error", "words"), [
    ("resnet181", {}, ConfigError, ["'resnet181'", "resnet18"]),
    ("test_vit", {}, ConfigError, ["strides [16, 16, 16]", "resnet50"]),
    ("vgg11", {"drop_path": 0.1}, ConfigError, ["DROP_PATH 0.0", "'vgg11'"]),
    ("hiera_tiny_224", {"freeze_at": 2}, ConfigError, ["FREEZE_AT 0", "LAYER_DECAY 1.0"]),
    ("test_convnext", {"norm": "GN"}, ConfigError, ["no batch norms", 'TIMM.NORM ""']),
    ("cspresnet50d", {"pretrained": True}, WeightsError, ["no weights of", "PRETRAINED False"]),
    ("test_resnet", {"weights": "/nothing.pth"}, WeightsError, ["/nothing.pth", "is no file"]),
])  # fmt: skip
def test_networks_that_cannot_be_built_are_refused(name, options, error, words):
    with pytest.raises(error) as caught:
        TimmBackbone(name, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_weights_that_cannot_be_downloaded_are_refused(monkeypatch):
    create = timm.create_model

    def offline(name, **options):
        if options.get("pretrained"):
            raise FileNotFoundError("LocalEntryNotFoundError")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"cache and a download.*MODEL\.TIMM\.WEIGHTS"):
        TimmBackbone("test_resnet", pretrained=True)


def test_pixel_statistics_are_those_of_the_network():
    mean, std = pixel_statistics("resnet50")
    assert mean == pytest.approx([123.675, 116.28, 103.53])
    assert std == pytest.approx([58.395, 57.12, 57.375])
    cfg = with_timm("test_resnet")
    use_pixel_statistics(cfg)
    assert pytest.approx([127.5] * 3) == cfg.MODEL.PIXEL_MEAN
    assert cfg.INPUT.FORMAT == "RGB"
    plain = tiny_cfg("INPUT.FORMAT", "BGR")
    use_pixel_statistics(plain)
    assert plain.INPUT.FORMAT == "BGR"


def test_pixel_statistics_of_ones_own_stay_with_a_note(caplog):
    cfg = with_timm("test_resnet", "FPN", "MODEL.PIXEL_MEAN", [10.0, 20.0, 30.0])
    use_pixel_statistics(cfg)
    assert cfg.MODEL.PIXEL_MEAN == [10.0, 20.0, 30.0]
    assert pytest.approx([127.5] * 3) == cfg.MODEL.PIXEL_STD
    assert "MODEL.PIXEL_MEAN is [10.0, 20.0, 30.0]" in caplog.text
    before = caplog.text
    use_pixel_statistics(with_timm("test_resnet", "FPN", "MODEL.PIXEL_MEAN", [127.5] * 3))
    assert caplog.text == before


@pytest.mark.parametrize(("neck", "complete"), [("FPN", False), ("ChannelMapper", False)])
def test_a_neck_may_leave_out_the_last_map_whose_layers_get_no_gradient(neck, complete):
    levels = ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"]]
    used = ["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"]]
    names = ["MODEL.BACKBONE.NAME", "build_resnet_neck_backbone", "MODEL.NECK.NAME", neck]
    model = build_model(tiny_cfg(*names, *levels, *used))
    sum(model(batch([(64, 96)], [2])).values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert bool(without) != complete
    assert model.all_parameters_get_gradients == complete


def test_layer_decay_follows_the_parts_of_the_network():
    cfg = with_timm("test_efficientnet", "FPN", "SOLVER.LAYER_DECAY", 0.5)
    model = build_model(cfg)
    rates = {id(p): g["lr"] for g in build_optimizer(cfg, model).param_groups for p in g["params"]}
    parts = model.backbone.bottom_up.parts()
    for depth, part in enumerate(parts):
        for parameter in (p for unit in part for p in unit.parameters()):
            expected = cfg.SOLVER.BASE_LR * 0.5 ** (4 - depth)
            assert rates[id(parameter)] == pytest.approx(expected)


def test_bifpn_fuses_by_weights_that_sum_to_one():
    neck = BiFPN(TimmBackbone("test_resnet"), ["res2", "res3", "res4", "res5"], 8)
    fusion = neck.rounds[0].down[0]
    fusion.weights.data = torch.tensor([3.0, -1.0])  # the second is off
    x, y = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(fusion([x, y]), fusion([x, 5 * y]))
    fusion.weights.data = torch.tensor([1.0, 1.0])
    torch.testing.assert_close(fusion([x, x]), fusion([3 * x, -x]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("opts", "words"), [
    (["MODEL.NECK.NAME", "NASFPN"], ["'NASFPN'", "PAFPN, BiFPN, ChannelMapper"]),
    (["MODEL.NECK.NAME", "PAFPN"], ["build_resnet_fpn_backbone", "build_resnet_neck_backbone"]),
    (["MODEL.TIMM.DROP_PATH", 1.0], ["DROP_PATH is 1.0", "below 1"]),
    (["MODEL.TIMM.NORM", "LN"], ["'LN'", "FrozenBN, SyncBN, GN"]),
    (["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"],
      "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"]], ["res5", "build_resnet_neck_backbone"]),
])  # fmt: skip
def test_invalid_values_are_refused(opts, words):
    with pytest.raises(ConfigError) as caught:
        load_cfg("quick/sparse_rcnn_shapes", opts)
    assert all(word in str(caught.value) for word in words), str(caught.value)
