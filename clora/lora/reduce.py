"""Lower ranks by SVD, and what a change of rank or of storage type costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clora.errors import CloraError
from clora.lora.state import LoRAModule, LoRAState


@dataclass(frozen=True)
class ModuleSVD:
    """``lora_B @ lora_A = (basis_B @ left) diag(values) (right @ basis_A.T)``, all in fp64.

    Attributes:
        basis_B: ``[out, r]``, orthonormal columns.
        left: ``[r, r]``.
        values: ``[r]``, the singular values, falling.
        right: ``[r, r]``.
        basis_A: ``[in, r]``, orthonormal columns.
    """

    basis_B: Tensor
    left: Tensor
    values: Tensor
    right: Tensor
    basis_A: Tensor

    def truncated(self, rank: int) -> LoRAModule:
        """The best approximation of that rank; its factors share the singular values, ``U sqrt(S)`` and ``sqrt(S) V^T``."""
        root = self.values[:rank].sqrt()
        lora_B = self.basis_B @ (self.left[:, :rank] * root)
        lora_A = (root[:, None] * self.right[:rank]) @ self.basis_A.T
        return LoRAModule(lora_A.float(), lora_B.float())


def module_svd(lora_A: Tensor, lora_B: Tensor) -> ModuleSVD:
    """The SVD of ``lora_B @ lora_A`` without its ``[out, in]`` product.

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` it is that of ``R_B R_A^T``, which is at most ``[rank, rank]``.

    Args:
        lora_A: ``[rank, in]``.
        lora_B: ``[out, rank]``.
    """
    basis_B, factor_B = torch.linalg.qr(lora_B.double())
    basis_A, factor_A = torch.linalg.qr(lora_A.double().T)
    left, values, right = torch.linalg.svd(factor_B @ factor_A.T, full_matrices=False)
    return ModuleSVD(basis_B, left, values, right, basis_A)


def reduce_to_rank(state: LoRAState, rank: int) -> LoRAState:
    """Every module at most of this rank; one that already is stays as it is, to the bit.

    Raises:
        CloraError: a rank below 1.
    """
    if rank < 1:
        raise CloraError(f"expected a rank of at least 1, found {rank}")
    return _reduced(state, dict.fromkeys(state.modules, rank))


def reduce_to_energy(state: LoRAState, energy: float, uniform: bool) -> LoRAState:
    """The lowest ranks at which every module keeps a share of its energy, the sum of its squared singular values.

    Args:
        state: what to reduce.
        energy: the share to keep, above 0 and at most 1.
        uniform: for a file of one rank: the largest of these ranks for every module that has it.

    Raises:
        CloraError: a share outside the range.
    """
    if not 0 < energy <= 1:
        raise CloraError(f"expected a share of energy above 0 and at most 1, found {energy:g}")
    ranks = {name: _energy_rank(module, energy) for name, module in state.modules.items()}
    return _reduced(state, dict.fromkeys(ranks, max(ranks.values(), default=1)) if uniform else ranks)


def _reduced(state: LoRAState, ranks: dict[str, int]) -> LoRAState:
    modules = {
        name: module if module.rank <= ranks[name] else module_svd(module.lora_A, module.lora_B).truncated(ranks[name])
        for name, module in state.modules.items()
    }
    return LoRAState(modules, state.metadata, state.format)


def _energy_rank(module: LoRAModule, energy: float) -> int:
    kept = module_svd(module.lora_A, module.lora_B).values.square().cumsum(0)
    return int((kept < energy * kept[-1]).sum()) + 1


def energy_share(module: LoRAModule, rank: int) -> float:
    """The share of a module's energy that its best approximation of that rank keeps."""
    kept = module_svd(module.lora_A, module.lora_B).values.square().cumsum(0)
    return (kept[rank - 1] / kept[-1]).item() if kept[-1] > 0 else 1.0


def stored_as(module: LoRAModule, dtype: torch.dtype) -> LoRAModule:
    """What a reader finds of a module that was written in that type, in fp32."""
    return LoRAModule(module.lora_A.to(dtype).float(), module.lora_B.to(dtype).float())


def balanced(module: LoRAModule) -> LoRAModule:
    """The same update, exactly, with both factors of each rank about equally large: best for fp8's narrow range.

    They are scaled by powers of two, since fp8 has a smallest step of 0.002 and no place for a scale of its own.
    """
    size_A, size_B = module.lora_A.abs().amax(dim=1), module.lora_B.abs().amax(dim=0)
    exponent = ((size_B / size_A).log2() / 2).round()
    factor = torch.where((size_A > 0) & (size_B > 0), exponent, 0.0).exp2()
    return LoRAModule(module.lora_A * factor[:, None], module.lora_B / factor)


def relative_error(before: LoRAModule, after: LoRAModule) -> float:
    """``|after - before| / |before|`` of the updates, in the Frobenius norm; 0 where both are zero."""
    difference = LoRAModule(torch.cat([before.lora_A, after.lora_A]), torch.cat([before.lora_B, -after.lora_B], dim=1))
    norm, change = _norm(before), _norm(difference)
    return change / norm if norm else (float("inf") if change else 0.0)


def _norm(module: LoRAModule) -> float:
    """The Frobenius norm of an update, without its ``[out, in]`` product."""
    factor_B = torch.linalg.qr(module.lora_B.double(), mode="r").R
    factor_A = torch.linalg.qr(module.lora_A.double().T, mode="r").R
    return (factor_B @ factor_A.T).norm().item()
