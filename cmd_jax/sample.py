"""The reverse half of CMD: class -> content frame -> motion latent -> video, one jitted program (paper section 3.3)."""

import contextlib
import os
import shutil
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from cmd_jax.checkpoint import Trained, load_trained, versions, whole, write_json
from cmd_jax.config import STAGES, to_json
from cmd_jax.data.pipeline import local_rows, to_global, video_reader
from cmd_jax.data.sources import open_source
from cmd_jax.data.video import fit
from cmd_jax.diffusion.flow import Flow
from cmd_jax.diffusion.guidance import check_guidance
from cmd_jax.diffusion.schedules import check_count
from cmd_jax.distributed import is_leader, leader_first
from cmd_jax.errors import UserError, choose, nearest
from cmd_jax.evaluation import shapes_oracle
from cmd_jax.evaluation.reconstruction import psnr
from cmd_jax.models.autoencoder import Latents
from cmd_jax.report.gallery import Item, Section, write_gallery
from cmd_jax.report.video import film_strip, image_grid, to_uint8, video_grid, write_gif, write_mp4, write_png
from cmd_jax.runtime import StopRequest
from cmd_jax.sharding import batch_sharding, check_batch, make_mesh, partitioning, replicated
from cmd_jax.stages import DIFFUSION_STAGES, AutoencoderStage, FrozenAutoencoder, pixels
from cmd_jax.state import abstract

MODES = ("generate", "reconstruct", "vary-motion", "animate")


class Sampler:
    """The three trained stages, whose parameters lie on the mesh, and the jitted programs over them.

    A program maps a batch to {"video": [B, T, H, W, C] in [-1, 1], "content": [B, H, W, C], "motion": [B, T, h+w, K]},
    split over the mesh like the batch.
    Sample i draws from fold_in(key(seed), i) alone, so its video does not depend on the batch it is made in.
    """

    def __init__(self, stages: dict[str, Trained], config, mesh):
        self.mesh, self.rules, self.options, self.seed = mesh, config.rules, config.sampling, config.seed
        self.class_names = tuple(stages["content"].facts["class_names"]) if "content" in stages else ()
        guidance = check_guidance(self.options.guidance)
        self.guidance = None if guidance == 1.0 or not self.class_names else jnp.float32(guidance)
        trained = stages["autoencoder"]
        self.autoencoder = FrozenAutoencoder(trained.config, trained.params)
        self.params = {"autoencoder": self.autoencoder.params}
        self.statistics, self.denoisers = {}, {}
        for name in ("content", "motion"):
            if name not in stages:
                continue
            facts = stages[name].facts
            if facts["autoencoder"] != trained.facts["digest"]:
                problem = "this stage was trained with another autoencoder"
                raise UserError("weights", name, problem, "give the three stages of one run")
            if tuple(facts["class_names"]) != self.class_names:
                raise UserError("weights", name, "its classes differ from the content stage's", "use stages of one run")
            stage = denoiser_stage(stages[name].config, facts, trained.config)
            self._check_options(name, stage.process)
            self.denoisers[name], self.params[name] = stage, stages[name].params
            self.statistics[name] = jax.device_put(stage.frozen["statistics"], replicated(mesh))
        jit = partial(jax.jit, out_shardings=batch_sharding(mesh))
        self._programs = {name: jit(getattr(self, f"_{name}")) for name in ("generate", "animate", "reconstruct")}

    def _check_options(self, name, process):
        """Before anything is compiled, and by the names the user knows."""
        steps, solver = self.options[f"{name}_steps"], self.options[f"{name}_solver"]
        choose(f"sampling.{name}_solver", solver or process.solvers[0], process.solvers)
        if self.options.eta and (solver or process.solvers[0]) != "ddim":
            raise UserError("sampling.eta", self.options.eta, f"the {name} solver is not ddim", "set it to 0.0")
        # With the spacing "even" dpmpp steps to clean data from the timestep before the least noisy one.
        most = None if isinstance(process, Flow) else len(process.schedule) - (solver == "dpmpp")
        check_count(f"sampling.{name}_steps", steps, most)

    # Programs, pure functions of their arguments.

    def _draw(self, name, params, keys, label, content, guidance):
        """Content frames (content=None) or motion latents [B, ...], one key a sample."""
        stage, options = self.denoisers[name], self.options
        eta = {} if isinstance(stage.process, Flow) else {"eta": options.eta}
        steps, solver = options[f"{name}_steps"], options[f"{name}_solver"]
        return stage.sample(
            params[name], self.statistics[name], label, content, keys,
            guidance=guidance, steps=steps, solver=solver, **eta,
        )  # fmt: skip

    def _finish(self, params, content, motion):
        video = self.autoencoder.decode(params["autoencoder"], Latents(content, motion))
        return {"video": video, "content": content, "motion": motion}

    def _keys(self, key, batch):
        """-> (content keys [B], motion keys [B]). Samples of one "index" share the content key, not the motion key."""
        split = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)), out_axes=1)
        content, motion = split(batch["index"])
        return content, jax.vmap(jax.random.fold_in)(motion, batch["variant"])

    def _generate(self, params, batch, key, guidance):
        """Class labels -> content -> motion -> video."""
        content_keys, motion_keys = self._keys(key, batch)
        content = self._draw("content", params, content_keys, batch["label"], None, guidance)
        motion = self._draw("motion", params, motion_keys, batch["label"], content, guidance)
        return self._finish(params, content, motion)

    def _animate(self, params, batch, key, guidance):
        """Given content frames -> motion -> video."""
        _, motion_keys = self._keys(key, batch)
        motion = self._draw("motion", params, motion_keys, batch["label"], batch["content"], guidance)
        return self._finish(params, batch["content"], motion)

    def _reconstruct(self, params, batch):
        latents = self.autoencoder.encode(params["autoencoder"], batch)
        return {**self._finish(params, *latents), "original": pixels(batch["video"])}

    # Calls, which cut any number of samples into batches of one compiled size.

    def generate(self, batch: dict) -> dict:
        """{"label", "index", "variant"} int [N] -> host arrays of N samples."""
        return self._in_batches("generate", batch, jax.random.key(self.seed), self.guidance)

    def animate(self, batch: dict) -> dict:
        """As generate, with "content" float32 [N, H, W, C] in [-1, 1] given."""
        return self._in_batches("animate", batch, jax.random.key(self.seed), self.guidance)

    def reconstruct(self, batch: dict) -> dict:
        """{"video": uint8 [N, T, H, W, C]} -> reconstructions, and the clips themselves as "original"."""
        return self._in_batches("reconstruct", batch)

    def _in_batches(self, name: str, batch: dict, *arguments) -> dict:
        program, size, parts = self._programs[name], self.options.batch_size, []
        count = len(next(iter(batch.values())))
        rows = local_rows(size, self.mesh)
        for start in range(0, count, size):
            # The last batch is filled up by repeating its last sample; what that gives is dropped.
            picks = {row: min(start + row, count - 1) for row in rows}
            examples = {row: {k: values[i] for k, values in batch.items()} for row, i in picks.items()}
            with partitioning(self.mesh, self.rules):
                out = program(self.params, to_global(examples, size, self.mesh), *arguments)
            parts.append(jax.tree.map(whole, out))
        return {k: np.concatenate([part[k] for part in parts])[:count] for k in parts[0]}


def denoiser_stage(config, facts: dict, autoencoder_config):
    """The content or motion stage of a trained one's config and facts, without parameters."""
    autoencoder = FrozenAutoencoder(autoencoder_config, {"autoencoder": None})
    return DIFFUSION_STAGES[config.stage](config, autoencoder, len(facts["class_names"]), facts["statistics"])


def load_stages(config, workdir: Path, mesh) -> dict[str, Trained]:
    """What a sample config names, shipped weights or the stages of the workdir, read straight into its shards."""
    names = ("autoencoder",) if config.sampling.mode == "reconstruct" else ("autoencoder", "content", "motion")
    root, suffix = (Path(config.weights), ".safetensors") if config.weights else (workdir, "")
    stages = {}

    def place(trained_config, facts):
        if trained_config.stage == "autoencoder":
            stage = AutoencoderStage(trained_config)
        else:
            stage = denoiser_stage(trained_config, facts, stages["autoencoder"].config)
        return abstract(stage.init, mesh, config.rules)

    for name in names:
        stages[name] = load_trained(root / f"{name}{suffix}", name, place)
    return stages


def load_sampler(config, workdir: Path) -> Sampler:
    """The sampler of a sample config: shipped weights, or the stages of the workdir."""
    mesh = make_mesh(config.mesh)
    check_batch("sampling.batch_size", config.sampling.batch_size, mesh)
    stages = load_stages(config, workdir, mesh)
    shape = stages["autoencoder"].config.data
    for side in ("frames", "height", "width"):
        if config.data[side] != shape[side]:
            raise UserError(f"data.{side}", config.data[side], f"the weights are for {shape[side]}", "use that")
    return Sampler(stages, config, mesh)


def choose_labels(wanted: str, class_names: tuple[str, ...], count: int) -> np.ndarray:
    """`count` labels from names or numbers separated by commas, or from all classes in turn -> int32 [count]."""
    words = [w.strip() for w in wanted.split(",") if w.strip()]
    if not class_names:
        if words:
            raise UserError("sampling.classes", wanted, "the model was trained without classes", "leave it empty")
        return np.zeros(count, np.int32)
    labels = []
    for word in words:
        if word in class_names:
            labels.append(class_names.index(word))
        elif word in (numbers := [str(i) for i in range(len(class_names))]):
            labels.append(numbers.index(word))
        else:
            near = ", ".join(nearest(word, class_names, 3))
            raise UserError("sampling.classes", word, "no such class", f"did you mean one of: {near}")
    if len(labels) > count:
        problem = f"{len(labels)} classes, but only {count} videos"
        raise UserError("sampling.classes", wanted, problem, f"set sampling.num={len(labels)}")
    return np.resize(np.array(labels or range(len(class_names)), np.int32), count)


def _caption(sampler: Sampler, label: int) -> str:
    return sampler.class_names[label] if label < len(sampler.class_names) else "unlabelled"


def read_image(path: str, height: int, width: int) -> np.ndarray:
    """An image file, centre-cropped and resized -> float32 [H, W, 3] in [-1, 1]."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            array = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        remedy = "give a PNG or JPEG file of 8 bits a channel"
        raise UserError("sampling.image", path, f"cannot be read as an image ({e})", remedy) from e
    return fit(array[None], height, width)[0].astype(np.float32) / 127.5 - 1


def read_clips(config, workdir: Path, count: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """`count` clips from all over the data, or all there are -> (uint8 [N, T, H, W, 3], labels [N], class names)."""
    source = leader_first(lambda: open_source(config.data, cache=workdir / "probe.json"))
    read = video_reader(source)
    picks = np.linspace(0, len(source), min(count, len(source)), endpoint=False).astype(int)
    clips = [read(int(i), np.random.default_rng((config.seed, int(i)))) for i in picks]
    return np.stack([c["video"] for c in clips]), np.array([c["label"] for c in clips]), tuple(source.class_names)


def make_samples(sampler: Sampler, config, workdir: Path) -> tuple[dict, np.ndarray, list[str]]:
    """What `sampling.mode` asks for -> (host arrays, labels [N], captions)."""
    options = config.sampling
    choose("sampling.mode", options.mode, MODES)
    if options.mode == "reconstruct":
        videos, labels, names = read_clips(config, workdir, options.num)
        return sampler.reconstruct({"video": videos}), labels, [names[i] if i < len(names) else "" for i in labels]
    labels, content = choose_labels(options.classes, sampler.class_names, options.num), None
    if options.mode == "animate":
        if options.image:
            image = read_image(options.image, config.data.height, config.data.width)
            content = np.repeat(image[None], options.num, axis=0)
        else:
            videos, own, names = read_clips(config, workdir, options.num)
            content = sampler.reconstruct({"video": videos})["content"]
            if not options.classes and names != sampler.class_names:
                problem = "the clips' classes are not the model's"
                raise UserError("data", config.data.root or config.data.source, problem, "name sampling.classes")
            labels = labels[: len(videos)] if options.classes else own
    index = np.arange(len(labels), dtype=np.int32)
    batch = {"index": index, "variant": np.zeros_like(index), "label": labels.astype(np.int32)}
    out = sampler.generate(batch) if content is None else sampler.animate({**batch, "content": content})
    captions = [_caption(sampler, label) for label in labels]
    if options.mode == "vary-motion":
        # Each content frame is drawn once: drawn again in another row of a batch, its last bits could differ.
        batch = {name: np.repeat(values, options.motions) for name, values in batch.items()}
        batch["variant"] = np.tile(np.arange(options.motions, dtype=np.int32), len(labels))
        out = sampler.animate({**batch, "content": np.repeat(out["content"], options.motions, axis=0)})
        captions = [f"{caption}, motion {v + 1}" for caption in captions for v in range(options.motions)]
    return out, batch["label"], captions


class OutputFolder:
    """A folder that appears under its name only when everything in it is written; a taken name gets a number.

    final: that folder, known when all is written.
    """

    def __init__(self, workdir: Path, name: str):
        if not name or Path(name).name != name or name in (".", "..", *STAGES):
            remedy = f"use for example samples, and none of {', '.join(STAGES)}"
            raise UserError("sampling.output", name, "not the name of a new folder in the workdir", remedy)
        self.workdir, self.name, self.final = workdir, name, None
        self.path = workdir / f".tmp-{os.getpid()}-{name}"

    def remove(self):
        """What is written so far."""
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Path:
        try:
            self.remove()
            self.path.mkdir(parents=True)
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", e)
            raise UserError("workdir", self.workdir, f"cannot be written ({reason})", "give another folder") from e
        return self.path

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.remove()
            return
        number, self.final = 2, self.workdir / self.name
        while self.final.exists():
            number, self.final = number + 1, self.workdir / f"{self.name}-{number}"
        self.path.rename(self.final)


def write_samples(folder: Path, out: dict, captions: list[str], title: str, options, table=None, note: str = ""):
    """mp4, gif and content frame of every sample, overview grids, samples.json and index.html."""
    items, records = [], []
    for i, caption in enumerate(captions):
        video, content = to_uint8(out["video"][i]), to_uint8(out["content"][i])
        if "original" in out:
            video = np.concatenate([to_uint8(out["original"][i]), video], axis=2)
        write_mp4(folder / f"{i:04d}.mp4", video, fps=options.fps)
        write_gif(folder / f"{i:04d}.gif", video, fps=options.fps)
        write_png(folder / f"{i:04d}_content.png", content)
        items.append(Item(caption, video=f"{i:04d}.mp4", image=f"{i:04d}_content.png"))
        records.append({"index": i, "caption": caption, "video": f"{i:04d}.mp4", "content": f"{i:04d}_content.png"})
    columns = max(1, round(len(captions) ** 0.5))
    videos = to_uint8(out["video"])
    write_gif(folder / "grid.gif", video_grid(videos, columns), fps=options.fps)
    write_png(folder / "content_grid.png", image_grid(to_uint8(out["content"]), columns))
    write_png(folder / "grid.png", image_grid(np.stack([film_strip(v) for v in videos]), columns=1))
    section = {"title": title, "note": note, "table": table, "items": records}
    write_json(folder / "samples.json", section)
    write_gallery(folder / "index.html", title, [Section(title, items, note=note, table=table)])


@contextlib.contextmanager
def writing(output: OutputFolder):
    """The output's folder on the process that writes it, None on the others; a signal to stop removes it."""
    with StopRequest("stopped by a signal; nothing was written") as stop:
        if not is_leader():
            yield None
            return
        stop.first(output.remove)
        with output as folder:
            yield folder


def sample(config, workdir: Path) -> Path:
    """The `sample` verb: write the samples of `sampling.mode` and their gallery; returns the folder.

    Of several processes the first one writes, and the others return None.
    """
    console, started = Console(quiet=not is_leader()), time.perf_counter()
    choose("sampling.mode", config.sampling.mode, MODES)
    output = OutputFolder(workdir, config.sampling.output)
    sampler = load_sampler(config, workdir)
    with writing(output) as folder:
        out, _, captions = make_samples(sampler, config, workdir)
        if folder is None:
            return None
        note = f"mode {config.sampling.mode}, guidance {config.sampling.guidance}, seed {config.seed}"
        write_samples(folder, out, captions, f"CMD: {config.sampling.mode}", config.sampling, note=note)
        _write_summary(folder, config, started, samples=len(captions))
    console.print(f"{len(captions)} videos: {output.final}/index.html", soft_wrap=True)
    return output.final


def evaluate(config, workdir: Path) -> dict:
    """The `evaluate` verb: PSNR of reconstructed clips of data.split, and attributes of generated videos of shapes.

    Prints them with counts and chance levels; writes them to summary.json beside the videos it shows.
    """
    console, started = Console(quiet=not is_leader()), time.perf_counter()
    options = config.sampling
    if options.mode != "generate":
        raise UserError("sampling.mode", options.mode, "evaluate scores generated videos", "use sampling.mode=generate")
    output = OutputFolder(workdir, options.output)
    sampler = load_sampler(config, workdir)
    with writing(output) as folder:
        videos, _, _ = read_clips(config, workdir, config.evaluation.clips)
        decoded = sampler.reconstruct({"video": videos})
        decibels = psnr(decoded["video"], decoded["original"])
        reconstruction = {"mean": float(decibels.mean()), "clips": len(decibels), "split": config.data.split}
        scores = {"reconstruction_psnr": reconstruction}
        which = "held-out" if config.data.split == "test" else config.data.split
        console.print(f"{which} reconstruction: {decibels.mean():.2f} dB PSNR over {len(decibels)} clips")

        labels = choose_labels(options.classes, sampler.class_names, config.evaluation.videos)
        index = np.arange(len(labels), dtype=np.int32)
        timed = time.perf_counter()
        out = sampler.generate({"index": index, "variant": np.zeros_like(index), "label": labels})
        seconds = time.perf_counter() - timed
        table = [["score", "value", "chance"], ["reconstruction PSNR", f"{decibels.mean():.2f} dB", ""]]
        if config.data.source == "shapes":
            read = shapes_oracle.score(to_uint8(out["video"]), labels, list(sampler.class_names))
            scores["attributes"] = read
            for name in ("color", "direction", "shape", "all"):
                share = f"{read[name]['correct']}/{read['count']} = {read[name]['accuracy']:.1%}"
                table.append([name, share, f"{read[name]['chance']:.1%}"])
        _print_table(console, table)
        shown = config.evaluation.shown
        captions = [_caption(sampler, label) for label in labels[:shown]]
        title = f"CMD, {Path(config.weights).name or 'trained here'}"
        note = f"guidance {options.guidance}, seed {config.seed}, {len(labels)} videos in {seconds:.0f} s, compiled"
        if folder is None:
            return scores
        write_samples(folder, {k: v[:shown] for k, v in out.items()}, captions, title, options, table, note)
        _write_summary(folder, config, started, samples=len(labels), sampling_seconds=round(seconds, 1), scores=scores)
    console.print(f"scores: {output.final}/summary.json\nvideos: {output.final}/index.html", soft_wrap=True)
    return scores


def _print_table(console: Console, rows: list[list[str]]):
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def _write_summary(folder: Path, config, started: float, **values):
    (folder / "config.json").write_text(to_json(config) + "\n")
    write_json(
        folder / "summary.json",
        {
            "wall_seconds": round(time.perf_counter() - started, 1),
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "platform": jax.default_backend(),
            "seed": config.seed,
            "versions": versions(),
            **values,
        },
    )
