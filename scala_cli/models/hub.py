"""The Hugging Face Hub, quietly, and without a minute of retries where there is no network."""

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars, logging

from scala_cli.errors import CheckpointError

NO_WEIGHTS = (
    "Convert a file you have: scala convert MODEL --weights FILE; or random weights: scala convert --scratch"
)

TRANSPORT: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the HTTP library raises that this version of the Hub's client is built on."""


def fetch(repo: str, names: list[str]) -> Path:
    """The directory that holds the named files of a Hub repository, downloaded or cached.

    Raises CheckpointError where the repository cannot be reached or lacks a file.
    """
    fail_fast_offline()
    repo, _, revision = repo.partition("@")
    try:
        paths = [huggingface_hub.hf_hub_download(repo, name, revision=revision or None) for name in names]
    except (OSError, ValueError, TRANSPORT) as error:
        raise unreachable(f"hf-hub:{repo}", error) from None
    return Path(paths[0]).parent


def fail_fast_offline() -> None:
    """Where the Hub's name does not resolve, use only what is cached, without retrying for a minute."""
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    if any(key.upper() in ("HTTPS_PROXY", "ALL_PROXY") for key in os.environ):
        return
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def unreachable(name: str, error: Exception) -> CheckpointError:
    """The error for weights that could not be downloaded."""
    why = "there is no network" if constants.HF_HUB_OFFLINE else type(error).__name__
    return CheckpointError(f"could not download the weights of {name}: {why}.", NO_WEIGHTS)
