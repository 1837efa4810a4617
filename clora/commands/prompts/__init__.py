"""``clora prompts``: student prompts, triggers and general instructions, written to one editable file.

A language model writes them, and only what is usable of its answers is read (`writers`). Templates stand in for what it does
not answer (`wording`), triggers are chosen for resembling one another least (`triggers`), and `write_prompts` joins it all.
No outside service is needed. Source: docs/method.md sections 4 (b) and 8.
"""

from clora.commands.prompts.write import EffectReport, similarity_table, write_prompts

__all__ = ["EffectReport", "similarity_table", "write_prompts"]
