"""Finds and opens the safetensors file of a LoRA; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clora.errors import CloraError
from clora.files import user_path

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl"})
METADATA_KEY = "lora_adapter_metadata"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
# In this order, as diffusers and PEFT look for them.
_USUAL_NAMES = ("pytorch_lora_weights.safetensors", PEFT_WEIGHTS)


@dataclass(frozen=True)
class LoRASource:
    """The header of a LoRA file.

    Attributes:
        file: the safetensors file.
        shapes: tensor name to shape.
        dtypes: tensor name to safetensors dtype (``F32``, ``BF16``, ...).
        metadata: the header's string metadata.
        config: rank and alpha stated beside the tensors.
    """

    file: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    config: AdapterConfig

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Reads tensors on the CPU in fp32, whatever type they are stored in.

        Raises:
            CloraError: the file became unreadable.
        """
        try:
            with safe_open(self.file, framework="pt") as opened:
                return {key: opened.get_tensor(key).float() for key in keys}
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CloraError(f"{self.file}: cannot read its tensors: {error}") from error

    def read_finite(self, parts: Mapping[str, str]) -> dict[str, Tensor]:
        """Reads tensors by another name than their key's, as `read` does.

        Args:
            parts: name to key.

        Raises:
            CloraError: one holds NaN or infinite values, or the file became unreadable.
        """
        tensors = self.read(parts.values())
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise CloraError(f"{self.file}: {key} holds NaN or infinite values; export the LoRA again")
        return {part: tensors[key] for part, key in parts.items()}


def open_lora(path: str | Path) -> LoRASource:
    """Opens a LoRA file or folder and reads its header.

    Args:
        path: a ``.safetensors`` file, or a folder with ``pytorch_lora_weights.safetensors`` (diffusers),
            ``adapter_model.safetensors`` (PEFT) or exactly one ``.safetensors``.

    Raises:
        CloraError: missing, ambiguous, empty, truncated or corrupt file, a pickle, or a broken adapter config.
    """
    file = find_weights(path)
    if file.stat().st_size == 0:
        raise CloraError(f"{file} is empty (0 bytes); expected a safetensors file. Download or export it again")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  (not a dict)
            shapes = {key: tuple(piece.get_shape()) for key, piece in slices.items()}
            dtypes = {key: str(piece.get_dtype()) for key, piece in slices.items()}
            metadata = dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        message = f"{file} is not a readable safetensors file, it is corrupt or truncated ({error})"
        raise CloraError(f"{message}. Download or export it again") from error
    if not shapes:
        raise CloraError(f"{file} holds no tensors; expected the matrices of a LoRA")
    return LoRASource(file, shapes, dtypes, metadata, _adapter_config(file, shapes, metadata))


def find_weights(path: str | Path) -> Path:
    """The one weights file that a path stands for.

    Raises:
        CloraError: nothing there, several candidates, or a pickle.
    """
    path = user_path(path)
    try:
        return _find(path)
    except OSError as error:
        raise CloraError(f"{path} cannot be read: {error}") from error


def content_hash(path: str | Path) -> str:
    """The sha256 of the weights file that a LoRA file or folder stands for, in hexadecimal.

    Raises:
        CloraError: as `find_weights`, or the file cannot be read.
    """
    file = find_weights(path)
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CloraError(f"{file} cannot be read: {error}") from error
    return digest.hexdigest()


def _find(path: Path) -> Path:
    if not path.exists():
        raise CloraError(f"{path} does not exist; expected a .safetensors LoRA file or a folder with one")
    if path.is_dir():
        return _find_in_folder(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickle_error(path)
    if path.suffix.lower() != ".safetensors":
        raise CloraError(f"{path} is not a .safetensors file; expected a LoRA in safetensors format")
    return path


def _find_in_folder(folder: Path) -> Path:
    for name in _USUAL_NAMES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.is_file())
    candidates = [file for file in files if file.suffix.lower() == ".safetensors"]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(file.name for file in candidates)
        raise CloraError(f"{folder} holds {len(candidates)} safetensors files ({names}); name the one you mean")
    pickle = next((file for file in files if file.suffix.lower() in PICKLE_SUFFIXES), None)
    if pickle is not None:
        raise _pickle_error(pickle)
    found = ", ".join(file.name for file in files[:5]) or "nothing"
    raise CloraError(f"{folder} holds no .safetensors file (found: {found}); expected one LoRA in it")


def _pickle_error(file: Path) -> CloraError:
    return CloraError(
        f"{file} is a pickle ({file.suffix}), which can run any code when it is opened, so it is refused. "
        "Expected .safetensors. If you trust its author, convert it once in an isolated environment: load its state "
        "dict with torch (weights_only=True) and write it with safetensors.torch.save_file"
    )


def _adapter_config(file: Path, keys: Iterable[str], metadata: dict[str, str]) -> AdapterConfig:
    """Reads ``adapter_config.json`` beside PEFT weights, else diffusers' metadata entry, else nothing."""
    beside = file.with_name(PEFT_CONFIG)
    is_peft = file.name == PEFT_WEIGHTS or any(key.startswith("base_model.model.") for key in keys)
    if is_peft and beside.is_file():
        try:
            text = beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CloraError(f"{beside} cannot be read: {error}") from error
        return AdapterConfig.parse(_json_object(text, str(beside)), str(beside))
    if METADATA_KEY in metadata:
        where = f"{METADATA_KEY} of {file}"
        return AdapterConfig.parse(_json_object(metadata[METADATA_KEY], where), where)
    return AdapterConfig()


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CloraError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CloraError(f"{where} must be a JSON object, found {type(value).__name__}")
    return value


_KINDS = ("LORA", "LOHA", "LOKR")

# With these starts PEFT also replaces the base's weights, so that the file alone does not tell the update.
_REPLACES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")

# Options of PEFT's LoRA whose update is another than alpha / r * B A.
_OTHER_UPDATES = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)


@dataclass(frozen=True)
class AdapterConfig:
    """Rank and alpha as stated beside the weights; everything may be absent."""

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> AdapterConfig:
        """Reads the fields of ``adapter_config.json`` or of diffusers' ``lora_adapter_metadata``.

        Args:
            values: the JSON object; diffusers' ``transformer.`` prefix is removed.
            where: file name for the error message.

        Raises:
            CloraError: another adapter type than LoRA, LoHa or LoKr, an option whose update the tensors alone do not
                tell, or a value of the wrong type.
        """
        values = {key.removeprefix("transformer."): value for key, value in values.items()}
        _refuse_other_adapters(values, where)
        alpha = values.get("lora_alpha", values.get("alpha"))  # LoHa and LoKr call it alpha
        try:
            return cls(
                rank=None if values.get("r") is None else int(values["r"]),
                alpha=None if alpha is None else _finite(alpha),
                rank_pattern={key: int(value) for key, value in (values.get("rank_pattern") or {}).items()},
                alpha_pattern={key: _finite(value) for key, value in (values.get("alpha_pattern") or {}).items()},
                use_rslora=bool(values.get("use_rslora")),
                use_dora=bool(values.get("use_dora")),
            )
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CloraError(f"{where}: r, alpha and their patterns must be numbers ({error})") from error

    def module_rank(self, module: str) -> int | None:
        """The stated rank of a module, None where the config is silent."""
        return _match_pattern(self.rank_pattern, module, self.rank)

    def module_alpha(self, module: str) -> float | None:
        """The stated alpha of a module, None where the config is silent."""
        return _match_pattern(self.alpha_pattern, module, self.alpha)

    def scale(self, alpha: float, rank: int) -> float:
        """The factor on the update: alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _refuse_other_adapters(values: Mapping[str, Any], where: str) -> None:
    kind = values.get("peft_type") or "LORA"
    if kind not in _KINDS:
        raise CloraError(f"{where} describes {kind}, which is not supported; expected one of {', '.join(_KINDS)}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REPLACES_BASE):
        raise CloraError(
            f"{where}: with init_lora_weights = {start!r} the update is relative to a base that PEFT changed, so the "
            "file alone does not tell it; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    other = [name for name in _OTHER_UPDATES if values.get(name)]
    if other:
        raise CloraError(f"{where}: {', '.join(other)} makes another update than alpha / r * B A; not supported")


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"found {number}")
    return number


def _match_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is, as a regular expression, the module's name or a dotted tail of it."""
    for key, value in pattern.items():
        try:
            if key == module or re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error as error:
            raise CloraError(f"adapter config: {key!r} is no valid module pattern ({error})") from error
    return default
