"""A LoRA that changes nothing: every lora_B is zero (a training that never ran, an optimizer that missed the layers).

Reports: kohya-ss/musubi-tuner #66, bmaltais/kohya_ss #809, tloen/alpaca-lora #357, kohya-ss/sd-scripts #2133.
Right: `clora inspect` reports that the LoRA changes nothing, `clora plan` (or distill) refuses or warns before hours of
rendering what the base would make without it. Also with alpha = 0, and where half of the modules are zero.
"""

import sys
import tempfile
from pathlib import Path

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import clora
from clora.lora.layers import linear_shapes
from clora.testing import tiny_pipeline

folder = Path(tempfile.mkdtemp())
pipe = tiny_pipeline()
pipe.save_pretrained(folder / "pipe")
shapes = linear_shapes(pipe.transformer)
names = [n for n in shapes if "attn.to_" in n]
torch.manual_seed(0)
zero_b = {
    f"transformer.{n}.lora_{s}.weight": (torch.randn(4, shapes[n][1]) if s == "A" else torch.zeros(shapes[n][0], 4))
    for n in names
    for s in "AB"
}
alpha0 = {}
for n in names:
    alpha0 |= {
        f"transformer.{n}.lora_A.weight": torch.randn(4, shapes[n][1]),
        f"transformer.{n}.lora_B.weight": torch.randn(shapes[n][0], 4),
        f"transformer.{n}.alpha": torch.tensor(0.0),
    }
save_file(zero_b, folder / "zero_b.safetensors")
save_file(alpha0, folder / "alpha0.safetensors")
bad = 0
for file in ("zero_b", "alpha0"):
    info = clora.inspect(folder / f"{file}.safetensors", pipe)
    said = info["problems"] + info["notes"]
    print(f"inspect {file}: scales {info['scales']}; problems and notes: {said}")
    bad |= not any(word in " ".join(said).lower() for word in ("zero", "nothing", "no effect", "no change"))
(folder / "images").mkdir()
for i in range(2):
    Image.new("RGB", (64, 64), (60 * i, 90, 30)).save(folder / "images" / f"{i}.png")
(folder / "c.yaml").write_text(
    yaml.safe_dump(
        {
            "pipeline": str(folder / "pipe"),
            "output": str(folder / "out"),
            "effects": [{"name": "zero", "lora": str(folder / "zero_b.safetensors"), "prompt": "make it a blueprint"}],
            "data": {
                "sources": str(folder / "images"),
                "size": [64, 64],
                "max_sequence_length": 60,
                "general_instructions": ["brighten the image"],
            },
            "student": {"rank": 4},
            "train": {"updates": 2, "batch_size": 2},
        }
    )
)
import subprocess  # noqa: E402

run = subprocess.run(
    [str(Path(sys.executable).with_name("clora")), "plan", str(folder / "c.yaml")], capture_output=True, text=True
)
code, text = run.returncode, run.stdout + run.stderr
if code:
    print(text[-600:])
said = any(word in text.lower() for word in ("changes nothing", "no effect", "is zero", "all zero"))
print("plan exit", code, "says so:", said)
bad |= not said
sys.exit(bad)
