"""A small server that speaks the hub's API as huggingface_hub calls it, over the files of a folder.

    <root>/models/<owner>/<name>/<revision>/...      <root>/datasets/<owner>/<name>/<revision>/...

A revision's commit is the sha1 of its name. Repositories named private-... need the token "good", gated-... are gated. A
file in `cut_once` is cut off in the middle the first time that it is asked for.
"""

import json
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


def commit_of(repository: str, revision: str) -> str:
    return sha1(f"{repository}@{revision}".encode()).hexdigest()


class HubServer:
    """Serves until `close`. `log` holds (method, path) of every request."""

    def __init__(self, root: Path):
        self.root, self.log, self.cut_once = root, [], set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self._answer(with_body=False)

            def do_GET(self):
                self._answer(with_body=True)

            def _answer(self, with_body: bool) -> None:
                path = unquote(self.path.partition("?")[0]).strip("/")
                hub.log.append((self.command, path))
                is_api = path.startswith("api/")
                parts = path.removeprefix("api/").split("/")
                kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
                repository, rest = "/".join(parts[:2]), parts[2:]
                folder = hub.root / kind / repository
                token = self.headers.get("Authorization")
                if token not in (None, "Bearer good"):
                    return self._fail(401, "Invalid credentials in Authorization header", None)
                if not folder.is_dir() or "/private-" in f"/{parts[1]}" and token is None:
                    return self._fail(401, "Repository not found", "RepoNotFound")
                if parts[1].startswith("gated-"):
                    return self._fail(403, "Access to this repository is restricted", "GatedRepo")
                revision, files = self._revision(folder, repository, "/".join(rest[1:]) if rest else "main")
                if revision is None:
                    return self._fail(404, "Revision not found", "RevisionNotFound")
                commit = commit_of(repository, revision)
                if is_api:
                    names = sorted(p.relative_to(files).as_posix() for p in files.rglob("*") if p.is_file())
                    if rest[:1] == ["tree"]:
                        sizes = {name: (files / name).stat().st_size for name in names}
                        tree = [{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in sizes.items()]
                        return self._send(json.dumps(tree).encode(), "application/json", {}, with_body)
                    info = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
                    return self._send(json.dumps(info).encode(), "application/json", {}, with_body)
                file = files / self.path_in_repository
                if not file.is_file():
                    return self._fail(404, "Entry not found", "EntryNotFound")
                data = file.read_bytes()
                headers = {"X-Repo-Commit": commit, "ETag": f'"{sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
                start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
                if with_body and file.name in hub.cut_once:
                    hub.cut_once.discard(file.name)
                    self._send(data[start:], "application/octet-stream", headers, with_body, cut=True)
                    return None
                return self._send(
                    data[start:], "application/octet-stream", headers, with_body, status=206 if start else 200
                )

            def _revision(self, folder: Path, repository: str, wanted: str):
                """The revision that the words after the repository begin with: a name, or a commit; then its folder."""
                self.path_in_repository = ""
                for revision in sorted(
                    p.relative_to(folder).as_posix() for p in folder.rglob("*") if (p / ".revision").exists()
                ):
                    for name in (revision, commit_of(repository, revision)):
                        if wanted == name or wanted.startswith(name + "/"):
                            self.path_in_repository = wanted[len(name) + 1 :]
                            return revision, folder / revision
                return None, None

            def _send(self, data, kind, headers, with_body, status=200, cut=False) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.close_connection = True

            def _fail(self, status: int, message: str, code: str | None) -> None:
                headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
                self._send(
                    json.dumps({"error": message}).encode(), "application/json", headers, self.command == "GET", status
                )

        return Handler
