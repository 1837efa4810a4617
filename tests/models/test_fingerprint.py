"""Another model is another fingerprint; the same one is the same, wherever and however it was loaded."""

from __future__ import annotations

import errno
import shutil
import tempfile
from types import SimpleNamespace

import pytest
import torch

from clora.errors import CloraError
from clora.models.fingerprint import SAMPLE, _fingerprint, component_fingerprints
from clora.models.loading import load_pipeline
from clora.testing import tiny_pipeline


@pytest.fixture
def pipeline():
    return tiny_pipeline()


def differing(first, second):
    return {name for name in first if first[name] != second[name]}


def test_the_same_model_from_another_folder(tiny_folder, tmp_path):
    found = component_fingerprints(load_pipeline(str(tiny_folder), "cpu"))
    assert set(found) == {"scheduler", "vae", "text_encoder", "tokenizer", "transformer", "pipeline"}
    shutil.copytree(tiny_folder, tmp_path / "copy")
    copy = load_pipeline(str(tmp_path / "copy"), "cpu")
    copy.encode_prompt("a prompt", max_sequence_length=40)  # fast tokenizers save how they were last called
    assert component_fingerprints(copy) == found


@torch.no_grad()
def change_a_weight(pipeline):
    pipeline.transformer.proj_out.weight[3, 5] += 1e-3


@torch.no_grad()
def train_a_large_weight(pipeline):
    weight = pipeline.text_encoder.get_input_embeddings().weight = torch.nn.Parameter(torch.zeros(10 * SAMPLE, 8))
    weight += 1e-3


def change_a_buffer(pipeline):
    pipeline.vae.bn.running_mean[0] += 1


def change_a_setting(pipeline):
    pipeline.register_modules(scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift=5.0))


def change_a_template(pipeline):
    pipeline.tokenizer.chat_template += " "


def add_a_token(pipeline):
    pipeline.tokenizer.add_tokens(["<new>"])


def halve(pipeline):
    pipeline.transformer.to(torch.bfloat16)


def distil(pipeline):
    pipeline.register_to_config(is_distilled=True)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (change_a_weight, "transformer"),
        (train_a_large_weight, "text_encoder"),
        (change_a_buffer, "vae"),
        (change_a_setting, "scheduler"),
        (change_a_template, "tokenizer"),
        (add_a_token, "tokenizer"),
        (halve, "transformer"),
        (distil, "pipeline"),
    ],
)
def test_a_change_is_seen_where_it_is(pipeline, change, part):
    before = component_fingerprints(pipeline)
    change(pipeline)
    assert differing(before, component_fingerprints(pipeline)) == {part}


def test_a_processor_counts_by_its_parts_and_settings(pipeline):
    tokenizer, found = pipeline.tokenizer, []
    for template, changed in (("a", False), ("a", False), ("b", False), ("a", True)):
        if changed:
            tokenizer.add_tokens(["<new>"])
        processor = SimpleNamespace(tokenizer=tokenizer, chat_template=template, video_processor=None)
        found.append(_fingerprint(processor))
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_quantised_weights_count_by_what_they_consist_of(pipeline):
    """As torchao's: a tensor of a class of its own, made of plain ones."""

    class Scaled(torch.Tensor):
        @staticmethod
        def __new__(cls, values, scale):
            return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

        def __init__(self, values, scale):
            self.values, self.scale = values, scale

        def __tensor_flatten__(self):
            return ["values", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
            if function is torch.ops.aten.detach.default:
                return arguments[0]
            raise NotImplementedError(function)

    values, found = torch.randint(-8, 8, (16, 16), dtype=torch.int8), []
    for scale in (1.0, 1.0, 2.0):
        weight = Scaled(values, torch.tensor(scale))
        pipeline.transformer.proj_out.weight = torch.nn.Parameter(weight, requires_grad=False)
        found.append(component_fingerprints(pipeline)["transformer"])
    assert found[0] == found[1] != found[2]


def test_no_folder_for_temporary_files_is_one_clear_error(monkeypatch):
    """On a full disk Python finds none, and raises an error of its own whenever it is asked for one."""

    def full():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    pipeline = tiny_pipeline()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", full)
    with pytest.raises(CloraError, match="cannot be saved in any folder .* set TMPDIR to another folder"):
        component_fingerprints(pipeline)
