"""`import cmd_jax` as somebody who writes a program with it sees it."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import cmd_jax


def test_every_public_name_is_there_documented_and_hides_no_module():
    modules = {module.name for module in pkgutil.iter_modules(cmd_jax.__path__)}
    assert not modules & set(cmd_jax.__all__)
    for name in set(cmd_jax.__all__) - {"__version__"}:
        thing = getattr(cmd_jax, name)
        assert inspect.getdoc(thing), name
        assert name in cmd_jax.__doc__ or name in ("Latents", "Trained", "Sampler"), name
    assert set(cmd_jax.__all__) <= set(dir(cmd_jax))
    for module in modules:
        assert inspect.ismodule(importlib.import_module(f"cmd_jax.{module}"))
    with pytest.raises(AttributeError, match="nothing"):
        cmd_jax.nothing  # noqa: B018


def test_importing_it_is_quick_and_starts_no_jax():
    code = "import sys, time; t = time.process_time(); import cmd_jax; print(time.process_time() - t, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds, *loaded = done.stdout.split()
    assert float(seconds) < 0.3 and "cmd_jax" in loaded and not {"jax", "numpy"} & {*loaded}
