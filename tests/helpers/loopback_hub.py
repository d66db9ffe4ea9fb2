"""A Hub on this machine: what an unmodified huggingface_hub client needs to create, push, tag, look and fetch.

It keeps everything in memory and speaks the endpoints that the client calls with xet switched off. Faults can be put
in its way: a status instead of an answer, a body cut short, a flipped byte.
"""

import hashlib
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer

import loopback_endpoints
from loopback_endpoints import TOKEN


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    message: str = ""


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files, message=""):
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        oid = hashlib.sha1(f"{content} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, dict(files), message))
        return oid

    def at(self, revision):
        wanted = self.tags.get(revision, revision)
        if wanted == "main":
            return self.commits[-1]
        return next((c for c in self.commits if c.oid == wanted), None)


@dataclass
class Fault:
    method: str
    path: str
    kind: int | str
    times: int


class LoopbackHub:
    """Repositories, uploaded objects, the requests seen, and faults to come."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.url = ""

    def add(self, name, files, **options):
        """A repository with one commit; returns the commit's id."""
        self.repositories[name] = Repository(**options)
        return self.repositories[name].commit(files, "first")

    def add_folder(self, name, folder, **options):
        return self.add(name, {path.name: path.read_bytes() for path in folder.iterdir()}, **options)

    def files(self, name):
        return self.repositories[name].commits[-1].files

    def fail(self, method, path, kind, times=1):
        """Answer the next requests whose path matches with a status, their body 'cut' or 'flipped', or 'never'."""
        self.faults.append(Fault(method, path, kind, times))

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.kind
        return None

    @contextmanager
    def running(self):
        handler = type("Handler", (loopback_endpoints.Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        # Clients that are killed on purpose would fill the output with tracebacks.
        server.handle_error = lambda *connection: None
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def environment(self, cache, token=TOKEN):
        """Of a process that should use this Hub."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})
