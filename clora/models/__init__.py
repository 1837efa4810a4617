"""Model adapters, one per pipeline family, behind one protocol: what the engine needs to know of a family.

An adapter is chosen by the class of the loaded pipeline (`adapter_for`); `register` adds one for another class. It uses
the pipeline's own methods throughout, so that a stock call of the pipeline gives what the engine gives.
"""

from clora.models.protocol import ModelAdapter
from clora.models.registry import adapter_for, register

__all__ = ["ModelAdapter", "adapter_for", "register"]
