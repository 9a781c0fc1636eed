"""What Orbax and TensorStore, which hold the arrays of a checkpoint, must be told before they save here."""

import contextlib
import errno
import glob
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import Unavailable, UserError
from cmd_jax.files import is_remote
from cmd_jax.stores import retry_seconds

# Orbax raises the first error of its threads, which is where we tell of it. It logs it too, with two tracebacks; leaves
# other tasks behind, whose errors asyncio logs with one each, or that never began, of which Python warns; and closes
# event loops that TensorStore still answers to.
NOISE = {"absl": ("_SignalingThread.run() raised",), "asyncio": ("/orbax/", " OCDBT database ")}
for _logger, _noise in NOISE.items():
    logging.getLogger(_logger).addFilter(lambda record, noise=_noise: not any(x in record.getMessage() for x in noise))
warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited", RuntimeWarning)


def _unraisable(told, before=sys.unraisablehook):
    if told.object is not None or str(told.exc_value) != "Event loop is closed":
        before(told)


sys.unraisablehook = _unraisable


LONGEST_NAME = 800  # of a folder in a bucket: that of an object may have 1024 bytes
RETRIES = 6  # after pauses that grow twofold each time
FAILED = r"All \d+ retry attempts failed: "  # TensorStore's words for an error that may pass but did not
_spec_of, _context = tensorstore_utils.build_kvstore_tspec, tensorstore_utils.get_ts_context


def _with_s3(directory: str, name: str | None = None, **options) -> dict:
    """Orbax's specification of a key-value store, also for s3://, which Orbax takes for a local path."""
    if not directory.startswith("s3://"):
        return _spec_of(directory, name, **options)
    return _on_s3(_spec_of(directory.replace("s3://", "gs://", 1), name, **options))


def _on_s3(spec):
    if not isinstance(spec, dict) or spec.get("driver") != "gcs":
        return {key: _on_s3(value) for key, value in spec.items()} if isinstance(spec, dict) else spec
    endpoint, region = os.environ.get("AWS_ENDPOINT_URL"), os.environ.get("AWS_REGION")
    spec |= {"driver": "s3"} | ({"endpoint": endpoint} if endpoint else {})
    # Only of Amazon's own buckets can TensorStore ask for the region.
    if region := region or os.environ.get("AWS_DEFAULT_REGION") or (endpoint and "us-east-1"):
        spec |= {"aws_region": region}
    # The first of its default chain, which complains on stderr of files that the others would need.
    return spec | ({"aws_credentials": {"type": "environment"}} if "AWS_ACCESS_KEY_ID" in os.environ else {})


def _with_patience(**options) -> ts.Context:
    """Orbax's context, in which requests to a bucket are tried again for `retry_seconds`, not for a quarter of an hour.

    Each of them ends after SILENCE_SECONDS in which nothing comes (see stores.py): a server that takes connections and
    says nothing is given up after seven times that, and `retry_seconds`.
    """
    seconds = retry_seconds()
    again = {"max_retries": RETRIES, "initial_delay": f"{seconds / (2**RETRIES - 1)}s", "max_delay": f"{seconds}s"}
    return ts.Context({"gcs_request_retries": again, "s3_request_retries": again}, _context(**options))


tensorstore_utils.build_kvstore_tspec, tensorstore_utils.get_ts_context = _with_s3, _with_patience


def make_handler() -> ocp.PyTreeCheckpointHandler:
    """What writes and reads one tree of arrays."""
    # Orbax cuts an array that several devices hold whole into as many slices, to write each from another one. For small
    # arrays that costs far more than it saves: four seconds for 300 arrays on 8 devices.
    of_devices = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**22)
    of_host = ocp.type_handlers.NumpyHandler()
    kinds = ocp.type_handlers.create_type_handler_registry((jax.Array, of_devices), (np.ndarray, of_host))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=kinds)


class LiteralPath(type(epath.Path())):
    """A path whose `glob` takes no character of the path itself for a pattern; Orbax looks for its own files so."""

    def glob(self, pattern: str):
        return map(type(self), glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))


def check_lengths(folder: BucketPath):
    """RuntimeError for an object of one tree of arrays that is shorter than its OCDBT index says.

    TensorStore believes that a store has kept all of what it uploaded.
    """
    context = tensorstore_utils.get_ts_context()
    base = ts.KvStore.open(
        tensorstore_utils.build_kvstore_tspec(str(folder), use_ocdbt=False), context=context
    ).result()
    base.path += "/"
    needed, nodes = {}, [ts.ocdbt.dump(base, context=context).result()["versions"][-1]["root"]]
    while nodes:
        entry = nodes.pop()
        place = entry.get("location") or entry.get("indirect_value")
        if place:  # KIND:FOLDER:NAME:OFFSET:LENGTH
            _, parent, name, offset, length = place.split(":")
            needed[parent + name] = max(needed.get(parent + name, 0), int(offset) + int(length))
        if "location" in entry:
            nodes += ts.ocdbt.dump(base, node=place, context=context).result()["entries"]
    for name, size in needed.items():
        if (found := (folder / name).stat().st_size) < size:
            raise RuntimeError(f"{folder.name}/{name} has {found} bytes, not {size}")


def literal(path: Path | BucketPath) -> LiteralPath | BucketPath:
    # Orbax drops LINK/.. by itself, which may lead elsewhere.
    return path if is_remote(path) else LiteralPath(os.path.realpath(path))


def check_name(folder: Path | BucketPath):
    """UserError for a folder that TensorStore cannot name, or that Orbax takes for one of a bucket."""
    if is_remote(folder):
        path, problem = str(folder), ""
        if wrong := re.search(r"[#?*\[\]\\\x00-\x1f\x7f]|gs:(?=/)", f"{folder.key}/"):
            problem = f"holds {wrong[0]}"
        elif len(folder.key.partition("/")[2].encode(errors="replace")) > LONGEST_NAME:
            problem = f"is longer than {LONGEST_NAME} bytes"
    else:
        path, problem = os.path.realpath(folder), ""
        if re.match("/(gs|s3|az|hf)/", f"{path}/"):  # as etils has it
            problem = f"would be taken for {path[1:3]}://"
        elif wrong := re.search(r"gs:(?=/)|\\", f"{path}/"):
            problem = f"holds {wrong[0]}"
    if path != path.encode(errors="replace").decode():
        problem = "is not UTF-8"
    if problem:
        raise UserError("workdir", folder, f"{problem}, where Orbax cannot save", "rename it, or give another folder")


@contextlib.contextmanager
def answering(folder: Path | BucketPath):
    """What TensorStore raises within, where a bucket did not answer, as Unavailable."""
    try:
        yield
    except Exception as error:
        if (told := as_unavailable(error, folder)) is error:
            raise
        raise told from error


def as_unavailable(error: Exception, folder: Path | BucketPath) -> Exception:
    """An error of TensorStore that says that a bucket did not answer, as Unavailable; another one as it is."""
    if not is_remote(folder) or isinstance(error, OSError) or not re.search(FAILED, str(error)):
        return error
    told = Unavailable(errno.EHOSTUNREACH, f"cannot be reached ({reason(error)})", str(folder))
    told.__cause__ = error
    return told


def reason(error: BaseException) -> str:
    """What went wrong in one short line; TensorStore's messages carry source locations."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    text = re.sub(rf".*{FAILED}", "", text)
    if system := re.search(r"([^:]*) \[os_error_code=", text):
        return system[1].strip()
    if answer := re.search(r"([^:]*) \[http_response_code='(\d+)'", text):
        return f"{answer[1].strip()} ({answer[2]})"
    return text[:200]
