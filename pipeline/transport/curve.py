"""CURVE: keys in files, and who may connect.

A listener keeps a list of those who may connect by their public keys; who connects knows the listener's. Both sides are
sure of each other then, and nobody else can read what passes.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator


class CurveServer(msgspec.Struct, frozen=True):
    """Keys of an endpoint that others may reach (Z85 text), and the public keys of those who may listen; the file is
    for what is said about them."""

    public: str
    secret: str
    allow: tuple[str, ...]
    secret_file: str = ""


class CurveClient(msgspec.Struct, frozen=True):
    """Keys of a listener, and the public key of the endpoint (Z85 text); the files are for what is said about them."""

    public: str
    secret: str
    server: str
    secret_file: str = ""
    server_file: str = ""


def make_curve_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Writes a new pair of keys, ``<name>.key`` (public) and ``<name>.key_secret`` (mode 0600); returns their paths.
    FileExistsError rather than overwriting one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (folder / f"{name}.key", folder / f"{name}.key_secret"):
        if path.exists():
            raise FileExistsError(path)
    from zmq.auth import create_certificates

    public, secret = create_certificates(folder, name)
    Path(secret).chmod(0o600)
    return Path(public), Path(secret)


def load_curve_server(secret_file: Path, allow: Iterable[Path]) -> CurveServer:
    """The endpoint's own key pair, and the public key files of those who may listen. ConfigError for a bad file."""
    public, secret = _load_pair(secret_file)
    return CurveServer(public, secret, tuple(_load_key(path)[0] for path in allow), str(secret_file))


def load_curve_client(secret_file: Path, server_file: Path) -> CurveClient:
    """A listener's own key pair, and the endpoint's public key file. ConfigError for a bad file."""
    public, secret = _load_pair(secret_file)
    return CurveClient(public, secret, _load_key(server_file)[0], str(secret_file), str(server_file))


def _load_key(path: Path) -> tuple[str, str | None]:
    from zmq.auth import load_certificate
    from zmq.utils.z85 import decode

    todo = "make a pair of keys with `sensorium keys NAME`, or copy the file from the host that has it"
    try:
        if not path.exists():
            raise ConfigError(f"there is no key file {path}; {todo}")
        found = load_certificate(path)
        keys = [key.decode("ascii") for key in found if key is not None]
        if any(len(key) != 40 or len(decode(key)) != 32 for key in keys):
            raise ValueError("a key has 40 characters, and this one has not")
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror or error}; {todo}") from None
    except (ValueError, LookupError) as error:  # what pyzmq says where a key is cut off, or no text
        said = str(error) if type(error) is ValueError else "it is damaged"
        raise ConfigError(f"{path} is no CURVE key file: {said}; {todo}") from None
    return keys[0], keys[1] if len(keys) > 1 else None


def _load_pair(path: Path) -> tuple[str, str]:
    public, secret = _load_key(path)
    if secret is None:
        raise ConfigError(f"{path} holds a public key only; name the file that ends in .key_secret")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path} is a secret key that others on this machine can read (mode {mode:o}): chmod 600 it")
    return public, secret


class _Allowed:
    """Who may listen, as pyzmq's authenticator asks it."""

    def __init__(self, keys: frozenset[bytes], refuse: Callable[[str, str], None], auth: Any) -> None:
        self._keys, self._refuse, self._auth = keys, refuse, auth

    def callback(self, domain: str, key: bytes) -> bool:
        allowed = key in self._keys
        if not allowed:
            self._refuse(key.decode("ascii", "replace"), self._auth.peer)
        return allowed


def authenticator(context: zmq.Context[zmq.Socket[bytes]]) -> ThreadAuthenticator:
    """What asks for keys, started. Imported only here: with asyncio and TLS it would make every node start slower."""
    from zmq.auth.thread import ThreadAuthenticator

    class Authenticator(ThreadAuthenticator):
        """Knows of whom it is just asked."""

        peer = ""

        async def handle_zap_message(self, msg: list[bytes]) -> None:
            self.peer = msg[3].decode("ascii", "replace") if len(msg) > 3 else ""
            await super().handle_zap_message(msg)

    auth = Authenticator(context)
    auth.start()
    return auth


def guard(
    socket: zmq.Socket[bytes],
    domain: str,
    curve: CurveServer,
    auth: ThreadAuthenticator,
    refuse: Callable[[str, str], None],
) -> None:
    """Lets only those connect to what is bound next who are on the list; the others' keys and addresses go to
    ``refuse``."""
    allowed = _Allowed(frozenset(key.encode() for key in curve.allow), refuse, auth)
    auth.configure_curve_callback(domain, allowed)
    socket.setsockopt_string(zmq.ZAP_DOMAIN, domain)
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = curve.public.encode(), curve.secret.encode()


def own_keys(socket: zmq.Socket[bytes], curve: CurveClient) -> None:
    socket.curve_publickey, socket.curve_secretkey = curve.public.encode(), curve.secret.encode()
    socket.curve_serverkey = curve.server.encode()
