"""HTTP for operators, on an address of its own: /healthz, /readyz, /metrics."""

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from service.settings import ConfigurationError

# Always in a list of its own: wsgiref adds the length of an answer to the list it is given.
TEXT = ("Content-Type", "text/plain; charset=utf-8")


class Admin:
    """Answers in threads of its own: a busy event loop is no reason to look dead."""

    def __init__(
        self, address: str, *, is_ready: Callable[[], bool], registry: CollectorRegistry
    ) -> None:
        """Takes the address; raises ConfigurationError where it cannot."""
        self._is_ready = is_ready
        self._metrics: Any = make_wsgi_app(registry)
        host, _, port = address.rpartition(":")
        try:
            self._server = make_server(host.strip("[]"), int(port), self._answer, _Server, _Quiet)
        except (OSError, ValueError, OverflowError) as error:
            why = getattr(error, "strerror", None) or "it is not HOST:PORT"
            raise ConfigurationError(
                f"PARLEY_ADMIN_ADDRESS: cannot listen on {address}: {why}."
            ) from None
        self.address = f"{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        if path not in ("/healthz", "/readyz"):
            start_response("404 Not Found", [TEXT])
            return [b"There is /healthz, /readyz and /metrics.\n"]
        if path == "/readyz" and not self._is_ready():
            start_response("503 Service Unavailable", [TEXT])
            return [b"not ready\n"]
        start_response("200 OK", [TEXT])
        return [b"ok\n"]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True


class _Quiet(WSGIRequestHandler):
    # A client that says nothing gets no thread for ever.
    timeout = 10

    def log_message(self, *_: object) -> None:
        """Probes come every second: they are not worth a line."""
