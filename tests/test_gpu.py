"""What only a GPU shows. Skipped without one; alone: pytest -m gpu."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import QUICK

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


def test_a_run_goes_on(scala, tiny, folder):
    """Twice from the same state, to the same losses."""
    words = ("finetune", tiny, "--data", folder, "-b", 4, "-j", 0, "--device", "cuda", "--epochs", 1)
    assert scala(*words, "-o", "one").code == 0
    shutil.copytree("one", "other")
    for run in ("one", "other"):
        assert scala("finetune", "--resume", run, "--epochs", 2).code == 0
    assert losses("one")[1] == pytest.approx(losses("other")[1], rel=1e-3)


def test_evaluation_and_bench_run_there(scala, tiny, folder):
    words = ("eval", tiny, "--data", folder, "-j", 0, "--no-amp", "--json")
    found = [scala(*words, "--device", device).json["points"] for device in ("cpu", "cuda")]
    assert found[0] == found[1]
    rows = scala("bench", tiny, "--device", "cuda", "--runs", 3, "--json").json["points"]
    assert len(rows) == 4 and all(row["latency_ms"] > 0 for row in rows)
