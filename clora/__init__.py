"""clora: many effect LoRAs and few-step sampling in one LoRA."""
