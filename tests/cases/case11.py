"""A second collection in the same pipeline, a second one that fails, unloading and coming back, and adapter weights.

Reports: huggingface/diffusers #6524 (the second loading does nothing), #10392 and #5395 (which of two is active).
Right: after clora.apply(B) the pictures are those of a fresh pipeline with B, scheduler included; a failing apply leaves
pictures as they were; after unload_lora_weights they are the base's; weight 0.5 is W + B A / 2.
"""

import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import clora
from clora.collection.metadata import CollectedEffect, Collection, Sampling, to_metadata
from clora.collection.write import scheduler_config
from clora.errors import CloraError
from clora.lora.save import save_lora
from clora.lora.state import LoRAModule, LoRAState
from clora.testing import MAX_SEQUENCE_LENGTH, merge_lora, random_lora, tiny_pipeline

pipe = tiny_pipeline(is_distilled=True)
plain, own_scheduler = copy.deepcopy(pipe.transformer), pipe.scheduler
folder, bad = Path(tempfile.mkdtemp()), 0
image = Image.fromarray((np.random.default_rng(3).random((64, 64, 3)) * 255).astype("uint8"))


def collection(name, lora, shift):
    about = Collection(
        version="0",
        pipeline="Flux2KleinPipeline",
        base_model="tiny",
        effects=(CollectedEffect(name=name, prompts=(f"<s> {name}",), teacher="t", teacher_sha256="0"),),
        sampling=Sampling(
            steps=3, shift=shift, size=(64, 64), max_sequence_length=MAX_SEQUENCE_LENGTH, call={"guidance_scale": 1.0}
        ),
        scheduler=scheduler_config(shift),
    )
    save_lora(lora, folder / name / "pytorch_lora_weights.safetensors", metadata=to_metadata(about))
    return folder / name


blocks = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and "blocks" in n]
A = random_lora(plain, 4, 1, blocks[:6])
B = random_lora(plain, 8, 2, blocks[3:])
misfit = LoRAState({n: LoRAModule(torch.randn(4, m.lora_A.shape[1] + 1), m.lora_B) for n, m in A.modules.items()})
strange = LoRAState({**A.modules, "transformer_blocks.7.attn.to_q": A.modules[blocks[0]]})
a, b, c, d = (
    collection("a", A, 3.0),
    collection("b", B, 1.5),
    collection("c", misfit, 2.0),
    collection("d", strange, 2.0),
)


def picture(effects, name):
    torch.manual_seed(0)
    return pipe(image=image, output_type="pt", **effects[name]).images


def fresh(path, name):
    pipe.transformer, pipe.scheduler = copy.deepcopy(plain), own_scheduler
    return picture(clora.apply(pipe, path), name)


def check(label, got, want):
    global bad
    off = (got - want).abs().max().item()
    print(f"{label}: off by {off:.1e}{' WRONG' if off > 1e-5 else ''}")
    bad |= off > 1e-5


want_a, want_b = fresh(a, "a"), fresh(b, "b")
print("the two differ by", (want_a - want_b).abs().max().item())
pipe.transformer, pipe.scheduler = copy.deepcopy(plain), own_scheduler
torch.manual_seed(0)
call = {k: v for k, v in clora.load_collection(a)["a"].items()}
base = pipe(image=image, output_type="pt", **call).images
ea = clora.apply(pipe, a)
check("a, then", picture(ea, "a"), want_a)
eb = clora.apply(pipe, b)
check("b after a", picture(eb, "b"), want_b)
try:
    ea = clora.apply(pipe, a)
    check("a again", picture(ea, "a"), want_a)
except CloraError as error:
    bad = 1
    print("a again: WRONG, refused:", str(error)[:60], "...", str(error)[-130:])
    check("   b after that refusal", picture(eb, "b"), want_b)
pipe.transformer, pipe.scheduler = copy.deepcopy(plain), own_scheduler
ea = clora.apply(pipe, a)
for broken in (c, d):
    try:
        clora.apply(pipe, broken)
        print(broken.name, "was taken: WRONG")
        bad = 1
    except CloraError as error:
        print("refused:", str(error)[-90:])
    check(f"a after the failed {broken.name}", picture(ea, "a"), want_a)
    print("   adapters now:", list(pipe.transformer.peft_config), "active", pipe.get_active_adapters())
pipe.unload_lora_weights()
pipe.scheduler = own_scheduler
torch.manual_seed(0)
check("base after unload", pipe(image=image, output_type="pt", **call).images, base)
ea = clora.apply(pipe, a)
check("a after unload", picture(ea, "a"), want_a)
pipe.set_adapters(pipe.get_active_adapters(), 0.5)
half = LoRAState({n: LoRAModule(m.lora_A, m.lora_B * 0.5) for n, m in A.modules.items()})
got = picture(ea, "a")
pipe.transformer = merge_lora(plain, half)
check("weight 0.5", got, picture(ea, "a"))
pipe.transformer = copy.deepcopy(plain)
ea = clora.apply(pipe, a)
pipe.fuse_lora()
pipe.unload_lora_weights()
check("fused and unloaded", picture(ea, "a"), want_a)
sys.exit(bad)
