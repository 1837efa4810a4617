"""The studio's pipeline: made of its parts, and saved."""

from __future__ import annotations

import json
from pathlib import Path

from clora.files import write_atomic


def make_pipeline(vae, text_encoder, tokenizer, transformer):
    """Makes the stock pipeline with a static time shift of 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def save_pipeline(pipeline, folder: Path) -> None:
    """Saves the pipeline with fp16 weights, which diffusers loads as fp32; transformers would keep fp16."""
    for component in (pipeline.transformer, pipeline.vae):
        component.half()
    # A call leaves its padding and truncation in the tokenizer.
    words = pipeline.tokenizer.backend_tokenizer
    words.no_padding()
    words.no_truncation()
    pipeline.save_pretrained(folder)
    # diffusers writes where the parts were loaded from, a path of this machine.
    for config in folder.rglob("*.json"):
        values = json.loads(config.read_text())
        if values.pop("_name_or_path", None) is not None:
            write_atomic(config, json.dumps(values, indent=2) + "\n")
