"""How networks are trained: batches, the one epoch loop, and its checks."""
