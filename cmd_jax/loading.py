"""From trained stages on disk to a Sampler: which files they are, and that they belong together."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from cmd_jax import defaults
from cmd_jax.config import STAGES, shipped
from cmd_jax.data.sizes import Size, sizes_of
from cmd_jax.errors import UserError, choose
from cmd_jax.files import as_path
from cmd_jax.models.conditions import Classes
from cmd_jax.pretrained import check_same, load_texts, open_space, stated_conditions, stated_space
from cmd_jax.sampling.sampler import Sampler
from cmd_jax.sharding import abstract, is_unset, make_mesh, replicated
from cmd_jax.stages import AutoencoderStage, FrozenAutoencoder, diffusion_stage
from cmd_jax.trained import Metadata, Trained, belongs, load_trained


def load_sampler(
    folder: str | Path,
    pretrained: str = "",
    *,
    mesh=None,
    rules=defaults.RULES,
    attention: str = "auto",
    stages=STAGES,
    size: Size | None = None,
    dtype: str = "",
) -> Sampler:
    """The sampler of the three stages in a folder: exported weights, autoencoder.safetensors and so on, or a workdir;
    or of the shipped weights of that name ("quickstart").

    pretrained: the folder of the Stable Diffusion whose VAE and text encoder they were trained with. mesh: by default
    all devices, which share each batch by its size. attention: one of models.attention.KERNELS. stages:
    ("autoencoder",) to reconstruct only. size: height and width of videos, one of those that were trained; the first
    without it. dtype: "bfloat16" for matrices of half the bytes, of all of its parts, and products in it; "float32";
    or "", float32 with products as they were trained.
    UserError where a stage is missing or damaged, and where they are not of one run.
    """
    config = defaults.stage("sample")
    config.pretrained.path = str(pretrained)
    config.sampling.dtype = choose("sampling.dtype", dtype, ("", *defaults.DTYPES))
    folder, named = as_path(folder), shipped() / "weights" / folder
    folder = named if named.is_dir() and not folder.exists() else folder
    suffix = ".safetensors" if (folder / "autoencoder.safetensors").exists() else ""
    paths = {name: folder / f"{name}{suffix}" for name in stages}
    made = make_mesh(config.mesh) if mesh is None else mesh
    return _load(paths, config, made, rules, size, attention, by_size=mesh is None)


def open_sampler(config, workdir: Path) -> Sampler:
    """The sampler of a sample config: its weights, or the stages of the workdir."""
    root, suffix = (as_path(config.weights), ".safetensors") if config.weights else (workdir, "")
    stages = ("autoencoder",) if config.sampling.mode == "reconstruct" else STAGES
    paths = {name: root / f"{name}{suffix}" for name in stages}
    size = config.data.height, config.data.width
    mesh, by_size = make_mesh(config.mesh), is_unset(config.mesh)
    sampler = _load(paths, config, mesh, config.rules, size, config.attention, by_size)
    if config.sampling.executable:
        sampler.keep_executables(config.sampling.executable)
    if config.data.frames != (frames := sampler.autoencoder.clip_shape[0]):
        raise UserError("data.frames", config.data.frames, f"the weights are for {frames}", "use that")
    return sampler


def _check_size(size: Size, trained: Trained):
    sizes = sizes_of(trained.config.data)
    if size not in sizes:
        side = int(size[0] in (height for height, _ in sizes))
        known = " or ".join(str(known[side]) for known in sizes if side == 0 or known[0] == size[0])
        raise UserError(f"data.{('height', 'width')[side]}", size[side], f"the weights are for {known}", "use that")


def _load(paths: dict[str, Path], config, mesh, rules, size: Size | None, attention: str, by_size: bool) -> Sampler:
    """Read the stages, autoencoder first, straight into their shards, in the dtype that a sample config says."""
    stages, dtype, pretrained = {}, config.sampling.dtype, config.pretrained.copy_and_resolve_references()
    pretrained.dtype = dtype or pretrained.dtype

    def shardings(config, metadata):
        if config.stage == "autoencoder":
            stage = AutoencoderStage(config, space=stated_space(metadata.vae))
        else:
            stage = denoiser_stage(config, metadata, stages["autoencoder"])
        return abstract(stage.init, mesh, rules)

    for name, path in paths.items():
        stages[name] = load_trained(path, name, shardings, dtype)
    if size:
        _check_size(size, stages["autoencoder"])
    rounded = dtype not in ("", "float32")
    whole = partial(load_trained, paths["autoencoder"], "autoencoder") if rounded else None
    return assemble(stages, pretrained, mesh, rules, size, attention, by_size, dtype, whole)


def assemble(
    stages: dict[str, Trained], pretrained, mesh, rules, size: Size | None = None, attention: str = "auto",
    by_size: bool = False, dtype: str = "", whole: Callable[[], Trained] | None = None,
) -> Sampler:  # fmt: skip
    """The sampler of trained stages that lie on the mesh, and of the parts of a config's `pretrained` group.

    by_size: as of Sampler. dtype: in which all of them were read. whole() -> the autoencoder as it was trained, where
    that is another one.
    """
    shardings, trained = partial(abstract, mesh=mesh, rules=rules), stages["autoencoder"]
    space = open_space(pretrained, trained.metadata.vae, shardings)
    size = size or sizes_of(trained.config.data)[0]
    autoencoder = FrozenAutoencoder(trained.config, trained.params, space).resized(*size)
    params = {"autoencoder": autoencoder.params}
    denoisers, statistics, conditions, class_names, tokenizer = {}, {}, None, (), None
    for name in ("content", "motion"):
        if name not in stages:
            continue
        metadata = stages[name].metadata
        if not belongs(metadata, trained, whole and (lambda: whole().params)):
            problem = "this stage was trained with another autoencoder"
            raise UserError("weights", name, problem, "give the three stages of one run")
        if conditioned_on(metadata) != conditioned_on(stages["content"].metadata):
            problem = "its classes or text encoder differ from the content stage's"
            raise UserError("weights", name, problem, "use stages of one run")
        denoisers[name] = denoiser_stage(stages[name].config, metadata, trained, size)
        params[name] = stages[name].params
        statistics[name] = jax.device_put(denoisers[name].frozen["statistics"], replicated(mesh))
    if denoisers:
        class_names = stages["content"].metadata.class_names
        conditions, tokenizer = _open_conditions(stages["content"].metadata, pretrained, shardings)
        params["conditions"] = conditions.params
    digests = {name: stage.metadata.digest for name, stage in stages.items()}
    return Sampler(
        autoencoder,
        denoisers,
        statistics,
        params,
        conditions,
        class_names,
        tokenizer,
        mesh,
        rules,
        attention,
        digests,
        dtype,
        by_size,
    )


def _open_conditions(metadata: Metadata, pretrained, shardings) -> tuple:
    """-> (Classes or Texts, the tokenizer of the latter)."""
    if metadata.text_encoder is None:
        return Classes(len(metadata.class_names)), None
    for part in filter(None, (metadata.image_model, metadata.text_encoder)):
        check_same(pretrained.path, part, "the content stage was trained with")
    return load_texts(pretrained, shardings)


def conditioned_on(metadata: Metadata) -> dict | tuple[str, ...]:
    """What must be the same in two diffusion stages that sample together."""
    return metadata.text_encoder.identity() if metadata.text_encoder else metadata.class_names


def denoiser_stage(config, metadata: Metadata, autoencoder: Trained, size: Size | None = None):
    """The content or motion stage of a trained one's config and metadata, without parameters."""
    frozen = FrozenAutoencoder(autoencoder.config, None, stated_space(autoencoder.metadata.vae))
    frozen = frozen.resized(*size) if size else frozen
    conditions = stated_conditions(len(metadata.class_names), metadata.text_encoder)
    return diffusion_stage(config, frozen, conditions, metadata.statistics, metadata.image_model)
