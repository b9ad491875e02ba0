"""TLS to the broker, to its data nodes and to the sentinels."""

import ipaddress
import shutil
import subprocess
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from app.config.settings import Settings
from app.errors import PublishFailed
from tests.support import delivery, workout
from tests.support.broker import BlockingPublisher
from tests.support.sentinels import DURABLE, MASTER, PASSWORD, SENTINEL_PASSWORD, until
from workers.broker_admin import need_durable, need_redis
from workers.local.ports import free_port
from workers.local.wheels import ENVIRONMENT

SERVER = shutil.which("redis-server")  # the Valkey of the wheel has no TLS
pytestmark = [pytest.mark.services, pytest.mark.skipif(SERVER is None, reason="needs a redis-server with TLS")]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1 that is its own authority; its key is beside it."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(names, critical=True)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    file = tmp_path / "certificate.pem"
    file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.with_suffix(".key").write_bytes(private)
    return file


def serve(stack: ExitStack, certificate: Path, port: int, *arguments: str) -> None:
    """Runs redis-server with TLS only."""
    tls = ["--tls-port", str(port), "--port", "0", "--tls-auth-clients", "no", "--tls-replication", "yes"]
    tls += ["--tls-cert-file", str(certificate), "--tls-key-file", str(certificate.with_suffix(".key"))]
    command = [str(SERVER), *arguments, *tls, "--tls-ca-cert-file", str(certificate)]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=certificate.parent, stdout=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)


def publishes(url: str) -> bool:
    publisher = BlockingPublisher(Settings(broker_url=url))
    try:
        publisher.publish([delivery(workout("u1"))])
    except PublishFailed:
        return False
    finally:
        publisher.close()
    return True


@pytest.mark.parametrize("kind", ["direct", "sentinel"])
def test_the_broker_is_reached_with_tls_and_verified(
    tmp_path: Path, certificate: Path, kind: Literal["direct", "sentinel"]
) -> None:
    """Breaks if a password is sent without TLS, or the certificate is not verified."""
    port, sentinel_port = free_port(), free_port()
    with ExitStack() as stack:
        serve(stack, certificate, port, "--requirepass", PASSWORD, *DURABLE)
        configuration = tmp_path / "sentinel.conf"
        lines = (f"sentinel monitor {MASTER} 127.0.0.1 {port} 1", f"sentinel auth-pass {MASTER} {PASSWORD}")
        configuration.write_text("\n".join((*lines, f"requirepass {SENTINEL_PASSWORD}\n")))
        serve(stack, certificate, sentinel_port, str(configuration), "--sentinel")
        url = f"rediss://:{PASSWORD}@127.0.0.1:{port}/0?"
        if kind == "sentinel":
            options = f"master={MASTER}&sentinel_password={SENTINEL_PASSWORD}&ssl=true&"
            url = f"sentinel://:{PASSWORD}@127.0.0.1:{sentinel_port}/0?{options}"
        trusted = f"{url}ssl_ca_certs={certificate}"
        until(lambda: publishes(trusted))
        assert not publishes(url.rstrip("?&"))
        if kind == "direct":
            need_durable(Settings(broker_url=trusted))
        else:
            need_redis(trusted, "REDIS_URL")
