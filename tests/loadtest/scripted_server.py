"""A server process for the comparison tests: echoes fixed text, and can be told to misbehave.

python scripted_server.py FOLDER MODE --host H --port P. It writes its process ids, and that of a
worker it starts, into FOLDER, so that a test can see that none outlives the comparison.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder, mode = Path(sys.argv[1]), sys.argv[2]
host, port = sys.argv[4], int(sys.argv[6])
chats = 0
dying = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(200, json.dumps({"data": [{"id": "scripted"}]}).encode())

    def do_POST(self) -> None:
        global chats
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chats += 1
        if mode == "refuses":
            self._answer(404, b'{"error": "no such model"}')
        elif mode == "loads" and chats <= 2:
            self._answer(503, b'{"error": "loading"}')
        elif mode == "dies" and chats > 3:
            dying.acquire()  # once is enough for all requests in flight
            print("out of memory", flush=True)
            os._exit(7)
        else:
            self._stream(body)

    def _stream(self, body: dict[str, object]) -> None:
        self.send_response(200)
        self.end_headers()
        tokens = int(str(body["max_tokens"]))
        for _ in range(tokens):
            time.sleep(0.001)
            self._event({"choices": [{"delta": {"content": "x"}}]})
        usage = {"prompt_tokens": 9 if mode == "thinks" else 5, "completion_tokens": tokens}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: object) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


if mode == "crashes":
    sys.exit("no memory for the weights")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
(folder / str(os.getpid())).touch()
(folder / str(worker.pid)).touch()
if mode == "hangs":
    time.sleep(120)


class Server(ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        pass  # a client that leaves in mid-stream is part of the test


Server((host, port), Handler).serve_forever()
