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
TEXT_MODEL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 1.0,  # else every request is answered alike
}


def tokenizer_with(*special):
    from clora.studio.text import train_tokenizer

    tokenizer = train_tokenizer(SENTENCES)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.model_max_length = 10_000
    return tokenizer


def text_model(tokenizer, **more):
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**TEXT_MODEL, **ids, "vocab_size": len(tokenizer), **more}


@pytest.fixture(scope="session")
def qwen_vl():
    """A tiny Qwen2.5-VL and its processor, as in Qwen-Image-Edit pipelines."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )

    class Processor(Qwen2VLProcessor):
        """Without its part for videos, which needs torchvision."""

        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    tokenizer = tokenizer_with(*names.values())
    processor = Processor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
        ),
        tokenizer=tokenizer,
        chat_template=CHAT.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text_model(tokenizer, rope_parameters=rope),
            vision_config=vision,
            **{key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()},
        )
    )
    return model.eval(), processor


@pytest.fixture(scope="session")
def vision_model_folder(tmp_path_factory):
    """A saved tiny LLaVA, as a user's own vision-language model."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    folder = tmp_path_factory.mktemp("vlm") / "tiny-llava"
    tokenizer = tokenizer_with("<image>")
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.format(image="<image>"),
    ).save_pretrained(folder)
    torch.manual_seed(0)
    vision = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text_model(tokenizer, model_type="qwen2"),
            vision_config={"model_type": "clip_vision_model", **vision, "patch_size": 8, "image_size": 16},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def short_answers(monkeypatch):
    """Answers of at most 6 tokens."""
    monkeypatch.setattr("clora.prompting.writers.MAX_TOKENS", 6)


@pytest.fixture
def pair():
    """Pictures before and after an effect."""
    return Image.new("RGB", (24, 16), "red"), Image.new("RGB", (24, 16), "blue")
