"""Probes of embeddings, compared with slow loops that do the same."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build, write_timm_directory
from PIL import Image
from torch.nn import functional as F

from scala_cli import probe
from scala_cli.embeddings import FULL, embed, probe_loaders, probe_widths
from scala_cli.errors import DataError
from scala_cli.evaluate import answering
from scala_cli.models.dense import pooled
from scala_cli.models.in_memory import slimmable
from scala_cli.models.order import order_channels
from scala_cli.probe import LinearProbe, agreement, nearest, recall, vote
from scala_cli.settings import DeviceSettings, ProbeSettings, ReadSettings
from scala_cli.tasks import task_named
from scala_cli.watch import QUIET

CPU, READ = DeviceSettings(device="cpu", amp=False), ReadSettings(workers=0)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_neighbours_vote_as_in_two_loops(chunk, monkeypatch):
    monkeypatch.setattr(probe, "CHUNK", chunk)
    queries, bank, labels = drawn(10, 4), drawn(40, 4, seed=1), torch.arange(40) % 3
    found = nearest(queries, bank)
    guess = vote(found, labels, 3)
    for number, query in enumerate(queries.tolist()):
        cosines = [cosine(query, other) for other in bank.tolist()]
        best = sorted(range(40), key=lambda n: -cosines[n])[:20]
        assert found.numbers[number].tolist() == best
        votes = [sum(math.exp(cosines[n] / 0.07) for n in best if n % 3 == label) for label in range(3)]
        assert guess[number] == votes.index(max(votes))


def test_a_small_bank_has_fewer_neighbours():
    assert nearest(drawn(5, 4), drawn(3, 4)).numbers.shape == (5, 3)


def test_agreement_is_the_share_of_their_neighbours_that_are_ours():
    ours, theirs = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 1, 9], [0, 7, 8]])
    assert agreement(ours, theirs) == pytest.approx(2 / 6)
    assert agreement(theirs, theirs) == 1


@pytest.mark.parametrize("chunk", [7, 1024])
def test_recall_counts_the_images_that_are_nearer(chunk, monkeypatch):
    monkeypatch.setattr(probe, "CHUNK", chunk)
    index = drawn(40, 4)
    queries = index + 0.5 * drawn(40, 4, seed=1)
    ahead = [
        sum(cosine(query, other) > cosine(query, index[n].tolist()) for other in index.tolist())
        for n, query in enumerate(queries.tolist())
    ]
    for count, share in zip((1, 5, 10), recall(queries, index, (1, 5, 10)), strict=True):
        assert share == pytest.approx(sum(number < count for number in ahead) / 40)
    assert recall(index, index, (1,)) == [1]
    assert recall(index.repeat(2, 1), index.repeat(2, 1), (1,)) == [1], "the same image twice is found"


def test_a_linear_probe_is_the_ridge_regression_of_the_classes():
    """Compares it with torch's least squares on padded rows, at the strength chosen on held-out images."""
    labels = torch.arange(160) % 4
    shift = 1000 * torch.ones(6)  # standardising removes the shift
    x = (drawn(4, 6)[labels] + drawn(160, 6, seed=1)) * torch.tensor([1, 1, 1, 1, 100, 0]) + shift
    fitted = LinearProbe(x, labels, 4)
    spread = x.double().std(0, correction=0)
    plain = ((x.double() - x.double().mean(0)) / spread.clamp_min(1e-3)).float()
    targets = F.one_hot(labels, 4).float()
    near = []
    for strength in probe.STRENGTHS:
        energy = plain.square().mean(0).mean()
        pull = (160 * strength * energy).sqrt() * torch.eye(6)
        wanted = torch.linalg.lstsq(
            torch.cat([plain, pull]).double(),
            torch.cat([targets - targets.mean(0), torch.zeros(6, 4)]).double(),
        ).solution.T
        near.append((fitted.weight - wanted)[:, :5].abs().max().item())
    assert min(near) < 1e-4
    assert (fitted(x) == labels).float().mean() > 0.6


def test_a_linear_probe_of_a_few_images_that_are_all_alike():
    fitted = LinearProbe(torch.ones(4, 3), torch.tensor([0, 1, 1, 1]), 2)
    assert fitted(torch.ones(2, 3)).tolist() == [1, 1]


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    """Returns a folder of stripes across, stripes down and noise: 16 training images a class, 8 to judge."""
    root, noise = tmp_path_factory.mktemp("textures"), np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 8)):
        for label in ("across", "down", "noise"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                picture = noise.integers(0, 255, (16, 16, 3))
                stripes = 120 * (np.arange(16) // 2 % 2)
                picture = picture // (1 if label == "noise" else 2)
                picture = picture + {"across": stripes[:, None, None], "down": stripes[None, :, None]}.get(
                    label, 0
                )
                Image.fromarray(picture.astype(np.uint8)).save(root / part / label / f"{number}.png")
    return root


@pytest.mark.parametrize("kind", ["knn", "linear"])
@pytest.mark.parametrize("classes", [0, 5])
def test_every_width_is_probed(kind, classes, textures):
    images = drawn(32, 3, 16, 16)
    net = order_channels(slimmable(build("deit", num_classes=classes)[0]), [images])
    chosen = ProbeSettings(kind)
    loaders = probe_loaders(net, str(textures), chosen, 5, READ)
    rows = probe_widths(net, chosen, loaders, net.points, CPU, QUIET)
    assert [row["ratio"] for row in rows] == [0.25, 0.5, 0.75, 1] and rows[0]["images"] == 24
    names = {"ratio", f"{kind}_full", f"{kind}_own", "agreement", "recall@1", "recall@10", "images"}
    assert all(row.keys() == names for row in rows)
    full = rows[-1]
    assert full[f"{kind}_full"] == full[f"{kind}_own"] > 50
    assert full["agreement"] == full["recall@1"] == full["recall@10"] == 100
    assert all(row["recall@1"] <= row["recall@10"] <= 100 for row in rows)
    (half,) = probe_widths(net, chosen, loaders, [net.points[1]], CPU, QUIET)
    assert half == rows[1]


def test_a_probe_is_of_what_the_model_pools(textures):
    for kind in ("deit", "average pool, fc_norm"):
        net = slimmable(build(kind, num_classes=0)[0])
        loader = probe_loaders(net, str(textures), ProbeSettings("knn"), 64, READ)[1]
        found = embed(net, loader, [net.points[1]], CPU, QUIET)
        (images, labels), *_ = loader
        with torch.no_grad():
            assert torch.equal(found.index, net(images))
            assert torch.equal(found.of[net.points[1]], net(images, 0.5))
        assert torch.equal(found.labels, labels)
    net = slimmable(build("deit")[0])
    with torch.no_grad():
        assert torch.equal(pooled(net, images, FULL.ratio), net.vit.forward_features(images)[:, 0])


def test_another_model_takes_the_place_of_the_full_width(textures):
    """Its embeddings are the index, also for the full width's own recall."""
    net, other = (slimmable(build("deit", num_classes=0)[0]) for _ in range(2))
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(torch.randn_like(weight) * 0.1)
    reference = answering(other.vit, task_named("features"), CPU)
    chosen = ProbeSettings("knn")
    loaders = probe_loaders(net, str(textures), chosen, 64, READ)
    rows = probe_widths(net, chosen, loaders, net.points, CPU, QUIET, reference)
    (seen, labels), *_ = loaders[0]
    (images, _), *_ = loaders[1]
    with torch.no_grad():
        queries, bank, index = net(images, 0.5), other(seen), other(images)
    right = vote(nearest(queries, bank), labels, 3) == embed(net, loaders[1], [], CPU, QUIET).labels
    assert rows[1]["knn_full"] == pytest.approx(100 * right.float().mean().item(), abs=1e-3)
    assert rows[1]["recall@1"] == pytest.approx(100 * recall(queries, index, (1,))[0], abs=1e-3)
    assert rows[-1]["recall@1"] < 100 and rows[-1]["agreement"] < 100


def test_recall_needs_no_classes(scala, pictures):
    write_timm_directory(Path("backbone"), num_classes=0)
    assert scala("convert", "backbone", "-o", "net").code == 0
    assert scala("slice", "net", "--ratio", "0.5", "-o", "half").code == 0
    words = ("--data", pictures, "-j", 0, "--no-amp", "--probe", "recall", "--json")
    rows = scala("eval", "net", *words).json["points"]
    assert rows[-1] == {"ratio": 1, "recall@1": 100, "recall@10": 100, "images": 24}
    (row,) = scala("eval", "half", "--against", "backbone", *words).json["points"]
    assert row == {**rows[1], "ratio": 1}, "a slice in the index of the model that it came from"


def test_a_cap_takes_images_of_every_class(textures):
    net = slimmable(build("deit")[0])
    loaders = probe_loaders(net, str(textures), ProbeSettings("knn", 6), 64, READ)
    for loader in loaders:
        (_, labels), *_ = loader
        assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_probe_as_a_user_runs_it(scala, textures):
    write_timm_directory(Path("backbone"), num_classes=0)
    assert scala("convert", "backbone", "--order", "importance", "-o", "net").code == 0
    words = ("--data", textures, "-j", 0, "--no-amp", "--json")
    told = scala("eval", "net", "--probe", "linear", "--probe-images", 12, "--ratio", "0.5", *words)
    assert told.code == 0, told.stderr
    (row,) = told.json["points"]
    assert row["ratio"] == 0.5 and row["images"] == 12 and told.json["skipped"] == []
    told = scala("eval", "net", "--probe", "knn", "--calibrate", *words)
    assert told.code == 0 and len(told.json["points"]) == 4, told.stderr


def test_an_unreadable_training_image_is_skipped_and_told(scala, textures, folder):
    write_timm_directory(Path("backbone"), num_classes=0)
    assert scala("convert", "backbone", "-o", "net").code == 0
    (folder / "train/red/0.png").write_bytes(b"no image")
    told = scala("eval", "net", "--probe", "knn", "--data", folder, "-j", 0, "--on-corrupt", "skip", "--json")
    assert told.code == 0 and len(told.json["skipped"]) == 1 and "unreadable and skipped: 1" in told.told


def test_what_cannot_be_probed(scala, pictures, textures):
    write_timm_directory(Path("backbone"), num_classes=0)
    assert scala("convert", "backbone", "-o", "net").code == 0
    for part in ("train", "val"):
        Path("one", part, "red").mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(f"one/{part}/red/0.png")
    for words, told in (
        (("--data", pictures), "has no train/."),
        (("--data", "one"), "one has one class, 'red'; there is nothing to tell apart. Give images of two"),
        (("--data", textures, "--cascade", "0.25,1"), "--probe judges embeddings"),
        (("--data", textures, "--ratio", "0.3"), "not trained"),
    ):
        refused = scala("eval", "net", "--probe", "knn", *words)
        assert refused.code == 2 and told in refused.told, refused.stderr
    with pytest.raises(DataError, match="none of the images could be read"):
        net = slimmable(build("deit")[0])
        Path("one/train/red/0.png").write_bytes(b"")
        (Path("one/train") / "blue").mkdir()
        Path("one/train/blue/0.png").write_bytes(b"")
        settings = ReadSettings(workers=0, on_corrupt="skip")
        loaders = probe_loaders(net, "one", ProbeSettings("knn"), 4, settings)
        probe_widths(net, ProbeSettings("knn"), loaders, net.points, CPU, QUIET)
