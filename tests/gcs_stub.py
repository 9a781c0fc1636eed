"""A small server of the documented JSON API of Google Cloud Storage, in memory, which knows what the emulator does not:
generations with their preconditions, and faults to order. It takes what gcsfs and TensorStore's gcs driver send."""

import base64
import dataclasses
import hashlib
import json
import re
import socket
import threading
from collections import defaultdict
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

from bucket_faults import UNASKED, Faulty

PAGE = 1000  # names at most in one answer to a listing
QUANTUM = 2**18  # bytes; of which chunks of a resumable upload are multiples, but for the last


@dataclasses.dataclass
class Stored:
    data: bytes
    generation: int
    updated: float
    kind: str
    metadata: dict
    metageneration: int = 1

    @property
    def hashes(self) -> dict[str, str]:
        import google_crc32c  # here: every run of the tests imports this file

        if not hasattr(self, "_hashes"):
            crc, md5 = google_crc32c.Checksum(self.data).digest(), hashlib.md5(self.data).digest()
            self._hashes = {"crc32c": base64.b64encode(crc).decode(), "md5Hash": base64.b64encode(md5).decode()}
        return self._hashes


class Refused(Exception):
    def __init__(self, status: int, message: str):
        self.status, self.message = status, message


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address):
        """Clients that are killed, or weary of waiting, close their connections."""


class Stub(Faulty, Server):
    """`buckets`: {bucket: {name: Stored}}."""

    def __init__(self, port: int = 0, **faults):
        Server.__init__(self, ("127.0.0.1", port), Handler)
        Faulty.__init__(self, **faults)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.uploads: dict[str, dict] = {}
        self.generation = 10**15

    def start(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self):
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def objects(self, bucket: str) -> dict[str, Stored]:
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[bucket]

    def find(self, bucket: str, name: str, query: dict) -> Stored:
        """The object to read or delete, once its generation is as the query has it."""
        stored = self.objects(bucket).get(name)
        self.check(stored, query)
        if stored is None or query.get("generation", str(stored.generation)) != str(stored.generation):
            raise Refused(404, f"No such object: {bucket}/{name}")
        return stored

    @staticmethod
    def check(stored: Stored | None, query: dict, otherwise: int = 412):
        """otherwise: the status where ifGenerationNotMatch fails, 304 of a read."""
        generation = str(stored.generation) if stored else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if query.get("ifGenerationNotMatch") == generation:
            raise Refused(otherwise, "")

    def store(self, bucket: str, name: str, data: bytes, kind: str, given: dict, query: dict) -> Stored:
        """given: the resource that came along, whose hashes must be those of the data."""
        with self.lock:
            objects = self.objects(bucket)
            self.check(objects.get(name), query)
            if self.truncates():
                data = data[: len(data) // 2]
            self.generation += 1
            stored = Stored(
                data, self.generation, self.now(), given.get("contentType", kind), given.get("metadata", {})
            )
            for key, value in stored.hashes.items():
                if given.get(key, value) != value:
                    raise Refused(400, f"Provided {key} doesn't match calculated {key}, invalid")
            objects[name] = stored
            return stored


def resource(bucket: str, name: str, stored: Stored) -> dict:
    updated = datetime.fromtimestamp(stored.updated, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {
        "kind": "storage#object", "id": f"{bucket}/{name}/{stored.generation}", "name": name, "bucket": bucket,
        "generation": str(stored.generation), "metageneration": str(stored.metageneration), "contentType": stored.kind,
        "size": str(len(stored.data)), "timeCreated": updated, "updated": updated, "metadata": stored.metadata,
        "etag": f"{stored.generation:x}", "storageClass": "STANDARD", **stored.hashes,
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Stub

    def log_message(self, *_):
        pass

    def date_time_string(self, timestamp=None):
        return formatdate(self.server.now() if timestamp is None else timestamp, usegmt=True)

    def serve(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.fault = "" if self.headers.get(UNASKED) else self.server.fault_of(self.command, self.path)
        if self.fault == "drop":
            return self.hang_up()
        try:
            match self.fault:
                case "503" | "429":
                    raise Refused(int(self.fault), "Try again later.")
                case "deny":
                    status = self.server.faults.status
                    who = "Anonymous caller" if status == 401 else "run@project.iam.gserviceaccount.com"
                    raise Refused(status, f"{who} does not have access to the Google Cloud Storage object.")
            self.route()
        except Refused as e:
            self.answer_json({"error": {"code": e.status, "message": e.message}}, e.status)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def hang_up(self):
        self.server.seen.append((self.command, self.path, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, body: bytes = b"", status: int = 200, **headers):
        if self.fault == "cut" and not body:
            return self.hang_up()
        self.server.seen.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif status not in (204, 304):
            self.wfile.write(body)
        return None

    def answer_json(self, value: dict, status: int = 200, **headers):
        return self.answer(
            json.dumps(value).encode(), status, Content_Type="application/json; charset=UTF-8", **headers
        )

    def route(self):
        path, _, query = self.path.partition("?")
        query = {key: values[0] for key, values in parse_qs(query, keep_blank_values=True).items()}
        match = re.fullmatch(r"/(?:(upload|download)/)?storage/v1/b(?:/([^/]+)(?:/(o)(?:/([^/]*)(/.*)?)?)?)?", path)
        if not match:
            raise Refused(501, f"nothing here does {self.command} {path}")
        door, bucket, objects, name, rest = match.groups()
        bucket, name = (None if x is None else unquote(x) for x in (bucket, name))
        if bucket is None or not objects:
            return self.serve_bucket(bucket)
        if door == "upload":
            return self.upload(bucket, query)
        if name is None:
            return self.list(bucket, query)
        if rest:
            return self.copy(bucket, name, rest, query)
        return self.serve_object(bucket, name, query, "media" if door == "download" else query.get("alt"))

    def serve_bucket(self, bucket: str | None):
        buckets = self.server.buckets
        if self.command == "POST":
            bucket = json.loads(self.body)["name"]
            buckets[bucket] = {}
        if bucket is None:
            items = [{"kind": "storage#bucket", "name": name} for name in buckets]
            return self.answer_json({"kind": "storage#buckets", "items": items})
        self.server.objects(bucket)
        return self.answer_json({"kind": "storage#bucket", "name": bucket, "id": bucket})

    def serve_object(self, bucket: str, name: str, query: dict, alt: str | None):
        with self.server.lock:
            stored = self.server.find(bucket, name, query)
            if self.command == "DELETE":
                del self.server.buckets[bucket][name]
                return self.answer(status=204)
            if self.command == "PATCH":
                stored.metadata |= json.loads(self.body).get("metadata", {})
                stored.metageneration += 1
        if alt != "media":
            return self.answer_json(resource(bucket, name, stored))
        headers = dict(
            Content_Type=stored.kind, x_goog_generation=stored.generation, x_goog_metageneration=stored.metageneration,
            x_goog_hash=f"crc32c={stored.hashes['crc32c']},md5={stored.hashes['md5Hash']}",
            x_goog_stored_content_length=len(stored.data), Last_Modified=formatdate(stored.updated, usegmt=True),
        )  # fmt: skip
        if not (asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            return self.answer(stored.data, **headers)
        size = len(stored.data)
        start = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
        end = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
        if start >= size:
            return self.answer(b"", 416, Content_Range=f"bytes */{size}")
        return self.answer(stored.data[start:end], 206, Content_Range=f"bytes {start}-{end - 1}/{size}", **headers)

    def list(self, bucket: str, query: dict):
        with self.server.lock:
            objects = dict(self.server.objects(bucket))
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset", "")
        page, after = min(int(query.get("maxResults", PAGE)), PAGE), query.get("pageToken", "")
        found: dict[str, str | None] = {}  # by their order: {what is listed: the object's name, or None of a prefix}
        for name in sorted(objects):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            place = name.find(delimiter, len(prefix)) if delimiter else -1
            found.setdefault(name if place < 0 else name[: place + len(delimiter)], name if place < 0 else None)
        left = [key for key in found if key > after]
        answer = {
            "kind": "storage#objects",
            "items": [resource(bucket, key, objects[key]) for key in left[:page] if found[key] is not None],
            "prefixes": [key for key in left[:page] if found[key] is None],
        }
        if left[page:]:
            answer["nextPageToken"] = left[page - 1]
        return self.answer_json({key: value for key, value in answer.items() if value})

    def copy(self, bucket: str, name: str, rest: str, query: dict):
        match = re.fullmatch(r"/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", rest)
        if not match:
            raise Refused(501, f"nothing here does {rest}")
        other, target = unquote(match[1]), unquote(match[2])
        source = self.server.find(bucket, name, {})
        stored = self.server.store(other, target, source.data, source.kind, {"metadata": source.metadata}, query)
        made = resource(other, target, stored)
        if rest.startswith("/copyTo"):
            return self.answer_json(made)
        size = str(len(stored.data))
        done = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
        return self.answer_json(done | {"resource": made})

    def upload(self, bucket: str, query: dict):
        self.server.objects(bucket)
        kind = self.headers.get("Content-Type", "application/octet-stream")
        match query.get("uploadType", "resumable"):
            case "media":
                given, data = {}, self.body
            case "multipart":
                given, kind, data = parts_of(self.body, kind)
            case _:
                return self.resumable(bucket, query)
        hashes = re.findall(r"(crc32c|md5)=([^,\s]+)", self.headers.get("x-goog-hash", ""))
        given |= {{"md5": "md5Hash"}.get(key, key): value for key, value in hashes}
        name = query.get("name") or given["name"]
        return self.answer_json(resource(bucket, name, self.server.store(bucket, name, data, kind, given, query)))

    def resumable(self, bucket: str, query: dict):
        """A session: opened with the resource, filled by chunks in their order, closed by the last one."""
        uploads = self.server.uploads
        if "upload_id" not in query:
            given = json.loads(self.body or b"{}")
            name = query.get("name") or given["name"]
            self.server.check(self.server.objects(bucket).get(name), query)
            upload = f"upload-{len(uploads)}"
            kind = self.headers.get("X-Upload-Content-Type", "application/octet-stream")
            uploads[upload] = dict(name=name, given=given, kind=kind, query=query, data=bytearray(), done=None)
            where = urlsplit(self.path)
            host = self.headers["Host"]
            return self.answer(Location=f"http://{host}{where.path}?{where.query}&upload_id={quote(upload)}")
        if not (session := uploads.get(query["upload_id"])):
            raise Refused(404, "no such upload")
        if self.command == "DELETE":
            del uploads[query["upload_id"]]
            return self.answer(status=499)
        if session["done"]:
            return self.answer_json(session["done"])
        chunk = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        if not chunk:
            raise Refused(400, "Content-Range is invalid")
        data, total = session["data"], None if chunk[3] == "*" else int(chunk[3])
        if chunk[1]:
            start = int(chunk[1])
            if start > len(data) or len(self.body) != int(chunk[2]) - start + 1:
                raise Refused(400, "the chunk is invalid: not the next one, or not as long as it says")
            data += self.body[len(data) - start :]
        if total is None or len(data) < total:
            if len(data) % QUANTUM:
                raise Refused(400, f"the chunk is invalid: not a multiple of {QUANTUM} bytes")
            return self.answer(status=308, **({"Range": f"bytes=0-{len(data) - 1}"} if data else {}))
        name = session["name"]
        stored = self.server.store(bucket, name, bytes(data), session["kind"], session["given"], session["query"])
        session |= {"done": resource(bucket, name, stored), "data": None}
        return self.answer_json(session["done"])


def parts_of(body: bytes, kind: str) -> tuple[dict, str, bytes]:
    """The two parts of a multipart/related upload -> (the resource, the data's type, the data)."""
    boundary = re.search(r'boundary="?([^";]+)', kind)[1].encode()
    # Not by a parser of mail: it would take the line's end before the boundary to be "\r\n" where the data end in "\r".
    start = body.index(b"--" + boundary)
    line = b"\r\n" if body[start:].startswith(b"--" + boundary + b"\r\n") else b"\n"
    middle = body.index(line + b"--" + boundary, start + 1)
    end = body.rindex(line + b"--" + boundary + b"--")
    given = body[start:middle].split(2 * line, 1)[1]
    head, data = body[middle + len(line) : end].split(2 * line, 1)
    types = defaultdict(str, re.findall(r"(?im)^(content-type):\s*([^\r\n]+)", head.decode()))
    return json.loads(given), types["Content-Type"] or "application/octet-stream", data
