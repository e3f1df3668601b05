"""What people run today, where it can be imported: one-sided cross entropy over scores, and the sigmoid loss.

Each function returns the contenders that exist here and, by name, why the others do not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = Callable[[Tensor, Tensor], Tensor]  # scaled queries, keys -> mean cross entropy of the diagonal
Found = tuple[dict[str, Rows], dict[str, str]]


def _labels(a: Tensor) -> Tensor:
    return torch.arange(len(a), device=a.device)


def _torch_chunked() -> Rows:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda a, b: F.linear_cross_entropy(a, b, _labels(a), options=options)


def _liger() -> Rows:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda a, b: loss(b, a, _labels(a))


def _cut() -> Rows:
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda a, b: loss(a, b, _labels(a))


def _inf_cl() -> Rows:
    loss = importlib.import_module("inf_cl").cal_flash_loss

    def rows(a: Tensor, b: Tensor) -> Tensor:
        head = next(h for h in (256, 128, 64, 32, 16) if a.shape[1] % h == 0)
        return loss(a, b, head_dim=head).mean()

    return rows


CROSS_ENTROPY: dict[str, Callable[[], Rows]] = {
    "linear_cross_entropy, chunked": _torch_chunked,
    "liger-kernel": _liger,
    "cut-cross-entropy": _cut,
    "inf-cl": _inf_cl,
}
ON_GPU_ONLY = ("liger-kernel", "cut-cross-entropy", "inf-cl", "siglip-kernel")


def _available(makers: dict[str, Callable[[], Any]], device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
    found, absent = {}, {}
    for name, make in makers.items():
        if device.type != "cuda" and name in ON_GPU_ONLY:
            absent[name] = "runs on a GPU alone"
            continue
        try:
            found[name] = make()
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error)[:120]}"
    return found, absent


def cross_entropy(device: torch.device) -> Found:
    return _available(CROSS_ENTROPY, device)


def _siglip() -> Callable[..., Tensor]:
    loss = importlib.import_module("siglip_kernel").fused_siglip_loss

    def run(image: Tensor, text: Tensor, scale: float, bias: float) -> Tensor:
        log_scale = torch.full((), scale, device=image.device).log()
        return loss(image, text, log_scale, torch.full((), bias, device=image.device))

    return run


def sigmoid(device: torch.device) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    return _available({"siglip-kernel": _siglip}, device)
