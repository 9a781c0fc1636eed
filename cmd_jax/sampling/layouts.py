"""Where a batch of samples lies on the devices: by the mesh that was asked for, or by how many samples it has."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from cmd_jax.models.layout import spec_of, ways
from cmd_jax.sharding import SAMPLING_AXES, batch_sharding, batch_ways, check_batch, mesh_over, partitioning

SPLIT = ("guidance", "tensor")  # axes over which the devices of a row share it


class Layout(NamedTuple):
    """rows: of the batch, at least as many as there are samples. attention: as of `partitioning`."""

    mesh: Mesh
    rules: tuple
    attention: str
    rows: int

    def partitioning(self):
        return partitioning(self.mesh, self.rules, self.attention)

    def frames(self, count: int) -> NamedSharding:
        """Of clips of so many frames, which the devices of a row share. Of several processes each needs its rows
        whole."""
        with self.partitioning():
            if jax.process_count() > 1 or ways(count, "act_picture", beside="act_batch") == 1:
                return batch_sharding(self.mesh)
            return NamedSharding(self.mesh, spec_of((self.rows, count), ("act_batch", "act_picture")))


class Layouts:
    """The layouts of a sampler's batches over the devices of `mesh`, on which its parameters lie.

    by_size: each batch has a mesh of its own (`sizes_of`): the batch is split as far as it goes, and the devices of a
    row share the halves of guidance, then the tokens, rows of cells and frames, as `models.layout` does it. Parameters
    are then whole on each device: what devices send one another is keys, values and edges of cells, less than the
    activations that parameters split by heads and channels would have them sum up. Else `mesh` is that of all batches,
    and what its rules split stays split.
    """

    def __init__(self, mesh: Mesh, rules, attention: str = "auto", by_size: bool = False):
        self.mesh, self.rules, self.attention, self.by_size = mesh, rules, attention, by_size
        self.devices = mesh.devices.ravel() if by_size else None  # one order for all: arrays then pass between them

    def check(self, batch_size: int):
        """UserError sampling.batch_size for one that the mesh does not divide."""
        if not self.by_size:
            check_batch("sampling.batch_size", batch_size, self.mesh)

    def of(self, samples: int, batch_size: int, guided: bool) -> Layout:
        """Of a batch of so many samples, up to batch_size. It has as many rows as the next power of two up to that, so
        that a few programs do for all counts; more where the mesh cannot be filled otherwise."""
        rows = min(1 << (samples - 1).bit_length(), batch_size)
        if not self.by_size:
            ways = batch_ways(self.mesh)
            return Layout(self.mesh, self.rules, self.attention, -(-rows // ways) * ways)
        sizes = sizes_of(len(self.devices), rows, guided)
        mesh = mesh_over(self.devices.reshape(sizes), SAMPLING_AXES)
        rules = dict(self.rules) | {"act_token": SPLIT, "act_time": SPLIT}
        return Layout(mesh, tuple(rules.items()), self.attention, -(-rows // sizes[0]) * sizes[0])


def sizes_of(devices: int, rows: int, guided: bool) -> tuple[int, int, int, int]:
    """(data, fsdp, guidance, tensor) of a batch of `rows` on so many devices.

    data: what leaves the fewest rows empty, of equals the most; the rest must be a power of two, since widths, heights
    and frames seldom divide by other numbers. guidance: 2 of the rest if the batch is guided; tensor: what is left.
    """
    powers = [1 << i for i in range(devices.bit_length()) if devices % (1 << i) == 0]
    rest = min(powers, key=lambda rest: (-(-rows // (devices // rest)) * (devices // rest), rest))
    guidance = 2 if guided and rest > 1 else 1
    return devices // rest, 1, guidance, rest // guidance
