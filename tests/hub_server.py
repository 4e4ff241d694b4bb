"""A hub on localhost: what `datasets` and `transformers` ask of it, with faults on demand."""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LARGE = 3000  # bytes from which a file is in large-file storage: with a sha256


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match.

    kind: a status (503; 429 asks for a wait), `drop` (the connection is closed), `truncate` (half
    of the body), `stall` (half of it, then silence), `other` (another body of the same length).
    """

    method: str
    path: str
    kind: str
    times: int = 1


class Hub:
    """Serves a folder as every repository: /<kind>/<any>/<name> holds root/<name>."""

    def __init__(self, root: Path) -> None:
        self.root, self.faults, self.seen = Path(root), [], []
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, "GET")

            def do_HEAD(self) -> None:
                hub.answer(self, "HEAD")

            def do_POST(self) -> None:
                hub.answer(self, "POST")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def fault(self, method: str, path: str) -> str:
        with self.lock:
            self.seen.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.kind
        return ""

    def answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        path = unquote(urlsplit(request.path).path)
        length = int(request.headers.get("Content-Length") or 0)
        asked = parse_qs(request.rfile.read(length).decode()).get("paths", [])
        kind = self.fault(method, path)
        if kind == "drop":
            request.close_connection = True
            request.connection.close()
        elif kind.isdigit():
            headers = {"Retry-After": "0.01"} if kind == "429" else {}
            self.send(request, int(kind), b"{}", headers)
        elif found := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(/.*)?", path):
            self.api(request, found[1].split("/")[1], (found[2] or "").strip("/"), asked)
        elif found := re.fullmatch(r"(?:/datasets)?/[^/]+/([^/]+)/resolve/[^/]+/(.+)", path):
            self.file(request, self.root / found[1] / found[2], kind)
        else:
            self.send(request, 404, b"{}")

    def api(self, request: BaseHTTPRequestHandler, name: str, rest: str, asked: list[str]) -> None:
        root = self.root / name
        if not root.is_dir():
            headers = {"X-Error-Code": "RepoNotFound"}
            self.send(request, 404, b'{"error": "Repository not found"}', headers)
            return
        files = sorted(p for p in root.rglob("*") if p.is_file())
        if rest.startswith("tree/"):
            below = "/".join(rest.split("/")[2:])
            deep = "recursive=true" in request.path.lower()
            value = self.tree(root, root / below, deep)
        elif rest.startswith("paths-info/"):
            value = [self.entry(root, root / name) for name in asked if (root / name).exists()]
        else:
            names = [{"rfilename": p.relative_to(root).as_posix()} for p in files]
            value = {"id": f"any/{name}", "sha": COMMIT, "siblings": names, "tags": []}
            value |= {"private": False, "gated": False, "disabled": False, "downloads": 0}
        self.send(request, 200, json.dumps(value).encode())

    def tree(self, root: Path, folder: Path, deep: bool) -> list[dict]:
        found = sorted(folder.rglob("*") if deep else folder.glob("*"))
        return [self.entry(root, path) for path in found]

    def entry(self, root: Path, path: Path) -> dict:
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        content = path.read_bytes()
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry = {"type": "file", "oid": blob, "size": len(content), "path": name}
        if len(content) >= LARGE:
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
        return entry

    def file(self, request: BaseHTTPRequestHandler, path: Path, kind: str) -> None:
        if not path.is_file():
            self.send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        tag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if len(content) >= LARGE:
            headers |= {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
            low, high = int(found[1]), int(found[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {low}-{high}/{len(content)}"
            content, status = content[low : high + 1], 206
        if kind == "other":
            content = bytes(len(content))
        self.send(request, status, content, headers, kind)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        kind: str = "",
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "HEAD":
            return
        if kind in ("truncate", "stall"):
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            if kind == "stall":
                time.sleep(60)
            request.close_connection = True
            request.connection.close()
            return
        request.wfile.write(content)
