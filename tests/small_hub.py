"""A local HTTP server that answers like the Hugging Face hub for one dataset or model, from files in memory."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


def handler_for(
    repo: str, files: dict[str, bytes], asked: list[str], on_download: Callable[[str], None], kind: str
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Quiet."""

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer_json(self, content: object, status: int = 200, **headers: str) -> None:
            self.answer(json.dumps(content).encode(), status, Content_Type="application/json", **headers)

        def entries(self, folder: str, recursive: bool) -> list[dict]:
            prefix = f"{folder}/" if folder else ""
            found: dict[str, dict] = {}
            for name in sorted(files):
                if not name.startswith(prefix):
                    continue
                parts = name.removeprefix(prefix).split("/")
                for depth in range(1, len(parts)):
                    inner = prefix + "/".join(parts[:depth])
                    if depth == 1 or recursive:
                        found[inner] = {"type": "directory", "path": inner, "oid": "0" * 40, "size": 0}
                if len(parts) == 1 or recursive:
                    found[name] = self.entry(name)
            return list(found.values())

        def entry(self, name: str) -> dict:
            oid = hashlib.sha1(files[name]).hexdigest()
            return {"type": "file", "path": name, "oid": oid, "size": len(files[name])}

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            asked.append(f"{self.command} {path}")
            api, resolve = (
                f"/api/{kind}/{repo}",
                f"/{repo}/resolve/" if kind == "models" else f"/{kind}/{repo}/resolve/",
            )
            if path in (api, f"{api}/revision/main", f"{api}/revision/{REVISION}"):
                siblings = [{"rfilename": name} for name in files]
                info = {"id": repo, "sha": REVISION, "siblings": siblings, "tags": [], "private": False, "gated": False}
                self.answer_json(info)
            elif path.startswith(f"{api}/tree/"):
                folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
                entries = self.entries(folder, "recursive=true" in url.query.lower())
                self.answer_json(
                    entries if entries else {"error": "none"}, 200 if entries else 404, **self.missing(entries)
                )
            elif path.startswith(resolve):
                self.file(path.removeprefix(resolve).partition("/")[2])
            else:
                self.answer_json({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        @staticmethod
        def missing(entries: object) -> dict[str, str]:
            return {} if entries else {"X_Error_Code": "EntryNotFound"}

        def file(self, name: str) -> None:
            if name not in files:
                self.answer_json({"error": "no such file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=REVISION)
                return
            body, headers = files[name], {"X_Repo_Commit": REVISION, "ETag": f'"{self.entry(name)["oid"]}"'}
            wanted = self.headers.get("Range")
            if wanted and self.command == "GET":
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                stop = min(int(last) + 1 if last else len(body), len(body))
                headers["Content_Range"] = f"bytes {first}-{stop - 1}/{len(body)}"
                self.answer(body[int(first) : stop], 206, **headers)
            else:
                if self.command == "GET":
                    on_download(name)
                self.answer(body, Accept_Ranges="bytes", **headers)

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"POST {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            if path.startswith(f"/api/{kind}/{repo}/paths-info/"):
                if self.headers.get("Content-Type", "").startswith("application/json"):
                    names = json.loads(body)["paths"]
                else:
                    names = [unquote(part.partition("=")[2]) for part in body.split("&") if part.startswith("paths=")]
                names = [names] if isinstance(names, str) else names
                folders = {"/".join(name.split("/")[:i]) for name in files for i in range(1, name.count("/") + 1)}
                found = [self.entry(name) for name in names if name in files]
                found += [{"type": "directory", "path": n, "oid": "0" * 40, "size": 0} for n in names if n in folders]
                self.answer_json(found)
            else:
                self.answer_json({"error": "not found"}, 404)

    return Handler


@contextmanager
def small_hub(
    repo: str, files: dict[str, bytes], on_download: Callable[[str], None] = lambda name: None, kind: str = "datasets"
) -> Iterator[tuple[str, list[str]]]:
    """The server's address, and the growing list of what it was asked. `on_download` is called before a file is sent whole."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(repo, files, asked, on_download, kind))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
