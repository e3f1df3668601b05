"""Scores of trained models: metrics, probes and robustness. Independent of the systems."""
