"""A picture is edited under the same name between two runs.

Reports: bmaltais/kohya_ss #1629 (cached latents of the old picture are used), bghira/SimpleTuner #1172 and
hiyouga/LlamaFactory #7085 (resuming on other data).
Right: 1. a new run after a finished one encodes the new picture; 2. a stopped run that is started again reports that its
data changed (as it does where a LoRA changed), or starts anew; it does not go on in silence and then claim the new inputs.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

import clora
import clora.commands.distill as job
from clora.lora.save import save_lora
from clora.testing import random_lora, tiny_pipeline

folder = Path(tempfile.mkdtemp())
pipe = tiny_pipeline()
pipe.save_pretrained(folder / "pipe")
save_lora(random_lora(pipe.transformer, 2, 1), folder / "a.safetensors")
(folder / "images").mkdir()
(folder / "edits.txt").write_text("brighten the image\n")


def paint(seed):
    for i in range(2):
        pixels = np.random.default_rng(10 * seed + i).random((64, 64, 3)) * 255
        Image.fromarray(pixels.astype("uint8")).save(folder / "images" / f"{i}.png")


def config(output):
    file = folder / "c.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "pipeline": str(folder / "pipe"),
                "output": str(folder / output),
                "dtype": "float32",
                "device": "cpu",
                "effects": [{"name": "a", "lora": str(folder / "a.safetensors"), "prompt": "make it a blueprint"}],
                "data": {
                    "sources": str(folder / "images"),
                    "size": [16, 16],
                    "max_sequence_length": 60,
                    "general_instructions": str(folder / "edits.txt"),
                    "sources_per_effect": 2,
                    "cache": str(folder / "cache"),
                },
                "student": {"rank": 2},
                "sampler": {"teacher_steps": 2, "steps": 2},
                "objective": {"target_simulation": False},
                "train": {
                    "updates": 3,
                    "batch_size": 1,
                    "critic_ratio": 1,
                    "checkpoint_every": 1,
                    "learning_rate": 1e-2,
                },
            }
        )
    )
    return clora.load_config(file)


def weights(output):
    from safetensors.torch import load_file

    return load_file(folder / output / "pytorch_lora_weights.safetensors")


same = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)  # noqa: E731
bad = 0
paint(1)
job.distill(config("first"))
old = weights("first")
paint(2)
job.distill(config("first"))
print("1. finished run, pictures edited: trained again with them:", not same(old, weights("first")))
bad |= same(old, weights("first"))
new = weights("first")


def stopped(output):
    real = job.train_student

    def stopping(cfg, adapter, teachers, data, report, *rest):
        def noted(update, values):
            report(update, values)
            if update == 2:
                raise KeyboardInterrupt

        return real(cfg, adapter, teachers, data, noted, *rest)

    job.train_student = stopping
    try:
        job.distill(config(output))
    except KeyboardInterrupt:
        pass
    finally:
        job.train_student = real


for what in ("pictures",):
    paint(1)
    (folder / "edits.txt").write_text("brighten the image\n")
    pipe.save_pretrained(folder / "pipe")
    stopped(what)
    assert (folder / what / job.CHECKPOINT).exists()
    if what == "pictures":
        paint(2)
    try:
        job.distill(config(what))
        print(f"2. stopped run, {what} changed: went on in silence from the checkpoint: WRONG")
        bad = 1
        before = weights(what)
        updates = []
        real = job.train_student
        job.train_student = lambda *a, **k: updates.append(1) or real(*a, **k)
        job.distill(config(what))
        job.train_student = real
        print(
            f"   and the same command then says that nothing is to be done: {not updates and same(before, weights(what))}"
        )
    except clora.CloraError as error:
        print(f"2. stopped run, {what} changed: refused: {str(error)[-150:]}")
sys.exit(bad)
