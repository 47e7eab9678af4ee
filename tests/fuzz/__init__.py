"""Mutated command lines, configs, image folders, .npz files and run directories for `fedkd`.

`python -m tests.fuzz --help` runs any number of cases; `test_fuzz.py` runs a few of each kind.
A case is given by its kind and its seed alone, so one that failed is run again by those two.
"""
