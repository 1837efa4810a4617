"""Model adapters, one per pipeline family, behind one protocol: all that the engine asks of a family.

An adapter is chosen by the class of the loaded pipeline (`adapter_for`); `register` adds one for another class. It uses
the pipeline's own methods throughout, so that a stock call of the pipeline computes what the engine computes.
"""

from clora.models.protocol import ModelAdapter
from clora.models.registry import adapter_for, register

__all__ = ["ModelAdapter", "adapter_for", "register"]
