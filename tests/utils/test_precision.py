"""Settings of torch for float32, in the spelling of every version."""

import pytest
import torch

from dsrcnn.utils import precision
from dsrcnn.utils.precision import exact_float32, float32_precision

has_new = bool(precision._holders())  # settings by operator, from torch 2.9 on


@pytest.mark.skipif(not has_new, reason="torch has no settings by operator")
def test_programs_that_set_the_precision_by_operator_keep_it():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        assert float32_precision()[0] == "tf32"
        with exact_float32():
            assert float32_precision() == ("ieee", "ieee")
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


def test_earlier_versions_are_set_as_a_whole(monkeypatch):
    monkeypatch.setattr(precision, "_holders", lambda: ())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert float32_precision() == ("high", str(torch.backends.cudnn.allow_tf32))
        with exact_float32():
            assert float32_precision() == ("highest", "False")
        assert float32_precision()[0] == "high"
    finally:
        torch.set_float32_matmul_precision(before)
