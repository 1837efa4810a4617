"""The studio's words: a byte-level BPE tokenizer with a chat template, and a tiny Qwen3 text encoder.

The text encoder is trained first (``clora.studio.making.text_training``) and frozen from then on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from clora.studio.edits import FAMILIES, sample_edit
from clora.studio.effects import EFFECTS
from clora.studio.scenes import make_scene

MAX_SEQUENCE_LENGTH = 64
VOCABULARY = 1000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompt_corpus(seed: int = 0, edits_per_family: int = 60) -> list[str]:
    """Sentences the tokenizer is trained on: general instructions, effect prompts and their descriptions."""
    rng = np.random.default_rng([seed, 2])
    edits = [
        sample_edit(make_scene(i), rng, family).instruction for family in FAMILIES for i in range(edits_per_family)
    ]
    return edits + [t for e in EFFECTS.values() for t in (e.prompt, e.description, f"{e.prompt}. {e.description}")]


def train_tokenizer(corpus: Iterable[str]):
    """A ``Qwen2TokenizerFast`` of about 1000 byte-level BPE tokens with a chat template.

    transformers 5 builds it from ``vocab=`` and ``merges=``; ``vocab_file=`` gives an empty tokenizer there.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCABULARY - len(SPECIAL)
    raw.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(raw.to_str())["model"]
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


def make_text_encoder(vocabulary: int):
    """An untrained ``Qwen3ForCausalLM`` of 28 layers x 32: the pipeline taps its layers 9, 18 and 27 (3 x 32 channels).

    Token embeddings have unit scale, attention is strong and the rest is weak: every token keeps what it is, and the
    padding that fills most of the 64 positions carries the words before it. With equal scales, 28 random layers bury
    the tokens.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=MAX_SEQUENCE_LENGTH,
            initializer_range=0.05,
            tie_word_embeddings=True,
        )
    )
    torch.nn.init.normal_(encoder.model.embed_tokens.weight)
    for layer in encoder.model.layers:
        for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj):
            torch.nn.init.normal_(projection.weight, std=0.14)
    return encoder
