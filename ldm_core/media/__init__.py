"""Files -> tensors, and the procedural data set."""
