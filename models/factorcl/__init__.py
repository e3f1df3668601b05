"""FactorCL: factorized contrastive learning (arXiv 2306.05268)."""

from models.factorcl.config import FactorCLConfig, Settings
from models.factorcl.model import MAXIMISED, MINIMISED, FactorCLSSL, FactorCLSUP, Factors, build_ssl, build_sup

__all__ = [
    "MAXIMISED",
    "MINIMISED",
    "FactorCLConfig",
    "FactorCLSSL",
    "FactorCLSUP",
    "Factors",
    "Settings",
    "build_ssl",
    "build_sup",
]
