"""`cmd-jax ingest --encode`: a whole store of latents ahead of its training, by all processes over the mesh."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from cmd_jax import cache
from cmd_jax.data.roots import check_bad
from cmd_jax.errors import UserError
from cmd_jax.ingest.windows import ListedClips
from cmd_jax.prepare import open_clips, prepare_stage, store_folder
from cmd_jax.report.console import make_console
from cmd_jax.report.store import report
from cmd_jax.running.distributed import agree, is_leader, leader_alone, leader_first
from cmd_jax.running.runtime import StopRequest
from cmd_jax.running.watch import watched
from cmd_jax.sharding import check_batch, make_mesh, partitioning
from cmd_jax.trained import Metadata

STOPPED = "stopped by a signal; what is finished of the store stays, and the same command goes on"


def encode(config, workdir: Path, end_process: Callable | None = None, listed: bool = False):
    """Make the store of a stage's latents, in config.latents.store.

    listed: its clips are only listed, and decoded while they are encoded. UserError as of a training of that stage, for
    latents.starts=0, and where more than data.max_bad_fraction of the clips could not be used; the store stays.
    """
    console, mesh = make_console(quiet=not is_leader()), make_mesh(config.mesh)
    folder = store_folder(config, workdir)
    cache.use(config.data.cache_dir, config.data.cache_gib)
    if not config.latents.starts:
        raise UserError("latents.starts", 0, "no latents are kept", "give how many windows of a clip to keep")
    check_batch("train.batch_size", config.train.batch_size, mesh, config.train.accumulate)
    with (
        StopRequest(STOPPED, end_process) as stop,
        watched(folder.parent / ".encode", config.processes, None, stop, end_process),
        partitioning(mesh, config.rules, config.attention),
        contextlib.ExitStack() as opened,
    ):
        source = leader_first(lambda: ListedClips(config) if listed else open_clips(config, workdir))
        if listed:
            opened.enter_context(contextlib.closing(source))
        agree({"data": source.fingerprint}, "let every process see the same files")
        filler = prepare_stage(config, workdir, source, mesh, console, Metadata()).filler
        opened.callback(filler.store.abandon)
        filler.fill()
        summary = leader_alone(lambda: report(filler.store, source.bad, console))
        if listed and (bad := summary["quarantined"]):
            why = f", the first: {' '.join(min(bad.items()))}"
            check_bad(source.root, len(bad), source.listed, config.data.max_bad_fraction, why)
