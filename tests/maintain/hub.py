"""A stand-in for the hub on loopback: the part of its HTTP interface that uploading and fetching a folder needs."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Repositories as {repo: {path: bytes}}, and the requests received."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.refuse = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        repo = "/".join(self.path.split("/")[3:5])
        files = self.server.repos.get(repo, {})
        if "/resolve/" in self.path:
            self._file()
        elif "/tree/" in self.path:
            self._json([{"type": "file", "path": p, "size": len(d), "oid": COMMIT} for p, d in files.items()])
        else:
            record = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
            self._json({**record, "private": self.server.private.get(repo, False)})

    def do_HEAD(self) -> None:
        self._file()

    def _file(self) -> None:
        """A file of a repository: /owner/name/resolve/REVISION/PATH."""
        _, owner, name, _, _, path = self.path.split("?")[0].split("/", 5)
        data = self.server.repos.get(f"{owner}/{name}", {}).get(unquote(path))
        self.send_response(404 if data is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(data or b"")))
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if data and self.command == "GET":
            self.wfile.write(data)

    def do_PUT(self) -> None:
        self.server.blobs[self.path.split("/")[-1]] = self._body()
        self._json({})

    def do_POST(self) -> None:
        body = self._body()
        if self.server.refuse:
            self._json({"error": "no write access"}, 403)
        elif self.path == "/api/repos/create":
            data = json.loads(body)
            repo = f"{data['organization']}/{data['name']}" if data.get("organization") else data["name"]
            known = repo in self.server.repos
            self.server.repos.setdefault(repo, {})
            self.server.private.setdefault(repo, data.get("private") or data.get("visibility") == "private")
            self._json({"url": f"{self.server.url}/{repo}"}, 409 if known else 200)
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            self._json({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{self.server.url}/blob/{o['oid']}"}}} for o in wanted]
            self._json({"transfer": "basic", "objects": actions})
        elif "/commit/" in self.path:
            self._commit("/".join(self.path.split("/")[3:5]), body)
        else:
            self._json({})

    def _commit(self, repo: str, body: bytes) -> None:
        files = self.server.repos[repo]
        for line in body.splitlines():
            record = json.loads(line)
            value = record["value"]
            if record["key"] == "header":
                self.server.messages.append(value["summary"])
            elif record["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif record["key"] == "lfsFile":
                data = self.server.blobs[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
            elif record["key"] == "deletedFile":
                del files[value["path"]]
        self._json({"commitUrl": f"{self.server.url}/{repo}/commit/0", "commitOid": COMMIT, "success": True})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def hub() -> Iterator[Hub]:
    """A running stand-in."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
