"""A FLUX.2 [klein] LoRA as one file in PEFT's prefix with the original repository's names and no adapter config.

Reports: huggingface/diffusers #13162 and sgl-project/sglang #20200 (a published klein LoRA loaded on no layer).
diffusers and sglang take alpha = rank. Right: that change, or a refusal that states how to go on, and that way works
whatever the name of the file; `clora inspect` does not call the file useless.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import clora
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.testing import tiny_pipeline

model = tiny_pipeline().transformer
shapes = linear_shapes(model)
torch.manual_seed(0)
width = shapes["transformer_blocks.0.attn.to_q"][0]
a, b = torch.randn(4, width), torch.randn(3 * width, 4)
a1, b1 = (
    torch.randn(4, shapes["single_transformer_blocks.0.attn.to_qkv_mlp_proj"][1]),
    torch.randn(shapes["single_transformer_blocks.0.attn.to_qkv_mlp_proj"][0], 4),
)
folder = Path(tempfile.mkdtemp())
file = folder / "spritesheet.safetensors"
save_file(
    {
        "base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight": a,
        "base_model.model.double_blocks.0.img_attn.qkv.lora_B.weight": b,
        "base_model.model.single_blocks.0.linear1.lora_A.weight": a1,
        "base_model.model.single_blocks.0.linear1.lora_B.weight": b1,
    },
    file,
)
want = {f"transformer_blocks.0.attn.to_{n}": (b @ a)[i * width : (i + 1) * width] for i, n in enumerate("qkv")}
want["single_transformer_blocks.0.attn.to_qkv_mlp_proj"] = b1 @ a1


def compare():
    state = clora.load_lora(file, model)
    worst = max(((state.modules[n].delta() - d).norm() / d.norm()).item() for n, d in want.items())
    print("worst", worst)
    return worst > 1e-5 or set(state.modules) != set(want)


try:
    sys.exit(compare())
except CloraError as error:
    print("refused:", error)
(folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
wrong = compare()
print("problems by inspect:", clora.inspect(file, model)["problems"])
sys.exit(wrong)
