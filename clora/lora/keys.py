"""The names of tensors in LoRA files; no other module depends on them.

A key is ``<prefix><module>.<part>``. The prefix shows the format:

==============  =====================  ========================================================
format          prefix                 written by
==============  =====================  ========================================================
``diffusers``   ``transformer.``       diffusers; alpha in ``lora_adapter_metadata``
``peft``        ``base_model.model.``  PEFT; alpha in ``adapter_config.json``
``comfyui``     ``diffusion_model.``   ai-toolkit, ComfyUI; alpha = rank unless stated
``kohya``       ``lora_unet_``         sd-scripts, musubi-tuner; dots become underscores
``lycoris``     ``lycoris_``           SimpleTuner with LyCORIS; dots become underscores
``onetrainer``  ``lora_transformer_``  OneTrainer; dots become underscores
``bare``        none                   Lightning (``.alpha`` tensors), DiffSynth (``.default.``)
==============  =====================  ========================================================

Programs wrap models, and their names stand before or inside these prefixes: ``model.diffusion_model.``,
``transformer.transformer.``, ``module.``, ``_orig_mod.``. They say nothing about the layer and are taken away.

The part shows the adapter type (`clora.lora.adapters`), the module is found by `clora.lora.families`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

# PEFT's first: it decides how alpha is found, so that it counts wherever it stands among wrappers.
PREFIXES = {
    "base_model.model.": "peft",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
    "lora_unet_": "kohya",
    "lycoris_": "lycoris",
    "lora_transformer_": "onetrainer",
}
UNDERSCORED = frozenset({"kohya", "lycoris", "onetrainer"})
"""The formats whose module names have underscores for dots, so that only the model shows which modules they are."""

# Names of whole models, of the programs that hold them and of what wraps them (DataParallel, torch.compile); no family's
# layer begins with one of them.
_WRAPPER = r"(?:_orig_mod|base_model|diffusion_model|dit|model|module|pipe|transformer)\."
# The same in names with underscores for dots. A transformer is not taken away where its blocks' names begin with it.
_UNDERSCORED_WRAPPER = re.compile(
    r"_+|(?:orig_mod|base_model|diffusion_model|dit|model|module|transformer(?!_blocks))_+"
)

# The group that matches names the part; diffusers' and PEFT's names and kohya's are two spellings of lora_A and lora_B.
# ``itself`` holds the parts whose spelling is their name. A word between is PEFT's name of the adapter, mostly "default".
_KEY = re.compile(
    r"(?P<module>.+)\."
    r"(?:(?P<lora_A>(?:lora_A(?:\.[\w-]+)?|lora_down|lora\.down)\.weight)"
    r"|(?P<lora_B>(?:lora_B(?:\.[\w-]+)?|lora_up|lora\.up)\.weight)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.(?!weight$)[\w-]+)?(?:\.weight)?)"
    r"|(?P<itself>alpha|diff|lokr_w[12](?:_[ab])?|hada_w[12]_[ab]))"
)

_ADAPTER_NAME = re.compile(r".+\.lora_(?:A|B|magnitude_vector)\.(?!weight$)(?P<name>[\w-]+)(?:\.weight)?")

# Contents that no low-rank update of the transformer's weights can express, and the keys that show them.
_UNSUPPORTED = {
    "for the text encoder, and clora adapts only the transformer": re.compile(
        r"(lora_te\d?|lora_prior_te|text_encoders?(_\d)?)[._].+"
    ),
    "a change of a bias, and a low-rank update has none": re.compile(
        r".+\.(diff_b|b_norm|lora_(A|B|up|down)(\.\w+)?\.bias)"
    ),
    "a change of a norm's weight, which is not a matrix": re.compile(r".+\.w_norm"),
    "in Tucker form (a core tensor for convolutions)": re.compile(r".+\.(lokr_t[12]|hada_t[12]|lora_mid\.weight)"),
    "OFT or BOFT, which rotates the weights": re.compile(r".+\.(oft_\w+|boft_\w+)(\.weight)?"),
    "a replaced or reshaped weight": re.compile(r".+\.(set_weight|reshape_weight)"),
}


@dataclass(frozen=True)
class FileKeys:
    """The tensor names of a LoRA file, sorted out.

    Attributes:
        format: one of the formats above, or ``mixed``.
        modules: module name as in the file, prefix included, to its keys by part: ``lora_A``, ``lora_B``, ``alpha``,
            ``magnitude`` (DoRA's), ``diff``, ``lokr_w1``, ``lokr_w1_a``, ..., ``hada_w1_a``, ...
        unknown: keys that are not LoRA tensors.
        unsupported: contents that clora cannot read, to the keys that show them.
        twice: pairs of keys that spell the same part of the same module.
        adapters: PEFT's names of the adapters that the keys state, sorted; more than one are several LoRAs.
    """

    format: str
    modules: Mapping[str, Mapping[str, str]]
    unknown: tuple[str, ...]
    unsupported: Mapping[str, tuple[str, ...]]
    twice: tuple[tuple[str, str], ...]
    adapters: tuple[str, ...]


def sort_keys(keys: Iterable[str]) -> FileKeys:
    """Groups the tensor names of a file by module and names its format."""
    modules: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    unsupported: dict[str, tuple[str, ...]] = {}
    twice: list[tuple[str, str]] = []
    adapters: set[str] = set()
    # Sorted, so that the same file gives the same order of modules, whoever wrote it.
    for key in sorted(keys):
        reason = next((reason for reason, pattern in _UNSUPPORTED.items() if pattern.fullmatch(key)), None)
        if reason is not None:
            unsupported[reason] = (*unsupported.get(reason, ()), key)
        elif match := _KEY.fullmatch(key):
            part = match["itself"] or str(match.lastgroup)
            first = modules.setdefault(match["module"], {}).setdefault(part, key)
            if first != key:
                twice.append((first, key))
            if named := _ADAPTER_NAME.fullmatch(key):
                adapters.add(named["name"])
        else:
            unknown.append(key)
    # Only keys of modules show the format: foreign keys have prefixes of their own.
    formats = {split_prefix(stem)[0] for stem in modules}
    name = formats.pop() if len(formats) == 1 else "mixed"
    return FileKeys(name, modules, tuple(unknown), unsupported, tuple(twice), tuple(sorted(adapters)))


def split_prefix(stem: str) -> tuple[str, str]:
    """Splits a module name as in a file into (format, name without the format's prefix and without wrappers)."""
    return format_of(stem), list(_readings(stem))[-1]


def module_name(stem: str, layers: Container[str]) -> str:
    """Returns the name of a file's module among a model's layers, with as little taken away as makes it fit.

    Args:
        stem: the module name as in the file.
        layers: every spelling of the model's layers (`clora.lora.families.routes`).

    Returns:
        Without a fitting layer, the name without the format's prefix and without wrappers.
    """
    readings = list(_readings(stem))
    return next((name for name in readings if name in layers), readings[-1])


def format_of(stem: str) -> str:
    """Returns the format that the prefix of a module name shows, wrappers being passed over."""
    wrappers = re.match(f"(?:{_WRAPPER})*", stem)[0]
    for prefix, format_name in PREFIXES.items():
        if stem.startswith(prefix) if format_name in UNDERSCORED else prefix in wrappers:
            return format_name
    return "bare"


def _readings(stem: str) -> Iterator[str]:
    """Yields the names that a module's name in a file may stand for, each with more taken away than the one before."""
    prefix = next(
        (prefix for prefix, name in PREFIXES.items() if name in UNDERSCORED and stem.startswith(prefix)), None
    )
    name = stem if prefix is None else stem.removeprefix(prefix)
    yield name
    # torch.compile's wrapper may stand in the middle; some trainers end every name with an underscore.
    name = name.replace("._orig_mod.", ".") if prefix is None else re.sub(r"_+orig_mod_+", "_", name).rstrip("_")
    yield name
    wrapper = re.compile(_WRAPPER) if prefix is None else _UNDERSCORED_WRAPPER
    while found := wrapper.match(name):
        name = name[found.end() :]
        yield name
