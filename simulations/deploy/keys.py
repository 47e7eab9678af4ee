"""Keys and certificates of a federation: a CA, the server's certificate, a key pair per node.

Everything comes from the `cryptography` library; Flower asks for NIST curves and OpenSSH format.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from fedkd.io.extras import extra

with extra("deploy", "fedkd.simulations.deploy"):
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# Clocks of nodes differ: a certificate is valid from a little before it was made.
SKEW = timedelta(hours=1)


@dataclass(frozen=True)
class Pair:
    """A private key (secret) and what may be shown of it, as files hold them."""

    private: bytes
    public: bytes


def certificates(hosts: Sequence[str], *, days: int) -> tuple[Pair, Pair]:
    """A fresh CA and the SuperLink's certificate, both in PEM.

    Args:
        hosts: Names and IP addresses under which nodes reach the SuperLink.
        days: How long both are valid.

    Returns:
        (CA, server): the CA's private key signs and should go offline.
    """
    start = datetime.now(UTC) - SKEW
    end = start + SKEW + timedelta(days=days)
    ca_key, server_key = _new(), _new()
    ca_name = _name("fedkd CA")
    authority = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key(), start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    server = (
        _builder(_name("fedkd SuperLink"), ca_name, server_key.public_key(), start, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_san(host) for host in hosts]), critical=False)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(server_key.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority),
            critical=False,
        )
        .sign(ca_key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    return (
        Pair(_private(ca_key, serialization.PrivateFormat.PKCS8), ca.public_bytes(pem)),
        Pair(_private(server_key, serialization.PrivateFormat.PKCS8), server.public_bytes(pem)),
    )


def node_pair(comment: str) -> Pair:
    """A node's authentication key pair in OpenSSH format."""
    key = _new()
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    private = _private(key, serialization.PrivateFormat.OpenSSH)
    return Pair(private, public + f" {comment}\n".encode())


def public_key(line: bytes) -> bytes:
    """A public key in OpenSSH format as bytes that depend on the key alone.

    Raises:
        ValueError: it is none, or of another kind than Flower registers.
    """
    return _load_public(line).public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )


def sign(private: bytes, data: bytes) -> bytes:
    """Signature of `data` by a node's private key, as files hold it.

    Raises:
        ValueError: `private` is no such key.
    """
    try:
        key = serialization.load_ssh_private_key(private, None)
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("expected a key on a NIST curve")
    return key.sign(data, ec.ECDSA(hashes.SHA384()))


def verify(public: bytes, signature: bytes, data: bytes) -> bool:
    """Whether `signature` of `data` is of the key that `public_key` gave."""
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), public)
    try:
        key.verify(signature, data, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def _load_public(line: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(line)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise ValueError("expected ecdsa-sha2-nistp384")
    return key


def _new() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    start: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _san(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
