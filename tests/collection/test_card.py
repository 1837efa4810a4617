"""The model card: what people copy from it runs, and what the Hub reads is valid."""

from __future__ import annotations

import ast
import re

import pytest
import yaml
from helpers.collection_cases import describe, effect
from huggingface_hub import ModelCard

from clora.collection.card import model_card


def test_quotes_in_a_prompt_do_not_break_the_card():
    code = model_card(describe(effect(prompts=('say "a"',)))).split("```")[1].removeprefix("python")
    assert compile(code, "card", "exec")


def test_a_prompt_with_table_marks_stays_in_its_cell():
    local = model_card(describe(base_model="a local Flux2KleinPipeline (folder x)"))
    assert "effect LoRA for a local Flux2KleinPipeline (folder x)." in local
    assert 'from_pretrained("path/to/the/base/model", ' in local, "what is no hub id cannot be loaded"
    assert "from_pretrained('some/pipeline', " in model_card(describe())
    card = model_card(describe(effect("a|b", ("one | two\nthree",))))
    assert "| a\\|b | `one \\| two three` | a\\|b.safetensors `abababababab` | not stated in its file |" in card


def front_matter(described, **kwargs):
    return yaml.safe_load(model_card(described, **kwargs).split("---\n")[1])


HOSTILE = [
    "`</td><script>alert(1)</script>`",
    "x\n---\nlicense: mit\n---\n# Mine",
    "![a](https://x.test/y.png) | [b](javascript:c) <img src=x onerror=y>",
    "{{ 7 * 7 }} {% raw %} 'quote\" ``` \\ \u202e",
    ": - & *a !!python/object yes \t 1e5",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_files_is_shown_and_does_nothing(text):
    described = describe(effect(text, (text,), license=text), base_model=text, metrics={text: 1.0})
    card = model_card(described)
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])
    assert front["instance_prompt"] == front["widget"][0]["text"] == text
    assert front["license"] == "other"
    body = card.split("\n---\n")[-1]
    assert body.startswith("# 1 effect and 8-step sampling in one LoRA\n")
    assert not re.search(r"^#+ Mine", body, re.M)
    code = body.split("```python")[1].split("\n```\n")[0]
    assert {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)} >= {text}
    shown = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body.split("\n```\n")[1])
    assert not re.search(r"(?<!\\)<|(?<!\\)\[|(?<!\\)`", shown), shown


def test_evaluation_results_and_prompts_in_the_front_matter():
    described = describe(
        effect("a", ("make a",)), effect("b", ("make b",)), metrics={"accuracy": 0.5, "PSNR": {"a": 20.0}}
    )
    card = ModelCard(model_card(described, "me/x", has_samples=True))
    assert card.data.model_name == "me/x"
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("accuracy", 0.5), ("PSNR, a", 20.0)]
    assert card.data.widget[1] == {"text": "make b", "output": {"url": "samples.png"}}
    assert card.data.instance_prompt == "make a"


def test_what_the_hub_reads():
    front = front_matter(describe())
    assert front["base_model"] == "some/pipeline"
    assert {"lora", "template:sd-lora", "image-to-image"} <= set(front["tags"])
    assert "license" not in front
    assert "base_model" not in front_matter(describe(base_model="a folder")), "the Hub refuses what is no id"


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (("Apache-2.0", "apache-2.0"), {"license": "apache-2.0"}),
        (("apache-2.0", "mit"), {}),
        (("apache-2.0", None), {}),
        (("FLUX.1 [dev] Non-Commercial",) * 2, {"license": "other", "license_name": "flux.1-dev-non-commercial"}),
    ],
)
def test_the_card_states_a_licence_that_all_teachers_share(licenses, expected):
    effects = [effect(str(index), license=license) for index, license in enumerate(licenses)]
    front = front_matter(describe(*effects))
    assert {key: value for key, value in front.items() if key.startswith("license")} == expected


@pytest.mark.parametrize(
    ("pipeline", "call"),
    [
        ("Flux2KleinPipeline", {"guidance_scale": 1.0}),
        ("QwenImageEditPlusPipeline", {"true_cfg_scale": 1.0}),
        ("FluxKontextPipeline", {"guidance_scale": 2.5, "max_area": 4608}),
    ],
)
def test_the_card_calls_each_pipeline_by_its_own_names(pipeline, call):
    card = model_card(describe(pipeline=pipeline, call=call), hub_id="me/collection")
    code = card.split("```")[1].removeprefix("python")
    assert compile(code, "card", "exec")
    assert all(f"{name}={value}," in code for name, value in call.items())
    assert "pipe.load_lora_weights('me/collection')" in code
    assert ("guidance_scale" in code) == ("Flux" in pipeline)


@pytest.mark.parametrize(
    ("pipeline", "lightx2v", "diffsynth"),
    [
        ("Flux2KleinPipeline", True, "bare"),
        ("FluxKontextPipeline", False, "as it is"),
        ("LongCatImageEditPipeline", True, ""),
    ],
)
def test_the_card_names_only_files_of_the_table_of_programs(pipeline, lightx2v, diffsynth):
    """docs/models.md."""
    import diffusers

    if not hasattr(diffusers, pipeline):
        pytest.skip(f"this diffusers has no {pipeline}")
    (others,) = re.findall(r"^\*\*Others\*\*.*?\n\n", model_card(describe(pipeline=pipeline)), re.M | re.S)
    assert "`--format peft` for sglang" in others
    assert ("`--format bare` for LightX2V" in others) == lightx2v
    assert ("DiffSynth" in others) == bool(diffsynth)
    assert diffsynth in others


@pytest.mark.parametrize(
    ("pipeline", "targets", "as_it_is"),
    [
        ("Flux2KleinPipeline", None, True),
        ("Flux2KleinPipeline", ["modulation_img.linear"], False),
        ("QwenImageEditPlusPipeline", ["img_mod.1"], True),
        ("ZImageOmniPipeline", None, False),
        ("LongCatImageEditPipeline", None, True),
        ("QwenImage21Pipeline", None, False),
    ],
)
def test_the_card_names_the_file_that_comfyui_reads_whole(pipeline, targets, as_it_is):
    import diffusers

    if not hasattr(diffusers, pipeline):
        pytest.skip(f"this diffusers has no {pipeline}")
    call = {"true_cfg_scale": 1.0} if pipeline.startswith("Qwen") else None
    described = describe(pipeline=pipeline, call=call, provenance={"student": {"targets": targets}})
    assert ("--format comfyui" not in model_card(described)) == as_it_is
