"""Ground: how the stores behind gs:// and s3:// are spoken to: who does it, how often it is tried, and what their
errors are as those of a file system."""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator

from cmd_jax.errors import Unavailable, UserError

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for the kind of each bucket by gRPC first

RETRY_SECONDS = 60.0  # for how long a request is tried again; CMD_JAX_RETRY_SECONDS is another number
SILENCE_SECONDS = 30.0  # a server that says nothing for so long counts as cut off
REQUEST_SECONDS = 120.0  # the longest that a request may take, of UPLOAD bytes at most
LONGEST_PAUSE = 8.0
UPLOAD = 2**25  # bytes of a request when a large file is uploaded

# What a store answers, by its status or by S3's name for it, when another try may do, and when there is no right.
TRANSIENT = {
    "408", "429", "500", "502", "503", "504", "SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable",
    "OperationAborted", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
}  # fmt: skip
PASSING = {
    "ChecksumError",
    "ConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteReadError",
}  # of whichever library
DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}

# TensorStore speaks to them by itself, and waits for a silent server for as long as TCP does.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(int(SILENCE_SECONDS)))
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
for _name in ("gcsfs", "s3fs", "aiobotocore", "botocore"):  # they log what they raise, with tracebacks
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class NoBucket(FileNotFoundError):
    """Not that there is nothing there: there is no such bucket."""

    remedy = "make the bucket, or mend its name"


class Denied(PermissionError):
    """By the store: who this host is has not the right, or it is not told who it is."""

    remedy = "log in on this host, or give its account the right to it"


_patience = threading.local()


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within it, in this thread, what may pass is tried again for so long at most."""
    before = getattr(_patience, "seconds", float("inf"))
    _patience.seconds = min(before, seconds)
    try:
        yield
    finally:
        _patience.seconds = before


def retry_seconds() -> float:
    text = os.environ.get("CMD_JAX_RETRY_SECONDS") or str(RETRY_SECONDS)
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        raise UserError("CMD_JAX_RETRY_SECONDS", text, "not a number of seconds", "write it like 60, or unset it")
    given = float(text)
    return min(given, getattr(_patience, "seconds", given))


def retrying(scheme: str, path, action: Callable):
    """action(filesystem): of whose requests each is tried again, with growing random pauses, for `retry_seconds`.

    So is the action where it fails in more than one request. Its errors are OSErrors that name `path`.
    """
    seconds = retry_seconds()
    pauses = _pauses(seconds)
    while True:
        try:
            return action(filesystem(scheme, seconds))
        except Exception as error:
            if (fault := as_os_error(error, path)) is error:
                raise
            if not isinstance(fault, Unavailable) or isinstance(error, Unavailable):
                raise fault from error
            if not (pause := next(pauses)):
                raise _given_up(fault, seconds) from error
        time.sleep(pause)


async def _patiently(action: Callable, seconds: float):
    """The answer to await action() for, which is asked anew while its error may pass."""
    pauses = _pauses(seconds)
    while True:
        try:
            return await action()
        except Exception as error:
            fault = as_os_error(error, None)
            if not isinstance(fault, Unavailable):
                raise
            if not (pause := next(pauses)):
                raise _given_up(fault, seconds) from error
        await asyncio.sleep(pause)


def _given_up(fault: Unavailable, seconds: float) -> Unavailable:
    fault.strerror = fault.strerror.replace(" reached ", f" reached for {seconds:g} s ", 1)
    return fault


def _pauses(seconds: float) -> Iterator[float]:
    """How long to wait after each failure; 0 once it is `seconds` since the first."""
    end, longest = time.monotonic() + seconds, 0.2
    while (pause := random.uniform(0.05, longest)) + time.monotonic() < end:
        yield pause
        longest = min(2 * longest, LONGEST_PAUSE)
    while True:
        yield 0.0


@functools.cache
def filesystem(scheme: str, seconds: float):
    """What speaks to a store, each request tried again for `seconds`; without a cache of listings, which others change.

    A request ends after SILENCE_SECONDS, or `seconds` if these are fewer, in which nothing comes.
    """
    import fsspec

    silence = min(SILENCE_SECONDS, max(seconds, 1.0))
    if scheme == "gs":
        from aiohttp import ClientTimeout
        from gcsfs import GCSFileSystem

        class Patient(GCSFileSystem):
            async def _request(self, *arguments, **options):
                once = GCSFileSystem._request.__wrapped__  # without retries of its own, whose pauses are longer
                return await _patiently(lambda: once(self, *arguments, **options), seconds)

        token = {"token": "anon"} if os.environ.get("STORAGE_EMULATOR_HOST") else {}
        fsspec.config.conf.setdefault("gcs", {}).update({"use_listings_cache": False, **token})  # for Orbax's paths
        limit = ClientTimeout(max(REQUEST_SECONDS, silence), sock_connect=silence, sock_read=silence)
        return Patient(use_listings_cache=False, consistency="md5", requests_timeout=limit, **token)
    from s3fs import S3FileSystem

    class Patient(S3FileSystem):
        retries = 1

        async def _call_s3(self, *arguments, **options):
            once = super()._call_s3
            return await _patiently(lambda: once(*arguments, **options), seconds)

        call_s3 = fsspec.asyn.sync_wrapper(_call_s3)

    fsspec.config.conf.setdefault("s3", {}).update({"use_listings_cache": False})
    limits = {"connect_timeout": silence, "read_timeout": silence, "retries": {"total_max_attempts": 1}}
    return Patient(use_listings_cache=False, config_kwargs=limits)


def codes_of(error: BaseException) -> set[str]:
    """What the store answered: its status, and the name that S3 has for it."""
    while error is not None:
        if (code := getattr(error, "code", None) or getattr(error, "status", None)) is not None:
            return {str(code)}
        if isinstance(response := getattr(error, "response", None), dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
            return {str(response.get("Error", {}).get("Code", "")), str(status)}
        error = error.__cause__
    return set()


def as_os_error(error: Exception, path) -> OSError:
    """What a library for buckets raised as the OSError that a file system would; no fault of a store as it is."""
    name, codes, text = path and str(path), codes_of(error), str(getattr(error, "strerror", None) or error)
    text = re.sub(r"^Forbidden: \S+ ", "", " ".join(text.split()))[:200] or type(error).__name__
    names = {kind.__name__ for kind in type(error).__mro__}
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if isinstance(error, Unavailable):
        return Unavailable(error.errno, error.strerror, name)
    if isinstance(error, FileNotFoundError):
        # gcsfs tells the address that was asked: to list, or to write, takes no more than a bucket.
        is_bucket = path is not None and path == getattr(path, "parent", None)
        if is_bucket or "NoSuchBucket" in codes or re.search(r"/upload/storage/|^b/[^/]+(/o)?$", text):
            return NoBucket(errno.ENOENT, "no such bucket", name)
        return FileNotFoundError(errno.ENOENT, "no such object", name)
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, "exists already, or is of another version", name)
    if "RequestTimeTooSkewed" in codes:
        return Denied(errno.EACCES, "this host's clock and the store's are too far apart", name)
    no_login = "google" in modules and not ("TransportError" in names or error.retryable)
    if "Credentials" in type(error).__name__ or "401" in codes or no_login:
        return Denied(errno.EACCES, f"no valid credentials ({text})", name)
    if isinstance(error, PermissionError) or codes & DENIED or str(error).startswith("Forbidden"):
        return Denied(errno.EACCES, f"no right to it ({text})", name)
    passes = codes & TRANSIENT or isinstance(error, ConnectionError | TimeoutError) or names & PASSING
    if passes or modules & {"aiohttp", "requests", "google"} or re.search("doesn't match calculated", text):
        return Unavailable(errno.EHOSTUNREACH, f"cannot be reached ({text})", name)
    wrong = modules & {"gcsfs", "botocore"} or text.startswith(("Bad Request", "Invalid endpoint"))
    if isinstance(error, OSError) or wrong:
        return OSError(getattr(error, "errno", None) or errno.EIO, text, name)
    return error
