import cv2
import numpy as np
import pytest
from conftest import save_model, tiny_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from dsrcnn.analysis.images import encode_image, load_predictor, require_architecture
from dsrcnn.analysis.proposals import draw_expert_weights, draw_initial_proposals
from dsrcnn.errors import ConfigError
from dsrcnn.modeling import ASAG, SparseRCNN


def test_every_image_has_a_heat_map_of_its_weights():
    weights = np.random.default_rng(0).dirichlet([1, 1, 1], (2, 9)).transpose(0, 2, 1)
    one, two = (draw_expert_weights(weights[:n], ["a", "b"][:n]) for n in (1, 2))
    assert one.shape[1] == two.shape[1]
    assert two.shape[0] > one.shape[0]
    assert two.std() > 10


def test_a_registered_subclass_is_drawn_like_its_base(monkeypatch):
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "MyRCNN", type("MyRCNN", (SparseRCNN,), {}))
    cfg = tiny_cfg("MODEL.META_ARCHITECTURE", "MyRCNN")
    require_architecture(cfg, SparseRCNN, "dsrcnn draw assignment")
    with pytest.raises(ConfigError, match=r"dsrcnn draw anchors needs ASAG .* is MyRCNN"):
        require_architecture(cfg, ASAG, "dsrcnn draw anchors")


def test_the_predictor_of_pictures_keeps_a_pixel_of_narrow_images(tmp_path):
    save_model(tmp_path / "model.pth")
    cfg = tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    cfg.INPUT.MAX_SIZE_TEST = 96
    instances = load_predictor(cfg)(np.zeros((2000, 4, 3), dtype=np.uint8))["instances"]
    assert instances.image_size == (2000, 4)


def test_mixtures_of_models_without_dpg_are_refused(tmp_path):
    for opts, words in (
        ((), "DPG.ENABLED is False"),
        (("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), "needs SparseRCNN .* is GeneralizedRCNN"),
    ):
        with pytest.raises(ConfigError, match=words):
            draw_initial_proposals(tiny_cfg(*opts), tmp_path)


def test_the_quality_of_jpeg_files_is_no_option_of_others(monkeypatch):
    given, encode = [], cv2.imencode
    monkeypatch.setattr(cv2, "imencode", lambda *args: given.append(args[2]) or encode(*args))
    picture = np.zeros((4, 5, 3), np.uint8)
    for ending in (".png", ".jpg", ".JPEG"):
        decoded = cv2.imdecode(np.frombuffer(encode_image(picture, ending), np.uint8), 1)
        assert decoded.shape == (4, 5, 3)
    assert given == [[], *([[cv2.IMWRITE_JPEG_QUALITY, 95]] * 2)]
