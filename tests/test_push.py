"""Uploads to a local server that answers like the Hub."""

import base64
import json
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
import torch
from conftest import Answer, slimmable
from huggingface_hub import ModelCard, constants

from scala_cli.models.checkpoint import Record, load, save

RESOLVE = socket.getaddrinfo  # kept before tests patch it
METRICS = [{"ratio": r, "top1": 50 + 40 * r, "top5": 99.0} for r in (0.25, 0.5, 0.75, 1.0)]


class Hub(BaseHTTPRequestHandler):
    """A server that accepts repositories and commits; files come inline, as small ones do on the Hub."""

    server: "Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer(200, {"url": f"{self.server.url}/org/net"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return self.answer(200, {"files": told})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            return self.answer(200, {"commitUrl": f"{self.server.url}/org/net/commit/1", "commitOid": "1"})
        return self.answer(404, {"error": self.path})

    def do_GET(self) -> None:
        private = all(each.get("private") or each.get("visibility") for each in self.server.created)
        about = {"id": "org/net", "sha": "0", "siblings": [], "private": private and not self.server.open}
        self.answer(200, about)

    def answer(self, code: int, document: dict) -> None:
        text = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict] = []
        self.open = False
        self.files: dict[str, bytes] = {}


@pytest.fixture
def hub() -> Iterator[Server]:
    server = Server()
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def net(elsewhere) -> Path:
    origin = {"model": "deit_s", "weights": "deit_s", "data": "flowers", "command": "scala finetune deit_s"}
    save(slimmable(), Record(method="scala", metrics=METRICS, provenance=origin), elsewhere / "net")
    return elsewhere / "net"


@pytest.fixture
def push(scala, monkeypatch) -> Callable[..., Answer]:
    """Returns a function that runs `scala push` against a server, given by itself or by its address."""

    def run(server: Server | str, *words: str, token: str | None = "right") -> Answer:
        monkeypatch.setattr("socket.getaddrinfo", RESOLVE)
        chosen = {"ENDPOINT": server if isinstance(server, str) else server.url, "HF_TOKEN_PATH": "none"}
        for name, value in {**chosen, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token or "")
        return scala("push", *words)

    return run


def test_a_family_with_its_card(push, hub, net, images):
    done = push(hub, "net", "org/net", "--private", "--json")
    assert done.code == 0, done.stderr
    assert done.json == {"repository": "org/net", "url": f"{hub.url}/org/net"}
    (created,) = hub.created
    assert created["name"] == "net" and created["organization"] == "org"
    assert created.get("private") or created.get("visibility") == "private"
    assert set(hub.files) == {"config.json", "model.safetensors", "README.md", "widths.svg"}
    Path("back").mkdir()
    for name, content in hub.files.items():
        Path("back", name).write_bytes(content)
    with torch.no_grad():
        assert torch.equal(load("back")(images, 0.5), slimmable()(images, 0.5))
    card = ModelCard.load("back/README.md")
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        ("top-1 at width 0.25", 60), ("top-1 at width 0.5", 70),
        ("top-1 at width 0.75", 80), ("top-1 at width 1", 90),
    ]  # fmt: skip
    for told in ("hf-hub:org/net", "| 0.5 |", "scala finetune deit_s", "widths.svg"):
        assert told in card.text


def test_the_card_of_a_family_without_its_full_width(push):
    net = slimmable(ratios="0.25,0.5")
    save(net, Record(method="scala"), Path("narrow"))
    done = push("http://127.0.0.1:9", "narrow", "org/narrow", "--dry-run", "-o", "out", token=None)
    assert done.code == 0, done.stderr
    card = ModelCard.load("out/README.md").text
    assert 'scala_cli.load("hf-hub:org/narrow")' in card and "net.slice('0.25')" in card
    assert "timm.create_model" not in card and "timm loads" not in card


def test_what_is_to_be_private_is_not_put_where_everybody_sees_it(push, hub, net):
    hub.open = True
    done = push(hub, "net", "org/net", "--private")
    assert done.code == 2 and "is public" in done.stderr and not hub.files


def test_one_width_is_looked_at_first(push, net, images):
    done = push("http://127.0.0.1:9", "net", "org/half", "--ratio", "0.5", "--dry-run", token=None)
    assert done.code == 0, done.stderr
    assert {path.name for path in Path("half").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    model = timm.create_model("local-dir:half", pretrained=True).eval()
    with torch.no_grad():
        assert (model(images) - slimmable()(images, 0.5)).abs().max() <= 1e-5
    assert len(ModelCard.load("half/README.md").data.eval_results) == 1
    again = push("http://127.0.0.1:9", "net", "org/half", "--dry-run")
    assert again.code == 2 and "not empty" in again.stderr


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (("net", "org/net"), None, "there is no token for the Hub."),
        (("net", "org/net"), "wrong", "the Hub refuses org/net"),
        (("net", "or g/net"), "right", "not a valid name of a repository"),
        (("net",), "right", "no run yet"),
        (("net", "net"), "right", "not a valid name of a repository"),
        (("net", "org/net", "--private", "--dry-run"), "right", "leave out --private"),
        (("org/net",), "right", "no run yet"),
        (("net", "org/net", "--ratio", "0.3"), "right", "not trained"),
        (("net", "org/net", "-o", "x"), "right", "go with --dry-run"),
    ],
)
def test_what_is_refused(push, hub, net, words, token, message):
    done = push(hub, *words, token=token)
    assert done.code == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not hub.files and {path.name for path in Path().iterdir()} == {"net"}


def test_without_a_server(push, net):
    done = push("http://127.0.0.1:9", "net", "org/net")
    assert done.code == 2 and "cannot be reached" in done.stderr and "--dry-run" in done.stderr
