"""A tiny real FLUX.2 transformer and random LoRAs for it."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from clora.lora.layers import linear_shapes
from clora.lora.state import LoRAModule, LoRAState


@pytest.fixture(scope="session")
def transformer():
    """A random Flux2Transformer2DModel of one block of each kind, without guidance as in klein."""
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        axes_dims_rope=(2, 2, 2, 2),
        num_attention_heads=2,
        joint_attention_dim=12,
        in_channels=16,
        timestep_guidance_channels=8,
        guidance_embeds=False,
    ).eval()


@pytest.fixture(scope="session")
def shapes(transformer):
    """Module path to (out, in) of the tiny transformer."""
    return linear_shapes(transformer)


@pytest.fixture(scope="session")
def random_state(shapes):
    """Returns make(seed, ranks, modules): a LoRA whose ranks cycle over its modules."""

    def make(seed=0, ranks=(4,), modules=None):
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for index, name in enumerate(shapes if modules is None else modules):
            (out, inner), rank = shapes[name], ranks[index % len(ranks)]
            lora_A = torch.randn(rank, inner, generator=generator) * 0.3
            made[name] = LoRAModule(lora_A, torch.randn(out, rank, generator=generator) * 0.3)
        return LoRAState(made)

    return make


@pytest.fixture(scope="session")
def run():
    """Returns run(model): its output on a fixed input."""

    def forward(model):
        generator = torch.Generator().manual_seed(1)
        ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(2.0), torch.arange(2.0), torch.arange(1.0))
        with torch.no_grad():
            return model(
                hidden_states=torch.randn(1, 4, 16, generator=generator),
                encoder_hidden_states=torch.randn(1, 3, 12, generator=generator),
                timestep=torch.tensor([0.5]),
                img_ids=ids[None],
                txt_ids=torch.zeros(1, 3, 4),
                guidance=None,
                return_dict=False,
            )[0]

    return forward


@pytest.fixture(scope="session")
def applied_output(transformer, run):
    """Returns output(state): the output with W + B A put straight into the weights."""

    def output(state):
        model = copy.deepcopy(transformer)
        with torch.no_grad():
            for name, module in state.modules.items():
                model.get_submodule(name).weight += module.delta()
        return run(model)

    return output


@pytest.fixture(scope="session")
def diffusers_output(transformer, run):
    """Returns output(path): the output after diffusers' own pipeline loader has read the file."""

    def output(path):
        model = copy.deepcopy(transformer)
        tensors, metadata = Flux2KleinPipeline.lora_state_dict(str(path), return_lora_metadata=True)
        Flux2KleinPipeline.load_lora_into_transformer(tensors, transformer=model, metadata=metadata)
        assert model.peft_config, "diffusers loaded nothing"
        return run(model)

    return output


@pytest.fixture(scope="session")
def assert_same_deltas():
    """Returns check(state, reference, atol): both change the same modules by the same amount."""

    def check(state, reference, atol=0.0):
        assert set(state.modules) == set(reference.modules)
        for name, module in state.modules.items():
            torch.testing.assert_close(module.delta(), reference.modules[name].delta(), rtol=atol, atol=atol, msg=name)

    return check
