"""Statistics of the scores of a concat critic over all pairs of a batch."""
