"""Changed copies of tests/fixtures' folders of CLIP, and what is said of them."""

import json
import shutil
from pathlib import Path

import pytest

from cmd_jax.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"


def copied(source, folder):
    shutil.copytree(FIXTURES / source, folder, copy_function=shutil.copyfile)
    return folder


def change_json(path, **changes):
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "absent"}))


def message(function, *arguments, **more):
    with pytest.raises(UserError) as error:
        function(*arguments, **more)
    assert "\n" not in str(error.value)
    return str(error.value)
