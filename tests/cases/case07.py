"""A transformer whose q, k, v projections were fused (a speed-up of diffusers, also left behind by loading a fused LoKr).

Reports: huggingface/diffusers #11903 and pull #14047 (the split layers stay but are not called: LoRAs on them do nothing).
Right: clora.attach (and clora.apply) either give the same output as on the unfused transformer or refuse; silence is wrong.
"""

import copy
import sys

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel

import clora
from clora.errors import CloraError
from clora.testing import random_lora

common = dict(num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, in_channels=16)
torch.manual_seed(0)
MODELS = {
    "FLUX.2": Flux2Transformer2DModel(
        num_single_layers=1, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=8, guidance_embeds=False, **common
    ),
    "FLUX.1": FluxTransformer2DModel(
        num_single_layers=1, axes_dims_rope=(8, 4, 4), pooled_projection_dim=12, guidance_embeds=True, **common
    ),
    "Qwen-Image": QwenImageTransformer2DModel(out_channels=4, axes_dims_rope=(8, 4, 4), **common),
}


def run(name, model):
    g = torch.Generator().manual_seed(1)
    x = {
        "hidden_states": torch.randn(1, 4, 16, generator=g),
        "encoder_hidden_states": torch.randn(1, 3, 24, generator=g),
        "timestep": torch.tensor([0.7]),
    }
    if name == "Qwen-Image":
        x |= {"img_shapes": [[(1, 2, 2)]], "encoder_hidden_states_mask": torch.ones(1, 3, dtype=torch.long)}
    else:
        axes = 3 if name == "FLUX.1" else 4
        grid = torch.nn.functional.pad(torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0)), (1, axes - 3))
        x |= {"img_ids": grid, "txt_ids": torch.zeros(3, axes), "guidance": None}
        if name == "FLUX.1":
            x |= {"guidance": torch.ones(1), "pooled_projections": torch.randn(1, 12, generator=g)}
    with torch.no_grad():
        return model(**x, return_dict=False)[0]


bad = 0
for name, model in MODELS.items():
    model.eval()
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
        and n.startswith("transformer_blocks")
        and n.rsplit(".", 1)[1] in ("to_q", "to_k", "to_v", "add_q_proj")
    ]
    lora = random_lora(model, 4, 1, names)
    base = run(name, model)
    bank = clora.attach(copy.deepcopy(model), {"a": lora})
    with bank.route(["a"]):
        want = run(name, bank._bank.transformer)
    fused = copy.deepcopy(model)
    fused.fuse_qkv_projections()
    still = (run(name, fused) - base).abs().max().item()
    try:
        bank = clora.attach(fused, {"a": lora})
        with bank.route(["a"]):
            got = run(name, fused)
    except CloraError as error:
        print(name, "refused:", error)
        continue
    effect, error = (want - base).abs().max().item(), (got - want).abs().max().item()
    print(
        f"{name}: fused base differs by {still:.1e}; LoRA moves the output by {effect:.3f}, attach on fused is off by {error:.3f}"
    )
    bad |= error > 1e-3
sys.exit(bad)
