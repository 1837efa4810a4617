"""``clora plan``: the needs of a distillation, and everything wrong with its input, before anything heavy is loaded.

`cost` counts one pass of the transformer, which runs once on fake tensors, and measures the device. `needs` derives rows,
passes, memory and disk of a run from it by arithmetic. `make_plan` joins both with the checks of the input.
"""

from clora.commands.plan.make import make_plan, render

__all__ = ["make_plan", "render"]
