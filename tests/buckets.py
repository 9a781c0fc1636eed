"""Servers of buckets for tests, on this machine: `gcs` (gcp-storage-emulator), `s3` (moto) and `gcs_stub` (ours, with
generations and faults). A fixture is a fresh bucket's URL, with the server and its objects in hand; the environment is
set, so that child processes find it too.

    python tests/buckets.py stub --fault-share 0.1 --seed 1   # a process of its own; prints its URL, then the exports
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import re
import threading
import urllib.request
from functools import cached_property, partial
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlencode

import gcs_stub
import pytest
from bucket_faults import UNASKED, Faults, FaultyS3

NAMES = (f"bkt-{number}" for number in itertools.count(1))
QUIET = ("api", "gcp_storage_emulator", "werkzeug", "moto", "botocore", "boto3")


class Gcs:
    """A server of the JSON API by its URL, whosever it is; `bucket`, `objects` and the like are for tests, and faults
    do not befall them."""

    scheme = "gs"

    def __init__(self, url: str):
        self.url = url

    @property
    def environment(self) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # of gcsfs
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # or TensorStore looks for a metadata server
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "EPATH_USE_TF": "false",
        }

    def ask(self, method: str, path: str, data: bytes | None = None) -> bytes:
        kind = "application/octet-stream" if "uploadType=media" in path else "application/json"
        headers = {UNASKED: "1", "Content-Type": kind}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def make_bucket(self, name: str):
        with contextlib.suppress(HTTPError):  # it is there already
            self.ask("POST", "/storage/v1/b?project=test", json.dumps({"name": name}).encode())

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        found, query = [], {"prefix": prefix}
        while True:
            page = json.loads(self.ask("GET", f"/storage/v1/b/{bucket}/o?{urlencode(query)}"))
            found += [item["name"] for item in page.get("items", [])]
            if "nextPageToken" not in page:
                return sorted(found)
            query["pageToken"] = page["nextPageToken"]

    def get(self, bucket: str, name: str) -> bytes:
        return self.ask("GET", f"/download/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media")

    def put(self, bucket: str, name: str, data: bytes):
        self.ask("POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}", data)

    def delete(self, bucket: str, name: str):
        self.ask("DELETE", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        return {name: self.get(bucket, name) for name in self.names(bucket, prefix)}

    def flip(self, bucket: str, name: str, byte: int = 0, bit: int = 0):
        """Put it anew with one bit changed: the server's own sums are of the new content."""
        data = bytearray(self.get(bucket, name))
        data[byte] ^= 1 << bit
        self.put(bucket, name, bytes(data))


class Emulator(Gcs):
    """gcp-storage-emulator's handlers, in memory. Mended is what no test can live with: its loop answers one
    connection after the other, behind a queue of five; with every object it writes what it knows of all; its parser of
    uploads, one of mail, takes a last "\\r" of the data for part of a line's end, and fails for no bytes; and it does
    not tell a reader the generation, without which OCDBT cannot read its manifest a second time."""

    def __init__(self, port: int = 0):
        from gcp_storage_emulator import server as emulator
        from gcp_storage_emulator.storage import Storage

        storage, lock, read_data = Storage(use_memory_fs=True), threading.Lock(), emulator._read_data
        storage._write_config_to_file = lambda: None

        def read(handler, query):
            kind = handler.headers.get("Content-Type", "")
            if kind.startswith("multipart/related"):
                meta, kind, data = gcs_stub.parts_of(emulator._read_raw_data(handler), kind)
                return {"meta": meta, "content": data, "content-type": kind}
            if query.get("uploadType") == ["media"]:
                return emulator._read_raw_data(handler)
            return read_data(handler, query)

        emulator._read_data = read

        class Handler(emulator.RequestHandler):
            protocol_version = "HTTP/1.1"  # which answers "Expect: 100-continue", for which curl waits a second

            def end_headers(self):
                self.send_header("Connection", "close")  # it may leave a request's body unread
                place = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/?]+)(?:\?.*)?", self.path)
                bucket, name = map(unquote, place.groups()) if place else ("", "")
                if stored := storage.objects.get(bucket, {}).get(name):
                    self.send_header("x-goog-generation", stored["generation"])
                super().end_headers()

            def serve(self):
                with lock:
                    emulator.Router(self).handle(self.command)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = serve

        self.server = gcs_stub.Server(("127.0.0.1", port), partial(Handler, storage))
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        super().__init__(f"http://127.0.0.1:{self.server.server_port}")

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


class Stub(Gcs):
    """Our own server: `order(**Faults' fields)` says what goes wrong from then on, `faults` holds it, `seen` what was
    asked."""

    def __init__(self, port: int = 0, **faults):
        self.server = gcs_stub.Stub(port, **faults).start()
        self.order, self.seen, self.stop = self.server.order, self.server.seen, self.server.stop
        super().__init__(self.server.url)

    def plant(self, bucket: str, name: str, data: bytes):
        self.server.store(bucket, name, data, "", {}, {})

    @property
    def faults(self) -> Faults:
        return self.server.faults


class S3:
    """moto's server by its URL, or what stands before it."""

    scheme = "s3"

    def __init__(self, url: str):
        self.url = url

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "EPATH_USE_TF": "false",
        }

    @cached_property
    def client(self):
        import boto3

        keys = dict(aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1")
        client = boto3.client("s3", endpoint_url=self.url, **keys)
        client.meta.events.register("before-send.s3", lambda request, **_: request.headers.update({UNASKED: "1"}))
        return client

    def make_bucket(self, name: str):
        self.client.create_bucket(Bucket=name)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def get(self, bucket: str, name: str) -> bytes:
        return self.client.get_object(Bucket=bucket, Key=name)["Body"].read()

    def put(self, bucket: str, name: str, data: bytes):
        self.client.put_object(Bucket=bucket, Key=name, Body=data)

    def delete(self, bucket: str, name: str):
        self.client.delete_object(Bucket=bucket, Key=name)

    objects, flip = Gcs.objects, Gcs.flip


class Moto(S3):
    """moto's server, with faults as the stub's."""

    def __init__(self, port: int = 0, **faults):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self.faulty = FaultyS3(DomainDispatcherApplication(create_backend_app), **faults)
        handler = MotoRequestHandler
        self.server = make_server("127.0.0.1", port, self.faulty, threaded=True, request_handler=handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.order, self.seen = self.faulty.order, self.faulty.seen
        super().__init__(f"http://127.0.0.1:{self.server.server_port}")

    def plant(self, bucket: str, name: str, data: bytes):
        from moto.s3.models import s3_backends

        s3_backends["123456789012"]["aws"].put_object(bucket, name, data)

    @property
    def faults(self) -> Faults:
        return self.faulty.faults

    def stop(self):
        self.faulty.stopped.set()
        self.server.shutdown()
        self.server.server_close()


class Bucket(str):
    """A bucket's URL, "gs://bkt-1"; f"{bucket}/run" is what a command takes."""

    server: Gcs | S3

    @classmethod
    def make(cls, server):
        name = next(NAMES)
        server.make_bucket(name)
        bucket = cls(f"{server.scheme}://{name}")
        bucket.server, bucket.name = server, name
        return bucket

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        return self.server.objects(self.name, prefix)

    def names(self, prefix: str = "") -> list[str]:
        return self.server.names(self.name, prefix)

    def get(self, name: str) -> bytes:
        return self.server.get(self.name, name)

    def put(self, name: str, data: bytes):
        self.server.put(self.name, name, data)

    def put_folder(self, folder, name: str) -> str:
        """All files of a local folder -> its URL there."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())
        return f"{self}/{name}"

    def delete(self, name: str):
        self.server.delete(self.name, name)

    def flip(self, name: str, byte: int = 0, bit: int = 0):
        self.server.flip(self.name, name, byte, bit)


SERVERS = {"stub": Stub, "gcs": Emulator, "s3": Moto}


@contextlib.contextmanager
def serving(kind: str, **faults):
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    server = SERVERS[kind](**faults)
    try:
        yield server
    finally:
        server.stop()


def use(server, monkeypatch, tmp_path) -> Bucket:
    """A fresh bucket of the server, which the environment leads to until the test's end."""
    from cmd_jax.stores import filesystem

    for name, value in {**server.environment, "CMD_JAX_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    filesystem.cache_clear()  # it may be another server's client
    return Bucket.make(server)


@pytest.fixture(scope="session")
def gcs_server():
    with serving("gcs") as server:
        yield server


@pytest.fixture(scope="session")
def s3_server():
    with serving("s3") as server:
        yield server


@pytest.fixture(scope="session")
def stub_server():
    with serving("stub") as server:
        yield server


@pytest.fixture
def gcs(gcs_server, monkeypatch, tmp_path) -> Bucket:
    """gs:// on the emulator, which knows no preconditions."""
    return use(gcs_server, monkeypatch, tmp_path)


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """s3:// on moto, with faults as `gcs_stub` has them."""
    yield use(s3_server, monkeypatch, tmp_path)
    s3_server.order()
    s3_server.seen.clear()


@pytest.fixture(name="gcs_stub")
def gcs_stub_bucket(stub_server, monkeypatch, tmp_path):
    """gs:// with preconditions, and faults by `gcs_stub.server.order(share=0.1)`, gone with the test."""
    yield use(stub_server, monkeypatch, tmp_path)
    stub_server.order()
    stub_server.seen.clear()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("kind", nargs="?", choices=SERVERS, default="stub")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", default="bkt")
    parser.add_argument("--fault-share", type=float, default=0.0, dest="share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skew", type=float, default=0.0)
    given = vars(parser.parse_args())
    kind, bucket = given.pop("kind"), given.pop("bucket")
    with serving(kind, **({"port": given["port"]} if kind == "gcs" else given)) as server:
        server.make_bucket(bucket)
        exports = [f"export {name}={value}" for name, value in server.environment.items()]
        print(server.url, *exports, sep="\n", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
