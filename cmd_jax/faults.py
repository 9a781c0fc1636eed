"""Ground: what libraries for buckets raise, as the OSErrors that a file system would raise in its place."""

import errno

from cmd_jax.errors import Unavailable

# What a store answers, by its status or by S3's name for it, when another try may do, and when there is no right.
TRANSIENT = {
    "408", "429", "500", "502", "503", "504", "SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable",
}  # fmt: skip
DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}


def code_of(error: BaseException) -> str:
    """What the store answered: a status, or the name that S3 has for it."""
    while error is not None:
        if (code := getattr(error, "code", None) or getattr(error, "status", None)) is not None:
            return str(code)
        if isinstance(response := getattr(error, "response", None), dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def as_os_error(error: Exception, path) -> OSError:
    """What a library for buckets raised as the OSError that a file system would."""
    name, code, text = str(path), code_of(error), str(getattr(error, "strerror", None) or error)
    text = " ".join(text.split())[:200] or type(error).__name__
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if isinstance(error, Unavailable | TypeError):
        raise error
    if isinstance(error, FileNotFoundError):
        missing = "no such bucket" if "bucket does not exist" in text else "no such object or bucket"
        return FileNotFoundError(errno.ENOENT, missing, name)
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, "exists already, or is of another version", name)
    if "Credentials" in type(error).__name__ or code == "401" or "google.auth" in type(error).__module__:
        return PermissionError(errno.EACCES, f"no valid credentials ({text})", name)
    if isinstance(error, PermissionError) or code in DENIED or text.startswith("Forbidden"):
        return PermissionError(errno.EACCES, f"no right to it ({text})", name)
    if code in TRANSIENT or isinstance(error, ConnectionError | TimeoutError) or modules & {"aiohttp", "requests"} or (
        modules & {"botocore", "aiobotocore"} and not code
    ) or type(error).__name__ in ("ChecksumError", "FSTimeoutError"):  # fmt: skip
        return Unavailable(errno.EHOSTUNREACH, f"cannot be reached ({text})", name)
    return OSError(getattr(error, "errno", None) or errno.EIO, text, name)
