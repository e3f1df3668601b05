"""Every argument of the drop-ins' losses, replaced by unusual objects of many kinds.

A call may succeed, or raise ValueError or TypeError with a sentence. An input that is not finite must not give a finite
result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mi_kernels.compat import club, factorcl, info_nce, lightly, open_clip, supcontrast, torch_nn
from mi_kernels.compat.pytorch_metric_learning import losses as metric_learning
from tests.test_argument_kinds import work_or_are_named


def functions() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))  # noqa: E731
    x, y, labels = draw(4, 3), draw(4, 3) + 1, torch.tensor([0, 1, 0, 1])
    pair, samples = {"query": x, "positive_key": y}, {"x_samples": x, "y_samples": y}
    images = {"image_features": x, "text_features": y, "logit_scale": torch.tensor(3.0)}
    outputs, settings = {"out0": x, "out1": y}, {"temperature": 0.1, "gather_distributed": False}
    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "info_nce": (
            info_nce.info_nce,
            {**pair, "negative_keys": draw(5, 3), "temperature": 0.1, "reduction": "mean", "negative_mode": "unpaired"},
        ),
        "torch_nn": (torch_nn.info_nce_loss, {**pair, "temperature": 0.1, "reduction": "mean"}),
        "open_clip ClipLoss": (open_clip.ClipLoss(), images),
        "open_clip SigLipLoss": (open_clip.SigLipLoss(), {**images, "logit_bias": torch.tensor(-1.0)}),
        "fused_linear_cross_entropy": (
            open_clip.fused_linear_cross_entropy,
            {"hidden": x, "weight": draw(5, 3), "target": labels, "bias": draw(5), "reduction": "mean"},
        ),
        "SupContrast": (supcontrast.SupConLoss(), {"features": draw(4, 2, 3), "labels": labels}),
        "CLUBForCategorical": (club.CLUBForCategorical(3, 2, 4), {"inputs": x, "labels": labels}),
    }
    for name in ("NTXentLoss", "DCLLoss"):
        found[f"lightly {name}"] = (getattr(lightly, name)(), outputs)
        found[f"making lightly {name}"] = (getattr(lightly, name), settings)
    for name in ("NTXentLoss", "SupConLoss"):
        given = {"embeddings": x, "labels": labels, "ref_emb": y, "ref_labels": labels.clone()}
        found[f"PML {name}"] = (getattr(metric_learning, name)(), given)
    for name in ("CLUB", "CLUBSample", "NWJ", "InfoNCE", "MINE", "L1OutUB", "VarUB"):
        found[f"CLUB {name}"] = (getattr(club, name)(3, 3, 4), samples)
    for name in ("InfoNCECritic", "CLUBInfoNCECritic"):
        found[f"FactorCL {name}"] = (getattr(factorcl, name)(3, 3, 4, 1, "relu"), samples)
    return found


FUNCTIONS = functions()
# VarUB ignores y, as in the original.
UNREAD = {"CLUB VarUB": ("y_samples",)}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore")
def test_odd_arguments_work_or_are_named(name: str) -> None:
    work_or_are_named(*FUNCTIONS[name], unread=UNREAD.get(name, ()))
