import copy

import pytest
import torch
from conftest import tiny_cfg
from torch import nn

from dsrcnn.solver import build_optimizer, clip_full_model


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 3)
        self.head = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        self.head[0].bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.backbone(x))


def rates(optimizer, model):
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {
        by_id[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
def test_backbone_has_its_own_rate_and_everything_decays(name):
    model = Model()
    cfg = tiny_cfg("SOLVER.OPTIMIZER", name, "SOLVER.BASE_LR", 0.1)
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.5
    found = rates(build_optimizer(cfg, model), model)
    assert found == {
        "backbone.weight": (0.05, 1e-4),
        "backbone.bias": (0.05, 1e-4),
        "head.0.weight": (0.1, 1e-4),
        "head.1.weight": (0.1, 1e-4),
        "head.1.bias": (0.1, 1e-4),
    }


@pytest.mark.parametrize(("written", "neck"), [(None, 1e-5), (1.0, 1e-4)])
def test_the_neck_is_part_of_the_backbone_or_has_its_own_rate(written, neck):
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.bottom_up = nn.Linear(3, 3)
    model.backbone.fpn_lateral2 = nn.Linear(3, 3, bias=False)
    model.head = nn.Linear(3, 3, bias=False)
    cfg = tiny_cfg("SOLVER.BASE_LR", 1e-4, "SOLVER.BACKBONE_MULTIPLIER", 0.1)
    cfg.SOLVER.NECK_MULTIPLIER = written
    found = {name: rate for name, (rate, _) in rates(build_optimizer(cfg, model), model).items()}
    assert found == {
        "backbone.bottom_up.weight": pytest.approx(1e-5),
        "backbone.bottom_up.bias": pytest.approx(1e-5),
        "backbone.fpn_lateral2.weight": pytest.approx(neck),
        "head.weight": pytest.approx(1e-4),
    }


def test_asag_trains_all_but_the_backbone_at_its_learning_rate():
    from detectron2.modeling import build_model

    from dsrcnn.config import read_cfg

    for name in ("coco/asag_a_R50_100pro_1x", "crowdhuman/asag_s_R50_50e"):
        with torch.device("meta"):
            cfg = read_cfg(name, ["MODEL.DEVICE", "meta"])
            model = build_model(cfg)
        for key, (rate, decay) in rates(build_optimizer(cfg, model), model).items():
            expected = 2e-5 if key.startswith("backbone.bottom_up.") else 2e-4
            assert (rate, decay) == pytest.approx((expected, 1e-4)), key


def test_official_model_has_300_parameters_to_train():
    from detectron2.modeling import build_model

    from dsrcnn.config import read_cfg

    cfg = read_cfg("coco/sparse_rcnn_R50_300pro_3x", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 300


def test_grouped_and_fused_steps_equal_one_group_per_parameter():
    model = Model()
    other = copy.deepcopy(model)
    cfg = tiny_cfg("SOLVER.BASE_LR", 0.01)
    ours = build_optimizer(cfg, model)
    theirs = torch.optim.AdamW(
        [{"params": [p]} for p in other.parameters() if p.requires_grad],
        lr=0.01,
        weight_decay=1e-4,
        fused=False,
    )
    for _ in range(5):
        x = torch.randn(4, 3)
        for m, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_full_model_clipping_scales_all_gradients_by_one_factor():
    model = Model()
    optimizer = build_optimizer(tiny_cfg(), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.full_like(p, 2.0)
    count = sum(p.numel() for p in trained)
    norm = clip_full_model(optimizer, max_norm=1.0)
    assert norm.item() == pytest.approx(2 * count**0.5)
    for p in trained:
        torch.testing.assert_close(p.grad, torch.full_like(p, count**-0.5))


def test_small_gradients_are_not_clipped():
    model = Model()
    optimizer = build_optimizer(tiny_cfg(), model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    clip_full_model(optimizer, max_norm=1.0)
    assert model.backbone.weight.grad.max().item() == pytest.approx(1e-3)


def test_detectron2_clipping_types_still_work():
    cfg = tiny_cfg("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value")
    model = Model()
    optimizer = build_optimizer(cfg, model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    optimizer.step()
    assert model.backbone.weight.grad.max().item() == 1.0


def settings_of(*opts):
    from detectron2.modeling import build_model

    cfg = tiny_cfg("SOLVER.BASE_LR", 1.0, "MODEL.BACKBONE.FREEZE_AT", 0, *opts)
    model = build_model(cfg)
    return rates(build_optimizer(cfg, model), model)


def test_layer_decay_falls_from_the_last_part_of_the_backbone_to_the_stem():
    found = settings_of("SOLVER.LAYER_DECAY", 0.5, "SOLVER.BACKBONE_MULTIPLIER", 0.1)
    bottom_up = "backbone.bottom_up"
    assert found[f"{bottom_up}.res5.1.conv2.weight"][0] == pytest.approx(0.1)
    assert found[f"{bottom_up}.res4.0.conv1.weight"][0] == pytest.approx(0.05)
    assert found[f"{bottom_up}.stem.conv1.weight"][0] == pytest.approx(0.1 * 0.5**4)
    assert found["backbone.fpn_output2.weight"][0] == pytest.approx(0.1)
    assert found["head.head_series.0.linear1.weight"][0] == 1.0


def test_chosen_kinds_of_parameters_are_without_weight_decay():
    found = settings_of("SOLVER.NO_DECAY", "('norm', 'bias', 'embedding')")
    without = {name for name, (_, decay) in found.items() if decay == 0}
    assert "head.head_series.0.norm1.weight" in without
    assert "head.head_series.0.linear1.bias" in without
    assert "head.head_series.0.self_attn.in_proj_bias" in without
    assert "proposals.init_proposal_features.weight" in without
    matrices = set(found) - without
    assert matrices
    assert all(n.endswith("weight") and "norm" not in n for n in matrices)


def test_one_kind_alone_can_be_without_weight_decay():
    found = settings_of("SOLVER.NO_DECAY", "('norm',)", "MODEL.SparseRCNN.DPG.ENABLED", True)
    assert found["head.head_series.0.norm1.bias"][1] == 0
    assert found["head.head_series.0.linear1.bias"][1] == 1e-4
    assert found["proposals.expert_features"][1] == 1e-4
