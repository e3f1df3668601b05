"""Training of any model: alternating phases, atomic checkpoints and exact resuming. Independent of the systems."""
