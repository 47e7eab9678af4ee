"""One run seed, many independent named streams.

Every random draw comes from a stream named after its purpose, so a new feature never moves
the numbers of another, and a client draws the same numbers on whichever machine it runs.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(seed: int, *names: object) -> int:
    """63-bit seed of the stream `names` under the run's `seed`; stable across machines."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for the stream `names`."""
    return torch.Generator().manual_seed(stream_seed(seed, *names))


def beside(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """`generator` itself if it lives there; for another device a generator there, seeded by its
    next draw, so that nothing drawn has to travel."""
    if generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


@contextmanager
def seeded(seed: int, *names: object) -> Iterator[None]:
    """Run a block whose code draws from the *global* generators (weight init, dropout,
    torchvision transforms) on the stream `names`, and restore them afterwards."""
    value = stream_seed(seed, *names)
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
