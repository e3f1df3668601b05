"""Every model by name: its settings and how it is built. Adding a model is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from models import factorcl, mdm, mfm, mird
from models.baselines import contrastive, fusion, mag, misa, mmim
from models.data.dataset import Dataset
from models.data.formats.checks import suggestion
from models.model import Model


class Entry(NamedTuple):
    """settings: a frozen dataclass, what a YAML file may say under ``model``. build: of (settings, data)."""

    settings: type
    build: Callable[[Any, Dataset], Model]
    summary: str


def around(wrap: Callable[[Any, Dataset, Model], Model]) -> Callable[[Any, Dataset], Model]:
    """The build of a model that wraps the registered one which its setting ``base`` names; the base is built first."""

    def build_both(config: Any, data: Dataset) -> Model:
        return wrap(config, data, entry(config.base.name).build(config.base.settings, data))

    return build_both


MODELS: dict[str, Entry] = {
    "factorcl-sup": Entry(factorcl.Settings, factorcl.build_sup, "FactorCL with labels; classes, modalities by pairs"),
    "factorcl-ssl": Entry(factorcl.Settings, factorcl.build_ssl, "FactorCL without labels; modalities by pairs"),
    "simclr": Entry(contrastive.Settings, contrastive.build_simclr, "SimCLR across modalities"),
    "supcon": Entry(contrastive.Settings, contrastive.build_supcon, "supervised contrastive; classes"),
    "cross-self": Entry(contrastive.Settings, contrastive.build_cross_self, "SimCLR across and within modalities"),
    "early-fusion": Entry(fusion.EarlyFusion, fusion.build_early, "one MLP on all modalities"),
    "late-fusion": Entry(fusion.LateFusion, fusion.build_late, "an encoder and a vote per modality"),
    "ef-lstm": Entry(fusion.EFLSTMSettings, fusion.build_ef_lstm, "one LSTM on aligned modalities"),
    "lmf": Entry(fusion.LMFSettings, fusion.build_lmf, "low-rank multimodal fusion"),
    "mfn": Entry(fusion.MFNSettings, fusion.build_mfn, "Memory Fusion Network on aligned modalities"),
    "mfm": Entry(mfm.Settings, mfm.build, "MFM, factorized generative and discriminative; surrogates for missing ones"),
    "mult": Entry(fusion.MulTSettings, fusion.build_mult, "cross-modal transformers on unaligned modalities"),
    "mag-bert": Entry(mag.MAGBERTSettings, mag.build_mag_bert, "BERT on words shifted by the other modalities"),
    "mdm": Entry(
        mdm.Settings, around(mdm.build), "a fused model with a penalty that raises its modalities' dependence"
    ),
    "misa": Entry(misa.MISASettings, misa.build_misa, "MISA: shared and private vectors per modality"),
    "mmim": Entry(mmim.MMIMSettings, mmim.build_mmim, "MMIM: information between modalities and with their fusion"),
    "mird": Entry(mird.Settings, mird.build, "MIRD: one agnostic code, specific codes, CLUB between them"),
}


def entry(name: str) -> Entry:
    """Raises ValueError that lists the names there are."""
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {name!r}{suggestion(str(name), MODELS)}")
    return MODELS[name]


def build(name: str, settings: Any, data: Dataset, seed: int) -> Model:
    """A fresh model, its weights drawn from ``seed``."""
    from lightning import seed_everything  # here, since a command that builds no model need not wait for it

    seed_everything(seed, verbose=False)
    return entry(name).build(settings, data)
