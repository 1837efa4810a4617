"""How much triggers resemble one another, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from clora.prompting.write import EffectReport


def similarity_table(report: Sequence[EffectReport]) -> Table:
    """A row per effect: its trigger, who wrote its prompts, and what of other effects the trigger resembles most."""
    table = Table(title="similarity in the text encoder's space: cosine, 1 is the same, 0 like any two prompts")
    for column in ("effect", "trigger", "prompts by", "nearest trigger", "nearest prompt"):
        table.add_column(column, overflow="fold")  # a trigger that is cut cannot be typed
    for line in report:
        nearest = (line.similarity.trigger, line.similarity.prompt)
        cells = ("" if found is None else f"{found[0]:.2f} {found[1]}" for found in nearest)
        table.add_row(*map(Text, (line.name, line.trigger, line.written_by, *cells)))  # names are no markup
    return table
