"""The studio's words: a byte-level BPE tokenizer with a chat template, and a tiny Qwen3 text encoder.

The text encoder is trained first (``clora.studio.making.text_training``) and frozen from then on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from clora.studio.edits import FAMILIES, sample_edit
from clora.studio.effects import EFFECTS, Effect
from clora.studio.photographs import Photographs
from clora.studio.scenes import make_scene

MAX_SEQUENCE_LENGTH = 64
VOCABULARY = 1000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def effect_texts(effect: Effect) -> tuple[str, ...]:
    """Returns the sentences that ask for an effect."""
    return (effect.prompt, effect.description, f"{effect.prompt}. {effect.description}")


def prompt_corpus(edits_per_family: int = 60, photographs: Photographs | None = None) -> list[str]:
    """Draws the tokenizer's training sentences: general instructions, effect prompts and their descriptions."""
    rng = np.random.default_rng([0, 2])
    scenes = [make_scene(i, min_objects=1, photographs=photographs) for i in range(edits_per_family)]
    corpus = []
    for family in FAMILIES:
        corpus += [sample_edit(scene, rng, family, photographs=photographs).instruction for scene in scenes]
    for effect in EFFECTS.values():
        corpus += effect_texts(effect)
    return corpus


def train_tokenizer(corpus: Iterable[str]):
    """Trains a ``Qwen2TokenizerFast`` of about 1000 byte-level BPE tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    # The special tokens come on top, from transformers.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    model = json.loads(raw.to_str())["model"]
    # transformers 5 builds it from `vocab` and `merges`; `vocab_file` makes an empty tokenizer there.
    tokenizer = Qwen2TokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=list(SPECIAL),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = MAX_SEQUENCE_LENGTH
    return tokenizer


def random_text_encoder(vocabulary: int, width: int, initializer_range: float):
    """Makes a random ``Qwen3ForCausalLM`` of 28 layers: the pipeline taps layers 9, 18 and 27 (3 x ``width`` channels)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=width // 2,
            max_position_embeddings=MAX_SEQUENCE_LENGTH,
            initializer_range=initializer_range,
            tie_word_embeddings=True,
        )
    )


def make_text_encoder(vocabulary: int):
    """Makes the studio's text encoder before its training, 32 channels wide.

    Token embeddings have unit scale, attention is strong and the rest is weak: every token keeps what it is, and the
    padding that fills most of the 64 positions carries the words before it. With equal scales, 28 random layers bury
    the tokens.
    """
    import torch

    encoder = random_text_encoder(vocabulary, 32, initializer_range=0.05)
    torch.nn.init.normal_(encoder.model.embed_tokens.weight)
    for layer in encoder.model.layers:
        for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj):
            torch.nn.init.normal_(projection.weight, std=0.14)
    return encoder
