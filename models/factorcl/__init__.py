"""FactorCL: factorized contrastive learning (arXiv 2306.05268)."""

from models.factorcl.config import MAXIMISED, MINIMISED, OBJECTIVES, FactorCLConfig, Settings
from models.factorcl.model import FactorCLSSL, FactorCLSUP, Factors, build_ssl, build_sup

__all__ = [
    "MAXIMISED",
    "MINIMISED",
    "OBJECTIVES",
    "FactorCLConfig",
    "FactorCLSSL",
    "FactorCLSUP",
    "Factors",
    "Settings",
    "build_ssl",
    "build_sup",
]
