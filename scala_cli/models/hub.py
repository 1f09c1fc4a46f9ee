"""Downloads from the Hugging Face Hub, without output, and without a minute of retries when offline."""

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
"""Base error of the HTTP library that the installed Hub client uses."""


def fetch(repo: str, names: list[str], also: list[str] | None = None) -> Path:
    """Returns a directory with the named files of a Hub repository at one commit, downloaded or cached.

    The directory's name is the commit, so `org/net@COMMIT` gives the same directory.

    Args:
        repo: "org/name", or "org/name@REVISION".
        also: names or patterns of files to fetch if the repository has them.

    Raises CheckpointError if the repository cannot be reached or lacks a file.
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
    """Silences the Hub's client for the block, and limits it to its cache if the Hub's name does not resolve.

    Otherwise it would retry for a minute. The client's settings are restored afterwards.
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
    """Whether the Hub's host name resolves; True behind a proxy, which resolves names itself."""
    if any(key.upper() in ("HTTPS_PROXY", "ALL_PROXY") for key in os.environ):
        return True
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def unreachable(name: str, error: Exception) -> CheckpointError:
    """Returns the error for weights that could not be downloaded."""
    why = "there is no network" if constants.HF_HUB_OFFLINE else type(error).__name__
    return CheckpointError(f"could not download the weights of {name}: {why}.", remedy="other_weights")
