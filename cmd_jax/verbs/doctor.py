"""`cmd-jax doctor`: where a config puts each parameter on the devices here, and how many bytes that is on each.

Everything is worked out from shapes: no parameter is ever made.
"""

import math
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from cmd_jax.config import load, load_sibling, sibling
from cmd_jax.data.layouts import list_clips
from cmd_jax.data.sources import open_source
from cmd_jax.errors import UserError
from cmd_jax.files import as_path, versions
from cmd_jax.models.conditions import Classes, Texts
from cmd_jax.models.frames import Pixels, VAELatents
from cmd_jax.models.vae import init_vae
from cmd_jax.models.vgg import LPIPS
from cmd_jax.pretrained import (
    ImageModelMetadata,
    TextEncoderMetadata,
    VAEMetadata,
    stated,
    stated_conditions,
    stated_space,
)
from cmd_jax.report.console import make_console
from cmd_jax.sampling.layouts import sizes_of
from cmd_jax.sharding import (
    SAMPLING_AXES,
    Placed,
    batch_ways,
    check_batch,
    is_unset,
    layout,
    make_mesh,
    replicated_report,
)
from cmd_jax.stages import AutoencoderStage, FrozenAutoencoder, diffusion_stage
from cmd_jax.state import make_optimizer
from cmd_jax.trained import Metadata, read_stage

MIB = 2**20
FILE_WIDTH = 1000  # of output that is no terminal: nothing is cut off


def doctor(specification: str, overrides: dict[str, str], workdir: Path | None) -> int:
    """Print devices, mesh, and each parameter's shape, axes and MiB on each device, totals and batch -> 0.

    Of a `sample` config all three stages are shown as the sampler holds them. Where a stage needs another one's config,
    it is the one trained in WORKDIR or in the weights that the config names, else what the config file gives for it.
    Raises UserError where the mesh, the rules, the batch, or the stages' shapes do not fit.
    """
    console = make_console(file_width=FILE_WIDTH)
    config = load(specification, overrides, shapes_only=True)
    mesh = make_mesh(config.mesh)
    print_machine(console, config.mesh, mesh)
    companions = CompanionStages(specification, overrides, workdir, config, console)
    trees, clip_bytes = (sampling_arrays if config.stage == "sample" else training_arrays)(config, companions)
    records = {name: layout(tree, mesh, config.rules) for name, tree in trees.items()}

    group = "sampling" if config.stage == "sample" else "train"
    batch_size = config[group].batch_size
    console.print(parameter_table(records["params"]), soft_wrap=False)
    totals = total_table(records)
    by_size = config.stage == "sample" and is_unset(config.mesh)
    data = sizes_of(mesh.size, batch_size, config.sampling.guidance != 1)[0] if by_size else batch_ways(mesh)
    share = batch_size / data
    sizes = (f"{batch_size * clip_bytes / MIB:,.1f}", f"{share * clip_bytes / MIB:,.1f}")
    totals.add_row(f"batch, {share:g} of {batch_size} clips on each device", "", *sizes)
    console.print(totals, soft_wrap=False)
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        console.print("the mesh splits the batch only: each device holds everything else")
    else:
        lines = replicated_report(records["params"], config.mesh.report_above)
        above = f"no parameter of more than mesh.report_above={config.mesh.report_above:,} values"
        console.print("\n".join(lines) or f"{above} is whole on each device")
    if by_size:
        print_layouts(console, mesh.size, batch_size, config.sampling.guidance != 1)
        return 0
    check_batch(f"{group}.batch_size", batch_size, mesh, config.train.accumulate if group == "train" else 1)
    return 0


def print_machine(console, config, mesh):
    console.print(", ".join(f"{name} {version}" for name, version in versions().items()))
    kinds = ", ".join(sorted({d.device_kind for d in jax.devices()}))
    console.print(f"platform {jax.default_backend()}, devices: {jax.device_count()} ({kinds}), "
                  f"processes: {jax.process_count()}")  # fmt: skip
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    preset = f", preset {config.preset}" if config.preset else ""
    console.print(f"mesh: {sizes}{preset}" + (f", {config.slices} slices" if config.slices > 1 else ""))


def print_layouts(console, devices: int, batch_size: int, guided: bool):
    """How batches of each number of samples lie that has a program of its own."""
    for rows in sorted({*(1 << i for i in range(batch_size.bit_length())), batch_size}):
        sizes = zip(SAMPLING_AXES, sizes_of(devices, rows, guided), strict=True)
        console.print(f"a batch of {rows}: " + " ".join(f"{axis}={size}" for axis, size in sizes))


def parameter_table(records: list[Placed]) -> Table:
    table = Table("parameter", "shape", "logical axes", "split over")
    table.add_column("MiB on each device", justify="right")
    for r in records:
        split = ", ".join("x".join(axes) if isinstance(axes, tuple) else axes or "-" for axes in r.spec)
        where = f"whole: {r.reason}" if r.whole else split + (f" ({r.reason})" if r.reason else "")
        table.add_row(r.name, "x".join(map(str, r.shape)), ", ".join(r.axes), where, f"{r.bytes / MIB:.3f}")
    return table


def total_table(records: dict[str, list[Placed]]) -> Table:
    table = Table("")
    for column in ("values", "MiB in all", "MiB on each device"):
        table.add_column(column, justify="right")
    for name, leaves in records.items():
        whole, each = sum(r.size * r.dtype.itemsize for r in leaves), sum(r.bytes for r in leaves)
        table.add_row(name, f"{sum(r.size for r in leaves):,}", f"{whole / MIB:,.1f}", f"{each / MIB:,.1f}")
    return table


def training_arrays(config, companions: "CompanionStages") -> tuple[dict, int]:
    """What training holds -> (trees of abstract arrays by name, bytes of a clip of the batch)."""
    data, frozen = config.data, {}
    clip_bytes = math.prod((data.frames, data.height, data.width, 3))  # uint8
    if config.stage == "autoencoder":
        space = companions.space(config)
        stage = AutoencoderStage(config, space=space)
        params, frozen = jax.eval_shape(stage.init, abstract_key()), parameters_of(space)
        if config.loss.vgg:
            images = [jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)] * 2
            frozen["lpips"] = nn.unbox(jax.eval_shape(LPIPS().init, abstract_key(), *images))
        if config.latents.starts:
            clip_bytes = stored_bytes(config, [stage.video_shape])
    else:
        autoencoder, frozen = companions.autoencoder()
        conditions = companions.conditions(config)
        params, frozen = companions.denoiser(config, autoencoder, conditions), frozen | parameters_of(conditions)
        if config.latents.starts:
            clip_bytes = stored_bytes(config, [autoencoder.content_shape, autoencoder.motion_shape])
    trees = {"params": params, "ema": params}
    trees["opt_state"] = jax.eval_shape(make_optimizer(config.optimizer).init, params)
    return trees | ({"frozen": frozen} if frozen else {}), clip_bytes


def stored_bytes(config, shapes) -> int:
    """Of a clip whose latents have these shapes in a store."""
    return np.dtype(config.latents.store_dtype).itemsize * sum(map(math.prod, shapes))


def sampling_arrays(config, companions: "CompanionStages") -> tuple[dict, int]:
    """What sampling holds, as `training_arrays`."""
    autoencoder, params = companions.autoencoder()
    for name in ("content", "motion"):
        stage, metadata = companions.stage(name)
        conditions = companions.conditions(stage, metadata)
        params |= parameters_of(conditions) | {name: companions.denoiser(stage, autoencoder, conditions, metadata)}
    return {"params": params}, 4 * math.prod(autoencoder.clip_shape)  # float32 video


def parameters_of(part: Pixels | VAELatents | Classes | Texts) -> dict:
    """Boxed abstract parameters of the VAE or text encoder by its name, or {} for what has none."""
    if isinstance(part, VAELatents):
        return {"vae": jax.eval_shape(lambda key: init_vae(part.module, key), abstract_key())}
    if isinstance(part, Texts):
        ids = jax.ShapeDtypeStruct((1, 1), np.int32)
        return {"text_encoder": jax.eval_shape(part.module.init, abstract_key(), ids)["params"]}
    return {}


def part_of(config, kind):
    """A part of the Stable Diffusion of a config, by its configs alone."""
    return stated(config.pretrained.path, kind, config.pretrained.architecture)


def abstract_key():
    return jax.eval_shape(lambda: jax.random.key(0))


class CompanionStages:
    """The stages that a config needs beside its own, found or derived from the same file; their shapes must fit."""

    def __init__(self, specification: str, overrides: dict[str, str], workdir: Path | None, config, console):
        self.specification, self.overrides, self.workdir = specification, overrides, workdir
        self.config, self.console = config, console

    def stage(self, name: str) -> tuple[ConfigDict, Metadata | None]:
        """-> (its config, its metadata where it is trained)."""
        path, must_be = self._where(name)
        if path and (path.suffix == ".safetensors" or (path / "config.json").is_file()):
            config, metadata = read_stage(path, name)
        elif must_be:
            raise UserError("latents.autoencoder", path, f"holds no trained {name} stage", "train it there first")
        else:
            path, metadata = sibling(self.specification, name), None
            config = load_sibling(self.specification, name, self.overrides)
        self.console.print(f"{name}: as in {path}")
        for side in ("frames", "height", "width"):
            if self.config.data[side] != config.data[side]:
                problem = f"the {name} of {path} is for {config.data[side]}"
                raise UserError(f"data.{side}", self.config.data[side], problem, "use that, or another autoencoder")
        return config, metadata

    def _where(self, name: str) -> tuple[Path | None, bool]:
        """Where that stage may be trained, and whether it must be."""
        if self.config.stage == "sample" and self.config.weights:
            return as_path(self.config.weights) / f"{name}.safetensors", True
        if self.config.stage in ("content", "motion") and self.config.latents.autoencoder:
            return as_path(self.config.latents.autoencoder), True
        return self.workdir and self.workdir / name, False

    def autoencoder(self) -> tuple[FrozenAutoencoder, dict]:
        """-> (the autoencoder without values, its and its VAE's boxed abstract parameters by their names)."""
        config, metadata = self.stage("autoencoder")
        space = self.space(config, metadata)
        autoencoder = FrozenAutoencoder(config, None, space)
        video = jax.ShapeDtypeStruct((1, *autoencoder.video_shape), np.float32)
        params = jax.eval_shape(autoencoder.module.init, abstract_key(), video)["params"]
        return autoencoder, {"autoencoder": params} | parameters_of(space)

    def space(self, config, metadata: Metadata | None = None) -> Pixels | VAELatents:
        """Of an autoencoder's config, and its metadata where it is trained."""
        if config.model.mode != "latent":
            return Pixels()
        return stated_space(metadata.vae if metadata else part_of(config, VAEMetadata))

    def conditions(self, config, metadata: Metadata | None = None) -> Classes | Texts:
        """Of a denoiser's config, and its metadata where it is trained."""
        if config.model.condition == "text":
            return stated_conditions(0, metadata.text_encoder if metadata else part_of(config, TextEncoderMetadata))
        return Classes(len(metadata.class_names) if metadata else self.classes(config.data))

    def denoiser(self, config, autoencoder, conditions, metadata: Metadata | None = None) -> dict:
        """Boxed abstract parameters of a denoiser."""
        image_model = None
        if config.denoiser == "unet":
            image_model = metadata.image_model if metadata else part_of(config, ImageModelMetadata)
        return jax.eval_shape(diffusion_stage(config, autoencoder, conditions, None, image_model).init, abstract_key())

    def classes(self, data) -> int:
        """How many classes the data has; files are listed for it, none is decoded."""
        try:
            if data.source != "folder":
                return len(open_source(data).class_names)
            if not data.root:  # which would be the present folder
                raise UserError("data.root", "", "not given", "set it to count them")
            label = list_clips(data.root, data.layout, data.fold, data.split).entries.label
            return len(np.unique(label[label >= 0]))
        except UserError as error:
            self.console.print(f"classes counted as 0: {error}")
            return 0
