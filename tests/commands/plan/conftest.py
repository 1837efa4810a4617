"""A config to be planned."""

from __future__ import annotations

import pytest
from helpers.pictures import write_images

from clora.lora.save import save_lora
from clora.testing import (
    random_lora,
    tiny_config,
    tiny_pipeline,
)

RANK = 4


@pytest.fixture
def job(tmp_path, tiny_folder):
    """Returns job(**sections): a config of two teachers whose files exist."""
    transformer = tiny_pipeline().transformer
    for name, rank in (("snow", 2), ("sepia", 8)):
        save_lora(random_lora(transformer, rank, rank), tmp_path / f"{name}.safetensors")
    write_images(tmp_path / "images", 4)

    def make(effects=None, **sections):
        names = ("snow", "sepia")
        listed = [{"name": n, "lora": str(tmp_path / f"{n}.safetensors"), "prompt": "make it snow"} for n in names]
        data = {"sources": str(tmp_path / "images"), **sections.pop("data", {})}
        defaults = {"pipeline": str(tiny_folder), "output": str(tmp_path / "out"), "student": {"rank": RANK}}
        return tiny_config(effects or listed, data=data, **(defaults | sections))

    return make
