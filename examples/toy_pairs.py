"""Shared by the three CLIP examples: pairs of toy images and texts, two encoders, and a retrieval score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGE, TEXT, LATENT, EMBEDDING = 64, 48, 8, 32


def pairs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 64] and texts [count, 48]: two noisy, nonlinear views of the same eight latent numbers."""
    weights = torch.Generator().manual_seed(0)
    of_image = torch.randn(LATENT, IMAGE, generator=weights)
    of_text = torch.randn(LATENT, TEXT, generator=weights)
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(count, LATENT, generator=g)
    image = torch.tanh(latent @ of_image) + 0.5 * torch.randn(count, IMAGE, generator=g)
    text = torch.tanh(latent @ of_text) + 0.5 * torch.randn(count, TEXT, generator=g)
    return image, text


class Encoders(nn.Module):
    """Encoders of images and texts to unit vectors [B, 32], and CLIP's learnable logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(IMAGE, 128), nn.ReLU(), nn.Linear(128, EMBEDDING))
        self.text = nn.Sequential(nn.Linear(TEXT, 128), nn.ReLU(), nn.Linear(128, EMBEDDING))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normalize = nn.functional.normalize
        return normalize(self.image(image), dim=-1), normalize(self.text(text), dim=-1), self.log_scale.exp()


@torch.no_grad()
def retrieval(model: Encoders, count: int = 500) -> float:
    """Share of unseen images whose own text, among `count`, is the closest one."""
    image, text, _ = model(*pairs(count, seed=1))
    return (image @ text.T).argmax(1).eq(torch.arange(count)).float().mean().item()
