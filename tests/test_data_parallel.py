"""What each of several devices computes and sends, read from compiled programs. Run as a script it compiles them."""

import json
import subprocess
import sys
from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowered import batch_of, mesh_of, params_of, sample_program, space_of, stage_of, train_program, whole
from processes import ROOT, environment

from cmd_jax import defaults
from cmd_jax import train as training
from cmd_jax.models.conditions import Text
from cmd_jax.sharding import batch_sharding, few_of_each, partitioning, rows_of_all

WAYS, ROWS = 4, 2  # devices, and rows of a batch that each of them has
SHOWN = 2  # clips of a preview
TRAINED = ("autoencoder gaussian", "content text", "motion gaussian twice")  # twice: in two microbatches


@pytest.fixture(scope="module")
def programs():
    """{name: {"products", "collectives", "rows"}} of all programs below; one process compiles them."""
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=environment(2 * WAYS), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["unet", "dit", "vae encode", "vae decode"])
def test_each_device_computes_its_own_rows_and_sends_nothing(programs, name):
    alone, spread = programs[f"{name} alone"], programs[f"{name} spread"]
    assert alone["products"] and spread["products"] == alone["products"]
    assert not spread["collectives"]


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_guidance_is_twice_the_rows_and_sends_nothing(programs, name):
    """Half the batch, guided, is the work of the whole one."""
    alone, guided = programs[f"{name} alone"], programs[f"{name} guided"]
    assert guided["products"] == alone["products"]
    assert not guided["collectives"]


def test_drawing_videos_sends_nothing(programs):
    """Conditions, noise, both denoisers and the decoders of a whole program; its convolutions are UNet and VAE."""
    assert programs["generate text"]["rows"] == [ROWS, 2 * ROWS]
    for name in ("generate text", "generate gaussian"):
        assert not programs[name]["collectives"]


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_sends_gradients_only(programs, name):
    """Sums over the rows of all devices, in one message."""
    assert programs[f"train {name}"]["collectives"] == {"all-reduce": 1}


def test_a_preview_costs_a_device_the_same_however_many_there_are(programs):
    """Two clips are shown, and each device makes one: neither what it holds nor what it gives grows with the mesh."""
    few, many = programs["preview 2"], programs["preview 8"]
    assert many["products"] == few["products"] and set(many["collectives"]) == {"all-reduce"}
    assert many["bytes"] == few["bytes"]
    pictures = 2 * SHOWN * 4 * 16 * 24 * 3
    assert pictures <= many["bytes"]["output"] < 1.01 * pictures


def test_rows_of_a_preview(programs):
    """(rows a device, rows to show) -> which rows of the batch are made, and which of these are shown."""
    assert programs["rows"] == [
        [4, 8, [0, 1, 4, 5, 8, 9, 12, 13], [0, 1, 4, 5, 8, 9, 12, 13]],
        [4, 3, [0, 4, 8, 12], [0, 4, 8]],
        [4, 6, [0, 1, 4, 5, 8, 9, 12, 13], [0, 1, 4, 5, 8, 9]],
        [1, 8, [0, 1, 2, 3], [0, 1, 2, 3]],  # the batch has fewer
        [1, 2, [0, 1, 2, 3], [0, 1]],
    ]


# What follows runs in the process with fake devices.


def facts_of(lowered) -> dict:
    compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "products": sorted([*key, count] for key, count in hlo.products(text).items()),
        "collectives": hlo.collectives(text),
        "rows": sorted(hlo.convolved_rows(text)),
        "bytes": {"output": memory.output_size_in_bytes, "temporary": memory.temp_size_in_bytes},
    }


def compile_parts() -> dict:
    """Denoisers and the VAE: with the rows of one device, and spread over the mesh."""
    parts = {}

    def add(name, function, params, rows, ways, count):
        mesh = mesh_of(ways)
        with partitioning(mesh, defaults.RULES):
            jitted = jax.jit(function, out_shardings=batch_sharding(mesh))
            parts[name] = facts_of(jitted.lower(whole(params, mesh), *batch_of(rows, mesh, count)))

    text = Text(np.zeros((77, 8), np.float32), np.zeros(8, np.float32))
    for name, of in (("unet", "content"), ("dit", "motion")):
        stage = stage_of(of, "text")
        features = None if of == "content" else np.zeros((8, 16), np.float32)
        rows = np.zeros(stage.shape, np.float32), np.float32(0), text, features

        def plain(params, x, t, condition, features, stage=stage):
            return stage.guided_denoiser(params, condition, features, None, None)(x, t)

        def guided(params, x, t, condition, features, null, stage=stage):
            return stage.guided_denoiser(params, condition, features, 2.0, null)(x, t)

        params = params_of(stage, mesh_of(1))
        add(f"{name} alone", plain, params, rows, 1, 2 * ROWS)
        add(f"{name} spread", plain, params, rows, WAYS, 2 * ROWS * WAYS)
        add(f"{name} guided", guided, params, (*rows, text), WAYS, ROWS * WAYS)
    space = space_of("text")
    for name, function, frames in (
        ("encode", space.encode, np.zeros((4, 16, 32, 3), np.uint8)),
        ("decode", space.decode, np.zeros((4, 8, 16, 4), np.float32)),
    ):
        add(f"vae {name} alone", function, space.params, [frames], 1, ROWS)
        add(f"vae {name} spread", function, space.params, [frames], WAYS, ROWS * WAYS)
    return parts


def compile_preview(ways) -> dict:
    """Of a mesh whose devices have a row each."""
    mesh, stage = mesh_of(ways), stage_of("motion", "gaussian")
    batch = batch_of({"video": np.zeros((4, 16, 24, 3), np.uint8), "label": np.int32(0)}, mesh, ways)
    with partitioning(mesh, defaults.RULES):
        arguments = whole((params_of(stage, mesh), stage.frozen), mesh)
        preview = jax.jit(partial(training.preview, stage=stage, mesh=mesh))
        return facts_of(preview.lower(*arguments, batch, jax.random.key(0)))


def preview_rows() -> list:
    mesh, found = mesh_of(WAYS), []
    for rows, count in ((4, 8), (4, 3), (4, 6), (1, 8), (1, 2)):
        batch = jax.device_put(np.arange(rows * WAYS, dtype=np.uint8), batch_sharding(mesh))
        made = few_of_each(batch, mesh, count)
        assert made.sharding == batch_sharding(mesh)
        shown = rows_of_all(made, mesh, count)
        assert shown.is_fully_replicated
        middle = rows_of_all(batch, mesh, rows, jnp.int32(rows + 1))  # of two devices
        assert middle.tolist() == list(range(rows + 1, 2 * rows + 1))
        found.append([rows, count, made.tolist(), shown.tolist()])
    return found


if __name__ == "__main__":
    programs = compile_parts()
    # Text guided, classes not, whose content steps add noise.
    programs["generate text"] = facts_of(sample_program("generate", "text", WAYS, ROWS))
    unguided = dict(sampling__guidance=1, sampling__content_solver="ddpm")
    programs["generate gaussian"] = facts_of(sample_program("generate", "gaussian", WAYS, ROWS, **unguided))
    for words in TRAINED:
        name, kind, *more = words.split()
        programs[f"train {words}"] = facts_of(train_program(name, kind, WAYS, ROWS, 2 if more else 1))
    training.PREVIEW_CLIPS = SHOWN
    programs |= {f"preview {ways}": compile_preview(ways) for ways in (2, 8)}
    programs["rows"] = preview_rows()
    print(json.dumps(programs))
