"""TLS with certificates that can be replaced while the server runs.

The files are looked at when a client connects; a pair that cannot be read or does not fit is
reported, and the last good one stays in use.
"""

from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

log = structlog.get_logger()


class CertificateError(Exception):
    """The files cannot be used; the text is one line that says why."""


@dataclass(slots=True)
class Certificates:
    """A server's certificate chain and key; with `client_ca`, whose clients alone may connect."""

    chain: Path
    key: Path
    client_ca: Path | None = None
    _seen: tuple[int, ...] = ()

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files. Raises CertificateError if they are no good now."""
        try:
            self._seen = self._stamps()
            first = self._read()
        except OSError as error:
            raise CertificateError(f"{error.filename}: {error.strerror}") from None
        return grpc.dynamic_ssl_server_credentials(
            first,
            self._changed,  # type: ignore[arg-type]  # None is how it says "unchanged"
            require_client_authentication=self.client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration if a file changed, else None. Called for each new connection."""
        try:
            stamps = self._stamps()
            if stamps == self._seen:
                return None
            configuration = self._read()
        except OSError as error:
            log.error("certificates_unreadable", file=error.filename, error=error.strerror)
            return None
        self._seen = stamps
        log.info("certificates_reloaded", chain=str(self.chain))
        return configuration

    def _stamps(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns for path in self._files())

    def _files(self) -> list[Path]:
        return [path for path in (self.chain, self.key, self.client_ca) if path]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(self.key.read_bytes(), self.chain.read_bytes())],
            root_certificates=self.client_ca.read_bytes() if self.client_ca else None,
        )
