"""`cmd-jax doctor --data`: what a config's clips are, how fast they come, and the first batch as a picture."""

import time
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from cmd_jax import defaults
from cmd_jax.config import load
from cmd_jax.data.ahead import Shelf
from cmd_jax.data.pipeline import BatchPlan, batches, video_reader
from cmd_jax.data.sources import Source, open_source
from cmd_jax.data.splits import Split, split_of
from cmd_jax.data.store import LatentStore, StoredClips, open_store
from cmd_jax.errors import UserError
from cmd_jax.files import as_path, parse_json, read_json
from cmd_jax.interop.clip_tokenizer import Tokenizer
from cmd_jax.prepare import open_clips, store_folder
from cmd_jax.report.console import make_console
from cmd_jax.report.training import LINE
from cmd_jax.report.video import PAPER, enlarge, image_grid, write_png
from cmd_jax.sharding import make_mesh
from cmd_jax.verbs.doctor import FILE_WIDTH

SECONDS = 3.0  # of reading, after the first batch
ROWS = 64  # clips of a batch here, at most: of 256 large ones two would take minutes
LOOKED_AT = 4  # batches, whose values are looked at
SHOWN_CLIPS, SHOWN_FRAMES = 8, 8
MOST_SIDE = 256  # pixels; of larger frames every n-th is shown
FOREVER = 10**9  # steps
TEXTS = 2000  # clips whose captions are looked at


def doctor_data(specification: str, overrides: dict[str, str], workdir: Path | None) -> int:
    """Print what the data of a training config holds and how fast this machine reads it, and write the clips of the
    first batch to WORKDIR/data-STAGE.png, or into the present folder -> 0."""
    config, console = load(specification, overrides), make_console(file_width=FILE_WIDTH)
    if config.stage == "sample":
        raise UserError("config", "sample", "`doctor --data` looks at what a stage is trained on", "use FILE:STAGE")
    source = open_clips(config, workdir) if workdir else open_source(config.data)
    split = split_of(config.data, source)
    tokenizer = Tokenizer(as_path(config.pretrained.path) / "tokenizer") if config.pretrained.path else None

    table = Table("data", "")
    rows = [] if isinstance(source, StoredClips) else clip_rows(source, split) + text_rows(source, tokenizer)
    read, examples, shelf = video_reader(source), split.train, source.shelf
    name_of = lambda index: source.name(index % len(source))  # noqa: E731
    if config.latents.starts:
        store = open_store(store_folder(config, workdir or Path.cwd()))
        stored = examples_in(store, split) if store else examples[:0]
        rows.append(
            ("stored latents", f"{len(stored):,} of clips to train on" if store else "none yet: clips are read")
        )
        if len(stored):
            read, examples, shelf, name_of = store.read, stored, store.shelf, store.name
    rate, seen = read_some(config, read, examples, shelf)
    rows += rate_rows(config, rate, workdir and workdir / config.stage) + value_rows(seen)
    for name, told in rows:
        table.add_row(name, told)
    console.print(table, soft_wrap=False)

    path = (workdir or Path.cwd()) / f"data-{config.stage}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, picture(seen[0]))
    console.print(f"{path}: the first batch, a clip a row")
    ids, labels = (seen[0][name][:SHOWN_CLIPS].tolist() for name in ("id", "label"))
    for row, (index, label) in enumerate(zip(ids, labels, strict=True), 1):
        texts = ()
        if source.has_texts and not isinstance(source, StoredClips):
            texts = source.texts(index % len(source))
        named = [source.class_names[label]] if label < len(source.class_names) else []
        console.print(f"{row}: " + ", ".join([name_of(index), *named, *(repr(text) for text in texts[:1])]))
    return 0


def examples_in(store: LatentStore, split: Split) -> np.ndarray:
    """The examples of training that are in the store by now, int [n], sorted."""
    missing = {*store.missing()}
    parts = [store.examples_of(k) for k in range(store.shards.count) if k not in missing]
    return np.intersect1d(split.of_examples(len(store)).train, np.concatenate([*parts, np.arange(0)]))


def rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def spread(values: np.ndarray, unit: str) -> str:
    return f"{values.min():,} to {values.max():,} {unit}, median {np.median(values):,.0f}"


def clip_rows(source: Source, split: Split) -> list[tuple[str, str]]:
    """How many, how long, and of which classes."""
    told = f"{len(source):,}"
    if len(split.validation):
        told += f", of which {len(split.validation):,} are held out"
    rows = [("clips", told), ("frames of a clip", spread(source.lengths, "frames"))]
    if source.bad:
        name, reason = next(iter(sorted(source.bad.items())))
        rows.append(("left out", f"{len(source.bad):,}, the first: {name} {reason}"))
    names = source.class_names
    counts = np.bincount(source.labels[split.train], minlength=len(names) + 1)
    *counts, none = counts.tolist()
    if names:
        rarest, commonest = int(np.argmin(counts)), int(np.argmax(counts))
        told = f"{len(names):,}, of {counts[rarest]:,} clips ({names[rarest]}) to {counts[commonest]:,} clips"
        empty = sum(count == 0 for count in counts)
        told += f" ({names[commonest]}); {empty:,} have none to train on"
        rows.append(("classes", told))
    if none:
        rows.append(("without a class", f"{none:,}"))
    return rows


def text_rows(source: Source, tokenizer: Tokenizer | None) -> list[tuple[str, str]]:
    if not source.has_texts:
        return []
    clips = np.linspace(0, len(source), min(TEXTS, len(source)), endpoint=False).astype(int).tolist()
    texts = [text for clip in clips for text in source.texts(clip)]
    told = f"{len(texts):,} of {len(clips):,} clips: "
    if tokenizer is None:
        return [("captions", told + spread(np.array([len(text.split()) for text in texts]), "words"))]
    lengths, most = tokenizer.lengths(texts), tokenizer.max_length
    return [("captions", f"{told}{spread(lengths, 'tokens')}; {np.sum(lengths > most):,} are cut after {most}")]


def read_some(config, read, examples: np.ndarray, shelf: Shelf | None) -> tuple[float, list[dict]]:
    """The first batches, or the first ROWS rows of them -> (clips a second, the values of the first ones)."""
    size = min(config.train.batch_size, ROWS, len(examples))
    mesh = make_mesh(defaults.stage(config.stage).mesh, jax.local_devices()[:1])
    plan = BatchPlan(examples, size, config.seed)
    data = batches(
        read, plan, mesh, start=0, stop=FOREVER,
        threads=config.data.threads, prefetch=config.data.prefetch, shelf=shelf,
    )  # fmt: skip
    seen, count, begun = [next(data)], 0, time.perf_counter()
    for count, batch in enumerate(data, 1):  # noqa: B007
        seen += [batch] if len(seen) < LOOKED_AT else []
        if time.perf_counter() > begun + SECONDS:
            break
    rate = count * size / (time.perf_counter() - begun)
    data.close()
    return rate, [jax.tree.map(np.asarray, batch) for batch in seen]


def rate_rows(config, rate: float, folder: Path | None) -> list[tuple[str, str]]:
    """rate: clips a second that this machine reads. folder: of the stage, where a run may have told its own."""
    size, threads = config.train.batch_size, config.data.threads
    told = f"{rounded(rate)} clips/s by data.threads={threads}: {rounded(rate / size)} steps/s of {size} clips"
    rows = [("reading", told)]
    summary = folder / "summary.json" if folder else None
    like = {"steps_per_second?": (float, None), "processes?": int, ...: object}
    summary = read_json(summary, "workdir", like=like) if summary and summary.exists() else {}
    lines = metrics_of(folder / "metrics.jsonl") if folder else []
    steps = summary.get("steps_per_second") or (lines[-1]["steps_per_second"] if lines else None)
    if steps:
        processes = summary.get("processes", 1)
        told = f"{rounded(steps)} steps/s" + (
            f" by {processes} processes, each with its part of a batch" * (processes > 1)
        )
        factor = rate * processes / size / steps
        told += f"; reading is {rounded(factor)} times as fast" + ("" if factor > 1 else ": training waits for it")
        rows.append(("the last run", told))
    waits = [(line["data_wait"], 1 / line["steps_per_second"]) for line in lines if "data_wait" in line]
    if waits:
        shares, seconds = np.array(waits).T
        rows.append(("it waited for data", f"{np.average(shares, weights=seconds):.1%} of its time"))
    return rows


def metrics_of(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that tell a rate."""
    lines = path.read_text().splitlines() if path.exists() else []
    like = LINE | {"steps_per_second?": float, "data_wait?": float}
    records = [parse_json(line, "metrics", path, like=like) for line in lines if line.endswith("}")]
    return [record for record in records if record.get("steps_per_second", 0) > 0]


def value_rows(seen: list[dict]) -> list[tuple[str, str]]:
    """Range, mean and deviation of each array of pictures or latents in some batches."""
    rows = []
    for name, first in seen[0].items():
        if first.ndim > 2:
            x = np.concatenate([batch[name] for batch in seen]).astype(np.float32)
            shape = "x".join(map(str, first.shape[1:]))
            told = (
                f"{first.dtype} {shape}: {x.min():.4g} to {x.max():.4g}, mean {x.mean():.4g}, deviation {x.std():.4g}"
            )
            rows.append((name, told))
    return rows


def picture(batch: dict) -> np.ndarray:
    """Of videos uint8 [B,T,H,W,3] some frames, of latents [B,...,H,W,C] the first three channels, a clip a row:
    -> [H',W',3]."""
    arrays = [tiles_of(x[:SHOWN_CLIPS]) for x in batch.values() if x.ndim > 3]
    sides = [max(tiles.shape[axis] for tiles in arrays) for axis in (2, 3)]

    def filled_up(tiles):
        more = [(0, side - size) for side, size in zip(sides, tiles.shape[2:4], strict=True)]
        return np.pad(tiles, [(0, 0), (0, 0), *more, (0, 0)], constant_values=PAPER)

    tiles = np.concatenate([filled_up(tiles) for tiles in arrays], axis=1)
    return image_grid(enlarge(tiles.reshape(-1, *tiles.shape[2:]), None), columns=tiles.shape[1])


def tiles_of(x: np.ndarray) -> np.ndarray:
    """An array of a batch as pictures uint8 [B, n, H, W, 3]; latents from their least value to their greatest."""
    if x.dtype != np.uint8:
        x = x[..., np.arange(3) % x.shape[-1]].astype(np.float32)
        x = ((x - x.min()) / max(np.ptp(x), 1e-6) * 255).astype(np.uint8)
    if x.ndim == 4:
        x = x[:, None]
    frames = np.linspace(0, x.shape[1] - 1, min(SHOWN_FRAMES, x.shape[1])).round().astype(int)
    step = -(-min(x.shape[2:4]) // MOST_SIDE)
    return x[:, frames, ::step, ::step]
