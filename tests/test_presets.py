"""Presets of sampling: what a config file names together, below the flags and above its own keys."""

import pytest
from test_configs import FILES, given

import cmd_jax
from cmd_jax.config import load
from cmd_jax.errors import UserError

SAMPLES = [f"{file}:sample{',' * bool(size)}{size}" for file, sizes in FILES.items() for size in sizes]


def config_of(specification, **overrides):
    return load(specification, given(specification) | overrides)


@pytest.mark.parametrize("specification", SAMPLES)
def test_every_config_has_three_and_quality_is_what_its_keys_say(specification):
    plain = config_of(specification)
    names = {"quality", *(name for name, _ in plain.sampling.presets)}
    assert names == {"quality", "balanced", "fast"}
    for name in names:
        config = config_of(specification, **{"sampling.preset": name})
        changed = {key for key, value in config.sampling.items() if value != plain.sampling[key]} - {"preset"}
        named = dict(dict(plain.sampling.presets).get(name, ()))
        assert changed <= named.keys() and all(config.sampling[key] == value for key, value in named.items())
        assert bool(changed) == (name != "quality")


def test_flags_win_over_a_preset_and_a_preset_over_keys():
    fast = cmd_jax.load_config("quickstart:sample,size=long", {"sampling.preset": "fast"})
    other = cmd_jax.load_config(
        "quickstart:sample,size=long",
        {"sampling.motion_steps": 3, "sampling.motion_reuse": "", "sampling.preset": "fast"},
    )
    assert other.sampling.motion_steps == 3 != fast.sampling.motion_steps
    assert other.sampling.content_steps == fast.sampling.content_steps < 50
    settings = cmd_jax.SamplingSettings.of(fast, batch_size=2)
    assert (settings.content_solver, settings.content_steps) == ("ab2", fast.sampling.content_steps)
    assert (settings.batch_size, settings.guidance) == (2, 6.0)


def test_a_name_that_no_preset_has_is_one_line():
    with pytest.raises(UserError) as error:
        load("quickstart:sample", {"sampling.preset": "faster"})
    told = "sampling.preset=faster: not one of the choices; use one of quality, balanced, fast"
    assert str(error.value) == told
    with pytest.raises(UserError, match="^config.sampling.presets=x: is a table; "):
        load("quickstart:sample", {"sampling.presets": "x"})


def test_a_preset_of_a_key_that_is_none_names_it(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from cmd_jax import defaults\n\ndef get_config(argument=''):\n    config = defaults.stage('sample')\n"
        "    config.sampling.presets = defaults.presets(fast=dict(steps=3))\n    return config\n"
    )
    assert load(f"{file}:sample", {}).sampling.content_steps == 50
    with pytest.raises(UserError, match="^config.sampling.steps=3: no such key; "):
        load(f"{file}:sample", {"sampling.preset": "fast"})
