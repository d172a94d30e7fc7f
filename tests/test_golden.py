"""The training loop against an independent one: see golden.py."""

import json

import golden
import numpy as np
import pytest
from conftest import read_log, run_script


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with the weights, and one with the tokens as shards of odd lengths."""
    folder = tmp_path_factory.mktemp("golden")
    golden.make_model().save_pretrained(folder / "weights")
    (folder / "shards").mkdir()
    tokens = golden.make_tokens(golden.STEPS * golden.BATCH * golden.T + 1)
    for i, shard in enumerate(np.split(tokens, [1001, 20_011])):
        np.save(folder / "shards" / f"golden_train_{i:06d}.npy", shard)
    np.save(folder / "shards" / "golden_val_000000.npy", tokens[:100])
    return folder


@pytest.mark.parametrize(
    ("flags", "nproc", "tolerance"),
    [(["--micro_batch_size=4"], None, 1e-5), (["--micro_batch_size=8"], 2, 1e-3), (["--compile"], None, 1e-3)],
    ids=["one process", "two processes", "compiled"],
)
def test_losses_are_the_golden_ones(start, tmp_path, flags, nproc, tolerance):
    flags = [
        *(f"--init_from={start / 'weights'}", f"--data={start / 'shards'}", f"--log_dir={tmp_path}"),
        *(f"--block_size={golden.T}", f"--total_batch_size={golden.BATCH * golden.T}"),
        *(f"--max_steps={golden.STEPS}", f"--warmup_steps={golden.WARMUP}", f"--max_lr={golden.MAX_LR}"),
        *(f"--weight_decay={golden.WEIGHT_DECAY}", "--eval_interval=0", "--checkpoint_interval=0"),
        *("--device=cpu", "--dtype=float32", *flags),
    ]
    run = run_script(*flags, nproc=nproc)
    assert run.returncode == 0, run.stderr
    losses = [float(value) for _, kind, value in read_log(tmp_path) if kind == "train"]
    expected = json.loads(golden.GOLDEN.read_text(encoding="utf-8"))
    assert len(losses) == len(expected) == golden.STEPS
    assert expected[0] - expected[-1] > 2  # there was something to learn
    assert losses == pytest.approx(expected, abs=tolerance)
