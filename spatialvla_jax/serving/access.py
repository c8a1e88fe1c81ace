"""Who may reach a server: loopback hosts, and the token that clients send."""

import ipaddress
import os
from pathlib import Path

from spatialvla_jax.errors import InputError

VARIABLE = "SPATIALVLA_TOKEN"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: Path | None = None) -> str:
    """The token in `file`, by default in the environment variable SPATIALVLA_TOKEN ("" if unset). Raises InputError for
    an unreadable file and for a token that no client could send."""
    if file is None:
        source, text = VARIABLE, os.environ.get(VARIABLE, "")
        if not text:
            return ""
    else:
        source = f"token file {file}"
        if not file.is_file():
            kind = "is a folder" if file.is_dir() else "is not a file" if os.path.lexists(file) else "does not exist"
            raise InputError(f"{source} {kind}: expected a file with a token")
        try:
            text = file.read_text("ascii")
        except OSError as error:
            raise InputError(f"{source} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"{source} does not hold text: expected one line of printable ASCII characters") from None
    token = text.strip()
    if not token:
        raise InputError(f"{source} is empty: expected a token")
    if len(token.split()) > 1:
        raise InputError(f"{source} holds more than one token: expected one line of printable ASCII characters")
    if not (token.isascii() and token.isprintable()):
        raise InputError(f"{source} holds no token: expected one line of printable ASCII characters")
    return token
