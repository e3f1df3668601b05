"""Alias of `mi_kernels.losses`, kept for existing imports."""

from .losses import clip_loss, info_nce, nt_xent, siglip_loss, sup_con

__all__ = ["clip_loss", "info_nce", "nt_xent", "siglip_loss", "sup_con"]
