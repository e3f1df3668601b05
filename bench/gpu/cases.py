"""The rows of the benchmark. `cases(quick)` lists them in the order in which they are worth having."""

from __future__ import annotations

from functools import partial

import torch

from . import problems, sequences
from .problem import Case

_BF16 = torch.bfloat16
_COMPILED = (256, 4096, 32768)


def _info_nce(batch: int, depth: int, symmetric: bool, dtype: torch.dtype = _BF16) -> Case:
    kind = "symmetric" if symmetric else "one-sided"
    make = partial(
        problems.info_nce,
        batch=batch,
        depth=depth,
        symmetric=symmetric,
        dtype=dtype,
        with_compile=batch in _COMPILED and not symmetric,
        ours_only=batch > 131072,
    )
    size = {"B": batch, "D": depth, "dtype": str(dtype).removeprefix("torch.")}
    return Case(f"InfoNCE {kind}", f"B={batch}", size, make, seconds=4.0 if batch <= 16384 else 10.0)


def _siglip(batch: int, depth: int) -> Case:
    make = partial(problems.siglip, batch=batch, depth=depth, dtype=_BF16, with_compile=256 <= batch <= 16384)
    return Case("SigLIP", f"B={batch}", {"B": batch, "D": depth, "dtype": "bfloat16"}, make)


def _concat(batch: int, width: int, hidden: int, groups: int | None) -> Case:
    make = partial(
        problems.concat, batch=batch, width=width, hidden=hidden, groups=groups, dtype=_BF16, with_compile=batch == 256
    )
    size = {"B": batch, "widths": [2 * width, hidden, hidden, 1], "groups": groups or 1, "dtype": "bfloat16"}
    return Case("concat critic", f"B={batch} G={groups or 1}", size, make, seconds=10.0)


def _club(batch: int, depth: int, dtype: torch.dtype) -> Case:
    make = partial(problems.club, batch=batch, depth=depth, dtype=dtype, with_compile=batch >= 256)
    return Case("CLUB", f"B={batch}", {"B": batch, "D": depth, "dtype": str(dtype).removeprefix("torch.")}, make, 4.0)


def _mmd(batch: int, depth: int) -> Case:
    make = partial(problems.mmd, batch=batch, depth=depth, with_compile=256 <= batch <= 4096)
    return Case("MMD", f"B={batch}", {"B": batch, "D": depth, "dtype": "float32"}, make, seconds=4.0)


def _attention(
    batch: int, heads: int, size: int, steps: tuple[int, ...], dtype: torch.dtype, ragged: bool = False
) -> Case:
    make = partial(
        sequences.attention, batch=batch, heads=heads, size=size, steps=steps, dtype=dtype, ragged=ragged
    )
    kind = str(dtype).removeprefix("torch.")
    size_of = {"B": batch, "heads": heads, "E": size, "T": list(steps), "ragged": ragged, "dtype": kind}
    return Case("attention", f"E={size}{' ragged' if ragged else ''}", size_of, make, seconds=6.0)


def _lstm(batch: int, steps: int, hidden: int) -> Case:
    make = partial(sequences.lstm, batch=batch, steps=steps, hidden=hidden)
    size = {"B": batch, "T": steps, "D": hidden, "H": hidden, "dtype": "float32"}
    return Case("LSTM", f"B={batch} T={steps} H={hidden}", size, make, seconds=4.0)


def plan(quick: bool = False) -> list[tuple[Case, bool]]:
    """The cases without torch.compile, then torch.compile alone where it is wanted: it takes longest and says least."""
    every = cases(quick)
    return [(c, False) for c in every] + [(c, True) for c in every if c.make.keywords.get("with_compile")]


def cases(quick: bool = False) -> list[Case]:
    if quick:
        return [
            _info_nce(16, 8, False, torch.float32),
            _info_nce(16, 8, True, torch.float32),
            _siglip(12, 8),
            _concat(9, 4, 16, None),
            _concat(9, 4, 16, 2),
            _club(40, 6, torch.float32),
            _mmd(20, 5),
            _attention(2, 2, 4, (5, 7, 9), torch.float32, ragged=True),
            _attention(2, 2, 20, (9,), torch.float32),
            _lstm(3, 4, 8),
        ]
    return [
        _info_nce(32768, 512, False),
        _info_nce(32768, 512, True),
        _siglip(65536, 768),
        _concat(4096, 128, 512, None),
        _concat(256, 128, 512, 6),
        _attention(32, 10, 4, (50, 375, 500), torch.float32),
        _attention(32, 10, 4, (50, 375, 500), torch.float32, ragged=True),
        _attention(8, 8, 64, (2048,), _BF16),
        *(_lstm(*size) for size in ((32, 20, 128), (128, 100, 128), (32, 400, 256))),
        *(_info_nce(b, 512, s) for b in (256, 1024, 2048, 4096, 16384, 131072) for s in (False, True)),
        _club(65536, 512, _BF16),
        _club(8192, 256, torch.float32),
        _mmd(4096, 64),
        _mmd(8192, 256),
        _siglip(8192, 768),
        _info_nce(4096, 128, False, torch.float32),
        _info_nce(8192, 512, True),
        _info_nce(65536, 512, False),
        _info_nce(65536, 512, True),
        _info_nce(262144, 512, False),
        _info_nce(262144, 512, True),
    ]
