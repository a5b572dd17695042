import copy

import pytest
import torch
from conftest import tiny_cfg
from detectron2.modeling import build_model
from torch import nn

from dsrcnn.config import read_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.solver import build_optimizer, clip_full_model


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 3)
        self.head = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        self.head[0].bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.backbone(x))


def settings_of(cfg, model):
    """Learning rate and weight decay of every trained parameter, by name."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
def test_the_backbone_has_its_own_rate_and_everything_decays(name):
    cfg = tiny_cfg("SOLVER.OPTIMIZER", name, "SOLVER.BASE_LR", 0.1)
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.5
    assert settings_of(cfg, Model()) == {
        "backbone.weight": (0.05, 1e-4),
        "backbone.bias": (0.05, 1e-4),
        "head.0.weight": (0.1, 1e-4),
        "head.1.weight": (0.1, 1e-4),
        "head.1.bias": (0.1, 1e-4),
    }


@pytest.mark.parametrize(("multiplier", "neck"), [(None, 1e-5), (1.0, 1e-4)])
def test_the_neck_is_part_of_the_backbone_unless_it_has_a_factor(multiplier, neck):
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.bottom_up = nn.Linear(3, 3)
    model.backbone.fpn_lateral2 = nn.Linear(3, 3, bias=False)
    model.head = nn.Linear(3, 3, bias=False)
    cfg = tiny_cfg("SOLVER.BASE_LR", 1e-4, "SOLVER.BACKBONE_MULTIPLIER", 0.1)
    cfg.SOLVER.NECK_MULTIPLIER = multiplier
    assert {name: rate for name, (rate, _) in settings_of(cfg, model).items()} == {
        "backbone.bottom_up.weight": pytest.approx(1e-5),
        "backbone.bottom_up.bias": pytest.approx(1e-5),
        "backbone.fpn_lateral2.weight": pytest.approx(neck),
        "head.weight": pytest.approx(1e-4),
    }


@pytest.mark.parametrize("name", ["coco/asag_a_R50_100pro_1x", "crowdhuman/asag_s_R50_50e"])
def test_asag_trains_all_but_the_backbone_at_its_learning_rate(name):
    cfg = read_cfg(name, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    for key, (rate, decay) in settings_of(cfg, model).items():
        expected = 2e-5 if key.startswith("backbone.bottom_up.") else 2e-4
        assert (rate, decay) == pytest.approx((expected, 1e-4)), key


def test_the_official_model_has_300_trained_parameters():
    cfg = read_cfg("coco/sparse_rcnn_R50_300pro_3x", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    assert len(settings_of(cfg, model)) == 300


def test_grouped_and_fused_steps_equal_a_group_per_parameter():
    model = Model()
    reference = copy.deepcopy(model)
    groups = [{"params": [p]} for p in reference.parameters() if p.requires_grad]
    optimizer = build_optimizer(tiny_cfg("SOLVER.BASE_LR", 0.01), model)
    plain = torch.optim.AdamW(groups, lr=0.01, weight_decay=1e-4, fused=False)
    for _ in range(5):
        x = torch.randn(4, 3)
        for m, o in ((model, optimizer), (reference, plain)):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", [2.0, 1e-3])
def test_clipping_scales_all_gradients_by_one_factor_if_their_norm_is_too_large(gradient):
    model = Model()
    optimizer = build_optimizer(tiny_cfg(), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.full_like(p, gradient)
    norm = gradient * sum(p.numel() for p in trained) ** 0.5
    assert clip_full_model(optimizer, max_norm=1.0).item() == pytest.approx(norm)
    for p in trained:
        torch.testing.assert_close(p.grad, torch.full_like(p, gradient / max(norm, 1)))


def test_clipping_types_of_detectron2_still_work():
    model = Model()
    optimizer = build_optimizer(tiny_cfg("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"), model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    optimizer.step()
    assert model.backbone.weight.grad.max().item() == 1.0


def detector_settings(*opts):
    cfg = tiny_cfg("SOLVER.BASE_LR", 1.0, "MODEL.BACKBONE.FREEZE_AT", 0, *opts)
    return settings_of(cfg, build_model(cfg))


def test_layer_decay_decreases_from_the_last_part_of_the_backbone_to_the_stem():
    opts = ["SOLVER.LAYER_DECAY", 0.5, "SOLVER.BACKBONE_MULTIPLIER", 0.1]
    rates = {name: rate for name, (rate, _) in detector_settings(*opts).items()}
    bottom_up = "backbone.bottom_up"
    assert rates[f"{bottom_up}.res5.1.conv2.weight"] == pytest.approx(0.1)
    assert rates[f"{bottom_up}.res4.0.conv1.weight"] == pytest.approx(0.05)
    assert rates[f"{bottom_up}.stem.conv1.weight"] == pytest.approx(0.1 * 0.5**4)
    assert rates["backbone.fpn_output2.weight"] == pytest.approx(0.1)
    assert rates["head.head_series.0.linear1.weight"] == 1.0


def test_a_backbone_without_a_neck_decays_by_depth_and_has_no_factor_of_a_neck():
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    cfg = tiny_cfg("SOLVER.BASE_LR", 1.0, "SOLVER.LAYER_DECAY", 0.5)
    rates = {name: rate for name, (rate, _) in settings_of(cfg, model).items()}
    assert rates == {"backbone.0.weight": 0.5, "backbone.1.weight": 1.0}
    cfg.SOLVER.NECK_MULTIPLIER = 0.1
    with pytest.raises(ConfigError, match=r"NECK_MULTIPLIER is 0\.1, but .* has no neck"):
        settings_of(cfg, model)


def test_norms_biases_embeddings_or_one_kind_alone_can_be_without_weight_decay():
    settings = detector_settings("SOLVER.NO_DECAY", "('norm', 'bias', 'embedding')")
    without = {name for name, (_, decay) in settings.items() if decay == 0}
    for name in ("norm1.weight", "linear1.bias", "self_attn.in_proj_bias"):
        assert f"head.head_series.0.{name}" in without
    assert "proposals.init_proposal_features.weight" in without
    matrices = set(settings) - without
    assert matrices
    assert all(n.endswith("weight") and "norm" not in n for n in matrices)
    opts = ["SOLVER.NO_DECAY", "('norm',)", "MODEL.SparseRCNN.DPG.ENABLED", True]
    settings = detector_settings(*opts)
    assert settings["head.head_series.0.norm1.bias"][1] == 0
    assert settings["head.head_series.0.linear1.bias"][1] == 1e-4
    assert settings["proposals.expert_features"][1] == 1e-4


@pytest.mark.parametrize("name", [
    "swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224", "vit_tiny_patch16_224",
])  # fmt: skip
def test_position_tables_can_be_without_weight_decay_as_timm_says(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = nn.Module()
        model.backbone = timm.create_model(name)
    exempt = {f"backbone.{n}" for n in model.backbone.no_weight_decay()}
    expected = exempt & {n for n, _ in model.named_parameters() if "cls_token" not in n}
    assert expected
    settings = settings_of(tiny_cfg("SOLVER.NO_DECAY", "('position',)"), model)
    assert {name for name, (_, decay) in settings.items() if decay == 0} == expected


def test_sgd_uses_the_momentum_of_the_config():
    cfg = tiny_cfg("SOLVER.OPTIMIZER", "SGD", "SOLVER.NESTEROV", True, "SOLVER.MOMENTUM", 0.8)
    (group,) = build_optimizer(cfg, torch.nn.Linear(2, 2)).param_groups
    assert (group["nesterov"], group["momentum"]) == (True, 0.8)
