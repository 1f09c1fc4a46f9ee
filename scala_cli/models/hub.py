"""The Hugging Face Hub, quietly, and without a minute of retries where there is no network."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
)

from scala_cli.errors import CheckpointError

TRANSPORT: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the HTTP library raises that this version of the Hub's client is built on."""


def fetch(repo: str, names: list[str], also: list[str] | None = None) -> Path:
    """Returns a directory with the named files of a Hub repository, all of one commit, downloaded or cached.

    Its name is the commit: `org/net@COMMIT` is the same one again.

    Args:
        also: files, or patterns of them, that come along where the repository has them.

    Raises CheckpointError where the repository cannot be reached or lacks a file.
    """
    name, _, revision = repo.partition("@")
    wanted = [*names, *(also or [])]
    with quiet_hub():
        try:
            found = huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=wanted)
        except (OSError, ValueError, TRANSPORT) as error:
            raise unreachable(f"hf-hub:{name}", error) from None
        for file in names:
            if not Path(found, file).is_file():
                cached = ", as far as it is cached" if constants.HF_HUB_OFFLINE else ""
                raise CheckpointError(f"hf-hub:{name} holds no {file}{cached}.", remedy="other_weights")
    return Path(found)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """While active, the Hub's client is quiet, and reads its cache alone if the Hub's name does not resolve.

    Else it would retry for a minute. What the process has chosen for the client is as before afterwards.
    """
    verbosity, offline = logging.get_verbosity(), constants.HF_HUB_OFFLINE
    silenced = not sys.stderr.isatty() and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if silenced:
        disable_progress_bars()
    constants.HF_HUB_OFFLINE = offline or not resolves()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        if silenced:
            enable_progress_bars()
        logging.set_verbosity(verbosity)


def resolves() -> bool:
    """Whether the Hub's name does. A proxy resolves names itself."""
    if any(key.upper() in ("HTTPS_PROXY", "ALL_PROXY") for key in os.environ):
        return True
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def unreachable(name: str, error: Exception) -> CheckpointError:
    """The error for weights that could not be downloaded."""
    why = "there is no network" if constants.HF_HUB_OFFLINE else type(error).__name__
    return CheckpointError(f"could not download the weights of {name}: {why}.", remedy="other_weights")
