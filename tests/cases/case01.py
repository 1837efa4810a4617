"""Several pictures per prompt: diffusers orders rows A,A,B,B; a per-prompt adapter list must follow that order.

Report: vllm-project/vllm-omni #7766 and huggingface/diffusers #12306 (rows of another request's conditioning).
Right: with names ["a", "b"] and num_images_per_prompt=2 pictures 0, 1 are made by a and 2, 3 by b; or a refusal.
"""

import sys

import numpy as np
import torch
from PIL import Image

import clora
from clora.errors import CloraError
from clora.testing import MAX_SEQUENCE_LENGTH, random_lora, tiny_pipeline

pipe = tiny_pipeline(is_distilled=True)
loras = {"a": random_lora(pipe.transformer, 4, 1), "b": random_lora(pipe.transformer, 4, 2)}
image = Image.fromarray((np.random.default_rng(3).random((64, 64, 3)) * 255).astype("uint8"))


def call(prompts, per_prompt, latents):
    return pipe(
        image=image,
        prompt=prompts,
        num_images_per_prompt=per_prompt,
        num_inference_steps=2,
        height=64,
        width=64,
        latents=latents,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        output_type="pt",
    ).images


bank = clora.attach(pipe.transformer, loras)
shape = None
with bank.route(["a"]):
    torch.manual_seed(0)
    probe = pipe.prepare_latents(1, 4, 64, 64, torch.float32, torch.device("cpu"), None)[0]
generator = torch.Generator().manual_seed(5)
tokens = probe.shape[1:]
side = int(tokens[0] ** 0.5)
latents = torch.randn(4, tokens[1], side, side, generator=generator)
prompts = ["turn it into snow", "draw it in ink"]
expected = []
for row, (name, prompt) in enumerate([("a", prompts[0]), ("a", prompts[0]), ("b", prompts[1]), ("b", prompts[1])]):
    with bank.route([name]):
        expected.append(call([prompt], 1, latents[row : row + 1])[0])
try:
    with bank.route(["a", "b"]):
        found = call(prompts, 2, latents)
except CloraError as error:
    print("refused:", error)
    sys.exit(0)
errors = [(f - e).abs().max().item() for f, e in zip(found, expected)]
print("largest difference of each picture from its own call:", [f"{e:.4f}" for e in errors])
sys.exit(any(e > 1e-3 for e in errors))
