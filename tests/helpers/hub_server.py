"""A miniature Hugging Face hub on 127.0.0.1, for tests without a network.

It answers the requests that huggingface_hub's client makes to push and pull small files.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, COMMIT = "hf_ours", "a" * 40


class Handler(BaseHTTPRequestHandler):
    """Answers one request. `server.repos` is {repository: {file: content}}."""

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            account = {"name": "me", "type": "user", "orgs": [{"name": "lab"}]}
            return self.answer(*((account, 200) if authorized else ({"error": "who?"}, 401)))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/[^/]+", path):
            files = self.server.repos.get(match[1])
            if files is None:
                return self.missing("RepoNotFound")
            if match[2] == "tree":
                return self.answer(
                    [{"type": "file", "path": f, "size": len(files[f]), "oid": ""} for f in files]
                )
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": match[1], "sha": COMMIT, "siblings": siblings})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            if match[1] not in self.server.repos:
                return self.missing("RepoNotFound")
            content = self.server.repos[match[1]].get(match[2])
            return self.missing("EntryNotFound") if content is None else self.answer(content)
        return self.missing("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            self.server.repos.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main.*", self.path).groups()
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert what == "commit", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repos[name][line["value"]["path"]] = content
        url = f"{self.server.address}/{name}/commit/{COMMIT}"
        return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def answer(self, content, status=200, **headers):
        raw = isinstance(content, bytes)
        body = content if raw else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer({"error": code}, 404, X_Error_Code=code)

    def log_message(self, *_):
        pass


@contextmanager
def hub():
    """A running server; its repositories are in `.repos`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos, server.address = {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
