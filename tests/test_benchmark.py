"""The benchmark's figures are what they are called. No test measures a time."""

import itertools
import json

import benchmark
import pytest
import torch
from conftest import ROOT

from fineweb import UserError

# Of the lecture's script, what matters here: it trains when it is imported, and its model needs one of its globals.
LECTURE = """
import inspect
from dataclasses import dataclass
import torch
import torch.nn as nn
from hellaswag import something_that_this_project_lacks

class CausalSelfAttention(nn.Module): pass
class MLP(nn.Module): pass
class Block(nn.Module): pass

@dataclass
class GPTConfig:
    vocab_size: int = 50257

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, 8)
        self.lm_head = nn.Linear(8, config.vocab_size, bias=False)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.wte(idx))
        loss = nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss

    def configure_optimizers(self, weight_decay, learning_rate, device_type):
        if master_process:
            print("using fused AdamW")
        fused = "fused" in inspect.signature(torch.optim.AdamW).parameters and device_type == "cuda"
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=fused)

class DataLoaderLite:
    raise SystemExit("a class that is not of the model was executed")

raise SystemExit("the script was executed")
"""


@pytest.fixture
def lecture(tmp_path):
    path = tmp_path / "lecture.py"
    path.write_text(LECTURE, encoding="utf-8")
    return path


def test_the_lectures_model_trains_and_its_script_does_not_run(lecture, capsys):
    device = torch.device("cpu")
    model, optimizer, autocast = benchmark.build_lecture(device, lecture)
    loader = benchmark.DataLoaderLite(1, 16, 0, 1, "train", ROOT / "input.txt")
    before = model.wte.weight.detach().clone()
    loss = benchmark.train_step(model, list(model.parameters()), optimizer, loader, device, autocast)
    assert 10 < loss < 12
    assert not torch.equal(model.wte.weight, before)
    assert model.wte.num_embeddings == 50304
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("class GPT(", "never closed"),
        ("class GPT: pass", "it has no class Block, CausalSelfAttention, GPTConfig, MLP"),
        (LECTURE.replace("import inspect", "import no_such_module"), "No module named 'no_such_module'"),
    ],
)
def test_a_file_that_is_not_the_lectures(lecture, text, message):
    lecture.unlink()
    if text is not None:
        lecture.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        benchmark.load_lecture(lecture)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (
            ["transformers eager", "lecture eager", "float32", "bf16", "freed memory kept"],
            ["transformers eager", "lecture eager", "this script: float32", "+ bf16", "+ freed memory kept"],
        ),
        (["bf16", "fused AdamW"], ["this script: bf16", "+ freed memory kept, fused AdamW"]),
        (["freed memory kept"], ["this script: bf16, freed memory kept"]),
    ],
)
def test_labels_name_all_that_a_contender_adds(names, labels):
    assert benchmark.label_contenders(names, "cpu") == dict(zip(names, labels, strict=True))


def test_the_ladder_adds_one_measure_after_another():
    for device_type in ("cpu", "cuda", "mps"):
        found = benchmark.contenders(device_type, "FILE")
        assert list(found)[:3] == ["transformers eager", "transformers compiled", "lecture eager"]
        rungs = [found[name] for name in benchmark.LADDERS[device_type]]
        for above, below in itertools.pairwise(rungs):
            assert sum(above[key] != below[key] for key in above) == 1
    assert "lecture eager" not in benchmark.contenders("cpu", None)


def test_the_picture_shows_the_spread():
    results = {}
    for i, name in enumerate(["transformers eager", "bf16", "fused AdamW"]):
        results[name] = {
            "tokens_per_second": 100.0 + i,
            "lowest_tokens_per_second": 90.0 + i,
            "highest_tokens_per_second": 120.0 + i,
        }
    figure = benchmark.draw_ladder({"micro_batch_size": 4, "contenders": results}, "cpu")
    ax = figure.axes[0]
    figure.canvas.draw()
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["transformers eager", "this script: bf16", "+ freed memory kept, fused AdamW"]
    assert [bar.get_width() for bar in ax.patches] == [100, 101, 102]
    segments = [segment.tolist() for segment in ax.collections[0].get_segments()]
    assert segments == [[[90, 0], [120, 0]], [[91, 1], [121, 1]], [[92, 2], [122, 2]]]
    assert ax.yaxis_inverted()


# Reserved GB, as measured for the compiled script.
RESERVED = {4: 4.3, 8: 6.2, 16: 9.8, 32: 18.7, 64: 36.4, 96: 54.2, 128: 72.0}


@pytest.mark.parametrize(
    ("card", "largest"), [(5, None), (5.3, 4), (8, 8), (12, 16), (16, 16), (24, 32), (40, 64), (48, 64), (80, 128)]
)
def test_the_largest_micro_batch_of_a_card(card, largest):
    peaks = {size: {"reserved_gb": reserved} for size, reserved in RESERVED.items()}
    assert benchmark.largest_that_fits(peaks, card) == largest


def test_only_powers_of_two_are_recommended():
    peaks = {96: {"reserved_gb": 1.0}}
    assert benchmark.largest_that_fits(peaks, 80) is None


def test_memory_is_a_table_of_what_was_measured(monkeypatch, tmp_path, capsys):
    def measure(function, size, micro_batch_size, compile, device):
        assert (function, size) == (benchmark.measure_memory, "gpt2-xl")
        if micro_batch_size == 64 and not compile:
            return None
        gb = micro_batch_size / (2 if compile else 1)
        return {"allocated_gb": gb, "reserved_gb": gb + 0.5}

    monkeypatch.setattr(benchmark, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(benchmark, "run_in_process", measure)
    path = tmp_path / "memory.json"
    benchmark.main(["memory", "--model=gpt2-xl", "--micro_batch_sizes", "16", "64", f"--json={path}"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["micro-batch", "eager", "compiled"] in lines
    assert ["16", "16.0", "16.5", "8.0", "8.5"] in lines
    assert ["64", "did", "not", "run", "32.0", "32.5"] in lines
    assert ["16", "GB", "none", "16"] in lines
    assert ["40", "GB", "16", "64"] in lines
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["peaks"]["compiled"]["64"] == {"allocated_gb": 32.0, "reserved_gb": 32.5}
    assert figures["largest_micro_batch_size"]["eager"]["80"] == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["memory", "--device=cpu"], "run it on a machine with one"),
        (["memory", "--model=gpt3"], "invalid choice"),
        (["train", "--device=cpu", "--only=bf16,compile"], "'compile', which is no contender: use some of transform"),
        (["train", "--device=cpu", "--lecture=no_such_file.py"], "No such file"),
        (["nothing"], "invalid choice"),
    ],
)
def test_mistakes_end_in_one_line(monkeypatch, flags, message):
    monkeypatch.setattr(benchmark, "run_in_process", None)  # nothing may be measured
    with pytest.raises(UserError, match=message):
        benchmark.main(flags)


def test_a_step_of_several_micro_steps_is_one_of_their_mean():
    device = torch.device("cpu")
    grads, losses = [], []
    for micro_batch_size, grad_accum_steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        config = benchmark.GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=2, n_embd=32)
        model = benchmark.GPT(config)
        params = list(model.parameters())
        optimizer = model.configure_optimizers(0.1, 6e-4)
        loader = benchmark.DataLoaderLite(micro_batch_size, 16, 0, 1, "train", ROOT / "input.txt")
        autocast = benchmark.make_autocast(device, torch.float32)
        losses.append(benchmark.train_step(model, params, optimizer, loader, device, autocast, grad_accum_steps))
        grads.append(model.lm_head.weight.grad)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    torch.testing.assert_close(*grads)
