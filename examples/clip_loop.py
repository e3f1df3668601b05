"""Swap a CLIP loss in a plain training loop.

    python examples/clip_loop.py                  # mi_kernels
    python examples/clip_loop.py --loss eager     # the same loss over a stored B x B matrix

Both print the same losses and retrieval; the times differ.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from toy_pairs import Encoders, pairs, retrieval

import mi_kernels as mk


def eager_clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The usual implementation: a stored score matrix and two cross-entropies."""
    scores = scale * image @ text.T  # [B, B], and once more for its gradient
    target = torch.arange(len(scores))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def train(loss_function, steps: int, batch: int) -> Encoders:
    torch.manual_seed(0)
    model = Encoders()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    image, text = pairs(8 * batch, seed=0)
    for step in range(steps):
        rows = torch.randint(len(image), (batch,))
        image_features, text_features, scale = model(image[rows], text[rows])
        loss = loss_function(image_features, text_features, scale)  # the line that changes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("fused", "eager"), default="fused")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1024)
    options = parser.parse_args()
    loss_function = {"fused": mk.clip_loss, "eager": eager_clip_loss}[options.loss]
    start = time.perf_counter()
    model = train(loss_function, options.steps, options.batch)
    seconds = time.perf_counter() - start
    print(f"{options.loss}: {seconds:.1f} s; {retrieval(model):.0%} of 500 unseen images find their text")


if __name__ == "__main__":
    main()
