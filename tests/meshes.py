"""Meshes for the tests, and what refuses them says."""

import pytest
from jax.sharding import AbstractMesh

from cmd_jax import defaults
from cmd_jax.errors import UserError
from cmd_jax.sharding import (
    MESH_AXES,
)


def abstract(*sizes):
    return AbstractMesh(sizes, MESH_AXES)


def mesh_config(**changes):
    config = defaults.stage("content").mesh.copy_and_resolve_references()
    config.update(changes)
    return config


def refusal(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    return str(error.value)
