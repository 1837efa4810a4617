"""The adapter types: what the tensors of one module of a file mean as a change of a weight.

=======  =====================================================  ==========================
type     change of the ``[out, in]`` weight                     made of
=======  =====================================================  ==========================
LoRA     ``scale * B A``                                        one matrix
LoKr     ``scale * kron(W1, W2)``                               two, each whole or a product
LoHa     ``scale * W1 * W2`` (elementwise)                      two, each a product
diff     ``D``                                                  one whole matrix
=======  =====================================================  ==========================

With DoRA's magnitude any of them is followed by `decompose_weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clora.errors import CloraError
from clora.lora.keys import split_prefix
from clora.lora.source import LoRASource
from clora.lora.state import LoRAModule

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class Adapter:
    """One module of a file, whose tensors are complete and fit together.

    Attributes:
        stem: the module's name as in the file.
        kind: ``LoRA``, ``LoKr``, ``LoHa`` or ``diff``.
        parts: part to key (see `clora.lora.keys.FileKeys`).
        matrices: the one or two matrices that it is made of, each as the parts ``(up, down)`` of a product
            ``[rows, rank] @ [rank, columns]``, or as one whole part.
        shape: (out, in) of the weight that it changes.
        rank: the rank that alpha is divided by; None where no matrix is a product, and alpha means nothing.
        exact_rank: the rank of factors that hold the change exactly.
    """

    stem: str
    kind: str
    parts: Mapping[str, str]
    matrices: tuple[tuple[str, ...], ...]
    shape: tuple[int, int]
    rank: int | None
    exact_rank: int

    @property
    def is_dora(self) -> bool:
        """Whether DoRA's magnitude follows."""
        return "magnitude" in self.parts


def read_adapter(source: LoRASource, stem: str, parts: Mapping[str, str]) -> Adapter:
    """Tells the adapter type of one module of a file from its tensors' names and shapes.

    Raises:
        CloraError: a tensor is missing, is of another type, is no matrix, or disagrees with another one.
    """
    kind, matrices = _matrices(source, stem, parts)
    _check_types(source, parts)
    shapes = [_product_shape(source, parts, matrix) for matrix in matrices]
    ranks = [source.shapes[parts[matrix[1]]][0] for matrix in matrices if len(matrix) == 2]
    adapter = Adapter(
        stem,
        kind,
        parts,
        matrices,
        _combined_shape(source, kind, stem, shapes),
        # As LyCORIS and ComfyUI take it: that of the second product of a LoKr where it has two.
        ranks[-1 if kind == "LoKr" else 0] if ranks else None,
        _exact_rank(source, parts, matrices),
    )
    _check_vectors(source, adapter)
    if source.config.use_dora and not adapter.is_dora:
        raise CloraError(f"{source.file}: the config says DoRA but {stem} has no magnitude; export it again")
    return adapter


def change(adapter: Adapter, tensors: Mapping[str, Tensor], scale: float, max_rank: int) -> LoRAModule | Tensor:
    """The change of the weight, DoRA's magnitude left out.

    Args:
        adapter: what the tensors are.
        tensors: fp32 by part.
        scale: the factor on the product.
        max_rank: the largest rank of exact factors; a LoRA has its own whatever that is.

    Returns:
        Exact factors, or the dense ``[out, in]`` matrix in fp64 where these would take more ranks.
    """
    if adapter.kind == "LoRA":
        return LoRAModule(tensors["lora_A"], tensors["lora_B"] * scale)
    factors = [_factors(tensors, matrix) for matrix in adapter.matrices]
    if adapter.exact_rank <= max_rank:
        up, down = factors[0] if len(factors) == 1 else _PRODUCTS[adapter.kind](*factors[0], *factors[1])
        return LoRAModule(down.float(), (up * scale).float())
    whole = [up @ down for up, down in factors]
    if adapter.kind == "LoKr":
        return torch.kron(*whole) * scale
    return scale * (whole[0] if len(whole) == 1 else whole[0] * whole[1])


def decompose_weight(base: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: the change that gives every row (or column) of ``base + delta`` the stored length.

    Args:
        base: ``[out, in]``.
        delta: ``[out, in]``.
        magnitude: ``[out]`` or ``[out, 1]`` for rows, ``[1, in]`` for columns (LyCORIS unless told otherwise).

    Returns:
        ``[out, in]`` fp64, to be added to ``base``.
    """
    merged = base.double() + delta.double()
    is_column = magnitude.ndim == 2 and magnitude.shape[0] == 1 and magnitude.shape[1] == base.shape[1]
    length = torch.linalg.vector_norm(merged, dim=0 if is_column else 1, keepdim=True)
    stored = magnitude.double().reshape(length.shape)
    return merged * (stored / length.clamp_min(torch.finfo(torch.float64).tiny)) - base.double()


def _matrices(source: LoRASource, stem: str, parts: Mapping[str, str]) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """The adapter type and the parts of its matrices. Raises CloraError where some are missing or of two types."""
    kinds = {"lora": "LoRA", "lokr": "LoKr", "hada": "LoHa", "diff": "diff"}
    found = sorted({kinds[part.partition("_")[0]] for part in parts if part not in ("alpha", "magnitude")})
    if len(found) > 1:
        raise CloraError(f"{source.file}: {stem} is {' and '.join(found)} at once ({', '.join(parts.values())})")
    kind = found[0] if found else "LoRA"
    matrices = {
        "LoRA": (("lora_B", "lora_A"),),
        "LoKr": tuple(_whole_or_product(parts, f"lokr_w{number}") for number in (1, 2)),
        "LoHa": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
        "diff": (("diff",),),
    }[kind]
    expected = {part for matrix in matrices for part in matrix}
    missing, extra = sorted(expected - set(parts)), sorted(set(parts) - expected - {"alpha", "magnitude"})
    if missing or extra:
        wrong = f"has no {' and no '.join(missing)}" if missing else f"has {' and '.join(extra)} too"
        raise CloraError(f"{source.file}: {stem} {wrong} (found only {', '.join(parts.values())})")
    return kind, matrices


def _whole_or_product(parts: Mapping[str, str], name: str) -> tuple[str, ...]:
    product = (f"{name}_a", f"{name}_b")
    return product if any(part in parts for part in product) else (name,)


def _check_types(source: LoRASource, parts: Mapping[str, str]) -> None:
    for part, key in parts.items():
        if part != "alpha" and source.dtypes[key] not in _FLOATS:
            raise CloraError(f"{source.file}: {key} is stored as {source.dtypes[key]}; expected floating-point numbers")


def _product_shape(source: LoRASource, parts: Mapping[str, str], matrix: tuple[str, ...]) -> tuple[int, int]:
    """The shape of one matrix of an adapter. Raises CloraError where its tensors are no matrices or disagree."""
    shapes = [source.shapes[parts[part]] for part in matrix]
    # The down matrix is named first, as lora_A is.
    found = " and ".join(f"{parts[part]} is {list(source.shapes[parts[part]])}" for part in reversed(matrix))
    expected = "two matrices, [rank, in] and [out, rank]" if len(matrix) == 2 else "a matrix"
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise CloraError(f"{source.file}: {found}; expected {expected}")
    if len(shapes) == 2 and shapes[0][1] != shapes[1][0]:
        raise CloraError(f"{source.file}: rank mismatch, {found}; expected [rank, in] and [out, rank] of one rank")
    return shapes[0][0], shapes[-1][1]


def _combined_shape(source: LoRASource, kind: str, stem: str, shapes: list[tuple[int, int]]) -> tuple[int, int]:
    if kind == "LoKr":
        (rows, columns), (other_rows, other_columns) = shapes
        return rows * other_rows, columns * other_columns
    if len(set(shapes)) > 1:
        raise CloraError(f"{source.file}: the two matrices of {stem} are {list(shapes[0])} and {list(shapes[1])}")
    return shapes[0]


def _exact_rank(source: LoRASource, parts: Mapping[str, str], matrices: tuple[tuple[str, ...], ...]) -> int:
    """Both Kronecker and Hadamard products of matrices of rank r and s have factors of rank r * s."""
    rank = 1
    for matrix in matrices:
        # A product's rank is the length of its inner side, a whole matrix has that of its shorter side.
        rank *= min(source.shapes[parts[matrix[-1]]]) if len(matrix) == 1 else source.shapes[parts[matrix[1]]][0]
    return rank


def _check_vectors(source: LoRASource, adapter: Adapter) -> None:
    """Raises CloraError where alpha is no single number or DoRA's magnitude fits neither rows nor columns."""
    out_features, in_features = adapter.shape
    fitting = {"alpha": {(), (1,)}, "magnitude": {(out_features,), (out_features, 1), (1, in_features)}}
    for part, shapes in fitting.items():
        if part in adapter.parts and source.shapes[adapter.parts[part]] not in shapes:
            found = list(source.shapes[adapter.parts[part]])
            expected = "a single number" if part == "alpha" else f"[{out_features}, 1] or [1, {in_features}]"
            raise CloraError(f"{source.file}: {adapter.parts[part]} has shape {found}; expected {expected}")


def _factors(tensors: Mapping[str, Tensor], matrix: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """``(up, down)`` of one matrix in fp64; a whole one is its own product with the identity, on its shorter side."""
    if len(matrix) == 2:
        return tensors[matrix[0]].double(), tensors[matrix[1]].double()
    whole = tensors[matrix[0]].double()
    identity = torch.eye(min(whole.shape), dtype=torch.float64)
    return (identity, whole) if whole.shape[0] <= whole.shape[1] else (whole, identity)


def _kronecker(up_1: Tensor, down_1: Tensor, up_2: Tensor, down_2: Tensor) -> tuple[Tensor, Tensor]:
    """kron(U1 D1, U2 D2) = kron(U1, U2) kron(D1, D2)."""
    return torch.kron(up_1, up_2), torch.kron(down_1, down_2)


def _hadamard(up_1: Tensor, down_1: Tensor, up_2: Tensor, down_2: Tensor) -> tuple[Tensor, Tensor]:
    """(U1 D1) * (U2 D2) sums, over all pairs of ranks, the products of both columns times those of both rows."""
    up = (up_1[:, :, None] * up_2[:, None, :]).flatten(1)
    down = (down_1[:, None, :] * down_2[None, :, :]).flatten(0, 1)
    return up, down


_PRODUCTS = {"LoKr": _kronecker, "LoHa": _hadamard}


@dataclass(frozen=True)
class Strength:
    """How strongly a module of a file is applied.

    Attributes:
        alpha: the stated or implied alpha; None where the adapter type has none.
        origin: where alpha is from: ``tensor``, ``config``, ``rank`` (alpha = rank) or ``none``.
        scale: the factor on the product of its matrices.
    """

    alpha: float | None
    origin: str
    scale: float


def find_strength(source: LoRASource, adapter: Adapter) -> Strength:
    """Reads the alpha of one module of a file.

    Raises:
        CloraError: the config states another rank than the tensors have, PEFT weights come without a config, or alpha
            is not finite.
    """
    module = split_prefix(adapter.stem)[1]
    stated_rank, stated_alpha = source.config.module_rank(module), source.config.module_alpha(module)
    # LyCORIS never scales a LoKr of two whole matrices, whatever its alpha says; PEFT does, by its config's rank.
    rank = adapter.rank or stated_rank
    if adapter.kind == "diff":
        return Strength(None, "none", 1.0)
    if stated_rank not in (None, rank):
        message = f"{source.file}: {adapter.stem} has rank {rank} but its config says {stated_rank}"
        raise CloraError(f"{message}, so its strength is not known; export it again")
    if "alpha" in adapter.parts and adapter.rank is not None:
        alpha = source.read_finite({"alpha": adapter.parts["alpha"]})["alpha"].item()
        return Strength(alpha, "tensor", source.config.scale(alpha, adapter.rank))
    if stated_alpha is not None and rank is not None:
        return Strength(stated_alpha, "config", source.config.scale(stated_alpha, rank))
    if adapter.stem.startswith("base_model.model."):
        raise CloraError(
            f"{source.file}: PEFT keeps alpha in an adapter_config.json beside the weights, none is stated there, so "
            "their strength is not known; put that file there"
        )
    if rank is None:
        return Strength(None, "none", 1.0)
    return Strength(float(rank), "rank", source.config.scale(rank, rank))
