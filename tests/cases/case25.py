"""Spellings of whole files that are right for the model but for a prefix or an ending.

Reports: huggingface/diffusers #9803 (model.diffusion_model.), kohya-ss/sd-scripts #1463 and Comfy-Org/ComfyUI #4347 (an
underscore at the end of every module), huggingface/peft #2608 and radixark/miles_diffusion #206 (an adapter's name
inside the keys, other roots), torch.compile's _orig_mod. Right: read, or refused with a message that is about the spelling;
"a LoRA for another architecture" would mislead the user.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import clora
from clora.lora.layers import linear_shapes
from clora.testing import tiny_pipeline

pipe = tiny_pipeline()
shapes = linear_shapes(pipe.transformer)
names = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "single_transformer_blocks.0.attn.to_out",
]
torch.manual_seed(0)
pairs = {n: (torch.randn(4, shapes[n][1]), torch.randn(shapes[n][0], 4)) for n in names}
SPELLINGS = {
    "model.diffusion_model. + diffusers names": lambda n, s: f"model.diffusion_model.{n}.lora_{s}.weight",
    "underscore at the end": lambda n, s: (
        f"lora_unet_{n.replace('.', '_')}_.lora_{'down' if s == 'A' else 'up'}.weight"
    ),
    "adapter name default_0": lambda n, s: f"transformer.{n}.lora_{s}.default_0.weight",
    "adapter name of the user's": lambda n, s: f"transformer.{n}.lora_{s}.my_effect.weight",
    "compiled": lambda n, s: f"transformer._orig_mod.{n}.lora_{s}.weight",
    "module. of DDP": lambda n, s: f"module.{n}.lora_{s}.weight",
    "double transformer.": lambda n, s: f"transformer.transformer.{n}.lora_{s}.weight",
    "double underscore": lambda n, s: f"lora_unet__{n.replace('.', '_')}.lora_{'down' if s == 'A' else 'up'}.weight",
    "pipe.dit.": lambda n, s: f"pipe.dit.{n}.lora_{s}.default.weight",
    "1x1 convolutions": lambda n, s: f"diffusion_model.{n}.lora_{'down' if s == 'A' else 'up'}.weight",
}
folder, bad = Path(tempfile.mkdtemp()), 0
for label, spell in SPELLINGS.items():
    tensors = {spell(n, s): t.clone() for n, p in pairs.items() for s, t in zip("AB", p)}
    if label == "1x1 convolutions":
        tensors = {k: t[:, :, None, None].clone() for k, t in tensors.items()}
    file = folder / "x.safetensors"
    save_file(tensors, file)
    try:
        state = clora.load_lora(file, pipe)
        off = max((state.modules[n].delta() - b @ a).abs().max().item() for n, (a, b) in pairs.items())
        print(f"{label}: read, off by {off:.0e}")
        bad |= off > 1e-5
    except clora.CloraError as error:
        misled = "another architecture" in str(error)
        print(
            f"{label}: refused{' as ANOTHER ARCHITECTURE' if misled else ''}: {str(error)[len(str(file)) + 2 :][:150]}"
        )
        bad |= misled
sys.exit(bad)
