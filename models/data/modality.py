"""One modality of a data set: vectors, ragged sequences or tokens of N rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.batch import Inputs


@dataclass(frozen=True)
class Modality:
    """One modality of N rows. ``values`` is one of

        [N, D] float          vectors
        [sum T, D] float      frames of ragged sequences, with ``offsets`` [N + 1]: row i has offsets[i]:offsets[i + 1]
        [sum T] int64         tokens, with ``offsets`` likewise

    offsets: int64, from 0 to sum T, never decreasing. A row without a frame does not have this modality.
    shape: (height, width) of pictures flattened row by row to D; their values lie in [0, 1] and are never standardised.
    present: [N] bool, False where a row of vectors does not have this modality; None when all have it. For sequences
        leave it out: a length of 0 says it.
    table: [V, E] float, the embedding of every token where one comes with the data; row 0 is padding.
    vocabulary: number of different tokens; taken from the table or the largest token when 0.
    texts: of tokens, the strings [N] that they stand for, where they are known; another tokenizer can read them.
    tokenizer: which one numbered the tokens, as ``models.data.tokenizer`` names it; empty for words of the data's own.
    Raises ValueError, naming the modality, for shapes, offsets or dtypes that do not fit.
    """

    name: str
    values: Tensor
    offsets: Tensor | None = None
    shape: tuple[int, int] | None = None
    present: Tensor | None = None
    table: Tensor | None = None
    vocabulary: int = 0
    texts: tuple[str, ...] = ()
    tokenizer: str = ""

    def __post_init__(self) -> None:
        _check_values(self)
        if self.texts and len(self.texts) != len(self):
            raise ValueError(f"texts of {self.name!r} must be {len(self)}, one per row, got {len(self.texts)}")
        if self.offsets is not None:
            _check_offsets(self)
            if self.present is not None:
                raise ValueError(f"modality {self.name!r} is a sequence: a length of 0 says that it is missing")
        elif self.present is not None and (self.present.shape != (len(self),) or self.present.dtype != torch.bool):
            raise ValueError(f"present of {self.name!r} must be bool [{len(self)}], got {tuple(self.present.shape)}")
        if self.is_tokens and not self.vocabulary:
            largest = int(self.values.max()) + 1 if len(self.values) else 1
            object.__setattr__(self, "vocabulary", largest if self.table is None else len(self.table))

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def is_sequence(self) -> bool:
        """Rows have time steps: frames or tokens."""
        return self.offsets is not None

    @property
    def is_tokens(self) -> bool:
        return not self.values.is_floating_point()

    @property
    def dim(self) -> int:
        """Features of a vector or a frame; of a token the width of its table, 0 without one."""
        if self.is_tokens:
            return 0 if self.table is None else self.table.shape[1]
        return self.values.shape[1]

    def lengths(self) -> Tensor:
        """Steps [N] of every sequence; 1 for vectors and 0 where the modality is missing."""
        if self.offsets is not None:
            return self.offsets.diff()
        return torch.ones(len(self), dtype=torch.int64) if self.present is None else self.present.long()

    def has(self) -> Tensor:
        """[N] bool: which rows have this modality."""
        return self.lengths() > 0

    def take(self, rows: Tensor) -> Inputs:
        """The given rows; sequences come zero-padded on the right to the longest one among them (at least one step)."""
        if self.offsets is None:
            if self.present is None or bool(self.present[rows].all()):
                return Inputs(self.values[rows])
            here = self.present[rows]
            return Inputs(self.values[rows].masked_fill(~here[:, None], 0), None, here)
        start = self.offsets[rows]
        lengths = self.offsets[rows + 1] - start
        steps = torch.arange(max(int(lengths.max()) if len(rows) else 1, 1))
        valid = steps < lengths[:, None]
        here = lengths > 0
        present = None if bool(here.all()) else here
        if len(self.values) == 0:
            shape = (len(rows), len(steps), *self.values.shape[1:])
            return Inputs(self.values.new_zeros(shape), lengths, present)
        index = (start[:, None] + steps).clamp(max=len(self.values) - 1)
        values = self.values[index]
        return Inputs(values.masked_fill(~valid.reshape(*valid.shape, *[1] * (values.dim() - 2)), 0), lengths, present)

    def rows_of_frames(self) -> Tensor:
        """For each frame (or vector) the index of its row."""
        if self.offsets is None:
            return torch.arange(len(self.values))
        return torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())

    def select(self, rows: Tensor) -> Modality:
        """A modality of the given rows alone (indices), in that order."""
        if self.offsets is None:
            present = None if self.present is None else self.present[rows]
            return replace(self, values=self.values[rows], present=present)
        lengths = self.lengths()[rows]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        within = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], lengths)
        values = self.values[torch.repeat_interleave(self.offsets[rows], lengths) + within]
        texts = tuple(self.texts[int(row)] for row in rows) if self.texts else ()
        return replace(self, values=values, offsets=offsets, texts=texts)

    def standardised(self, train: Tensor) -> Modality:
        """Every feature centred and scaled with the statistics of the rows ``train`` [N] bool that have it.

        Pictures and tokens stay as they are. Raises ValueError when no such row has the modality.
        """
        if self.is_tokens or self.shape is not None:
            return self
        used = (train & self.has())[self.rows_of_frames()]
        if not bool(used.any()):
            raise ValueError(f"modality {self.name!r} is missing in every train row")
        frames = self.values[used].double()
        mean, std = frames.mean(0), frames.std(0, correction=0)
        resolved = torch.finfo(torch.float32).eps * frames.abs().amax(0)
        std = torch.where(std > resolved, std, torch.ones_like(std))
        values = ((self.values.double() - mean) / std).to(torch.float32)
        if self.present is not None:
            values = values.masked_fill(~self.present[:, None], 0)
        return replace(self, values=values)


def _check_values(modality: Modality) -> None:
    values, name = modality.values, modality.name
    if not name:
        raise ValueError("a modality needs a name")
    if values.is_floating_point():
        if values.dim() != 2 or values.shape[1] == 0:
            raise ValueError(f"values of {name!r} must be [N, D] or [sum T, D], got {tuple(values.shape)}")
        if modality.shape is not None and modality.shape[0] * modality.shape[1] != values.shape[1]:
            raise ValueError(f"shape of {name!r} must hold {values.shape[1]} pixels, got {modality.shape}")
        if modality.table is not None:
            raise ValueError(f"table of {name!r} must be left out: its values are no tokens")
        return
    if values.dtype != torch.int64 or values.dim() != 1 or modality.offsets is None:
        raise ValueError(
            f"values of {name!r} must be float, or int64 tokens [sum T] with offsets; got {values.dtype} "
            f"{tuple(values.shape)}"
        )
    if modality.table is not None and (modality.table.dim() != 2 or not modality.table.is_floating_point()):
        raise ValueError(f"table of {name!r} must be float [V, E], got {tuple(modality.table.shape)}")
    known = len(modality.table) if modality.table is not None else modality.vocabulary
    if len(values) and (int(values.min()) < 0 or (known and int(values.max()) >= known)):
        raise ValueError(
            f"tokens of {name!r} must lie between 0 and {known - 1 if known else 'the vocabulary'}, "
            f"got {int(values.min())} to {int(values.max())}"
        )


def _check_offsets(modality: Modality) -> None:
    offsets, name, frames = modality.offsets, modality.name, len(modality.values)
    assert offsets is not None
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or len(offsets) < 2:
        raise ValueError(f"offsets of {name!r} must be int64 [N + 1], got {offsets.dtype} {tuple(offsets.shape)}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != frames:
        raise ValueError(
            f"offsets of {name!r} must run from 0 to {frames}, they run from {int(offsets[0])} to {int(offsets[-1])}"
        )
    if bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets of {name!r} must not decrease")
