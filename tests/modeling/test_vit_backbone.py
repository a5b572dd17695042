"""Plain vision transformers with a simple feature pyramid."""

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_backbone, build_model

from dsrcnn.errors import ConfigError, WeightsError
from dsrcnn.layers import activation_checkpoint
from dsrcnn.modeling.backbone.build import use_pixel_statistics
from dsrcnn.modeling.backbone.vit_backbone import (
    ChannelNorm,
    VisionTransformer,
    apply_in_windows,
    attend_in_windows,
)
from dsrcnn.solver import build_optimizer

timm = pytest.importorskip("timm")
LAYERS = pytest.importorskip("timm.layers")
TINY = "test_vit"  # 6 blocks, 64 channels, 160 pixels


def with_vit(*opts):
    options = ["MODEL.BACKBONE.NAME", "build_timm_vit_fpn_backbone", "MODEL.TIMM.NAME", TINY]
    return tiny_cfg(*options, "MODEL.BACKBONE.FREEZE_AT", 0, *opts)


@pytest.mark.parametrize("size", [224, 320])
@pytest.mark.parametrize("window", [0, 4])
def test_images_of_any_size_give_finite_losses_and_gradients_everywhere(size, window):
    model = build_model(with_vit("MODEL.TIMM.WINDOW", window))
    losses = model(batch([(size, size), (64, 96)], [2, 1]))
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()(batch([(64, 96)], [0]))


def test_all_blocks_are_recomputed_under_activation_checkpointing(monkeypatch):
    inputs, losses = batch([(224, 224)], [2]), []
    for parts in ((), ("backbone",)):
        torch.manual_seed(0)
        opts = ["MODEL.TIMM.WINDOW", 4, "MODEL.ACTIVATION_CHECKPOINT", parts]
        model = build_model(with_vit(*opts))
        calls = []
        checkpointed = activation_checkpoint.checkpointed
        spy = lambda block, *rest: (calls.append(block), checkpointed(block, *rest))[1]  # noqa: E731, B023
        with monkeypatch.context() as patch:
            patch.setattr(activation_checkpoint, "checkpointed", spy)
            total = sum(model(inputs).values())
        total.backward()
        losses.append((total.detach(), model.backbone.bottom_up.blocks[0].attn.qkv.weight.grad))
    blocks = [id(block) for block in model.backbone.bottom_up.blocks]
    assert [id(block) for block in calls if id(block) in blocks] == blocks
    torch.testing.assert_close(losses[1], losses[0])


def test_levels_have_their_shapes():
    backbone = build_backbone(with_vit("MODEL.FPN.OUT_CHANNELS", 32))
    levels = backbone(torch.randn(2, 3, 96, 128))
    sizes = {f"p{i}": (2, 32, 96 // s, 128 // s) for i, s in enumerate((4, 8, 16, 32), 2)}
    assert {k: tuple(v.shape) for k, v in levels.items()} == sizes
    assert {k: v.stride for k, v in backbone.output_shape().items()} == {
        "p2": 4, "p3": 8, "p4": 16, "p5": 32,
    }  # fmt: skip


@pytest.mark.parametrize("size", [(160, 160), (224, 320)])
def test_the_map_is_that_of_timm_for_a_network_without_class_token(size, monkeypatch):
    create = timm.create_model

    def without_class_token(name, **options):
        return create(name, **options, class_token=False)

    monkeypatch.setattr(timm, "create_model", without_class_token)
    ours = VisionTransformer(TINY).eval()
    theirs = timm.create_model(TINY, num_classes=0, global_pool="", dynamic_img_size=True).eval()
    state = {k.removeprefix("embeddings."): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        (expected,) = theirs.forward_intermediates(
            images, indices=1, norm=True, intermediates_only=True
        )
        torch.testing.assert_close(ours(images)["last"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(160, 160), (224, 320), (64, 96)])
def test_position_embeddings_are_resized_as_timm_does(size):
    body = timm.create_model(TINY, num_classes=0, global_pool="", dynamic_img_size=True)
    torch.nn.init.normal_(body.pos_embed)
    backbone = VisionTransformer(TINY)
    positions = body.pos_embed.detach()[:, 1:]  # behind the class token
    backbone.embeddings.pos_embed.data.copy_(positions)
    torch.nn.init.zeros_(backbone.embeddings.patch_embed.proj.weight)
    torch.nn.init.zeros_(backbone.embeddings.patch_embed.proj.bias)
    found = backbone.embeddings(torch.zeros(1, 3, *size))
    grid = [size[0] // 16, size[1] // 16]
    expected = LAYERS.resample_abs_pos_embed(body.pos_embed, grid, [10, 10], num_prefix_tokens=1)
    torch.testing.assert_close(found.flatten(1, 2), expected[:, 1:])


def test_windows_equal_a_loop_over_them():
    torch.manual_seed(0)
    attention = VisionTransformer(TINY).blocks[0].attn.eval()
    tokens = torch.randn(2, 5, 7, 64)
    padded = torch.zeros(2, 6, 9, 64)
    padded[:, :5, :7] = tokens
    expected = torch.zeros_like(padded)
    for y in range(0, 6, 3):
        for x in range(0, 9, 3):
            window = padded[:, y : y + 3, x : x + 3].reshape(2, 9, 64)
            expected[:, y : y + 3, x : x + 3] = attention(window).view(2, 3, 3, 64)
    found = attend_in_windows(attention, tokens, 3)
    torch.testing.assert_close(found, expected[:, :5, :7])


def test_one_window_without_padding_is_the_whole_block():
    torch.manual_seed(0)
    block = VisionTransformer(TINY).blocks[0].eval()
    tokens = torch.randn(2, 6, 6, 64)
    expected = block(tokens.flatten(1, 2)).view_as(tokens)
    torch.testing.assert_close(apply_in_windows(block, tokens, 6), expected)


def test_stochastic_depth_drops_a_block_of_whole_images():
    torch.manual_seed(0)
    block = VisionTransformer(TINY, drop_path=0.5).blocks[-1].train()
    tokens = torch.randn(32, 4, 4, 64)
    with torch.no_grad():
        unchanged = (apply_in_windows(block, tokens, 2) == tokens).all(dim=-1).flatten(1)
    assert 0 < unchanged.all(dim=1).sum() < 32  # both of its branches
    assert (unchanged.all(dim=1) == unchanged.any(dim=1)).all()


def test_windows_of_a_network_of_other_blocks_are_refused():
    other = "vit_small_patch16_18x2_224"  # two attentions side by side
    with pytest.raises(ConfigError, match=r"TIMM\.WINDOW.*ParallelThingsBlock.*WINDOW 0"):
        VisionTransformer(other, window=7)


def test_the_last_block_of_every_quarter_attends_to_the_whole_image():
    assert VisionTransformer("vit_tiny_patch16_224", window=7).global_blocks == {2, 5, 8, 11}
    backbone = VisionTransformer(TINY, window=2).eval()
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    backbone(images)["last"][0, 0, 0, 0].backward()
    assert images.grad[0, :, 48:, 48:].abs().sum() > 0  # of another window


def test_channel_norm_is_a_layer_norm_of_every_position():
    x = torch.randn(2, 8, 3, 4)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(ChannelNorm(8)(x), (x - mean) / (variance + 1e-6).sqrt())


@pytest.mark.parametrize("kind", ["timm", "MAE"])
def test_local_weights_are_loaded_also_those_of_a_masked_autoencoder(tmp_path, kind):
    whole = timm.create_model(TINY)
    state = whole.state_dict()
    if kind == "MAE":
        state = {k: v for k, v in state.items() if not k.startswith("head")}
        extra = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 64)}
        state = {"model": {**state, **extra}}
    torch.save(state, tmp_path / "weights.pth")
    backbone = VisionTransformer(TINY, weights=str(tmp_path / "weights.pth"))
    for name in ("blocks.3.attn.qkv.weight", "norm.bias"):
        torch.testing.assert_close(backbone.state_dict()[name], whole.state_dict()[name])
    torch.testing.assert_close(backbone.embeddings.pos_embed, whole.pos_embed[:, 1:])


def test_weights_of_another_transformer_are_refused(tmp_path):
    torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="do not fit 'test_vit'"):
        VisionTransformer(TINY, weights=str(tmp_path / "weights.pth"))


def test_layer_decay_and_freezing_count_embeddings_and_blocks():
    cfg = with_vit("SOLVER.LAYER_DECAY", 0.5, "MODEL.BACKBONE.FREEZE_AT", 2)
    model = build_model(cfg)
    bottom_up = model.backbone.bottom_up
    frozen = [bottom_up.embeddings, bottom_up.blocks[0]]
    assert not any(p.requires_grad for module in frozen for p in module.parameters())
    rates = {id(p): g["lr"] for g in build_optimizer(cfg, model).param_groups for p in g["params"]}
    for index, block in enumerate(bottom_up.blocks[1:], start=1):
        for parameter in block.parameters():
            expected = cfg.SOLVER.BASE_LR * 0.5 ** (5 - index)
            assert rates[id(parameter)] == pytest.approx(expected)
    assert rates[id(bottom_up.norm.weight)] == pytest.approx(cfg.SOLVER.BASE_LR)


def test_freezing_at_minus_one_freezes_nothing():
    body = VisionTransformer(TINY, freeze_at=-1)
    assert all(p.requires_grad for p in body.parameters())


def test_pixels_are_standardized_as_the_network_expects():
    cfg = with_vit()
    use_pixel_statistics(cfg)
    assert pytest.approx([127.5] * 3) == cfg.MODEL.PIXEL_MEAN


@pytest.mark.parametrize(("opts", "words"), [
    (["MODEL.TIMM.NAME", "resnet18"], "needs a plain vision transformer"),
    (["MODEL.TIMM.NAME", "vit_small_patch14_dinov2"], "patches of 16 pixels"),
    (["MODEL.TIMM.NAME", "test_vit_relpos"], "position embeddings"),
    (["MODEL.TIMM.NORM", "GN"], "MODEL.TIMM.NORM is 'GN'"),
    (["MODEL.FPN.NORM", "GN"], "MODEL.FPN.NORM is 'GN'"),
    (["MODEL.NECK.NAME", "PAFPN"], "MODEL.NECK.NAME is 'PAFPN'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(opts, words):
    with pytest.raises(ConfigError, match=words):
        build_backbone(with_vit(*opts))
