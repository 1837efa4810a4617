"""LoRA files: read every common format into one state, write it back, inspect and merge."""
