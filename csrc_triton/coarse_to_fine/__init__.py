"""Coarse-to-fine distillation loss: distribution matching (BS, TS) and trajectory anchoring (TA-FM)."""
