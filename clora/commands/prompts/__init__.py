"""Prompts without an outside service: student prompts, triggers and general instructions, written to one editable file.

A language model writes them (`writers`), its answers are read with suspicion (`answers`), templates stand in for what it
does not give (`wording`), triggers are chosen by how little they resemble one another (`triggers`), and `write_prompts`
does it all. Source: docs/method.md sections 4 (b) and 8.
"""

from clora.commands.prompts.write import EffectReport, similarity_table, write_prompts

__all__ = ["EffectReport", "similarity_table", "write_prompts"]
