"""Scores of trained models: metrics, probes, robustness. Names no system."""
