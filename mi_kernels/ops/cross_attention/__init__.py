"""Attention between sequences of different lengths whose weights are never stored."""
