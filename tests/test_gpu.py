"""What only a GPU shows. Skipped without one; alone: pytest -m gpu."""

import json
from pathlib import Path

import pytest
import torch
from conftest import slimmable
from runs import QUICK
from torch.optim import AdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def losses(run: str) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_training_gives_the_losses_of_the_cpu(scala, tiny, folder):
    words = ("finetune", tiny, "--data", folder, *QUICK[:-1])
    for device, run in (("cpu", "wanted"), ("cuda", "ours")):
        done = scala(*words, device, "-o", run)
        assert done.code == 0, done.told
    (ours,), (wanted,) = losses("ours"), losses("wanted")
    assert ours == pytest.approx(wanted, rel=1e-3)


def test_a_run_resumes(scala, tiny, folder):
    words = ("finetune", tiny, "--data", folder, "-b", 4, "-j", 0, "--device", "cuda")
    assert scala(*words, "--epochs", 2, "-o", "whole").code == 0
    assert scala(*words, "--epochs", 1, "-o", "part").code == 0
    assert scala("finetune", "--resume", "part", "--epochs", 2).code == 0
    assert len(losses("part")) == len(losses("whole")) == 2
    assert losses("part")[0].keys() == losses("whole")[0].keys()


def test_evaluation_and_bench_run_there(scala, tiny, folder):
    words = ("eval", tiny, "--data", folder, "-j", 0, "--no-amp", "--json")
    found = [scala(*words, "--device", device).json["points"] for device in ("cpu", "cuda")]
    assert found[0] == found[1]
    rows = scala("bench", tiny, "--device", "cuda", "--runs", 3, "--json").json["points"]
    assert len(rows) == 4 and all(row["latency_ms"] > 0 for row in rows)


def test_cached_views_notice_a_fused_optimizer():
    net = slimmable().cuda()
    images = torch.randn(2, 3, 16, 16, device="cuda")
    with torch.no_grad():
        before = net(images, 0.5)
    optimizer = AdamW(net.parameters(), lr=0.1, fused=True)
    net(images, 0.5).sum().backward()
    optimizer.step()
    for parameter in net.parameters():
        torch.autograd.graph.increment_version(parameter)  # as Step does
    with torch.no_grad():
        assert not torch.allclose(net(images, 0.5), before)
