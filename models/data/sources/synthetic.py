"""FactorCL's synthetic generator: two views that share some of their latents (arXiv 2306.05268, section 4.1).

Follows the public code, whose published numbers these are, not the paper's text: latents of 10 shared and 6
+ 6 unique dimensions with variance 0.5, uniform mixing into 100 dimensions without noise, labels by a
linear threshold.
"""

from __future__ import annotations

import numpy as np
import torch

from models.batch import Target
from models.data.dataset import Dataset, Modality


def generate(
    samples: int = 4000,
    seed: int = 0,
    *,
    latent_dims: tuple[int, int, int] = (10, 6, 6),
    label_dims: tuple[int, int, int] = (10, 6, 6),
    view_dim: int = 100,
    labels: str = "linear",
    mixing: str = "uniform",
) -> Dataset:
    """Latent and label dimensions are (shared, unique to the first, unique to the second).

    ``mixing``: entries of the two mixing matrices, "uniform" in [0, 1) as published, or standard normal, "gaussian".

    ``labels``: "linear" (balanced, two classes) or "planar_flow" (20 classes, very unbalanced).
    Split 60/20/20 in order of drawing. Raises ValueError for label dimensions above the latent ones.
    """
    if any(used > drawn or used < 0 for used, drawn in zip(label_dims, latent_dims, strict=True)):
        raise ValueError(f"label_dims {label_dims} must lie between 0 and latent_dims {latent_dims}")
    if samples < 10:
        raise ValueError(f"samples must be at least 10, got {samples}")
    if mixing not in ("uniform", "gaussian"):
        raise ValueError(f'mixing must be "uniform" or "gaussian", got {mixing!r}')
    rng = np.random.default_rng(seed)
    draw = rng.random if mixing == "uniform" else rng.standard_normal
    shared, first, second = _latents(rng, samples, latent_dims)
    views = []
    for own in (first, second):
        latent = np.concatenate([shared, own], 1)
        views.append(torch.tensor(latent @ draw((latent.shape[1], view_dim)), dtype=torch.float32))
    used = np.concatenate([z[:, :n] for z, n in zip((shared, first, second), label_dims, strict=True)], 1)
    if labels == "linear":
        y, classes = (used.sum(1) >= 0).astype(np.int64), 2
    elif labels == "planar_flow":
        y, classes = _planar_flow(used, rng), 20
    else:
        raise ValueError(f'labels must be "linear" or "planar_flow", got {labels!r}')
    split = torch.full((samples,), 2)
    split[: int(0.8 * samples)] = 1
    split[: int(0.6 * samples)] = 0
    modalities = tuple(Modality(name, view) for name, view in zip(("x1", "x2"), views, strict=True))
    name = "synthetic" if mixing == "uniform" else "synthetic-gaussian"
    return Dataset(name, modalities, torch.from_numpy(y), Target.classes(classes), split)


def _latents(rng: np.random.Generator, samples: int, dims: tuple[int, int, int]) -> list[np.ndarray]:
    return [rng.normal(0, np.sqrt(0.5), (samples, dim)) for dim in dims]


def latents(
    samples: int = 4000, seed: int = 0, latent_dims: tuple[int, int, int] = (10, 6, 6)
) -> dict[str, torch.Tensor]:
    """What ``generate`` with the same arguments mixes: "shared", "first" and "second", [samples, dimensions] each."""
    drawn = _latents(np.random.default_rng(seed), samples, latent_dims)
    named = zip(("shared", "first", "second"), drawn, strict=True)
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in named}


def _planar_flow(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dim = z.shape[1]
    w, u = rng.normal(2, 1, (dim, 1)), rng.normal(2, 1, (1, dim))
    bias, h = rng.normal(2, 1), rng.normal(2, 1, (dim, 20))
    return ((z + np.tanh(z @ w + bias) @ u) @ h).argmax(1).astype(np.int64)


LABEL_DIMS = {"all": (10, 6, 6), "unique": (0, 6, 6), "shared": (10, 0, 0)}


def labelled_from(target: str, seed: int, mixing: str = "uniform") -> Dataset:
    """4,000 rows whose linear label depends on the latents of LABEL_DIMS. Raises ValueError for another target."""
    if target and target not in LABEL_DIMS:
        raise ValueError(f"target must be one of {', '.join(LABEL_DIMS)}, got {target!r}")
    return generate(seed=seed, label_dims=LABEL_DIMS[target or "all"], mixing=mixing)


def load(seed: int = 0, target: str = "") -> Dataset:
    """4,000 rows; target "all" (default), "unique" or "shared": the latents that the linear label depends on."""
    return labelled_from(target, seed)
