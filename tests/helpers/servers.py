"""HTTP servers on loopback that answer as they should, or fail as servers do."""

import http.server
import ssl
import threading
from contextlib import contextmanager


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files of a folder; a path's `server.answers` are called instead, each once, the last one for ever."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        answers = self.server.answers.get(self.path.partition("?")[0])
        if not answers:
            return super().do_GET()
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def translate_path(self, path):
        return str(self.server.folder / path.rpartition("/")[2].partition("?")[0])

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        """Stay silent: tests make clients disconnect on purpose."""


@contextmanager
def serving(folder, certificate=None):
    """A server of the files in `folder`; over TLS with the `certificate`, a file that holds its key, too."""
    with Server(("127.0.0.1", 0), Handler) as server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.folder, server.requests, server.answers = folder, [], {}
        server.released = threading.Event()  # ends answers that stall
        server.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def says(body=b"", status=200, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def breaks_off(body, length=None):
    """End in the middle of the body; without a length the end of the connection ends the body."""

    def answer(handler):
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header(*("Connection", "close") if length is None else ("Content-Length", str(length)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def stalls(body=None):
    """Stall after some bytes, or before any answer."""

    def answer(handler):
        handler.close_connection = True
        if body is not None:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000000")
            handler.end_headers()
            handler.wfile.write(body)
        handler.server.released.wait(60)

    return answer
