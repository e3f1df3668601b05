"""Training settings: everything except the model and the data that determines a result."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.data.corruption import CorruptionConfig

PRECISIONS = ("32", "64", "bf16", "16")
SCHEDULES = ("constant", "cosine", "linear")
ACCELERATORS = ("cpu", "gpu", "cuda", "mps", "auto")


@dataclass(frozen=True)
class TrainingConfig:
    """The same settings for all models.

    epochs, batch_size: length of the run and rows per batch.
    seed: of weights, batches, dropout, noise and random splits.
    lr, weight_decay: of AdamW, unless a phase sets its own.
    warmup: number of steps with linearly rising learning rates. schedule: of the learning rates afterwards: "constant",
        or "cosine" or "linear" decay to zero.
    clip: largest gradient norm of a phase, 0 for no clipping. precision: see Lightning; "16" uses loss scaling.
    validate: epochs between validations; 0 means about twenty validations per run, because one can cost as much as an
        epoch. patience: number of validations without a lower loss before training stops, 0 for no early stopping.
    select: which weights to keep, those of the "last" epoch or of the "best" validation loss.
    augmentation: "unique" (views of all modalities except the first preserve what the first refers to), "independent",
        or "mixing" (independent, with time warping and CutMix).
    input_noise: standard deviation of normal noise on the inputs of every training batch.
    corruption: modalities and frames to remove from training batches, see CorruptionConfig.
    accelerator: see Lightning. devices: number of processes that share the work of every batch, each on its own device.
        Batches and results are those of one process, except for rounding and dropout in encoders.
    threads: torch threads in training, 0 for torch's choice; they affect the last digits of sums. deterministic: use
        only operators whose results are repeatable bit for bit.
    """

    epochs: int = 20
    batch_size: int = 64
    seed: int = 0
    lr: float = 1e-4
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    clip: float = 0.0
    precision: str = "32"
    validate: int = 0
    patience: int = 0
    select: str = "last"
    augmentation: str = "unique"
    input_noise: float = 0.0
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    accelerator: str = "cpu"
    devices: int = 1
    threads: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        choices = {
            "schedule": SCHEDULES,
            "precision": PRECISIONS,
            "select": ("last", "best"),
            "augmentation": ("unique", "independent", "mixing"),
            "accelerator": ACCELERATORS,
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {getattr(self, name)!r}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, since losses compare rows; got {self.batch_size}")
        for name in ("epochs", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "weight_decay", "warmup", "clip", "validate", "patience", "input_noise", "threads"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    @property
    def look_every(self) -> int:
        """Epochs between validations; a run shorter than ``validate`` validates once at its end."""
        return min(self.validate, self.epochs) or max(1, self.epochs // 20)
