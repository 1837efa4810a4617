"""The model card: the README.md of a collection's folder, which the Hub shows."""

from __future__ import annotations

import re

from clora.collection.apply import call_arguments, pipeline_class
from clora.collection.hub import is_repo_id
from clora.collection.metadata import LORA_FILE, SAMPLES_FILE, Collection
from clora.lora.families import QWEN_IMAGE21, family_of_pipeline

CARD_MARK = "Distilled with clora"  # in every model card
# Licences that the Hub knows by these names; it takes any other as "other" with a name.
_HUB_LICENSE = re.compile(
    r"apache-2\.0|mit|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-4\.0|openrail(\+\+)?|creativeml-openrail-m|[al]?gpl-3\.0|bsd-3-clause"
)


def model_card(collection: Collection, hub_id: str | None = None, has_samples: bool = False) -> str:
    """Renders the card: samples, calls for diffusers and ComfyUI, effects, prompts, licences and metrics.

    Args:
        collection: the description.
        hub_id: where the collection will be on the Hub; None for a local folder.
        has_samples: True if the folder has `SAMPLES_FILE`.

    Raises:
        CloraError: the installed diffusers has no such pipeline.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("clora"), keep_trailing_newline=True, trim_blocks=True)
    environment.filters["plain"] = _plain
    environment.filters["code"] = _code
    environment.filters["repr"] = repr
    return environment.get_template("model_card.md.j2").render(
        collection=collection,
        front_matter=_front_matter(collection, hub_id, has_samples),
        mark=CARD_MARK,
        location=hub_id or "path/to/this/folder",
        loads_lora_weights=hasattr(pipeline_class(collection), "load_lora_weights"),
        file=LORA_FILE,
        samples=SAMPLES_FILE if has_samples else None,
        comfyui_takes_the_file=_comfyui_takes_the_file(collection),
        is_on_hub=is_repo_id(collection.base_model),
        call={"prompt": collection.effects[0].prompts[0], **call_arguments(collection)},
        metrics=_metric_rows(collection),
    )


def _comfyui_takes_the_file(collection: Collection) -> bool:
    """Returns False where ComfyUI may not know a layer of the file by diffusers' names."""
    family = family_of_pipeline(collection.pipeline)
    # By default a student has layers of the blocks only, of which one family's are unknown to it.
    only_blocks = not collection.provenance.get("student", {}).get("targets")
    all_known = family is None or not family.unknown_to_comfyui or (only_blocks and "Omni" not in collection.pipeline)
    # Its fused MLP is known by ComfyUI's own name in every version that has the model.
    return all_known and family is not QWEN_IMAGE21


def _plain(text: str) -> str:
    """Escapes text from files, so that Markdown and HTML in it are shown and do nothing; one line."""
    return re.sub(r"([\\`*_\[\]<>|&~#!])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Returns one line of code, which may hold backticks itself."""
    text = " ".join(text.split())
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def _front_matter(collection: Collection, hub_id: str | None, has_samples: bool) -> str:
    """Returns the fields that the Hub reads, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    # The Hub refuses a base model without an owner.
    base = {"base_model": collection.base_model, "base_model_relation": "adapter"}
    prompts = [effect.prompts[0] for effect in collection.effects]
    output = {"output": {"url": SAMPLES_FILE}} if has_samples else {}
    results = [
        EvalResult(
            task_type="image-to-image",
            dataset_type="held-out",
            dataset_name="held-out pictures",
            metric_type=name,
            metric_value=value,
        )
        for name, value in _metric_rows(collection)
    ]
    fields = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["diffusers", "lora", "template:sd-lora", "image-to-image", "image-editing", "clora"],
        instance_prompt=prompts[0],
        widget=[{"text": prompt, **output} for prompt in prompts],
        model_name=hub_id or "clora collection",
        eval_results=results or None,
        **(base if is_repo_id(collection.base_model) else {}),
        **_common_license(collection),
    )
    return fields.to_yaml()


def _common_license(collection: Collection) -> dict[str, str]:
    """Returns the fields of the teachers' licence; none unless all teachers share it."""
    found = {(effect.license or "").strip().lower() for effect in collection.effects}
    name = found.pop() if len(found) == 1 else ""
    if not name:
        return {}
    if _HUB_LICENSE.fullmatch(name):
        return {"license": name}
    slug = re.sub(r"[^a-z0-9.-]+", "-", name).strip("-")
    return {"license": "other", **({"license_name": slug} if slug else {})}


def _metric_rows(collection: Collection) -> list[tuple[str, float]]:
    """Returns a row for each value; values by effect are named ``metric, effect``."""
    rows: list[tuple[str, float]] = []
    for name, value in collection.metrics.items():
        rows += [(f"{name}, {of}", x) for of, x in value.items()] if isinstance(value, dict) else [(name, value)]
    return rows
