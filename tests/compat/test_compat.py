"""mi_kernels.compat as a package: it has every drop-in, imports them lazily, and needs only torch."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mi_kernels as mk

LIBRARIES = {
    "club": ["CLUB", "CLUBForCategorical", "CLUBMean", "CLUBSample", "InfoNCE", "L1OutUB", "MINE", "NWJ", "VarUB"],
    "factorcl": [
        "CLUBInfoNCECritic",
        "ConcatCritic",
        "InfoNCECritic",
        "SeparableCritic",
        "SupConLoss",
        "infonce_lower_bound_obj",
        "probabilistic_classifier_eval",
        "probabilistic_classifier_obj",
    ],
    "info_nce": ["InfoNCE", "info_nce"],
    "lightly": ["DCLLoss", "MemoryBankModule", "NTXentLoss"],
    "open_clip": [
        "ClipLoss",
        "CoCaLoss",
        "DistillClipLoss",
        "GenLipLoss",
        "SigLipLoss",
        "fused_linear_cross_entropy",
        "gather_features",
        "neighbour_exchange",
        "neighbour_exchange_bidir",
        "neighbour_exchange_bidir_with_grad",
        "neighbour_exchange_with_grad",
    ],
    "pytorch_metric_learning": ["losses", "utils"],
    "pytorch_metric_learning.losses": ["CrossBatchMemory", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss"],
    "pytorch_metric_learning.utils.distributed": ["DistributedLossWrapper"],
    "smile": ["ConcatCritic", "SeparableCritic", "estimate_mutual_information", "smile_lower_bound"],
    "supcontrast": ["SupConLoss"],
    "torch_nn": ["InfoNCELoss", "info_nce_loss"],
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_import_line_changes(library):
    module = importlib.import_module(f"mi_kernels.compat.{library}")
    for name in LIBRARIES[library]:
        assert name in module.__all__ and hasattr(module, name)


def test_libraries_are_attributes():
    assert sorted(dir(mk.compat)) == sorted(name for name in LIBRARIES if "." not in name)
    for name in dir(mk.compat):
        assert getattr(mk.compat, name).__name__ == f"mi_kernels.compat.{name}"
    with pytest.raises(AttributeError, match="sklearn"):
        _ = mk.compat.sklearn


def test_libraries_are_imported_when_used_and_bring_in_no_original():
    names = [f"mi_kernels.compat.{name}" for name in LIBRARIES]
    code = f"""
import sys, mi_kernels
assert not [name for name in {names} if name in sys.modules]
mi_kernels.compat.lightly.NTXentLoss
for name in {names}:
    __import__(name)
originals = ["lightly", "open_clip", "pytorch_metric_learning", "info_nce", "sklearn", "scipy", "torchvision"]
assert not [name for name in originals if name in sys.modules]
"""
    root = Path(mk.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("library", "names"),
    [
        ("club", "CLUB MINE log_sum_exp np math torch nn"),
        ("factorcl", "InfoNCECritic mlp np torch nn"),
        ("smile", "ConcatCritic np torch F nn"),
    ],
)
def test_stars_bring_what_the_originals_scripts_use(library, names):
    space = {}
    exec(f"from mi_kernels.compat.{library} import *", space)
    assert [name for name in names.split() if name not in space] == []
    assert space["np"].__name__ == "numpy" and space["torch"] is torch


def compiled_cases():
    compat = mk.compat
    x, y = (torch.nn.functional.normalize(torch.randn(6, 4), dim=1).requires_grad_() for _ in range(2))
    features, scale = torch.randn(6, 2, 4, requires_grad=True), torch.tensor(3.0)
    return {
        "info_nce": (compat.info_nce.InfoNCE(), x, y),
        "siglip": (compat.open_clip.SigLipLoss(), x, y, scale, torch.tensor(-1.0)),
        "distill": (compat.open_clip.DistillClipLoss(), x, y, scale, y, x, scale),
        "nt_xent": (compat.lightly.NTXentLoss(), x, y),
        "dcl": (compat.lightly.DCLLoss(), x, y),
        "sup_con": (compat.supcontrast.SupConLoss(), features),
        "club": (compat.club.CLUB(4, 4, 8), x, y),
        "club_categorical": (compat.club.CLUBForCategorical(4, 3, 8), x, torch.tensor([0, 2, 1, 1, 0, 2])),
        "info_nce_negatives": (compat.info_nce.InfoNCE(), x, y, features[:, 0]),
        "club_info_nce": (compat.club.InfoNCE(4, 4, 8), x, y),
        "leave_one_out": (compat.club.L1OutUB(4, 4, 8), x, y),
        "factorcl": (compat.factorcl.InfoNCECritic(4, 4, 8, 1, "relu"), x, y),
    }


@pytest.mark.parametrize("name", list(compiled_cases()))
def test_losses_compile_to_one_graph(name):
    module, *inputs = compiled_cases()[name]
    torch._dynamo.reset()
    got = torch.compile(module, fullgraph=True, backend="eager")(*inputs)
    torch.testing.assert_close(got, module(*inputs))
