"""The measured error of the low-rank part: none that every token has but in merged weights, and there as the rule has it."""

from __future__ import annotations

import json

import pytest
import torch

from bench import precision
from csrc_triton.multi_lora import designs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_weight_errs_alike_for_every_token(dtype):
    found = precision.errors(0.1, dtype, 1 << 14)
    figure = designs._table()["precision"][str(dtype).removeprefix("torch.")]
    assert found["merged"] == pytest.approx(figure / 0.1, rel=0.2)
    assert found["split"] < found["merged"] / 3
    assert found["fused"] < found["merged"] / 3


def test_stochastic_rounding_is_right_in_the_mean():
    value = torch.randn(100, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    calls = torch.stack([precision.stochastic(value, torch.bfloat16, generator).float() for _ in range(4000)])
    spacing = value.abs() * 2**-7
    assert ((calls - value).abs() <= spacing).all()
    assert ((calls.mean(0) - value).abs() <= 5 * spacing / 4000**0.5).all()
    exact = torch.tensor([0.5, -1.0])
    assert torch.equal(precision.stochastic(exact, torch.bfloat16, generator).float(), exact)


def test_as_many_rows_are_measured_as_asked_for(monkeypatch):
    rows = []

    def layer(x):
        rows.append(len(x))
        return torch.zeros(len(x), precision.WIDTH)

    monkeypatch.setattr(precision, "CHUNK", 256)
    monkeypatch.setattr(precision, "layers", lambda *parts: {"none": layer})
    precision.errors(0.1, torch.bfloat16, 640)
    assert rows == [256, 256, 128]


def test_the_table_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "STRENGTHS", (0.1,))
    precision.main(["--tokens", "512", "--out", str(tmp_path)])
    assert "10 % |" in capsys.readouterr().out
    written = json.loads((tmp_path / "precision.json").read_text())
    assert len(written["found"]) == 2
    assert written["tokens"] == 512
