"""A run: its settings, the model that they describe, and the folder that keeps both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lightning import seed_everything

from models import baselines, factorcl
from models.data import PairedData, load
from models.encoders import make_encoder

FACTORCL = {"factorcl-sup": factorcl.FactorCLSUP, "factorcl-ssl": factorcl.FactorCLSSL}
BASELINES = {"simclr": baselines.SimCLR, "supcon": baselines.SupCon, "cross-self": baselines.CrossSelf}
MODELS = (*FACTORCL, *BASELINES)
PRESETS = ("recommended", "public-code", "paper")
CHOICES = {
    "preset": PRESETS,
    "augmentation": ("unique", "independent"),
    "sequences": ("segments", "gru"),
    "club_critic": ("own", "shared"),
    "inner_batch": ("same", "fresh"),
}
Model = factorcl._FactorCL | baselines._Baseline


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result. Encoders, dropout and noise are shared by every model.

    head_layers: hidden layers - 1 of every head: the public synthetic code has 1, its code for real data 0.
    input_noise: deviation of normal noise on the standardised inputs of every training batch.
    inner_batch: FactorCL's inner steps see the "same" batch as the outer one (most of the public code), or a
        "fresh" one drawn from the training rows (Algorithm 3; the synthetic code draws it from all rows, test
        rows included, which is not offered).
    """

    model: str = "factorcl-sup"
    data: str = "digits"
    modalities: tuple[str, str] | None = None
    epochs: int = 20
    batch_size: int = 64
    seed: int = 0
    lr: float = 1e-4
    inner_steps: int = 1
    hidden: int = 512
    feature_dim: int = 128
    encoder_layers: int = 2
    stride: int = 1
    critic_hidden: int = 512
    head_layers: int = 1
    temperature: float = 0.1
    preset: str = "recommended"
    augmentation: str = "unique"
    sequences: str = "segments"
    segments: int = 4
    dropout: float = 0.0
    weight_decay: float = 0.0
    input_noise: float = 0.0
    club_critic: str = "own"
    inner_batch: str = "same"

    def __post_init__(self) -> None:
        choices = CHOICES | {"model": MODELS}
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "hidden", "feature_dim", "stride", "segments", "critic_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.weight_decay < 0 or self.input_noise < 0:
            raise ValueError(
                f"weight_decay and input_noise must not be negative, got {self.weight_decay} and {self.input_noise}"
            )
        if self.club_critic == "shared" and self.inner_steps < 1:
            raise ValueError("a shared club_critic learns in the inner steps alone: inner_steps must be at least 1")
        if self.lr <= 0 or self.temperature <= 0:
            raise ValueError(f"lr and temperature must be positive, got {self.lr} and {self.temperature}")
        for name in ("inner_steps", "encoder_layers", "head_layers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.model == "factorcl-ssl" and self.preset == "paper":
            raise ValueError("the paper preset draws negatives within a class: factorcl-ssl has no classes")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> RunConfig:
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no run: no such file: {path}")
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            if values.get("modalities"):
                values["modalities"] = tuple(values["modalities"])
            return cls(**values)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a run's settings: {error}") from error

    def changes(self, other: RunConfig) -> dict[str, Any]:
        """Settings of ``other`` that differ from these, apart from model and seed."""
        names = [f.name for f in fields(self) if f.name not in ("model", "seed")]
        return {name: getattr(other, name) for name in names if getattr(self, name) != getattr(other, name)}

    def differences(self, other: RunConfig) -> list[str]:
        """Names of settings that differ, apart from the number of epochs, which a resumed run may raise."""
        return [f.name for f in fields(self) if f.name != "epochs" and getattr(self, f.name) != getattr(other, f.name)]


def load_data(config: RunConfig) -> PairedData:
    return load(config.data, config.seed, config.modalities)


def build(config: RunConfig, data: PairedData) -> Model:
    """A fresh model, its weights drawn from config.seed."""
    seed_everything(config.seed, verbose=False)
    encoder1, encoder2 = (
        make_encoder(
            modality,
            config.hidden,
            config.feature_dim,
            config.encoder_layers,
            config.stride,
            config.sequences,
            config.segments,
            config.dropout,
        )
        for modality in (data.first, data.second)
    )
    dims = (config.feature_dim, config.feature_dim)
    if config.model in BASELINES:
        return BASELINES[config.model](
            encoder1, encoder2, dims, temperature=config.temperature, head_layers=config.head_layers
        )
    settings = factorcl.FactorCLConfig(
        num_classes=data.num_classes,
        feature_dims=dims,
        critic_hidden=(config.critic_hidden, config.critic_hidden),
        head_layers=config.head_layers,
    )
    if config.preset == "recommended":
        settings = settings.recommended()
    elif config.preset == "paper":
        settings = settings.paper()
    settings = replace(settings, club_critic=config.club_critic)
    return FACTORCL[config.model](encoder1, encoder2, settings)
