"""What a trained MFM says about its modalities: gradients per time step, dependence ratios, swapped factors."""

from __future__ import annotations

import torch
from torch import Tensor

import mi_kernels as mk
from models.mfm.model import JOINT, Codes, MFMNet


def gradient_curves(net: MFMNet, factors: Codes, steps: int) -> dict[str, Tensor]:
    """|d x'_t / d F_y|_F^2 per modality, [B, steps]: where the shared factor acts (section 4 of the paper).

    One forward-mode product per feature of F_y, all in one call; F_m is held fixed. Raises ValueError for a variant
    without F_y or without decoders.
    """
    if not net.parts.joint or not net.parts.generative:
        raise ValueError(f"gradient curves need F_y and decoders, variant {net.settings.variant!r} lacks one")
    shared = factors[JOINT].detach()
    others = {name: f.detach() for name, f in factors.items()}

    def decoded(f: Tensor) -> dict[str, Tensor]:
        return net.decode(others | {JOINT: f}, steps)

    def product(direction: Tensor) -> dict[str, Tensor]:
        return torch.func.jvp(decoded, (shared,), (direction.expand_as(shared),))[1]

    basis = torch.eye(shared.shape[1], dtype=shared.dtype, device=shared.device)
    with torch.no_grad():
        found = torch.func.vmap(product)(basis)
    return {name: slopes.square().sum((0, 3)) for name, slopes in found.items()}


@torch.no_grad()
def information_ratios(net: MFMNet, factors: Codes, steps: int) -> dict[str, float]:
    """HSIC(F_y, x'_m) / HSIC(F_m, x'_m), both normalised and at median bandwidths: above 1 the shared factor has the
    larger part in modality m. The paper's bandwidth is not known. Raises ValueError unless the variant is "full"."""
    if net.settings.variant != "full":
        raise ValueError(f"information ratios compare F_y with F_m: variant must be full, got {net.settings.variant!r}")
    decoded = {name: x.flatten(1) for name, x in net.decode(factors, steps).items()}
    return {n: float(mk.hsic(factors[JOINT], x) / mk.hsic(factors[n], x)) for n, x in decoded.items()}


@torch.no_grad()
def swapped(net: MFMNet, factors: Codes, name: str, steps: int) -> Tensor:
    """Modality ``name`` decoded with F_y of row i and F_m of row j, [B, B, steps, d]."""
    rows = len(factors[JOINT])
    first, second = torch.arange(rows).repeat_interleave(rows), torch.arange(rows).repeat(rows)
    mixed = {block: f[first if block == JOINT else second] for block, f in factors.items()}
    return net.decode(mixed, steps, [name])[name].unflatten(0, (rows, rows))
