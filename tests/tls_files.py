"""Certificates for tests of TLS, made with openssl."""

import shutil
import subprocess

import pytest


def openssl(*args):
    subprocess.run(["openssl", *args], check=True, capture_output=True)


LOCALHOST = "subjectAltName=DNS:localhost,IP:127.0.0.1"


def make_certificate(folder, name, ca=None, days="2", extensions=LOCALHOST):
    """Write NAME.key and NAME.pem for localhost, signed by `ca` or by itself.

    One that is signed by `ca` may have expired: `days` below 0.
    """
    folder.mkdir(exist_ok=True)
    key, pem, csr = (str(folder / f"{name}.{end}") for end in ("key", "pem", "csr"))
    names = folder / "names"
    names.write_text(extensions)
    new = (
        "req",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        key,
        "-subj",
        f"/CN={name}",
    )
    if ca is None:
        openssl(*new, "-x509", "-days", days, "-out", pem)
    else:
        openssl(*new, "-out", csr)
        openssl(
            *("x509", "-req", "-in", csr, "-days", days, "-out", pem),
            *("-CA", str(folder / f"{ca}.pem"), "-CAkey", str(folder / f"{ca}.key")),
            *("-CAcreateserial", "-extfile", str(names)),
        )
    return pem, key


def make_certificates(folder):
    """Write an authority, a stranger, and the authority's server and client."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command here to make certificates with")
    make_certificate(folder, "ca")
    make_certificate(folder, "stranger")
    for name in ("server", "client"):
        make_certificate(folder, name, "ca")
    return folder
