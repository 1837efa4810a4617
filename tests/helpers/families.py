"""The three families at tiny sizes: pipelines of a random transformer alone, and an input that it takes."""

from __future__ import annotations

import torch

FAMILIES = ("Flux2KleinPipeline", "QwenImageEditPlusPipeline", "FluxKontextPipeline")
_COMPONENTS = {
    "Flux2KleinPipeline": ("vae", "text_encoder", "tokenizer"),
    "QwenImageEditPlusPipeline": ("vae", "text_encoder", "tokenizer", "processor"),
    "FluxKontextPipeline": ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
}


def bare_pipeline(family):
    """A stock pipeline of this class whose only component, beside a scheduler, is the transformer."""
    import diffusers

    return getattr(diffusers, family)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=tiny_transformer(family),
        **dict.fromkeys(_COMPONENTS[family]),
    )


def tiny_transformer(family):
    """Of one block of each kind, with the same random weights at every call."""
    from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}
    if family == "QwenImageEditPlusPipeline":
        model = QwenImageTransformer2DModel(in_channels=16, out_channels=4, axes_dims_rope=(8, 4, 4), **sizes)
    elif family == "FluxKontextPipeline":
        flux = {"in_channels": 16, "num_single_layers": 1, "pooled_projection_dim": 12, "axes_dims_rope": (8, 4, 4)}
        model = FluxTransformer2DModel(guidance_embeds=True, **flux, **sizes)
    else:
        flux = {"in_channels": 16, "num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4)}
        model = Flux2Transformer2DModel(timestep_guidance_channels=8, guidance_embeds=False, **flux, **sizes)
    return model.eval().requires_grad_(False)


def run(family, transformer):
    """The transformer's output on a fixed input of four tokens and three of text."""
    with torch.no_grad():
        return transformer(**inputs_of(family), return_dict=False)[0]


def inputs_of(family, samples=1, device="cpu"):
    """The arguments of a pass: fixed random samples of four tokens and three of text."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(samples, *shape, generator=generator).to(device)  # noqa: E731
    levels = torch.linspace(0.5, 0.9, samples, device=device)
    inputs = {"hidden_states": draw(4, 16), "encoder_hidden_states": draw(3, 24), "timestep": levels}
    if family == "QwenImageEditPlusPipeline":
        mask = torch.ones(samples, 3, dtype=torch.long, device=device)
        return inputs | {"img_shapes": [[(1, 2, 2)]] * samples, "encoder_hidden_states_mask": mask}
    axes = 3 if family == "FluxKontextPipeline" else 4
    grid = torch.nn.functional.pad(torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0)), (1, axes - 3))
    inputs |= {"img_ids": grid.to(device), "txt_ids": torch.zeros(3, axes, device=device), "guidance": None}
    if family == "FluxKontextPipeline":
        inputs |= {"guidance": torch.ones(samples, device=device), "pooled_projections": draw(12)}
    return inputs
