"""Factorized multimodal models on top of mi_kernels; run with ``python -m models``."""
