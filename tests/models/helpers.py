"""Small data sets and settings for the tests of training and evaluation."""

from __future__ import annotations

import torch

from models.batch import Target
from models.data import Dataset, Modality
from models.settings import from_dict

ENCODER = {"hidden": 12, "out_dim": 8, "layers": 0}
SMALL = {
    "factorcl-sup": {"encoder": ENCODER, "critic_hidden": 12},
    "factorcl-ssl": {"encoder": ENCODER, "critic_hidden": 12},
    "simclr": {"encoder": ENCODER},
    "supcon": {"encoder": ENCODER},
    "cross-self": {"encoder": ENCODER},
    "early-fusion": {"hidden": 12},
    "late-fusion": {"encoder": ENCODER},
    "ef-lstm": {"hidden": 8, "align": 4},
    "lmf": {"encoder": ENCODER, "fused": 8},
    "mfn": {"hidden": 8, "memory": 8, "networks": 8, "align": 4},
    "mfm": {"code": 6, "joint_code": 6, "hidden": 8, "memory": 8, "networks": 8, "align": 4},
    "mdm": {"base": {"name": "mfn", "hidden": 8, "memory": 8, "networks": 8, "align": 4}},
    "mag-bert": {"text": {"hidden": 8, "layers": 1, "heads": 2, "intermediate": 8}},
    "mag-xlnet": {"text": {"hidden": 8, "layers": 2, "heads": 2, "intermediate": 8}},
    "misa": {"hidden": 4, "dim": 8},
    "mmim": {"hidden": 4, "dim": 4, "fused": 8},
    "mird": {
        "agnostic": "transformer",
        "language": "lstm",
        "dim": 6,
        "embedding": 5,
        "sizes": {"dim": 4, "heads": 2, "layers": 1},
    },
    "mult": {"sizes": {"dim": 4, "heads": 2, "layers": 1, "memory_layers": 1}},
}
# Models whose text encoder is from the package transformers.
NEED_TEXT = ("mag-bert", "mag-xlnet")


def config(model="factorcl-sup", changes=None, **training):
    """Settings with the smallest sizes. They name synthetic data, but a test passes its own data set."""
    defaults = {"epochs": 2, "batch_size": 16, "lr": 1e-3}
    tree = {"model": {"name": model} | SMALL[model], "data": {"name": "synthetic"}, "training": defaults | training}
    return from_dict(tree).changed(changes or {})


def mixed(target="classes", rows=90, missing=True):
    """Frames, tokens and vectors that depend on the target, with some modalities missing; split 60/20/20."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (rows,), generator=generator)
    lengths = torch.randint(2, 7, (rows,), generator=generator)
    words = torch.randint(1, 5, (rows,), generator=generator)
    if missing:
        lengths[::9], words[3::9] = 0, 0
    frames = torch.randn(int(lengths.sum()), 3, generator=generator) + 2 * y.repeat_interleave(lengths)[:, None]
    tokens = torch.randint(1, 4, (int(words.sum()),), generator=generator) + 3 * y.repeat_interleave(words)
    vectors = torch.randn(rows, 5, generator=generator) + y[:, None]
    present = torch.arange(rows) % 9 != 5 if missing else None
    zero = torch.zeros(1, dtype=torch.int64)
    modalities = (
        Modality("frames", frames, torch.cat([zero, lengths.cumsum(0)])),
        Modality("tokens", tokens, torch.cat([zero, words.cumsum(0)])),
        Modality("vectors", vectors, present=present),
    )
    split = torch.tensor([0, 0, 0, 1, 2]).repeat(rows // 5 + 1)[:rows]
    if target == "classes":
        return Dataset("mixed", modalities, y, Target.classes(2), split).standardised()
    values = 100 + 7 * (y + 0.2 * torch.randn(rows, generator=generator))
    return Dataset("mixed", modalities, values, Target.regression(), split).standardised()


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
