"""A LoRA of transformer and text encoder in one file, with the changes of norms and biases that a trainer adds.

Reports: nunchux-ai/ComfyUI-nunchaku #64 (OneTrainer), kohya-ss/sd-scripts #1806 (lora_te1_).
Right: never read in silence; the message names what is foreign and a way on for which the user writes no script.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

import clora

torch.manual_seed(0)
model = FluxTransformer2DModel(
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=3,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    in_channels=16,
    axes_dims_rope=(2, 2, 4),
    guidance_embeds=True,
)
folder, bad = Path(tempfile.mkdtemp()), 0
stem = "lora_unet_double_blocks_0_img_attn_proj"
good = {
    f"{stem}.lora_down.weight": torch.randn(4, 24),
    f"{stem}.lora_up.weight": torch.randn(24, 4),
    f"{stem}.alpha": torch.tensor(4.0),
}
FOREIGN = {
    "kohya te1": {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(4, 8),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(8, 4),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(4.0),
    },
    "comfy t5": {
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.layer_norm.diff": torch.randn(8),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.diff_b": torch.randn(8),
    },
    "bundled embedding": {"bundle_emb.word.clip_l": torch.randn(2, 8)},
    "norm scale": {"diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": torch.randn(8)},
    "norm diff": {"diffusion_model.double_blocks.0.img_attn.norm.key_norm.diff": torch.randn(8)},
}
for label, extra in FOREIGN.items():
    file = folder / f"{label}.safetensors".replace(" ", "_")
    save_file(good | extra, file)
    try:
        clora.load_lora(file, model)
        print(f"{label}: taken in silence: WRONG")
        bad = 1
    except clora.CloraError as error:
        print(
            f"{label}: refused, names a key: {any(k in str(error) for k in extra)}; {str(error)[len(str(file)) + 2 :][:210]}"
        )
        bad |= not any(k in str(error) for k in extra)
    info = clora.inspect(file, model)
    said = bool(info["unsupported"] or info["unknown_keys"] or info["problems"] or info["unmatched"])
    print("   inspect tells:", said)
    bad |= not said
helps = subprocess.run(
    [str(Path(sys.executable).with_name("clora")), "export", "--help"], capture_output=True, text=True
).stdout
print(
    "a way on by a command (an option to leave keys out):",
    any(w in helps for w in ("--drop", "--skip", "--only", "--ignore", "transformer-only")),
)
sys.exit(bad)
