"""As case07, for a collection: clora.apply on a pipeline whose projections were fused."""

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
from clora.testing import MAX_SEQUENCE_LENGTH, random_lora, tiny_pipeline

pipe = tiny_pipeline(is_distilled=True)
plain = copy.deepcopy(pipe.transformer)
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
save_lora(random_lora(plain, 4, 1), folder / "pytorch_lora_weights.safetensors", metadata=to_metadata(about))
image = Image.fromarray((np.random.default_rng(3).random((64, 64, 3)) * 255).astype("uint8"))


def picture(effects):
    torch.manual_seed(0)
    return pipe(image=image, output_type="pt", **effects["snow"]).images


want = picture(clora.apply(pipe, folder))
bad = 0
for when in ("before", "after"):
    pipe.transformer = copy.deepcopy(plain)
    try:
        if when == "before":
            pipe.transformer.fuse_qkv_projections()
        effects = clora.apply(pipe, folder)
        if when == "after":
            pipe.transformer.fuse_qkv_projections()
    except CloraError as error:
        print(when, "refused", error)
        continue
    except Exception as error:
        print(when, "diffusers' own error:", type(error).__name__, str(error)[:120])
        continue
    error = (picture(effects) - want).abs().max().item()
    print(f"fused {when} apply: off by {error:.4f}")
    bad |= when == "before" and error > 1e-4
sys.exit(bad)
