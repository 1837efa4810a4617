"""A student is trained on the families of which no other test runs a whole distillation."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_longcat, tiny_z_image
from helpers.pictures import write_images

from clora.data.prepare import encode_data
from clora.lora.layers import block_layers
from clora.testing import random_teachers, tiny_config
from clora.training.student import train_student

SIZE = (64, 80)


@pytest.mark.parametrize("family", [tiny_longcat, tiny_z_image], ids=["longcat", "z_image"])
def test_a_student_is_trained(family, monkeypatch, tmp_path):
    tiny_longcat.shrink(monkeypatch)
    adapter = family.tiny_adapter(size=SIZE)
    write_images(tmp_path, 3, size=(70, 90))
    teachers = random_teachers(adapter.pipeline.transformer, 2)
    data = {"sources": str(tmp_path), "size": SIZE, "sources_per_effect": 2, "general_targets": 2}
    config = tiny_config(list(teachers), data={**data, "max_sequence_length": family.MAX_SEQUENCE_LENGTH})
    encoded = encode_data(config, adapter, teachers)
    assert encoded.targets.shape == (2, 2, *adapter.latent_shape)
    if family is tiny_longcat:
        assert encoded.sources.shape == encoded.targets.shape
    reports = []
    student = train_student(config, adapter, teachers, encoded, lambda update, values: reports.append(values))
    assert len(reports) == 2
    assert set(student.modules) == set(block_layers(adapter.pipeline.transformer))
    assert all(torch.isfinite(module.delta()).all() for module in student.modules.values())
    assert [name for name, module in student.modules.items() if not module.lora_B.any()] == []
