"""A config with two effects, as text."""

TEXT = """
pipeline: base
output: out
effects:
  - {name: snow fall, lora: a.safetensors, prompt: make it snow}
  - {name: comic, lora: b, prompt: draw it, trigger: <c>, student_prompts: [<c> one, <c> two]}
data: {sources: photos, size: [64, 96], general_instructions: [brighten it]}
student: {rank: 8}
train: {updates: 10, learning_rate: 1e-3}
"""
