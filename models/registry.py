"""All models by name, with their settings and build functions. To add a model, add a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from models import factorcl, mdm, mfm, mird
from models.baselines import contrastive, fusion, mag, misa, mmim
from models.data.dataset import Dataset
from models.data.formats.checks import suggestion
from models.model import Model


class Entry(NamedTuple):
    """settings: a frozen dataclass of the keys under ``model`` in a YAML file. build: builds the model from (settings,
    data)."""

    settings: type
    build: Callable[[Any, Dataset], Model]
    summary: str


def around(wrap: Callable[[Any, Dataset, Model], Model]) -> Callable[[Any, Dataset], Model]:
    """The build function of a model that wraps another registered model, named by its setting ``base`` and built
    first."""

    def build_both(config: Any, data: Dataset) -> Model:
        return wrap(config, data, entry(config.base.name).build(config.base.settings, data))

    return build_both


MODELS: dict[str, Entry] = {
    "factorcl-sup": Entry(factorcl.Settings, factorcl.build_sup, "FactorCL with class labels; two or more modalities"),
    "factorcl-ssl": Entry(factorcl.Settings, factorcl.build_ssl, "FactorCL without labels; two or more modalities"),
    "simclr": Entry(contrastive.Settings, contrastive.build_simclr, "SimCLR across modalities"),
    "supcon": Entry(contrastive.Settings, contrastive.build_supcon, "supervised contrastive with class labels"),
    "cross-self": Entry(contrastive.Settings, contrastive.build_cross_self, "SimCLR across and within modalities"),
    "early-fusion": Entry(fusion.EarlyFusion, fusion.build_early, "one MLP on the concatenated modalities"),
    "late-fusion": Entry(fusion.LateFusion, fusion.build_late, "an encoder and a head per modality, averaged"),
    "ef-lstm": Entry(fusion.EFLSTMSettings, fusion.build_ef_lstm, "one LSTM on aligned modalities"),
    "lmf": Entry(fusion.LMFSettings, fusion.build_lmf, "low-rank multimodal fusion"),
    "mfn": Entry(fusion.MFNSettings, fusion.build_mfn, "Memory Fusion Network on aligned modalities"),
    "mfm": Entry(mfm.Settings, mfm.build, "MFM, factorized and generative; surrogates for missing modalities"),
    "mult": Entry(fusion.MulTSettings, fusion.build_mult, "cross-modal transformers on unaligned modalities"),
    "mag-bert": Entry(mag.MAGSettings, mag.build_mag_bert, "BERT on words shifted by the other modalities"),
    "mag-xlnet": Entry(mag.MAGSettings, mag.build_mag_xlnet, "XLNet on words shifted by the other modalities"),
    "mdm": Entry(
        mdm.Settings, around(mdm.build), "a fused model with a penalty that maximises dependence of the modalities"
    ),
    "misa": Entry(misa.MISASettings, misa.build_misa, "MISA: a shared and a private vector per modality"),
    "mmim": Entry(mmim.MMIMSettings, mmim.build_mmim, "MMIM: maximises information between modalities and with their "
    "fusion"),
    "mird": Entry(mird.Settings, mird.build, "MIRD: an agnostic code and specific codes, separated by CLUB"),
}


def entry(name: str, argument: str = "model") -> Entry:
    """The entry of a model. Raises ValueError that names the argument and lists the known names."""
    if name not in MODELS:
        raise ValueError(f"{argument} must be one of {', '.join(MODELS)}; got {name!r}{suggestion(str(name), MODELS)}")
    return MODELS[name]


def build(name: str, settings: Any, data: Dataset, seed: int) -> Model:
    """Builds a new model with weights drawn from ``seed``."""
    from lightning import seed_everything  # here, since a command that builds no model need not wait for it

    seed_everything(seed, verbose=False)
    return entry(name).build(settings, data)
