"""Serve an artifact over HTTP, with the standard library alone: text streams as it is generated.

    tokenmill optimize examples/tiny_deepseek -o model.tm --weights int4
    python examples/serve.py model.tm --port 8000
    curl -N localhost:8000/generate -d '{"prompt": "def main():", "max_new_tokens": 64}'

Beside the prompt a request may have what Session.stream takes: temperature, top_k, top_p, seed, stop. A list
of prompts is continued in one batch and answered with a JSON list.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from tokenmill import Session
from tokenmill.errors import TokenmillError


def server(session: Session, port: int) -> ThreadingHTTPServer:
    one_at_a_time = Lock()  # a session has one caller; prompts of one call share its batches

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = request.pop("prompt")
                with one_at_a_time:
                    if isinstance(prompt, list):
                        texts = [made.text for made in session.generate(prompt, **request)]
                        self.answer(200, "application/json")
                        self.wfile.write(json.dumps(texts).encode())
                    else:
                        pieces = session.stream(prompt, **request)  # raises before anything is sent
                        self.answer(200, "text/plain; charset=utf-8")
                        for piece in pieces:
                            self.wfile.write(piece.text.encode())
            except (TokenmillError, ValueError, KeyError, TypeError) as error:
                self.answer(400, "text/plain; charset=utf-8")
                self.wfile.write(f"{error}\n".encode())

        def answer(self, status: int, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()  # HTTP/1.0: the end of the connection ends the text

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", help="a directory that `tokenmill optimize` wrote")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with Session(options.artifact) as session, server(session, options.port) as http:
        print(f"listening on http://127.0.0.1:{http.server_port}/generate")
        http.serve_forever()


if __name__ == "__main__":
    main()
