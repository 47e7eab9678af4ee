"""Which code a node runs: the app that its owner has accepted, by its hash.

The server sends the app (Flower's FAB, a zip of the checkout) with a run, and Flower's SuperNode
runs whatever comes. Flower's own `--trusted-entities` takes signatures of its app hub only, so a
bundle from a checkout never passes. Here the content is hashed, file by file: two machines with
other versions of zlib pack the same checkout into other bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tomllib
import zipfile
from pathlib import Path

from fedkd.config import ConfigError

MANIFEST = ".info/CONTENT"
PROJECT = "pyproject.toml"
# A bundle has at most 10 MB; unpacked, code has not much more.
MAX_BYTES, MAX_FILES = 100 * 2**20, 10_000


def app_hash(bundle: bytes) -> str:
    """SHA-256 over the names and contents of a bundle's files.

    Raises:
        ValueError: the bundle is no zip, or holds what unpacks to something else than it shows.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(names) > MAX_FILES or sum(member.file_size for member in members) > MAX_BYTES:
                raise ValueError("the bundle unpacks to too much")
            if len({name.casefold() for name in names}) < len(names):
                raise ValueError("the bundle holds a file twice")
            odd = [name for name in names if not re.fullmatch(r"[\w.][\w./-]*", name, re.ASCII)]
            if odd or any(part == ".." for name in names for part in name.split("/")):
                raise ValueError(f"the bundle holds a file with an odd name ({odd[:1]})")
            files = {name: archive.read(name) for name in names if name != MANIFEST}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError) as error:
        raise ValueError(f"the bundle cannot be read ({error})") from None
    if PROJECT in files:  # Flower writes it anew, and every version of its writer differently
        try:
            project = tomllib.loads(files[PROJECT].decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{PROJECT} of the bundle cannot be read ({error})") from None
        files[PROJECT] = json.dumps(project, sort_keys=True, default=str).encode()
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def checkout_hash(checkout: Path) -> str:
    """The hash of what `flwr run` bundles of a checkout.

    Raises:
        ConfigError: there is nothing to bundle.
    """
    from flwr.cli.build import build_fab_from_disk

    if not (checkout / PROJECT).is_file():
        raise ConfigError(f"{checkout} is no checkout of fedkd: it has no {PROJECT}")
    try:
        return app_hash(build_fab_from_disk(checkout))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{checkout} cannot be bundled: {error}") from None


def read_apps(words: str) -> frozenset[str]:
    """The hashes in APPS of settings.env.

    Raises:
        ConfigError: there is none, or something else stands there.
    """
    apps = words.split()
    wrong = [word for word in apps if not re.fullmatch(r"[0-9a-f]{64}", word)]
    if wrong or not apps:
        raise ConfigError(
            f"APPS in settings.env: expected hashes of the apps this node runs, got {words!r}: "
            "read the code, then `fedkd deploy accept NODE CHECKOUT`"
        )
    return frozenset(apps)
