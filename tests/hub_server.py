"""A small imitation of the Hugging Face hub's web interface: repositories in memory, requests counted."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


def commit_of(files):
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + hashlib.sha1(files[name]).digest())
    return digest.hexdigest()


class HubServer:
    """`repos[ORG/NAME]` holds the files by revision: 'main', tags and commits. gated: names that want a login.

    fetched: the names of files whose bytes were asked for. commits: what was pushed. errors: requests it did not know.
    """

    def __init__(self):
        self.repos, self.gated, self.private = {}, set(), {}
        self.fetched, self.errors = [], []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo, files, revision="main"):
        """Commit files to a repository; returns the commit."""
        commit = commit_of(files)
        self.repos.setdefault(repo, {}).update({revision: files, commit: files})
        return commit

    def add_folder(self, repo, folder, revision="main"):
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.add(repo, files, revision)

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    hub._answer(self, unquote(urlsplit(self.path).path), body)

            do_GET = do_HEAD = do_POST = _do

            def log_message(self, *args):
                pass

        return Handler

    def _answer(self, request, path, body):
        if request.command == "POST":
            return self._write(request, path, body)
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                repo, revision, *rest = match.groups()
                if repo not in self.repos:
                    return send(request, 404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
                if revision not in self.repos[repo]:
                    return send(request, 404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
                return answer(request, repo, self.repos[repo][revision], *rest)
        self.errors.append(f"{request.command} {path}")
        send(request, 404, {"error": "unknown"})

    def _info(self, request, repo, files):
        siblings = [{"rfilename": name} for name in files]
        send(request, 200, {"id": repo, "modelId": repo, "sha": commit_of(files), "siblings": siblings})

    def _tree(self, request, repo, files):
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        send(request, 200, entries)

    def _file(self, request, repo, files, name):
        if repo in self.gated:
            return send(request, 403, {"error": "ask for access"}, {"X-Error-Code": "GatedRepo"})
        if name not in files:
            return send(request, 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        if request.command == "GET":
            self.fetched.append(name)
        content = files[name]
        send(
            request, 200, content, {"X-Repo-Commit": commit_of(files), "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        )

    def _write(self, request, path, body):
        if path == "/api/validate-yaml":
            return send(request, 200, {"errors": [], "warnings": []})
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return send(request, 401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo in self.repos:
                return send(request, 409, {"error": "exists", "url": f"{self.url}/{repo}"})
            self.repos[repo], self.private[repo] = (
                {"main": {}},
                asked.get("visibility") == "private" or asked.get("private"),
            )
            return send(request, 200, {"url": f"{self.url}/{repo}", "id": repo})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not match:
            self.errors.append(f"{request.command} {path}")
            return send(request, 404, {"error": "unknown"})
        repo, what = match.groups()
        if what == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return send(request, 200, {"files": [{**file, "shouldIgnore": False} for file in files]})
        lines = [json.loads(line) for line in body.decode().splitlines()]
        files = dict(self.repos[repo]["main"])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = self.add(repo, files)
        send(request, 200, {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{repo}/commit/{commit}"})


def send(request, status, content, headers=None):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
