"""A small problem of every operator on every backend of a device, forward and backward, to run under a sanitizer.

`python -m bench.gpu.small [--device cuda]`. Sizes are odd, so that the last tile of every kernel is only partly filled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.club.api import gaussian_club

from .problems import backends


def problems(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator(device=device).manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype).requires_grad_()  # noqa: E731
    x, y, z = new(2, 37, 21), new(2, 37, 21), new(2, 37, 21)
    critic = mk.ConcatCritic(21, 21, hidden_dims=(19, 33)).to(device, dtype)
    ids = torch.arange(37, device=device).expand(2, 37) // 2
    lengths = torch.tensor([20, 37], device=device)
    weights = new(36, 21), new(36, 9)

    def attend(size: int, normalizer: str) -> Tensor:
        q, k, v = (t[:, None, :, :size] for t in (x, y, z))
        options = {"key_lengths": lengths, "causal_offset": 3, "dropout_p": 0.2, "seed": 1}
        return mk.cross_attention(q, k, v, normalizer=normalizer, **options).square().sum()

    return {
        "one-sided": lambda: mk.info_nce(x, y),
        "symmetric": lambda: mk.info_nce(x, y, symmetric=True),
        "ids": lambda: mk.info_nce(x, y, query_ids=ids),
        "siglip": lambda: mk.siglip_loss(x, y, 3.0, -2.0),
        "nt_xent": lambda: mk.nt_xent(x, y),
        "smile": lambda: mk.SMILE(mk.DotCritic(), clip=1.0)(x, y).sum(),
        "concat": lambda: mk.InfoNCE(critic)(x, y).sum() + mk.NWJ(critic)(x, y).sum(),
        "club": lambda: gaussian_club(x, z, y).sum(),
        "mmd": lambda: mk.mmd(x, y).sum(),
        "hsic": lambda: mk.hsic(x, y).sum(),
        **{
            f"attention, {normalizer}, {size}": partial(attend, size, normalizer)
            for normalizer in ("softmax", "sparsemax")
            for size in (5, 21)
        },
        "lstm": lambda: sum(t.sum() for t in mk.lstm(x, *weights, lengths=lengths)),
        "lstm_decode": lambda: mk.lstm_decode(x[0, :, :9], weights[1], weights[1], None, None, 6).sum(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    failed = 0
    for name in backends(device):
        if name == "chunked":
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for what, loss in problems(device, dtype).items():
                try:
                    with mk.use_backend(name):
                        loss().backward()
                except RuntimeError as error:
                    skipped = "was requested" in str(error)
                    failed += not skipped
                    print(f"{name} {what} {dtype}: {'skipped' if skipped else 'FAILED'}: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"bench.gpu.small: {failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
