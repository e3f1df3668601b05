"""Models to compare with: contrastive ones on the encoders of a factorized model, and fusion models with a head."""
