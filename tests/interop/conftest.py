import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path():
    """A folder of a short name, wherever pytest would put its own: errors show long paths shortened."""
    with tempfile.TemporaryDirectory(prefix="w") as folder:
        yield Path(folder)
