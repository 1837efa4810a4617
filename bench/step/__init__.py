"""One whole distillation update, clora's way and the ways of others: `python -m bench.step`."""
