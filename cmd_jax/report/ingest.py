"""What `cmd-jax ingest` tells: how far it is, and in the end what went into the dataset and what did not."""

import collections
import itertools
import threading
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cmd_jax.data.codecs import decoded, video_name
from cmd_jax.data.examples import parse, text_of
from cmd_jax.data.records import Records
from cmd_jax.files import write_json
from cmd_jax.ingest.plan import Plan
from cmd_jax.report.gallery import Item, Section, write_gallery
from cmd_jax.report.video import film_strip, write_png

NOTE_EVERY = 30.0  # seconds, where the output is no terminal
SHOWN, NAMED = 12, 100  # clips with pictures, and quarantined files, on the page


class Note:
    """While clips are decoded: a bar on a terminal, else a line now and then. `clip` is called for each, by any thread.

    count: how many there will be.
    """

    def __init__(self, console: Console, count: int):
        self.console, self.count = console, count
        self.done, self.bad, self.begun, self.noted = 0, 0, time.monotonic(), time.monotonic()
        self.lock = threading.Lock()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=count)

    def __enter__(self) -> "Note":
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def clip(self, reason: str):
        """reason: why it is left out, or ""."""
        with self.lock:
            self.done, self.bad = self.done + 1, self.bad + bool(reason)
            now = time.monotonic()
            rate = self.done / max(now - self.begun, 1e-9)
            text = f"{rate:,.1f} clips/s" + (f", {self.bad:,} left out" if self.bad else "")
            self.bar.update(self.task, advance=1, description=text)
            if self.bar.disable and now > self.noted + NOTE_EVERY:
                self.noted = now
                left = (self.count - self.done) / rate
                clock = f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}"
                self.console.print(f"{self.done:,} of {self.count:,} clips, {text}, {clock} left")


def summary_of(plan: Plan, facts: list[dict]) -> dict:
    """What went in and what did not, as JSON."""
    columns = ([n for fact in facts for n in fact[key]] for key in ("lengths", "whole", "seconds"))
    lengths, whole, seconds = map(np.array, columns)
    labels = collections.Counter(np.asarray(plan.entries.label)[plan.used(facts)].tolist())
    return {
        "split": plan.split,
        "plan": plan.id,
        "source": plan.root or plan.fields["source"],
        "cut": plan.cut._asdict(),
        "clips": len(lengths),
        "listed": len(plan.entries),
        "absent": plan.fields["absent"],
        "shards": len(facts),
        "bytes": sum(fact["bytes"] for fact in facts),
        "frames": spread(lengths) | {"of whole clips": int(whole.sum())},
        "cut_to_their_middle": int((whole > lengths).sum()),
        "seconds": spread(seconds),
        "classes": {name: labels[i] for i, name in enumerate(plan.class_names)},
        "without_class": labels[-1],
        "quarantined": dict(sorted(plan.left_out(facts).items())),
        "shard_seconds": sum(fact["wall"] for fact in facts),
        "cpu_seconds": sum(fact["cpu"] for fact in facts),
    }


def spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"total": 0}
    kinds = {"total": np.sum, "least": np.min, "median": np.median, "most": np.max}
    return {name: round(of(values).item(), 3) for name, of in kinds.items()}


def report(plan: Plan, facts: list[dict], out: Path, console: Console):
    """Print it, and write OUT/ingest-SPLIT.json and OUT/ingest-SPLIT.html, a page with some clips from the shards."""
    summary = summary_of(plan, facts)
    name = f"ingest-{plan.split}"
    write_json(out / f"{name}.json", summary)
    sections = [clips_section(plan, facts, out, name), numbers_section(summary)]
    if summary["quarantined"]:
        sections.append(quarantine_section(summary["quarantined"]))
    write_gallery(out / f"{name}.html", f"{out.name}: split {plan.split}", sections, note=str(plan.folder))
    frames, left = summary["frames"], len(summary["quarantined"])
    console.print(
        f"{summary['clips']:,} clips of {frames['total']:,} frames, {summary['bytes'] / 2**20:,.1f} MiB, "
        f"{left:,} files left out: {out / name}.html"
    )
    if cut := summary["cut_to_their_middle"]:
        console.print(f"{cut:,} clips were longer than ingest.frames={plan.cut.frames}, and cut to their middle")


def clips_section(plan: Plan, facts: list[dict], out: Path, name: str) -> Section:
    """First, middle and last frame of some clips, from all over the split."""
    sizes, counts, digests = ([fact[name] for fact in facts] for name in ("bytes", "records", "sha256"))
    records = Records([plan.shards.path(k) for k in range(len(facts))], sizes, counts, digests)
    items, cut = [], plan.cut
    lengths, buckets = ([n for fact in facts for n in fact[key]] for key in ("lengths", "buckets"))
    for place in sorted({*np.linspace(0, len(records) - 1, min(SHOWN, len(records))).astype(int).tolist()}):
        record, count = parse(records[place]), lengths[place]
        which = sorted({0, count // 2, count - 1})
        video, size = record[video_name(cut.codec, cut.buckets)], cut.sizes[buckets[place]]
        path = f"{name}/{place:08d}.png"
        write_png(out / path, film_strip(decoded(video, cut.codec, count, size, which)))
        label, texts = record["label"][0], [*map(text_of, record["texts"])]
        caption = texts[0] if texts else plan.class_names[label] if label >= 0 else ""
        extra = {"": text_of(record["name"][0]), "frames": count, "fps": record["fps"][0]}
        items.append(Item(caption, image=path, extra=extra))
    return Section("Clips", items, "first, middle and last frame of some, as they lie in the shards")


def numbers_section(summary: dict) -> Section:
    rows = [("clips", summary["clips"]), ("listed", summary["listed"]), ("left out", len(summary["quarantined"]))]
    rows += [(f"{what}, {kind}", value) for what in ("frames", "seconds") for kind, value in summary[what].items()]
    rows += [("MiB", round(summary["bytes"] / 2**20, 1)), ("shards", summary["shards"])]
    rows += [("seconds of the CPU", round(summary["cpu_seconds"], 1))]
    return Section("Numbers", (), table=[("", ""), *rows])


def quarantine_section(bad: dict[str, str]) -> Section:
    rows = [*itertools.islice(bad.items(), NAMED)]
    more = f": the first {NAMED} of {len(bad):,}; all are in the JSON file" if len(bad) > NAMED else ""
    return Section(f"Left out{more}", (), table=[("file", "why"), *rows])
