"""Losses as functions: contrastive losses on dot-product scores, and kernel distances between distributions."""

from .contrastive import clip_loss, info_nce, nt_xent, siglip_loss
from .divergences import gaussian_mmd, hsic, mmd
from .supcon import sup_con

__all__ = ["clip_loss", "gaussian_mmd", "hsic", "info_nce", "mmd", "nt_xent", "siglip_loss", "sup_con"]
