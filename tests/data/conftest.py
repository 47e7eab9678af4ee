import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real data: FEDKD_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    root = Path(os.environ.get("FEDKD_DATA", beside))
    if not root.is_dir():
        pytest.skip("needs real data: set FEDKD_DATA")
    return root
