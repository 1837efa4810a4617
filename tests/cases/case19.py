"""A LoRA in two files: shards with an index, as transformers-style savers make them, or a download of half of a pair.

Reports: huggingface/diffusers on sharded adapter saving; adapter_model-00001-of-00002.safetensors beside its index.
Right: the folder is read as one LoRA, or refused as sharded. One shard by name is half of a LoRA: refused, or reported as half.
"""

import json
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
names = [n for n in shapes if "blocks" in n]
torch.manual_seed(0)
tensors = {
    f"base_model.model.{n}.lora_{s}.weight": torch.randn(*((4, shapes[n][1]) if s == "A" else (shapes[n][0], 4)))
    for n in names
    for s in "AB"
}
folder = Path(tempfile.mkdtemp())
half = len(names) // 2 * 2
keys = list(tensors)
shards = {
    "adapter_model-00001-of-00002.safetensors": keys[:half],
    "adapter_model-00002-of-00002.safetensors": keys[half:],
}
for file, part in shards.items():
    save_file({k: tensors[k] for k in part}, folder / file)
(folder / "adapter_model.safetensors.index.json").write_text(
    json.dumps({"metadata": {}, "weight_map": {k: f for f, part in shards.items() for k in part}})
)
(folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
bad = 0
for what in (folder, folder / next(iter(shards))):
    try:
        state = clora.load_lora(what, pipe)
        print(what.name, "loads", len(state.modules), "of", len(names), "modules")
        bad |= len(state.modules) != len(names)
    except clora.CloraError as error:
        told = any(w in str(error).lower() for w in ("shard", "parts", "index"))
        print(what.name, "refused:", str(error)[-170:], "| says it is sharded:", told)
        bad |= not told
sys.exit(bad)
