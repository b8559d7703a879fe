"""GPTQ: four-bit rounding that compensates for its own errors (Frantar et al., 2022, arXiv:2210.17323).

Columns are rounded in order, and each column's error is compensated by the columns after it, as far as their inputs
correlate on the calibration data. Scales are those of molmo_edge.quantize.rounding, computed when a block is reached,
with the clipping that has the least error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.rounding import CLIPS, HIGHEST, MIDDLE

_DAMP = 0.01  # times the mean diagonal, added to the diagonal: the Hessian may be singular


def gptq(
    weight: Tensor, hessian: Tensor, block: int, *, asymmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight [..., out, in] and hessian [..., in, in], the inputs' X^T X -> codes, scale, zero point.

    codes uint8 [..., out, in], scale float32 [..., out, in / block], zero point uint8 like scale, or None. Leading
    dimensions are a batch of matrices. All in float32. A hessian of zeros compensates nothing. Raises QuantizeError for
    a hessian that is not positive definite, as of inputs that are NaN or Inf.
    """
    shape = weight.shape
    # [matrices, in, out], so that a column is contiguous
    work = weight.float().reshape(-1, *shape[-2:]).transpose(1, 2).contiguous()
    factor = _inverse_factor(hessian.float()).reshape(-1, shape[-1], shape[-1])
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    scales, zeros = [], []
    for start in range(0, shape[-1], block):
        end = start + block
        rows = work[:, start:end].clone()  # [matrices, block, out]
        inner = factor[:, start:end, start:end]
        scale, zero = _scale(rows, inner.diagonal(dim1=-2, dim2=-1), asymmetric)
        step = torch.where(scale == 0, 1.0, scale)
        errors = torch.empty_like(rows)
        for i in range(block):
            code = (rows[:, i] / step).round_().add_(zero).clamp_(0, HIGHEST)
            codes[:, start + i] = code
            errors[:, i] = (rows[:, i] - (code - zero) * scale) / inner[:, i, i, None]
            rows[:, i + 1 :].baddbmm_(inner[:, i, i + 1 :, None], errors[:, i, None, :], alpha=-1)
        work[:, end:].baddbmm_(factor[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    per_block = (*shape[:-1], -1)
    zero_point = torch.stack(zeros, dim=-1).to(torch.uint8).reshape(per_block) if asymmetric else None
    return codes.transpose(1, 2).reshape(shape), torch.stack(scales, dim=-1).reshape(per_block), zero_point


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, [..., in, in]."""
    damped = hessian.clone()  # each copy is a gigabyte for a wide FFN
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal += (_DAMP * diagonal.mean(dim=-1, keepdim=True)).clamp(min=1e-12)
    try:
        factor = torch.linalg.cholesky(damped)
        del damped, diagonal
        inverse: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    except torch.linalg.LinAlgError as error:
        raise QuantizeError("the calibration's inputs are NaN or Inf: check the checkpoint") from error
    return inverse


def _scale(rows: Tensor, spread: Tensor, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """rows [matrices, block, out] -> scale and zero point, both float32 [matrices, out].

    `spread`: the factor's diagonal [matrices, block]; the weight of a rounding error is 1 / spread^2 (equation 2).
    """
    importance = spread.pow(-2).unsqueeze(-1)
    best = torch.full_like(rows[:, 0], torch.inf)
    result = torch.zeros_like(best), torch.zeros_like(best)
    for clip in CLIPS:
        if asymmetric:
            low = rows.amin(dim=1).clamp(max=0) * clip
            scale = (rows.amax(dim=1).clamp(min=0) * clip - low) / HIGHEST
            zero = torch.round(-low / torch.where(scale == 0, 1.0, scale))
        else:
            at = rows.abs().argmax(dim=1, keepdim=True)
            scale = rows.gather(1, at).squeeze(1) * (clip / -MIDDLE)  # with its sign: all sixteen levels
            zero = torch.full_like(scale, MIDDLE)
        step = torch.where(scale == 0, 1.0, scale)[:, None]
        codes = (rows / step).round_().add_(zero[:, None]).clamp_(0, HIGHEST)
        cost = (((codes - zero[:, None]) * step - rows).pow_(2) * importance).sum(dim=1)
        better = cost < best
        best = torch.where(better, cost, best)
        result = torch.where(better, scale, result[0]), torch.where(better, zero, result[1])
    return result
