"""A registered subclass is treated like the architecture it is derived from."""

import pytest
from conftest import QUICK, SMALL, coco_options, tiny_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from dsrcnn import load_cfg
from dsrcnn.cli.main import main
from dsrcnn.config import check_config
from dsrcnn.engine.main import run
from dsrcnn.errors import ConfigError
from dsrcnn.modeling import SparseRCNN

MY_RCNN = ["MODEL.META_ARCHITECTURE", "MyRCNN"]


@pytest.fixture(autouse=True)
def _my_rcnn():
    @META_ARCH_REGISTRY.register()
    class MyRCNN(SparseRCNN):
        pass

    yield
    META_ARCH_REGISTRY._obj_map.pop("MyRCNN")


def test_a_subclass_trains_is_evaluated_and_drawn(tmp_path, capsys):
    output = tmp_path / "out"
    options = [*SMALL, *MY_RCNN, *coco_options(tmp_path), "OUTPUT_DIR", str(output)]
    assert run([*QUICK, *options]) == 0
    assert main(["eval", str(output)]) == 0
    assert capsys.readouterr().out.count("AP50") == 2
    for drawing in ("predictions", "assignment"):
        assert main(["draw", drawing, str(output), "--images", "1"]) == 0
        assert len(list((output / drawing).glob("*.png"))) == 1


def test_the_class_count_of_a_subclass_is_resolved_and_its_config_checked():
    name, options = QUICK[1], [*SMALL, *MY_RCNN]
    cfg = load_cfg(name, options)
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 5
    with pytest.raises(ConfigError, match=r"NHEADS is 0"):
        check_config(tiny_cfg(*MY_RCNN, "MODEL.SparseRCNN.NHEADS", 0))
    with pytest.raises(ConfigError, match="NUM_CLASSES is 80"):
        load_cfg(name, [*options, "MODEL.SparseRCNN.NUM_CLASSES", "80"])
