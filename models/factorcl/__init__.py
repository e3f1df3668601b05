"""FactorCL: factorized contrastive learning (arXiv 2306.05268)."""

from models.factorcl.build import build_ssl, build_sup
from models.factorcl.config import MAXIMISED, MINIMISED, OBJECTIVES, FactorCLConfig, Settings
from models.factorcl.model import FactorCLSSL, FactorCLSUP, Factors
from models.factorcl.pairs import FactorCLPairs

__all__ = [
    "MAXIMISED",
    "MINIMISED",
    "OBJECTIVES",
    "FactorCLConfig",
    "FactorCLPairs",
    "FactorCLSSL",
    "FactorCLSUP",
    "Factors",
    "Settings",
    "build_ssl",
    "build_sup",
]
