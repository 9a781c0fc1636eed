"""The same shards written by Apache Beam: Dataflow, Flink, Spark, or processes of this machine.

Workers must have this package and see the folders of the clips and of the dataset under the same names. A pipeline of
three transforms, whatever the number of shards: what it hands around are their numbers.
"""

import contextlib
import io
import logging
from collections.abc import Sequence

import apache_beam
from apache_beam.options.pipeline_options import PipelineOptions

from cmd_jax.errors import UserError
from cmd_jax.files import as_path
from cmd_jax.ingest.plan import Plan, read_plan
from cmd_jax.ingest.shard import Limits, open_reader, write_shard

LOCAL = "FnApiRunner"


class WriteShards(apache_beam.DoFn):
    """Numbers of shards -> themselves, once they are written. Each worker has a decoder as long as it lives."""

    def __init__(self, folder: str, split: str, limits: Limits):
        self.folder, self.split, self.limits = folder, split, limits

    def setup(self):
        self.plan = read_plan(as_path(self.folder), self.split)
        self.reader = open_reader(self.plan, self.limits)

    def process(self, k: int):
        write_shard(self.plan, k, self.reader)
        yield k

    def teardown(self):
        self.reader.close()


def run_beam(plan: Plan, shards: Sequence[int], limits: Limits, runner: str, flags: Sequence[str]):
    """Write the shards; returns when the pipeline has ended. flags: Beam's own, like --direct_num_workers=2."""
    if runner in ("DirectRunner", "PrismRunner"):
        raise UserError("--beam", runner, "downloads a binary first", f"use {LOCAL} on this machine")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = PipelineOptions(list(flags))  # given, or it would read the flags of this command
            known = options.get_all_options()
    except SystemExit as error:  # argparse's, after a page on how Beam is used
        problem = said.getvalue().strip().rpartition("\n")[2].rpartition("error: ")[2]
        raise UserError("--beam", runner, problem, "see Beam's documentation") from error
    for flag in flags:
        if (name := flag.removeprefix("--").partition("=")[0]) not in known:
            raise UserError(f"--beam.{name}", flag.partition("=")[2], "not a flag of Beam's", "see its documentation")
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    try:
        pipeline = apache_beam.Pipeline(runner, options)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(
            "--beam", runner, str(error), f"use {LOCAL}, DataflowRunner, FlinkRunner or SparkRunner"
        ) from error
    (
        pipeline
        | apache_beam.Create(list(shards))
        | apache_beam.Reshuffle()
        | apache_beam.ParDo(WriteShards(str(plan.folder), plan.split, limits))
    )
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:  # noqa: BLE001  a runner may raise anything, with a worker's traceback in its text
        said = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UserError(
            "--beam", runner, f"the pipeline failed: {said[0]}", "run it again: what is written stays"
        ) from error
