"""Stores of latents: what the frozen parts of a stage make of clips, kept as shards that TFDS reads too.

A store lies in DIR/KIND/1.0.0, KIND being `vae` (frames as the VAE makes them) or `cmd` (content frames and motion
latents). Example e of its `clips` x `starts` is of clip e % clips, from a start that is drawn by (seed, 2, e). They lie
in the order in which a first epoch takes them, so that training can start when the first shards are there. `plan.json`
says what the values depend on, `order.npy` which example lies where, int32 [N], and `keys.npy` by what clips are held
out, uint64 [clips]; in the end `left_out.npy` has the examples that could not be read, int64. The rest is as in
records.py.
"""

import bisect
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from cmd_jax.cache import local
from cmd_jax.data.ahead import Shelf
from cmd_jax.data.claims import FileLocks, OneLease, alone
from cmd_jax.data.examples import example, parse, text_of
from cmd_jax.data.latents import LatentStatistics, Sums
from cmd_jax.data.packed import write_array
from cmd_jax.data.records import VERSION, Records, Shards, finished, write_dataset, write_shard
from cmd_jax.data.splits import Split
from cmd_jax.errors import UserError, brief
from cmd_jax.files import COUNT, each, is_remote, read_json, write_json

SPLIT = "train"
KINDS = {"autoencoder": "vae", "content": "cmd", "motion": "cmd"}  # stage -> the kind of store that it is trained on
PLAN = {
    "made_of": dict, "made_with": dict, "class_names": [str], "has_texts": bool, "clips": COUNT, "examples": COUNT,
    "held_out": COUNT, "shard": range(1, 2**31), "order": str,
    "arrays": {...: {"dtype": str, "shape": [COUNT]}},
}  # fmt: skip
LEFT_OUT = -1  # the label of a window that could not be read
STATISTICS_EXAMPLES = 10_000  # of a store's first shards: means come out to 1 % of a deviation
OTHER = "give another latents.store, or remove this one"


class LatentStore:
    """An opened store, complete or not. Any thread may read; what is not there yet is waited for.

    plan: as `PLAN`. order: int32 [N], the example of each place. The first plan["held_out"] places are of validation.
    """

    def __init__(self, folder: Path, plan: dict, order: np.ndarray):
        self.plan, self.order = plan, order
        self.shards = Shards(folder, SPLIT, -(-plan["examples"] // plan["shard"]))
        self.place = np.empty_like(order)
        self.place[order] = np.arange(len(order), dtype=order.dtype)
        self._files: dict[int, tuple[Records, list[int]]] = {}
        self._abandoned = threading.Event()
        self._claims = OneLease(folder) if is_remote(folder) else FileLocks(self.shards.work)
        self.id = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return self.plan["examples"]

    @property
    def complete(self) -> bool:
        return (self.shards.folder / "dataset_info.json").exists()

    def examples_of(self, k: int) -> np.ndarray:
        """The examples of shard k in their order."""
        return self.order[k * self.plan["shard"] : (k + 1) * self.plan["shard"]]

    def shards_of(self, examples) -> np.ndarray:
        """The shards in which examples lie, each once, sorted."""
        return np.unique(self.place[np.asarray(examples)] // self.plan["shard"])

    def facts(self, k: int) -> dict | None:
        """Of shard k, None until it is finished."""
        facts = finished(self.shards, k)
        if facts is not None and facts.get("plan") != self.id:
            raise UserError("latents.store", self.shards.facts_path(k), "is of another store's shard", OTHER)
        return facts

    def all_facts(self) -> list[dict | None]:
        """`facts` of all shards."""
        return each(self.shards.folder, self.facts, range(self.shards.count))

    def missing(self) -> list[int]:
        """The shards that are not finished. UserError for a finished one whose file is damaged."""
        return [k for k, facts in enumerate(self.all_facts()) if facts is None]

    # Reading.

    def record(self, index: int) -> dict[str, list]:
        """The features of an example."""
        k, row = divmod(int(self.place[index]), self.plan["shard"])
        records, left_out = self._records(k)
        return parse(records[row - bisect.bisect(left_out, row)])

    def read(self, index: int, rng=None) -> dict[str, np.ndarray]:
        """Example `index` as an example of a batch: its arrays, and "label" int32 []."""
        record = self.record(index)
        arrays = {
            name: np.frombuffer(record[name][0], like["dtype"]).reshape(like["shape"])
            for name, like in self.plan["arrays"].items()
        }
        return arrays | {"label": np.int32(record["label"][0])}

    def name(self, index: int) -> str:
        """Of an example's clip."""
        return text_of(self.record(index)["name"][0])

    def _records(self, k: int) -> tuple[Records, list[int]]:
        return self._files.get(k) or self._open(k)

    def _open(self, k: int) -> tuple[Records, list[int]]:
        while (facts := self.facts(k)) is None:
            if self._abandoned.wait(self.poll):
                raise RuntimeError("nobody fills the store any more")
        records = Records([self.shards.path(k)], [facts["bytes"]], [facts["records"]], [facts["sha256"]])
        return self._files.setdefault(k, (records, facts["left_out"]))

    @property
    def poll(self) -> float:
        """Seconds between looks for what others make."""
        return self._claims.poll

    @property
    def shelf(self) -> Shelf | None:
        """Of a complete store in a bucket; of one that is being filled the next shards are not there yet."""
        if not is_remote(self.shards.folder) or not self.complete:
            return None
        return Shelf(
            lambda: [facts["bytes"] for facts in self.all_facts()],
            lambda index: int(self.place[index]) // self.plan["shard"],
            lambda k: self._records(k)[0].fetch(0),
        )

    def abandon(self):
        """Nothing will be filled in any more: readers that wait for it raise."""
        self._abandoned.set()
        self._claims.release()

    def split_of(self, clips: Split) -> Split:
        """The examples of a split of clips, of a complete store without those that were left out."""
        parts = clips.of_examples(len(self))
        if self.complete:
            left_out = read_array(self.shards.folder / "left_out.npy")
            parts = Split(*(part[~np.isin(part, left_out)] for part in parts))
        return parts

    # Writing.

    def claim(self, wanted: Iterable[int], count: int) -> tuple[dict[int, object], list[int]]:
        """The first `count` of these shards that nobody else makes -> ({shard: a lock to close}, those found finished).

        Several trainings may fill one store at a time; see `claims`.
        """
        return self._claims.claim(wanted, count, lambda k: self.facts(k) is not None)

    def write(
        self,
        k: int,
        batches: Iterable[dict[str, np.ndarray]],
        name_of,
        reasons: Mapping[str, str] = MappingProxyType({}),
    ) -> dict:
        """Write shard k -> its facts.

        batches: {name: [n, ...]} of its examples in their order. name_of(clip). reasons: name -> why a clip is left
        out, which the label LEFT_OUT says.
        """
        clips, held_out = self.plan["clips"], self.plan["held_out"] - k * self.plan["shard"]
        arrays, sums, left_out, bad = self.plan["arrays"], {}, [], {}

        def records() -> Iterator[bytes]:
            examples = enumerate(self.examples_of(k).tolist())
            for batch in batches:
                for row, (place, index) in zip(range(len(batch["label"])), examples, strict=False):
                    clip = name_of(index % clips)
                    if batch["label"][row] == LEFT_OUT:
                        left_out.append(place)
                        bad[clip] = reasons[clip]
                        continue
                    values = {name: self._stored(name, batch[name][row]) for name in arrays}
                    for name, x in values.items() if place >= held_out else ():
                        if x.dtype.kind == "f":
                            sums.setdefault(name, Sums()).add(x)
                    told = {"label": int(batch["label"][row]), "name": clip}
                    yield example({name: x.tobytes() for name, x in values.items()} | told)

        def facts() -> dict:
            return {
                "plan": self.id,
                "sums": {n: x.as_json() for n, x in sums.items()},
                "left_out": left_out,
                "bad": bad,
            }

        written = write_shard(self.shards, k, records(), facts)
        self._claims.forget(k)
        return written

    def _stored(self, name: str, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values, self.plan["arrays"][name]["dtype"])
        if np.isinf(stored).any() and not np.isinf(values).any():
            problem = f"{name} reaches {np.abs(values).max():.3g}, more than it holds"
            raise UserError("latents.store_dtype", stored.dtype, problem, "use float32")
        return stored

    def finish(self):
        """Write what makes a dataset of TFDS of it, once all shards are finished."""
        if not self.complete:
            self._finish()
        self._claims.release()

    def _finish(self):
        facts = self.all_facts()
        left_out = [self.examples_of(k)[fact["left_out"]] for k, fact in enumerate(facts)]
        write_array(self.shards.folder / "left_out.npy", np.concatenate(left_out).astype(np.int64))
        sizes = [fact["records"] for fact in facts], sum(fact["bytes"] for fact in facts)
        told = {name: self.plan[name] for name in ("made_of", "made_with", "class_names", "clips", "held_out")}
        description = "Latents of clips, made by cmd-jax."
        write_dataset(
            self.shards.folder, features_of(self.plan["arrays"]), {SPLIT: sizes}, description=description, metadata=told
        )

    # Statistics.

    def measured(self) -> range:
        """The shards over which statistics go: the first, until they hold STATISTICS_EXAMPLES examples of training.

        The order is a random one, and whoever fills the store comes to the same numbers.
        """
        last = min(self.plan["held_out"] + STATISTICS_EXAMPLES, len(self))
        return range(-(-last // self.plan["shard"]))

    def statistics(self) -> LatentStatistics:
        """Of content frames and motion latents; those shards must be there."""
        facts = each(self.shards.folder, self.facts, self.measured())
        return LatentStatistics.of(sums for fact in facts if (sums := fact["sums"]))


def features_of(arrays: Mapping[str, dict]):
    """The features of a store's records, as TFDS has them."""
    import tensorflow_datasets as tfds

    tensors = {
        name: tfds.features.Tensor(shape=tuple(like["shape"]), dtype=np.dtype(like["dtype"]), encoding="bytes")
        for name, like in arrays.items()
    }
    return tfds.features.FeaturesDict({**tensors, "label": np.int32, "name": tfds.features.Text()})


def folder_of(directory: Path, kind: str) -> Path:
    """Of the store of a kind, vae or cmd."""
    return directory / kind / VERSION


def open_store(folder: Path) -> LatentStore | None:
    """The store in a folder, or None where none was begun."""
    path = folder / "plan.json"
    if not path.exists():
        return None
    plan = read_json(path, "latents.store", remedy=OTHER, like=PLAN)
    problem, file = "", folder / "order.npy"
    try:
        order = read_array(file)
        if digest_of(order) != plan["order"] or order.dtype != np.int32 or order.shape != (plan["examples"],):
            problem = "is not the one of its plan.json"
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({error})"
    if problem:
        raise UserError("latents.store", file, problem, "bring it back, or remove the store")
    return LatentStore(folder, plan, order)


def begin_store(folder: Path, plan: dict, arrays: Callable[[], tuple[np.ndarray, np.ndarray]]) -> LatentStore:
    """The store in a folder, begun by this plan (without "order") if none is there.

    arrays() -> the example of each place, int [N], and the clips' keys. UserError for one that was made of something
    else, naming the first field that differs.
    """
    while (store := open_store(folder)) is None:
        with alone(folder):
            if not (folder / "plan.json").exists():
                order, keys = arrays()
                order = order.astype(np.int32)
                write_array(folder / "order.npy", order)
                write_array(folder / "keys.npy", keys)
                write_json(folder / "plan.json", plan | {"order": digest_of(order)})
    check_made_of(store, plan["made_of"])
    return store


def check_made_of(store: LatentStore, made_of: dict):
    theirs = store.plan["made_of"]
    for name in sorted(made_of.keys() | theirs.keys()):
        before, now = theirs.get(name), made_of.get(name)
        if before != now:
            problem = f"its {name} is {brief(before)}, here {brief(now)}"
            raise UserError("latents.store", store.shards.folder, problem, OTHER)


def read_array(path: Path) -> np.ndarray:
    with local(path) as copy:
        return np.load(copy)


def digest_of(order: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(order).data).hexdigest()


class StoredClips:
    """What a complete store says of the clips it was made of, in the place of a source that is not there."""

    bad: ClassVar[dict] = {}
    shelf: ClassVar[None] = None

    def __init__(self, store: LatentStore):
        self.store, plan = store, store.plan
        self.fingerprint, self.class_names = plan["made_of"]["data"], tuple(plan["class_names"])
        self.has_texts = plan["has_texts"]

    def __len__(self) -> int:
        return self.store.plan["clips"]

    def keys(self) -> np.ndarray:
        return read_array(self.store.shards.folder / "keys.npy")
