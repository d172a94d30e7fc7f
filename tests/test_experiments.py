"""The experiments change what they say, in the script as it is today."""

import runpy

import experiments
import numpy as np
import pytest
import torch

import fineweb
import train_gpt2

NAMES = [experiment.name for experiment in experiments.EXPERIMENTS]


def test_every_experiment_has_a_name_and_changes_something():
    assert len(set(NAMES)) == len(NAMES)
    assert all(experiment.edits or experiment.flags for experiment in experiments.EXPERIMENTS[1:])


def load(edits, folder):
    """What train_gpt2.py with these edits defines."""
    script = folder / "train_gpt2.py"
    script.write_text(experiments.edited_source(edits), encoding="utf-8")
    return runpy.run_path(str(script))


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS, ids=NAMES)
def test_its_edits_fit_and_its_flags_are_accepted(experiment, tmp_path):
    edited = load(experiment.edits, tmp_path)
    flags = edited["parse_flags"](experiments.make_flags(experiment, 1, tmp_path))
    edited["complete_settings"](edited["merge_settings"](flags), 1)


@pytest.mark.parametrize("name", ["no-residual", "post-norm", "no-position", "no-root", "no-mask", "relu"])
def test_the_model_computes_something_else(name, tmp_path):
    (experiment,) = (experiment for experiment in experiments.EXPERIMENTS if experiment.name == name)
    edited = load(experiment.edits, tmp_path)
    idx = torch.arange(8).view(1, 8)
    outputs = []
    for module in (vars(train_gpt2), edited):
        torch.manual_seed(0)
        model = module["GPT"](module["GPTConfig"](block_size=8, vocab_size=256, n_layer=2, n_head=2, n_embd=16))
        outputs.append(model(idx)[0])
    assert not torch.allclose(*outputs)


def test_the_tokens_are_the_bytes_of_the_text(tmp_path):
    experiments.write_characters(tmp_path)
    shards = [fineweb.open_tokens(*fineweb.find_shards(tmp_path, split), split) for split in ("train", "val")]
    assert [len(shard) / len(shards[0]) for shard in shards] == [1, pytest.approx(1 / 9, abs=1e-4)]
    assert bytes(np.concatenate(shards).astype(np.uint8)) == (experiments.ROOT / "input.txt").read_bytes()


def test_an_edit_that_does_not_fit_is_refused():
    for text in ("no such line", "import"):
        with pytest.raises(ValueError, match="change the experiment"):
            experiments.edited_source({text: ""})


def test_a_run_and_the_table(tmp_path, monkeypatch):
    small = {"n_layer": 1, "n_embd": 8, "block_size": 8, "total_batch_size": 32, "micro_batch_size": 2}
    steps = {"max_steps": 10, "warmup_steps": 2, "val_tokens": 64, "dtype": "float32"}
    monkeypatch.setattr(experiments, "BASE", experiments.BASE | small | steps)
    chosen = [experiment for experiment in experiments.EXPERIMENTS if experiment.name in ("as-it-is", "untied")]
    results = {one.name: [experiments.run(one, seed, tmp_path) for seed in (1, 2)] for one in chosen}
    for one in chosen:
        for figures in results[one.name]:
            assert 5 < figures["val"] < 6  # ln 256 = 5.5
            assert figures["dt"] > 0
    monkeypatch.setattr(experiments, "edited_source", None)  # a finished run is not repeated
    assert experiments.run(chosen[1], 2, tmp_path) == results["untied"][1]
    lines = experiments.table(results).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| nothing: the script as it is | 5.")
    results["untied"][0] = {"failed": "out of memory"}
    assert "| out of memory |" in experiments.table(results)
    results["as-it-is"][0] = {"failed": "out of memory"}
    assert "nothing to compare with" in experiments.table(results)


def test_a_run_that_failed_is_not_kept(tmp_path, monkeypatch):
    broken = experiments.experiment("broken", "a mistake", {"x = tok_emb + pos_emb": "x = tok_emb + no_such_name"})
    monkeypatch.setattr(experiments, "BASE", {**experiments.BASE, "n_layer": 1, "n_embd": 8, "max_steps": 1})
    assert "no_such_name" in experiments.run(broken, 1, tmp_path)["failed"]
    assert list(tmp_path.iterdir()) == []
