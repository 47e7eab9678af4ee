"""Folders of runs: what is written, read, exported and stated."""
