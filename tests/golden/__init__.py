"""What each path through the code came to, bit by bit, in `hashes.json`.

A change that is meant to move no number moves none of these. One that has to move some says in its
commit which and why, and writes the file anew:

    python -m tests.golden --write

Floating-point sums depend on the processor's kernels, so values are kept per machine
(`tests/golden/machine.py` says what makes one). On a machine whose values are not in the file, the
test runs every path twice, asks that both runs agree, and skips the comparison; to compare
there, run the command on the unchanged tree first. Values of other machines are kept as long as
they can be right: a path whose value moves here is forgotten for them.
"""
