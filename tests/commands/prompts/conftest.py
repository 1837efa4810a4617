"""Language models of the real classes at tiny sizes, with random weights, which answer nothing of use."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from clora.testing import SENTENCES

CHAT = (
    "{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n"
    "{{% for c in m['content'] %}}{{% if c['type'] == 'image' %}}{image}{{% else %}}{{{{ c['text'] }}}}\n{{% endif %}}"
    "{{% endfor %}}<|im_end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


@pytest.fixture(scope="session")
def qwen_pipeline():
    """A tiny Qwen-Image-Edit-2509, whose text encoder is a Qwen2.5-VL, with a chat template for pictures."""
    from helpers.tiny_qwen_image import tiny_qwen_pipeline

    pipeline = tiny_qwen_pipeline()
    pipeline.processor.chat_template = CHAT.format(image="<|vision_start|><|image_pad|><|vision_end|>")
    return pipeline


@pytest.fixture
def qwen_vl(qwen_pipeline):
    """Its language model and processor."""
    return qwen_pipeline.text_encoder, qwen_pipeline.processor


@pytest.fixture(scope="session")
def vision_model_folder(tmp_path_factory):
    """A saved tiny LLaVA, as a user's own vision-language model."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from clora.studio.text import train_tokenizer

    folder = tmp_path_factory.mktemp("vlm") / "tiny-llava"
    tokenizer = train_tokenizer(SENTENCES)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.model_max_length = 10_000
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.format(image="<image>"),
    ).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), "num_key_value_heads": 2, **small},
            vision_config={"model_type": "clip_vision_model", **small, "patch_size": 8, "image_size": 16},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def short_answers(monkeypatch):
    """Answers of at most 6 tokens."""
    monkeypatch.setattr("clora.commands.prompts.writers.MAX_TOKENS", 6)


@pytest.fixture
def pair():
    """Pictures before and after an effect."""
    return Image.new("RGB", (24, 16), "red"), Image.new("RGB", (24, 16), "blue")
