"""llama-cpp-python behind the little of OpenAI's HTTP API that the benchmarks ask for.

It runs in that package's own environment and imports nothing of ours:
python peer_llama.py MODEL.gguf PORT --threads N. One request at a time, as the package has it.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Streams completions of token ids, greedily, to exactly as many tokens as are asked for."""

    protocol_version = "HTTP/1.1"
    model: Any = None
    turn = threading.Lock()

    def do_GET(self) -> None:
        """GET /v1/models."""
        body = json.dumps({"data": [{"id": "llama-cpp"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """POST /v1/completions."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            with self.turn:
                self._complete(asked["prompt"], asked["max_tokens"])
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _complete(self, prompt: list[int], num_tokens: int) -> None:
        if self._is_gone():
            return
        model = type(self).model
        model.reset()
        for number, token in enumerate(model.generate(prompt, temp=0.0), 1):
            choice = {
                "index": 0,
                "text": model.detokenize([token]).decode(errors="replace"),
                "finish_reason": "length" if number == num_tokens else None,
            }
            self._chunk(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            if number == num_tokens:
                break

    def _is_gone(self) -> bool:
        """Whether the client left while it waited for its turn."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


def main() -> None:
    """Serve until killed."""
    from llama_cpp import Llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=4096)
    options = parser.parse_args()
    Handler.model = Llama(
        options.model,
        n_ctx=options.context,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
