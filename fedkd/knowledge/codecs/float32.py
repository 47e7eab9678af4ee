"""Single precision, as it is."""

from __future__ import annotations

import numpy as np

from fedkd.knowledge.codecs import CODECS
from fedkd.knowledge.codecs.float16 import Plain


@CODECS.register("float32")
class Float32(Plain):
    """Four bytes a number: what comes back is what was sent."""

    dtype = np.float32

    def error(self, values: np.ndarray, *, logits: bool = False) -> float:
        """None."""
        return 0.0
