"""The Hub's endpoints that the client calls with xet switched off, answered from a `LoopbackHub`."""

import base64
import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER, TOKEN = "me", "hf_loopbackloopbackloopbackloopback00"
READ_TOKEN = "hf_readonlyreadonlyreadonlyreadonly11"
# Smaller files travel inside the commit, as on the Hub.
LFS_SUFFIXES = (".safetensors", ".png", ".bin")


class Refusal(Exception):  # noqa: N818
    """An answer other than 200: status, message, and the code that the client knows errors by."""


class Handler(BaseHTTPRequestHandler):
    hub: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._serve("GET")

    def do_HEAD(self):
        self._serve("HEAD")

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    def _serve(self, method):
        url = urlsplit(self.path)
        self.route = unquote(url.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        self.hub.requests.append(f"{method} {self.route}")
        self.broken = self.hub.fault(method, self.route)
        try:
            self._answer("GET" if method == "HEAD" else method)
        except Refusal as refusal:
            status, message, *code = refusal.args
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code[0]} if code else {})
            self._json({"error": message}, status, headers)

    def _answer(self, method):
        if self.broken == "never":
            time.sleep(600)
        if isinstance(self.broken, int):
            raise Refusal(self.broken, "a fault for the test")
        for verb, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and verb == method:
                answer(self, **match.groupdict())
                return
        raise Refusal(404, f"no such endpoint: {method} {self.route}")

    def _chunks(self):
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, data, status=200, headers=None):
        if self.broken == "flipped" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.broken == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data)

    def _json(self, content, status=200, headers=None):
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repository(self, name):
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token() not in (TOKEN, READ_TOKEN)):
            raise Refusal(404 if self._token() else 401, "Repository not found", "RepoNotFound")
        if repository.gated:
            raise Refusal(403, "Access to this repository is restricted", "GatedRepo")
        return repository

    def _commit_at(self, name, revision):
        commit = self._repository(name).at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _check_write(self, name):
        if not self._token():
            raise Refusal(401, "Invalid username or password.")
        if self._token() not in (TOKEN, READ_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        if self._token() != TOKEN or not name.startswith(OWNER + "/"):
            raise Refusal(403, "You don't have the rights to write here")

    def whoami(self):
        self._json({"name": OWNER, "type": "user", "orgs": []})

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        self._check_write(name)
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            self._json(url | {"error": "You already created this model repo"}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private))
        self._json(url)

    def info(self, name, revision="main"):
        commit = self._commit_at(name, revision)
        repository = self.hub.repositories[name]
        self._json(
            {
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": repository.private,
                "tags": [],
                "siblings": [{"rfilename": path} | _blob(path, data) for path, data in commit.files.items()],
            }
        )

    def tree(self, name, revision):
        commit = self._commit_at(name, revision)
        files = commit.files.items()
        self._json([{"type": "file", "path": p, "oid": _blob(p, d)["blobId"]} | _blob(p, d) for p, d in files])

    def refs(self, name):
        repository = self._repository(name)
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.commits[-1].oid}
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repository.tags.items()]
        self._json({"branches": [branch], "tags": tags, "converts": []})

    def tag(self, name, revision):
        commit = self._commit_at(name, revision)
        self._check_write(name)
        repository, tag = self.hub.repositories[name], json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise Refusal(409, "Tag reference exists already")
        repository.tags[tag] = commit.oid
        self._json({})

    def validate(self):
        self._json({"errors": [], "warnings": []})

    def preupload(self, name, revision):
        self._check_write(name)
        commit = self._commit_at(name, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            old = commit.files.get(path)
            oid = None if old is None else _blob(path, old)["lfs" if mode == "lfs" else "blobId"]
            oid = oid["sha256"] if isinstance(oid, dict) else oid
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def batch(self, name):
        self._check_write(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                target = f"{self.hub.url}/upload/{asked['oid']}"
                answer["actions"] = {"upload": {"href": target}, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the object does not have that hash")
        self.hub.objects[oid] = self.body
        self._json({})

    def verify(self):
        self._json({} if json.loads(self.body)["oid"] in self.hub.objects else {"error": "missing"})

    def commit(self, name, revision):
        self._check_write(name)
        repository = self._repository(name)
        lines = [json.loads(line) for line in self.body.decode().splitlines() if line.strip()]
        with self.hub.lock:
            files = dict(repository.commits[-1].files)
            header = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    header = value
                    parent = value.get("parentCommit")
                    if parent not in (None, repository.commits[-1].oid):
                        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
            oid = repository.commit(files, header.get("summary", ""))
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def resolve(self, name, revision, path):
        commit = self._commit_at(name, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data, blob = commit.files[path], _blob(path, commit.files[path])
        etag = blob["lfs"]["sha256"] if blob.get("lfs") else blob["blobId"]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match:
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(data[start:], 206, headers)
        else:
            self._send(data, 200, headers)


def _blob(path, data):
    """What the Hub says about a file: git's hash of it, and where it is large also its SHA-256."""
    described = {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if path.endswith(LFS_SUFFIXES):
        sha256 = hashlib.sha256(data).hexdigest()
        described["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 134}
    return described


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", Handler.tree),
    ("GET", f"/api/models/{_NAME}/refs", Handler.refs),
    ("POST", f"/api/models/{_NAME}/tag/{_REVISION}", Handler.tag),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/upload/(?P<oid>[0-9a-f]+)", Handler.upload),
    ("POST", "/verify", Handler.verify),
    ("GET", f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
    ("GET", f"/api/models/{_NAME}", Handler.info),
]
