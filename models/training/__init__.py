"""Training of any model: phases in order, atomic checkpoints, exact resuming. Names no system."""
