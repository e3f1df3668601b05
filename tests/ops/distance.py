"""How far a tensor is from the one it should be."""

import torch


def distance(a: torch.Tensor, b: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """Norm of a - b relative to `size` or else b; infinite if shapes or places of infinities differ, or a has a NaN."""
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape or not torch.equal(a.isinf(), b.isinf()) or a.isnan().any():
        return float("inf")
    keep = b.isfinite()
    norm = (b[keep] if size is None else size).norm().item()
    return (a[keep] - b[keep]).norm().item() / (norm if norm > 0 else 1.0)
