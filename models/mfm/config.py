"""Settings of MFM, and the components of each ablation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from models.baselines.supervised import SupervisedSettings
from models.layers.sequence import check_choice, check_positive
from models.layers.transformer import check_rate


class Parts(NamedTuple):
    """The components of a variant.

    joint: whether there is an encoder of all modalities. private: generative codes of "each" modality, one "shared"
        code, or "none".
    generative: whether inputs are reconstructed and codes regularised. crossed: the code of a modality is computed from
    the other modalities and the label passes no gradient, a purely generative baseline.
    """

    joint: bool
    private: str
    generative: bool
    crossed: bool = False


# Names of the paper; its public code permutes the letters (M_A there is M_E here, B is C, C is D, D is A).
VARIANTS = {
    "full": Parts(True, "each", True),
    "M_A": Parts(False, "each", False),
    "M_B": Parts(True, "none", False),
    "M_C": Parts(False, "each", True),
    "M_D": Parts(True, "none", True),
    "M_E": Parts(True, "shared", True),
    "seq2seq": Parts(False, "each", True, crossed=True),
}


@dataclass(frozen=True)
class Settings(SupervisedSettings):
    """The keys under ``model`` in a YAML file.

    variant: "full", one of the paper's ablations "M_A" to "M_E", or the baseline "seq2seq", which reconstructs every
        modality from the others without F_y.
    encoder: "mfn" (paper) or "lstm" on the concatenated modalities, which must be aligned; or "separate", one encoder
        of width ``hidden`` per modality, each with its own steps.
    pictures: "sequence" treats a picture as a sequence of one step; "convolution" encodes and decodes it by
        convolutions (needs encoder "separate").
    code, joint_code: widths of Z_m and Z_y. factor, joint_factor: widths of F_m and F_y. hidden: width of MFN's LSTMs;
        memory and networks: sizes of MFN. code, factor and hidden are one number for all modalities or one per
            modality, in their order.
    dropout: in the maps from codes to factors and in the head; network_dropout: in MFN's networks.
    regulariser: "mmd", or "kl" of N(code, exp(logvar)) from N(0, I), where the code is not sampled (MFM-KL).
    prior: of the MMD: "sampled" in every step (published), or "analytic", the exact expectation over N(0, I).
    reconstruction, prior_weight: weights of each modality's squared error and of each code's distance from the prior.
    padding: include padded steps in the squared errors, as the public code does.
    surrogate: also learn the codes of a missing modality from the others; only for variant "full".
    surrogate_phase: train the surrogates in steps of their own, by all their terms, while the rest of the model is
        frozen. False adds their terms to the loss of the model, as published, where they change its other parts too.
    detach: block the gradient of the surrogates' targets (the public code does not). Without effect under
        surrogate_phase, which always blocks it.
    public_slip: reconstruct the last modality from the codes without the previous modality, as the public code does,
        instead of from the codes without itself.
    stride, align: see Inlet.
    """

    variant: str = "full"
    encoder: str = "mfn"
    pictures: str = "sequence"
    code: int | tuple[int, ...] = 32
    joint_code: int = 32
    factor: int | tuple[int, ...] = 32
    joint_factor: int = 32
    hidden: int | tuple[int, ...] = 64
    memory: int = 64
    networks: int = 128
    dropout: float = 0.2
    network_dropout: float = 0.5
    regulariser: str = "mmd"
    prior: str = "sampled"
    reconstruction: float = 0.1
    prior_weight: float = 1.0
    padding: bool = False
    surrogate: bool = False
    surrogate_phase: bool = False
    detach: bool = False
    public_slip: bool = False
    stride: int = 1
    align: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, tuple(VARIANTS))
        check_choice("encoder", self.encoder, ("mfn", "lstm", "separate"))
        check_choice("pictures", self.pictures, ("sequence", "convolution"))
        if self.pictures == "convolution" and self.encoder != "separate":
            raise ValueError(f"pictures by convolution need encoder separate, got {self.encoder!r}")
        check_choice("regulariser", self.regulariser, ("mmd", "kl"))
        check_choice("prior", self.prior, ("sampled", "analytic"))
        for name in ("joint_code", "joint_factor", "memory", "networks", "stride", "align"):
            check_positive(**{name: getattr(self, name)})
        for name in ("code", "factor", "hidden"):
            check_positive(**{name: min(_widths(getattr(self, name)), default=0)})
        for name in ("dropout", "network_dropout"):
            check_rate(name, getattr(self, name))
        for name in ("reconstruction", "prior_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if self.surrogate_phase and not self.surrogate:
            raise ValueError("surrogate_phase needs surrogate true, got false")
        if self.surrogate and self.variant != "full":
            raise ValueError(f"surrogate needs variant full, got {self.variant!r}")

    def widths(self, name: str, number: int) -> tuple[int, ...]:
        """``code``, ``factor`` or ``hidden`` of each of ``number`` modalities. Raises ValueError for another number."""
        found = _widths(getattr(self, name))
        if len(found) not in (1, number):
            raise ValueError(f"{name} must be one width or one for each of {number} modalities, got {list(found)}")
        return found * number if len(found) == 1 else found


def _widths(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
