"""Strength by the pipeline's own argument (attention_kwargs scale), with a collection and with attached LoRAs.

Report: huggingface/diffusers #9525 (lora_scale has no effect). Right: W + s B A; where that cannot be, it is refused, not
ignored in silence.
"""

import copy
import sys

import numpy as np
import torch
from PIL import Image

import clora
from clora.errors import CloraError
from clora.lora.state import LoRAModule, LoRAState
from clora.testing import MAX_SEQUENCE_LENGTH, merge_lora, random_lora, tiny_pipeline

pipe = tiny_pipeline(is_distilled=True)
plain = copy.deepcopy(pipe.transformer)
lora = random_lora(plain, 4, 1)
image = Image.fromarray((np.random.default_rng(3).random((64, 64, 3)) * 255).astype("uint8"))


def picture(**more):
    torch.manual_seed(0)
    return pipe(
        image=image,
        prompt="make it snow",
        num_inference_steps=2,
        height=64,
        width=64,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        output_type="pt",
        **more,
    ).images


pipe.transformer = merge_lora(
    plain, LoRAState({n: LoRAModule(m.lora_A, m.lora_B * 0.5) for n, m in lora.modules.items()})
)
want = picture()
pipe.transformer = merge_lora(plain, lora)
full = picture()
pipe.transformer = copy.deepcopy(plain)
bank = clora.attach(pipe.transformer, {"a": lora})
try:
    with bank.route(["a"]):
        got = picture(attention_kwargs={"scale": 0.5})
except (CloraError, ValueError) as error:
    print("refused:", error)
    sys.exit(0)
print(
    "scale 0.5 with attach: off from half strength by",
    (got - want).abs().max().item(),
    ", from full strength by",
    (got - full).abs().max().item(),
)
sys.exit((got - want).abs().max().item() > 1e-4)
