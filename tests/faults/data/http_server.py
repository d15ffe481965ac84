"""A real HTTP server on the loopback interface that serves a folder and injects faults."""

import socket
import struct
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer(ThreadingHTTPServer):
    """``faults[name]`` lists the faults of the next responses with that file: stall, reset, cut, error, short."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults, self.asked = folder, {}, Counter()
        self.lock, self.released = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set"

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that disconnect, which the tests cause on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name, server = self.path.rsplit("/", 1)[-1], self.server
        path, fault = server.folder / name, None
        if body:
            with server.lock:
                server.asked[name] += 1
                fault = server.faults[name].pop(0) if server.faults.get(name) else None
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        if fault == "error":
            self.send_error(503)
            return
        self.send_response(200)
        sent = content[: len(content) // 2] if fault in ("stall", "reset", "cut", "short") else content
        self.send_header("Content-Length", str(len(sent) if fault == "short" else len(content)))
        self.end_headers()
        if not body:
            return
        self.wfile.write(sent)
        self.wfile.flush()
        if fault == "stall":
            server.released.wait(60)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("stall", "reset", "cut"):
            self.close_connection = True
            self.connection.close()

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serve(folder: Path):
    """Serve a folder until the block ends."""
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
