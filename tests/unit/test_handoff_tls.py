"""TLS on both sides: a peer of the authority is served, one of another is not, and neither is one without."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from handoff_toy import QUICK, SECRET, ToyEngine, ToyFeed, monolithic, send_rows

from sparkray.config.base import validate_settings
from sparkray.config.handoff import DecodeConfig, TlsConfig
from sparkray.errors import SparkrayError, UsageError
from sparkray.handoff.agent import DecodeAgent
from sparkray.handoff.client import Answer, Peer, request_name
from sparkray.handoff.messages import Generate

PROMPT = [5, 17, 3, 88, 41, 9, 60]


def certificate(folder: Path, name: str) -> TlsConfig:
    """A self-signed certificate; it is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / f"{name}.key").write_bytes(secret)
    pem = str(folder / f"{name}.pem")
    return TlsConfig(certificate=pem, private_key=str(folder / f"{name}.key"), authority=pem)


def ask(peer: Peer) -> list[int]:
    name = request_name()
    request = Generate(name, peer.ticket(name, tuple(PROMPT)), tuple(PROMPT), 6, rows_timeout_seconds=5)
    answer = Answer(peer, request)
    send_rows(peer, request, ToyFeed(PROMPT))
    return [token for message in answer.tokens(5) for token in message.token_ids]


def test_only_peers_of_the_authority_are_served(tmp_path: Path) -> None:
    decode, prefill, stranger = (certificate(tmp_path, name) for name in ("decode", "prefill", "stranger"))
    (tmp_path / "secret").write_bytes(SECRET)
    known = decode.model_copy(update={"authority": prefill.authority})
    config = DecodeConfig(secret_file=str(tmp_path / "secret"), require_pairing=False, link=QUICK, tls=known)
    agent = DecodeAgent(config, ToyEngine)
    agent.start()
    trusted = prefill.model_copy(update={"authority": decode.authority})
    assert ask(Peer(agent.address, SECRET, trusted, link=QUICK)) == monolithic(PROMPT, 6)
    for tls in (stranger.model_copy(update={"authority": decode.authority}), prefill, None):
        with pytest.raises((SparkrayError, OSError, EOFError)):
            ask(Peer(agent.address, SECRET, tls, link=QUICK))
    assert ask(Peer(agent.address, SECRET, trusted, link=QUICK)) == monolithic(PROMPT, 6)
    agent.stop()


def test_the_wire_is_tls_1_3(tmp_path: Path) -> None:
    from sparkray.handoff.tcp import tls_context

    context = tls_context(certificate(tmp_path, "one"), server=True)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3 and context.verify_mode is ssl.CERT_REQUIRED
    with pytest.raises(UsageError, match="do not load"):
        tls_context(TlsConfig(certificate="none", private_key="none", authority="none"), server=True)


def test_beyond_loopback_tls_is_needed() -> None:
    with pytest.raises(UsageError, match="tls is needed"):
        validate_settings(DecodeConfig, {"host": "0.0.0.0"})
    assert validate_settings(DecodeConfig, {"host": "0.0.0.0", "insecure": True}).insecure
