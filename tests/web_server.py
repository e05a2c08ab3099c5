"""A local web server for tests, with faults to order."""

import contextlib
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WebServer:
    """Serves `files` (name to bytes) at `url`; `faults[name]` lists what the next requests for a name get instead.

    A fault is a status, 'cut' (half of the body), 'reset' (no answer), 'stall' (half of the body, then nothing), 'slow'
    (a pause before each tenth of it) or 'flip' (a bit changed). requests: how many came for each name.
    """

    def __init__(self, files):
        self.files, self.faults, self.requests = files, {}, Counter()
        self._done = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self._done.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self):
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    web._answer(self, self.path.lstrip("/"))

            def log_message(self, *args):
                pass

        return Handler

    def _answer(self, handler, name):
        self.requests[name] += 1
        waiting = self.faults.get(name, [])
        fault = waiting.pop(0) if waiting else None
        body = self.files.get(name)
        if fault == "reset":
            handler.close_connection = True
            return
        if isinstance(fault, int) or body is None:
            handler.send_error(fault or 404)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        pieces = [body[: len(body) // 2]] if fault in ("cut", "stall") else [body]
        if fault == "flip":
            pieces = [bytes([body[0] ^ 1]) + body[1:]]
        if fault == "slow":
            tenth = len(body) // 10 + 1
            pieces = [body[start : start + tenth] for start in range(0, len(body), tenth)]
        for piece in pieces:
            time.sleep(0.05 if fault == "slow" else 0)
            handler.wfile.write(piece)
            handler.wfile.flush()
        if fault == "stall":
            self._done.wait(20)
