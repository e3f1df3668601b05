"""From settings and data to a model: FactorCL on two modalities, or on all pairs of more."""

from __future__ import annotations

from typing import Any

from models.data.dataset import Dataset
from models.factorcl.config import Settings
from models.factorcl.model import FactorCLSSL, FactorCLSUP
from models.factorcl.pairs import FactorCLPairs
from models.layers.encoders import make_encoder
from models.model import Model, OptimizerConfig, needs_classes


def _build(kind: type[FactorCLSUP] | type[FactorCLSSL], config: Settings, data: Dataset, num_classes: int) -> Model:
    if len(data.names) < 2:
        raise ValueError(f"FactorCL takes two modalities or more, the data has one: {data.names[0]}")
    encoders = [make_encoder(modality, config.encoder) for modality in data.modalities]
    inner: Any = {
        "inner_steps": config.inner_steps,
        "fresh": config.inner_batch == "fresh",
        "inner_optimizer": OptimizerConfig(config.critic_lr),
    }
    architecture = config.architecture(num_classes)
    model: Model
    if len(encoders) == 2:
        model = kind(encoders[0], encoders[1], architecture, **inner)
    else:
        model = FactorCLPairs(kind, data.names, encoders, architecture, **inner)
    model.headline = config.representation
    return model


def build_sup(config: Settings, data: Dataset) -> Model:
    needs_classes("factorcl-sup", data.target)
    return _build(FactorCLSUP, config, data, data.target.size)


def build_ssl(config: Settings, data: Dataset) -> Model:
    """The classes do not enter; the paper preset draws negatives within a class and is refused."""
    if config.preset == "paper":
        raise ValueError("preset must not be paper for factorcl-ssl: it draws negatives within a class")
    return _build(FactorCLSSL, config, data, 2)
