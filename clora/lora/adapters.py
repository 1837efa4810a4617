"""The adapter types: the change of a weight that the tensors of one module of a file mean.

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
from clora.lora.adapter_config import stated
from clora.lora.keys import split_prefix
from clora.lora.source import LoRASource
from clora.lora.state import LoRAModule

# The longest weight of any family, FLUX.2's fused projection, has 3.4e8 values; a file may claim any product.
_MAX_VALUES = 2**29
# Values of real files are below 100.
_MAX_VALUE = 1e6
# Alpha is at most some hundred times the rank in real files.
_MAX_SCALE = 1e4
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_KINDS = {"lora": "LoRA", "lokr": "LoKr", "hada": "LoHa", "diff": "diff"}
# The parts of each type's matrices: (up, down) of a product, or one whole matrix.
_MATRICES: dict[str, tuple[tuple[str, ...], ...]] = {
    "LoRA": (("lora_B", "lora_A"),),
    "LoKr": (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")),
    "LoHa": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
    "diff": (("diff",),),
}


@dataclass(frozen=True)
class Adapter:
    """One module of a file, whose tensors are complete and fit together.

    Attributes:
        source: the open file.
        stem: the module's name as in the file.
        kind: ``LoRA``, ``LoKr``, ``LoHa`` or ``diff``.
        parts: part to key (see `clora.lora.keys.FileKeys`).
        matrices: the one or two matrices that it is made of. Each is the parts ``(up, down)`` of a product
            ``[rows, rank] @ [rank, columns]``, or one whole part.
        shape: (out, in) of the weight that it changes.
        rank: the rank that alpha is divided by; None where no matrix is a product, and alpha means nothing.
        exact_rank: the rank of factors that hold the change exactly.
    """

    source: LoRASource
    stem: str
    kind: str
    parts: Mapping[str, str]
    matrices: tuple[tuple[str, ...], ...]
    shape: tuple[int, int]
    rank: int | None
    exact_rank: int

    @property
    def is_dora(self) -> bool:
        """True where DoRA's magnitude follows."""
        return "magnitude" in self.parts

    def read(self) -> dict[str, Tensor]:
        """Reads its tensors but alpha in fp32, by part. Raises CloraError for a value that is not finite, or absurd."""
        tensors = self.source.read({part: key for part, key in self.parts.items() if part != "alpha"})
        for part, tensor in tensors.items():
            if (tensor.abs() > _MAX_VALUE).any():
                raise CloraError(
                    f"{self.source.file}: {self.parts[part]} holds values up to {tensor.abs().max():.1e}; expected at most "
                    f"{_MAX_VALUE:.0e}. The training diverged, or the file is damaged: use an earlier checkpoint"
                )
        return tensors

    def changes_nothing(self, tensors: Mapping[str, Tensor], scale: float) -> bool:
        """Returns whether its product is zero, as of a training that never reached it; DoRA's depends on the base."""
        products = (all(bool(tensors[part].any()) for part in matrix) for matrix in self.matrices)
        return not self.is_dora and (scale == 0 or not all(products))

    def sizes(self) -> str:
        """Returns the names and shapes of its matrices' tensors, for error messages."""
        return " and ".join(_sizes(self.source, self.parts, matrix) for matrix in self.matrices)


def read_adapter(source: LoRASource, stem: str, parts: Mapping[str, str]) -> Adapter:
    """Finds the adapter type of one module of a file from its tensors' names and shapes.

    Raises:
        CloraError: a tensor is missing, is of another type, is not a matrix, or disagrees with another one.
    """
    kind, matrices = _matrices(source, stem, parts)
    for part, key in parts.items():
        if part != "alpha" and source.dtypes[key] not in _FLOATS:
            raise CloraError(f"{source.file}: {key} is stored as {source.dtypes[key]}; expected floating-point numbers")
    shapes = [_matrix_shape(source, parts, matrix) for matrix in matrices]
    if kind == "LoKr":
        shape = (shapes[0][0] * shapes[1][0], shapes[0][1] * shapes[1][1])
    elif len(set(shapes)) == 1:
        shape = shapes[0]
    else:
        raise CloraError(f"{source.file}: the two matrices of {stem} are {list(shapes[0])} and {list(shapes[1])}")

    if shape[0] * shape[1] > _MAX_VALUES:
        raise CloraError(f"{source.file}: {stem} changes a weight of {list(shape)}; no model has a layer of that size")
    # Kronecker and Hadamard products of matrices of ranks r and s both have factors of rank r * s. A product's rank is
    # the length of its inner side, that of a whole matrix the length of its shorter side.
    rank = None
    exact_rank = 1
    for matrix, (rows, columns) in zip(matrices, shapes, strict=True):
        if len(matrix) == 2:
            inner = source.shapes[parts[matrix[1]]][0]
            exact_rank *= inner
            # alpha is divided by the second product's rank in a LoKr of two, as LyCORIS and ComfyUI do.
            rank = inner if rank is None or kind == "LoKr" else rank
        else:
            exact_rank *= min(rows, columns)

    adapter = Adapter(source, stem, kind, parts, matrices, shape, rank, exact_rank)
    _check_vectors(adapter)
    if source.config.use_dora and not adapter.is_dora:
        raise CloraError(f"{source.file}: the config states DoRA but {stem} has no magnitude; export it again")
    return adapter


def change(adapter: Adapter, tensors: Mapping[str, Tensor], scale: float, max_rank: int) -> LoRAModule | Tensor:
    """Computes the change of the weight, DoRA's magnitude left out.

    Args:
        adapter: the module that the tensors are of.
        tensors: fp32 by part.
        scale: the factor on the product.
        max_rank: the largest rank of exact factors; a LoRA has its own whatever that is.

    Returns:
        Exact factors, or the dense ``[out, in]`` matrix in fp64 where these would take more ranks.
    """
    if adapter.kind == "LoRA":
        return LoRAModule(tensors["lora_A"], tensors["lora_B"] * scale)
    factors = [_factors(tensors, matrix) for matrix in adapter.matrices]
    if adapter.exact_rank > max_rank:
        whole = [up @ down for up, down in factors]
        if adapter.kind == "LoKr":
            return torch.kron(*whole) * scale
        return scale * (whole[0] if adapter.kind == "diff" else whole[0] * whole[1])

    up, down = factors[0]
    if adapter.kind == "LoKr":
        # kron(U1 D1, U2 D2) = kron(U1, U2) kron(D1, D2)
        up = torch.kron(up, factors[1][0])
        down = torch.kron(down, factors[1][1])
    elif adapter.kind == "LoHa":
        # (U1 D1) * (U2 D2) sums, over all pairs of ranks (i, j), column i of U1 times column j of U2 (elementwise), as a
        # column, times row i of D1 times row j of D2, as a row: [out, r s] and [r s, in].
        up = (up[:, :, None] * factors[1][0][:, None, :]).flatten(1)
        down = (down[:, None, :] * factors[1][1][None, :, :]).flatten(0, 1)
    return LoRAModule(down.float(), (up * scale).float())


def decompose_weight(base: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Computes DoRA's change, which gives every row (or column) of ``base + delta`` the stored length.

    Args:
        base: ``[out, in]``.
        delta: ``[out, in]``.
        magnitude: ``[out]`` or ``[out, 1]`` for rows, ``[1, in]`` for columns (LyCORIS by default).

    Returns:
        ``[out, in]`` fp64, to be added to ``base``.
    """
    # W' = m * (W + delta) / |W + delta|, the length taken over each row (or column). The clamp is for rows of
    # zeros, which have no direction.
    merged = base.double() + delta.double()
    is_column = magnitude.ndim == 2 and magnitude.shape[0] == 1 and magnitude.shape[1] == base.shape[1]
    length = torch.linalg.vector_norm(merged, dim=0 if is_column else 1, keepdim=True)
    stored = magnitude.double().reshape(length.shape)
    return merged * (stored / length.clamp_min(torch.finfo(torch.float64).tiny)) - base.double()


@dataclass(frozen=True)
class Strength:
    """The strength with which a module of a file is applied.

    Attributes:
        alpha: the stated or implied alpha; None where the adapter type has none.
        origin: where alpha is from: ``tensor``, ``config``, ``rank`` (alpha = rank) or ``none``.
        scale: the factor on the product of its matrices.
    """

    alpha: float | None
    origin: str
    scale: float


def find_strength(adapter: Adapter) -> Strength:
    """Reads the alpha of one module of a file.

    Raises:
        CloraError: the config states another rank than the tensors have, PEFT weights come without a config, or alpha
            is not finite or absurd.
    """
    strength = _stated_strength(adapter)
    if abs(strength.scale) > _MAX_SCALE:
        raise CloraError(
            f"{adapter.source.file}: {adapter.stem} has alpha {strength.alpha:g}, which makes its effective scale "
            f"{strength.scale:g}; expected at most {_MAX_SCALE:g}. The file is damaged; export the LoRA again"
        )
    return strength


def _stated_strength(adapter: Adapter) -> Strength:
    source = adapter.source
    module = split_prefix(adapter.stem)[1]
    stated_rank = stated(source.config.rank_pattern, module, source.config.rank)
    stated_alpha = stated(source.config.alpha_pattern, module, source.config.alpha)
    # LyCORIS never scales a LoKr of two whole matrices, whatever its alpha; PEFT does, by its config's rank.
    rank = adapter.rank or stated_rank
    if adapter.kind == "diff":
        return Strength(None, "none", 1.0)
    if stated_rank not in (None, rank):
        message = f"{source.file}: {adapter.stem} has rank {rank} but its config states {stated_rank}"
        raise CloraError(f"{message}, so its strength is not known; export it again")
    # An alpha beside the tensors is nearer to them than one in a config, and both are nearer than the convention.
    if "alpha" in adapter.parts and adapter.rank is not None:
        alpha = source.read({"alpha": adapter.parts["alpha"]})["alpha"].item()
        return Strength(alpha, "tensor", source.config.scale(alpha, adapter.rank))
    if stated_alpha is not None and rank is not None:
        return Strength(stated_alpha, "config", source.config.scale(stated_alpha, rank))
    # diffusers' and ComfyUI's files mean alpha = rank where none is stated; PEFT's default alpha is 8 at any rank. No
    # PEFT model has the original repositories' names: diffusers and sglang read such files with alpha = rank too.
    if split_prefix(adapter.stem)[0] == "peft" and not source.has_original_names:
        raise CloraError(
            f"{source.file}: PEFT keeps alpha in an adapter_config.json beside the weights, none is stated there, so "
            "their strength is not known; put that file there"
        )
    if rank is None:
        return Strength(None, "none", 1.0)
    return Strength(float(rank), "rank", source.config.scale(rank, rank))


def _matrices(source: LoRASource, stem: str, parts: Mapping[str, str]) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """Returns the adapter type and its matrices' parts. Raises CloraError where some are missing or of two types."""
    found = sorted({_KINDS[part.partition("_")[0]] for part in parts if part not in ("alpha", "magnitude")})
    if len(found) > 1:
        raise CloraError(f"{source.file}: {stem} is {' and '.join(found)} at once ({', '.join(parts.values())})")
    # alpha or a magnitude without matrices is reported as an incomplete LoRA.
    kind = found[0] if found else "LoRA"
    matrices = _MATRICES[kind]
    if kind == "LoKr":
        # Each is a product where the file has a factor of it, else whole.
        matrices = tuple(pair if parts.keys() & set(pair) else (pair[0].removesuffix("_a"),) for pair in matrices)
    expected = set().union(*matrices)
    missing = sorted(expected - set(parts))
    extra = sorted(set(parts) - expected - {"alpha", "magnitude"})
    if missing or extra:
        wrong = f"has no {' and no '.join(missing)}" if missing else f"has {' and '.join(extra)} too"
        raise CloraError(f"{source.file}: {stem} {wrong} (found only {', '.join(parts.values())})")
    return kind, matrices


def _matrix_shape(source: LoRASource, parts: Mapping[str, str], matrix: tuple[str, ...]) -> tuple[int, int]:
    """Returns the shape of one matrix of an adapter. Raises CloraError where its tensors are not matrices or disagree."""
    shapes = [source.shapes[parts[part]] for part in matrix]
    found = _sizes(source, parts, matrix)
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        expected = "two matrices, [rank, in] and [out, rank]" if len(matrix) == 2 else "a matrix"
        raise CloraError(f"{source.file}: {found}; expected {expected}")
    if len(shapes) == 2 and shapes[0][1] != shapes[1][0]:
        raise CloraError(f"{source.file}: rank mismatch, {found}; expected [rank, in] and [out, rank] of one rank")
    return shapes[0][0], shapes[-1][1]


def _sizes(source: LoRASource, parts: Mapping[str, str], matrix: tuple[str, ...]) -> str:
    # The down matrix is named first, as lora_A is.
    keys = [parts[part] for part in reversed(matrix)]
    return " and ".join(f"{key} is {list(source.shapes[key])}" for key in keys)


def _check_vectors(adapter: Adapter) -> None:
    """Raises CloraError where alpha is not a single number or DoRA's magnitude fits neither rows nor columns."""
    rows, columns = adapter.shape
    for part, fitting, expected in (
        ("alpha", [(), (1,)], "a single number"),
        ("magnitude", [(rows,), (rows, 1), (1, columns)], f"[{rows}, 1] or [1, {columns}]"),
    ):
        if part in adapter.parts:
            key = adapter.parts[part]
            shape = adapter.source.shapes[key]
            if shape not in fitting:
                raise CloraError(f"{adapter.source.file}: {key} has shape {list(shape)}; expected {expected}")


def _factors(tensors: Mapping[str, Tensor], matrix: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Returns ``(up, down)`` of one matrix in fp64, whose product it is."""
    if len(matrix) == 2:
        return tensors[matrix[0]].double(), tensors[matrix[1]].double()
    # A whole matrix is its own product with the identity, on its shorter side.
    whole = tensors[matrix[0]].double()
    identity = torch.eye(min(whole.shape), dtype=torch.float64)
    return (identity, whole) if whole.shape[0] <= whole.shape[1] else (whole, identity)
