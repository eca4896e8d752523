"""A stand-in for the Hub on 127.0.0.1: what any handler of it shares."""

from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from huggingface_hub import constants

TOKEN = "hf_secret"


class Handler(BaseHTTPRequestHandler):
    """Answers with a status, a body, and the headers by which the Hub names an error or a commit."""

    def log_message(self, *_):
        pass

    def answer(self, status, data=b"", commit=None, error=None):
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "ETag": f'"{hash(data)}"'}
        headers |= {"X-Repo-Commit": commit} if commit else {}
        headers |= {"X-Error-Code": error} if error else {}
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(handler, **state):
    """A server that answers with ``handler``, which finds ``state`` in it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        vars(server).update(state, endpoint=f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def point_at(monkeypatch, endpoint):
    """Makes huggingface_hub take ``endpoint`` for the Hub, and gives it a token."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
