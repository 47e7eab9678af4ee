"""How to run: the Flower apps, the runners and the command line."""
