"""The default LoRA targets are the linear layers of the blocks, in the order of the transformer's modules."""

from __future__ import annotations

import torch
from helpers import tiny_longcat

from clora import testing
from clora.lora.layers import block_layers


def test_names_and_order_where_blocks_are_called_transformer_blocks():
    for transformer in (testing.tiny_pipeline().transformer, tiny_longcat.tiny_pipeline().transformer):
        linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        names = block_layers(transformer)
        assert names == [name for name in linear if "transformer_blocks." in name]
        assert 0 < len(names) < len(linear)
