"""A Z-Image LoRA that has the fused attention.qkv and, beside it, to_q, to_k, to_v (and attention.out with to_out.0).

Report: huggingface/diffusers #13203. ComfyUI applies every entry, so the change of a layer is the sum.
Right: the sum of both, or a refusal that names the two entries; `clora inspect` reports what loading does.
"""

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

import clora
from clora.errors import CloraError

torch.manual_seed(0)
model = ZImageTransformer2DModel(
    dim=16,
    n_layers=1,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=12,
    siglip_feat_dim=10,
    axes_dims=[2, 2, 4],
    axes_lens=[8, 8, 8],
)
tensors, want = {}, {}
for n in ("to_q", "to_k", "to_v"):
    a, b = torch.randn(4, 16), torch.randn(16, 4)
    stem = f"lora_unet_layers_0_attention_{n}"
    tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(2.0)}
    want[f"layers.0.attention.{n}"] = 0.5 * b @ a
a, b = torch.randn(4, 16), torch.randn(48, 4)
stem = "lora_unet_layers_0_attention_qkv"
tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(2.0)}
for i, n in enumerate(("to_q", "to_k", "to_v")):
    want[f"layers.0.attention.{n}"] += (0.5 * b @ a)[16 * i : 16 * i + 16]
for n in ("to_out_0", "out"):
    a, b = torch.randn(4, 16), torch.randn(16, 4)
    stem = f"lora_unet_layers_0_attention_{n}"
    tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(2.0)}
    want["layers.0.attention.to_out.0"] = want.get("layers.0.attention.to_out.0", 0) + 0.5 * b @ a
file = Path(tempfile.mkdtemp()) / "z.safetensors"
save_file(tensors, file)
info = clora.inspect(file, model)
print("inspect problems:", info["problems"])
try:
    state = clora.load_lora(file, model)
except CloraError as error:
    print("refused:", error)
    sys.exit(not ("second time" in str(error) and info["problems"]))
worst = max(((state.modules[n].delta() - d).norm() / d.norm()).item() for n, d in want.items())
print("worst", worst)
sys.exit(worst > 1e-5)
