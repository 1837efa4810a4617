"""A compiled transformer (torch.compile wraps it, its modules get the prefix _orig_mod.) and LoRA loading.

Report: huggingface/diffusers #5227 and its many successors. Right: clora.apply and clora.attach work on a compiled
transformer as on the plain one, or refuse with a message about compilation that states what to do.
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
from clora.lora.save import save_lora
from clora.testing import MAX_SEQUENCE_LENGTH, random_lora, tiny_pipeline

torch._dynamo.config.suppress_errors = False
pipe = tiny_pipeline(is_distilled=True)
plain = copy.deepcopy(pipe.transformer)
lora = random_lora(plain, 4, 1)
folder = Path(tempfile.mkdtemp())
about = Collection(
    version="0",
    pipeline="Flux2KleinPipeline",
    base_model="tiny",
    effects=(CollectedEffect(name="snow", prompts=("<s> snow",), teacher="t", teacher_sha256="0"),),
    sampling=Sampling(
        steps=2, shift=3.0, size=(64, 64), max_sequence_length=MAX_SEQUENCE_LENGTH, call={"guidance_scale": 1.0}
    ),
    scheduler=scheduler_config(3.0),
)
save_lora(lora, folder / "pytorch_lora_weights.safetensors", metadata=to_metadata(about))
image = Image.fromarray((np.random.default_rng(3).random((64, 64, 3)) * 255).astype("uint8"))


def picture(effects):
    torch.manual_seed(0)
    return pipe(image=image, output_type="pt", **effects["snow"]).images


bad = 0
want = picture(clora.apply(pipe, folder))
pipe.transformer = torch.compile(copy.deepcopy(plain), backend="eager")
try:
    got = picture(clora.apply(pipe, folder))
    print("apply on compiled: difference", (got - want).abs().max().item())
    bad |= (got - want).abs().max().item() > 1e-4
except Exception as error:
    print("apply on compiled:", type(error).__name__, str(error)[:400])
    bad |= "compile" not in str(error)
try:
    pipe.transformer = torch.compile(copy.deepcopy(plain), backend="eager")
    bank = clora.attach(pipe.transformer, {"snow": folder / "pytorch_lora_weights.safetensors"})
    with bank.route(["snow"]):
        got = picture(clora.load_collection(folder))
    print("attach on compiled: difference", (got - want).abs().max().item())
    bad |= (got - want).abs().max().item() > 1e-4
except Exception as error:
    print("attach on compiled:", type(error).__name__, str(error)[:400])
    bad |= "compile" not in str(error)
sys.exit(bad)
