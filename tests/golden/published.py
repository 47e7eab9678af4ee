"""Numbers that published code gave, with their inputs: one JSON file a family of losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Published(dict[str, Any]):
    """Inputs under "inputs", what came out under other names."""

    def double(self, name: str) -> Tensor:
        """An input in double precision."""
        return torch.tensor(self["inputs"][name], dtype=torch.float64)


def published(family: str) -> Published:
    """The file of a family."""
    text = Path(__file__).with_name(f"{family}.json").read_text(encoding="utf-8")
    return Published(json.loads(text))
