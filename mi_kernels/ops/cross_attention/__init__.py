"""Attention between sequences of different lengths, without storing the attention weights."""
