"""Packaging. Reads the version as text: neither torch nor the package is imported to build it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "dsrcnn/version.py").read_text()).group(1)

# Detectron2 is not listed: the package index has no distribution of that name. `make setup` and the
# README install it; `import dsrcnn` says so where it is missing.
DETECTRON2_NEEDS = [
    "Pillow>=9.1",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "matplotlib",
    "omegaconf>=2.1",
    "pycocotools>=2.0.7",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29",
    "yacs>=0.1.8",
]
VIZ = ["opencv-python-headless>=4.7"]
EVAL = ["faster-coco-eval>=1.6"]
TIMM = ["timm>=1.0.9"]
# Later versions have another name and licence.
ALBUMENTATIONS = ["albumentations>=2.0.5,<2.1"]
DEV = [
    "mypy>=1.13",
    "pytest>=8",
    "pytest-xdist>=3.2",
    "ruff>=0.9",
    "types-PyYAML",
    "types-tabulate",
    "types-tqdm",
]

setup(
    name="dsrcnn",
    version=VERSION,
    description="Sparse detectors with dynamic parts for Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["dsrcnn", "dsrcnn.*"]), "dsrcnn.configs"],
    package_dir={"dsrcnn.configs": "configs"},
    package_data={"dsrcnn": ["py.typed"], "dsrcnn.configs": ["*.yaml", "*/*.yaml"]},
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy>=1.23",
        "scipy>=1.9",
        "PyYAML",
        "safetensors>=0.4",
        *DETECTRON2_NEEDS,
    ],
    extras_require={
        "viz": VIZ,  # pictures and the synthetic data set
        "eval": EVAL,  # COCO metrics several times faster; pycocotools otherwise
        "timm": TIMM,  # backbones (MODEL.TIMM)
        "albumentations": ALBUMENTATIONS,  # INPUT.AUG.ALBUMENTATIONS
        "dev": [*VIZ, *EVAL, *TIMM, *ALBUMENTATIONS, *DEV],
    },
    entry_points={"console_scripts": ["dsrcnn = dsrcnn.cli.main:main"]},
)
