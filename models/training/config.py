"""Settings of training: everything but the model and the data that decides a result."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.data.corruption import CorruptionConfig

PRECISIONS = ("32", "64", "bf16", "16")
SCHEDULES = ("constant", "cosine", "linear")
ACCELERATORS = ("cpu", "gpu", "cuda", "mps", "auto")


@dataclass(frozen=True)
class TrainingConfig:
    """One record for every model.

    seed: weights, batches, dropout, noise and drawn splits. lr, weight_decay: AdamW's, where a phase names no others.
    schedule: of all step sizes after ``warmup`` steps that rise linearly: "constant", or "cosine" / "linear" to zero.
    clip: largest norm of a phase's gradient, 0 for none. precision: "16" scales its losses; see Lightning.
    validate: epochs between two looks at the validation rows; 0 for about twenty a run, since a look can cost as much
        as an epoch. patience: looks without a lower validation loss before training stops, 0 for no early stopping.
    select: the weights that are kept, of the "last" epoch or of the "best" validation loss.
    augmentation: "unique" views of all modalities but the first keep what the first refers to; "independent"; or
        "mixing", independent with time warping and CutMix.
    input_noise: deviation of normal noise on the inputs of every training batch.
    corruption: modalities and frames that training batches lose; see CorruptionConfig.
    accelerator: Lightning's. devices: processes that share the work of every batch, each on a device of its own; the
        batch and the result stay those of one process, to rounding and the dropout of encoders.
    threads: of torch in training, 0 for its own choice; the last digits of sums hang on it. deterministic: only
        operators that repeat their results bit for bit.
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
        """Epochs between two looks; a run shorter than ``validate`` looks at its end."""
        return min(self.validate, self.epochs) or max(1, self.epochs // 20)
