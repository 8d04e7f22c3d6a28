"""A hub for tests: serves folders as repositories, with the part of the Hugging Face hub's API that downloads and uploads use.

    GET  /api/models/owner/name[/revision/REV]            the commit of a revision        (datasets likewise)
    GET  /api/models/owner/name/tree/REV?recursive=True   its files, PAGE entries a page, the next page in a Link header
    HEAD, GET /owner/name/resolve/REV/PATH                one file; /datasets/owner/name/... ; large ones by a redirect

    POST /api/repos/create                                a repository of the folder `uploads`, private or not
    POST /api/models/owner/name/preupload/REV             which files go into the commit, and which (large ones) beside it
    POST /owner/name.git/info/lfs/objects/batch           where to put those that are not here yet; PUT /lfs/SHA256
    POST /api/models/owner/name/commit/REV                JSON lines: the message, and a line for each file

It checks tokens, hides private repositories, can break off a file in the middle, and keeps a log of every request.
"""

import json
import re
from base64 import b64decode
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE = 3  # entries a page; the hub has 1000
LARGE = 4096  # files from this size on are redirected to another address, as the hub does
TOKEN = "hf_right"
ROUTE = re.compile(
    r"/(?P<api>api/)?(?:(?P<type>models|datasets)/)?(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<what>revision|tree|resolve|large)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)


@dataclass
class Repository:
    """Commits are folders; a revision is the name of one."""

    revisions: dict[str, Path] = field(default_factory=dict)
    access: str = "public"  # "private", "gated", "forbidden"

    def commit(self, revision: str) -> tuple[str, Path] | None:
        """(sha, folder): the sha is made from the names and bytes of the files."""
        for name, folder in self.revisions.items():
            files = [
                (p.relative_to(folder).as_posix(), p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()
            ]
            sha = sha1(repr(files).encode()).hexdigest()
            if revision in (name, sha):
                return sha, folder
        return None


@dataclass
class Hub:
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)  # (type, owner/name)
    log: list[str] = field(default_factory=list)  # "GET /path"
    break_off: dict[str, int] = field(default_factory=dict)  # path of a file -> how many times it breaks in the middle
    fail: set[str] = field(default_factory=set)  # paths of files that answer 500 after they have broken off
    endpoint: str = ""
    uploads: Path | None = None  # where new repositories are made
    large: dict[str, bytes] = field(default_factory=dict)  # sha256 -> bytes that were put
    refuse_puts: int = 0  # so many uploads of large files are broken off

    def add(self, type: str, name: str, folder: Path, revision: str = "main", access: str = "public") -> str:
        """Serve a folder; returns its commit."""
        repository = self.repositories.setdefault((type, name), Repository())
        repository.revisions[revision], repository.access = folder, access
        return repository.commit(revision)[0]

    def downloads(self) -> list[str]:
        """Names of the files that were fetched, in order of the requests."""
        return [line.rpartition("/")[2] for line in self.log if re.match("GET .*/(resolve|large)/", line)]


@contextmanager
def serve():
    """A Hub that listens on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # they are joined, so that no socket outlives the server
    server.hub = hub
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request a connection (HTTP/1.0)."""

    def log_message(self, *arguments) -> None:  # not on stderr
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        hub, data = self.server.hub, self.body()
        hub.log.append(f"PUT {self.path}")
        if hub.refuse_puts:
            hub.refuse_puts -= 1
            return self.refuse(400, None, "broken off")
        assert sha256(data).hexdigest() == self.path.rpartition("/")[2]
        hub.large[sha256(data).hexdigest()] = data
        self.answer({})

    def do_POST(self) -> None:
        hub, data = self.server.hub, self.body()
        path = unquote(urlsplit(self.path).path)
        hub.log.append(f"POST {path}")
        if self.headers.get("Authorization", "").removeprefix("Bearer ") != TOKEN:
            return self.refuse(401, None, "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "others":
                return self.refuse(403, None, "You don't have the rights to create a model under this namespace")
            if ("models", name) in hub.repositories:
                return self.answer({"url": f"{hub.endpoint}/{name}", "error": "You already created it"}, status=409)
            folder = hub.uploads / name
            folder.mkdir(parents=True)
            is_private = asked.get("visibility") == "private" or asked.get("private")
            hub.add("models", name, folder, access="private" if is_private else "public")
            return self.answer({"url": f"{hub.endpoint}/{name}", "id": name, "name": name})
        if found := re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git/info/lfs/objects)?/(preupload|commit|batch)(?:/.+)?", path
        ):
            folder = hub.repositories["models", found[1]].revisions["main"]
            return getattr(self, found[2])(hub, folder, data, found[1])
        self.refuse(404, "EntryNotFound", f"no route {path}")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def preupload(self, hub: Hub, folder: Path, data: bytes, name: str) -> None:
        def said(file: dict) -> dict:
            mode, old = "lfs" if file["size"] >= LARGE else "regular", folder / file["path"]
            oid = None
            if old.is_file():  # as git names it; a large one by its sha256
                content = old.read_bytes()
                oid = (
                    sha256(content).hexdigest()
                    if mode == "lfs"
                    else sha1(b"blob %d\0" % len(content) + content).hexdigest()
                )
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        self.answer({"files": [said(file) for file in json.loads(data)["files"]]})

    def batch(self, hub: Hub, folder: Path, data: bytes, name: str) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"]}
            | ({} if o["oid"] in hub.large else {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{o['oid']}"}}})
            for o in json.loads(data)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, hub: Hub, folder: Path, data: bytes, name: str) -> None:
        for line in map(json.loads, data.splitlines()):
            if line["key"] == "header":
                continue
            path = folder / line["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                path.write_bytes(b64decode(line["value"]["content"]))
            else:
                assert line["key"] == "lfsFile", line
                path.write_bytes(hub.large[line["value"]["oid"]])
        commit = hub.repositories["models", name].commit("main")[0]
        address = f"{hub.endpoint}/{name}/commit/{commit}"
        self.answer({"commitUrl": address, "commitOid": commit, "success": True})

    def do_GET(self) -> None:
        hub: Hub = self.server.hub
        url = urlsplit(self.path)
        hub.log.append(f"{self.command} {unquote(url.path)}")
        route = ROUTE.fullmatch(url.path)
        if not route:
            return self.refuse(404, "EntryNotFound", f"no route {url.path}")
        type, revision = route["type"] or "models", unquote(route["revision"] or "main")
        repository = hub.repositories.get((type, route["name"]))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if not token and (repository is None or repository.access == "private"):
            return self.refuse(401, None, "Invalid username or password.")
        if repository is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if repository.access == "gated" and route["what"] != "revision" and route["what"] is not None:
            return self.refuse(403, "GatedRepo", "Access to this repository is restricted")
        if repository.access == "forbidden":
            return self.refuse(403, None, "You do not have permission")
        found = repository.commit(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, folder = found
        if route["what"] in (None, "revision"):
            return self.answer(
                {"id": route["name"], "sha": commit, "private": repository.access == "private", "siblings": []}
            )
        if route["what"] == "tree":
            return self.tree(folder, url)
        path = folder / unquote(route["path"])
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        prefix = "" if type == "models" else "/datasets"
        place = f"{hub.endpoint}{prefix}/{route['name']}/large/{commit}/{quote(route['path'])}"
        self.file(path, commit, place if route["what"] == "resolve" and path.stat().st_size >= LARGE else None)

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str | None, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def tree(self, folder: Path, url) -> None:
        entries = []
        for path in sorted(folder.rglob("*")):
            entry = {"path": path.relative_to(folder).as_posix(), "type": "directory", "oid": "0" * 40, "size": 0}
            if path.is_file():
                size, digest = path.stat().st_size, sha1(path.read_bytes()).hexdigest()
                entry |= {"type": "file", "oid": digest, "size": size}
                if size >= LARGE:
                    entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
            entries.append(entry)
        first = int(parse_qs(url.query).get("cursor", ["0"])[0])
        headers = {}
        if first + PAGE < len(entries):
            address = f"{self.server.hub.endpoint}{url.path}?recursive=True&cursor={first + PAGE}"
            headers["Link"] = f'<{address}>; rel="next"'
        self.answer(entries[first : first + PAGE], **headers)

    def file(self, path: Path, commit: str, place: str | None) -> None:
        """The bytes of a file, from the byte on that Range asks for; or where they are."""
        hub, data = self.server.hub, path.read_bytes()
        digest, name = f'"{sha1(data).hexdigest()}"', str(path)
        headers = {"X-Repo-Commit": commit, "ETag": digest, "Accept-Ranges": "bytes"}
        if place:
            headers |= {"Location": place, "X-Linked-Size": str(len(data)), "X-Linked-ETag": digest}
            status, data = 302, b""
        else:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first, status = (int(asked[1]), 206) if asked else (0, 200)
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data = data[first:]
        if self.command == "GET" and not place and not hub.break_off.get(name) and name in hub.fail:
            return self.refuse(500, None, "Internal error")
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD" or place:
            return
        if hub.break_off.get(name):
            hub.break_off[name] -= 1
            data = data[: len(data) // 2]
        self.wfile.write(data)
