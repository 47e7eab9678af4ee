"""Real nodes: keys and start scripts, and a look at whether a node is ready."""
