"""Weights that people bring: the lecture's checkpoints, nanoGPT's, folders of transformers; and what we export."""

import json
import re
import signal
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, SIGNALS, edit_json, names_in, run_script
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
import train_gpt2
from fineweb import UserError
from train_gpt2 import GPT, CausalSelfAttention, GPTConfig, load_model, save_pretrained

SHAPE = {"block_size": 16, "vocab_size": 50304, "n_layer": 2, "n_head": 2, "n_embd": 8}
SAMPLES = ["--max_steps=0", "--prompt=To be", "--num_samples=2", "--max_new_tokens=4", "--device=cpu"]


def make_model(**changes):
    """Every tensor is random, the biases and norms too."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def assert_same(model, expected):
    """The same weights, names and shape. expected: a model or a state dict."""
    state = expected.state_dict() if isinstance(expected, GPT) else expected
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def refused(function, *args):
    """What a UserError says, which must be one line."""
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)
    return str(error.value)


def causal_masks():
    """What older versions of nanoGPT keep beside the weights, and whoever typed along with the lecture's video."""
    mask = torch.ones(1, 1, 16, 16).tril()
    return {f"transformer.h.{i}.attn.bias": mask.clone() for i in range(SHAPE["n_layer"])}


# ----------------------------------------------------------------------------------------------------------------------
# The lecture's checkpoints

LECTURE = f"""
import sys
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

for path in sys.argv[1:]:
    state = torch.load(path)
    torch.save({{"model": state, "config": GPTConfig(**{SHAPE}), "step": 19072, "val_loss": 3.07}}, path)
"""


@pytest.fixture(scope="module")
def lecture(tmp_path_factory):
    """A folder of checkpoints as the lecture's script writes them: their config is a pickled __main__.GPTConfig."""
    folder, state = tmp_path_factory.mktemp("lecture"), make_model().state_dict()
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save(state, folder / "model_19072.pt")
    torch.save({**compiled, **causal_masks()}, folder / "compiled.pt")
    subprocess.run([sys.executable, "-c", LECTURE, *map(str, folder.iterdir())], check=True)
    return folder


@pytest.mark.parametrize("name", ["model_19072.pt", "compiled.pt"])
def test_the_lectures_checkpoint_is_read(lecture, name, capsys):
    with pytest.raises(Exception, match=r"__main__\.GPTConfig"):
        torch.load(lecture / name, weights_only=True)  # so this is the pickled class
    model = load_model(str(lecture / name))
    assert_same(model, make_model())
    assert model.config == GPTConfig(**SHAPE)
    assert capsys.readouterr().out == f"loading {lecture / name}\n"


def test_the_lectures_checkpoint_can_be_sampled_exported_evaluated_and_trained(lecture, train, tmp_path, capsys):
    weights = f"--init_from={lecture / 'model_19072.pt'}"
    train_gpt2.main([weights, *SAMPLES])
    samples = capsys.readouterr().out
    assert samples.count("sample 1: To be") == 1
    train_gpt2.main([weights, f"--export={tmp_path / 'folder'}"])
    capsys.readouterr()
    train_gpt2.main([f"--init_from={tmp_path / 'folder'}", *SAMPLES])
    assert capsys.readouterr().out == samples.split("\n", 1)[1]  # without the line "loading"

    example = {"ctx": "A man", "endings": ["sits down", "runs", "eats a pie.", "is"], "label": 3}
    (tmp_path / "examples.jsonl").write_text(json.dumps(example) + "\n", encoding="utf-8")
    evaluate = ["-m", str(lecture / "model_19072.pt"), "--data", str(tmp_path / "examples.jsonl"), "-d", "cpu"]
    hellaswag.main([*evaluate, "--show", "1"])
    figures = re.findall(r"loss ([\d.]+)", capsys.readouterr().out)
    tokenized = hellaswag.tokenize_examples([example], 16)
    sums = hellaswag.ending_losses(make_model(), tokenized, torch.device("cpu"))[0]
    assert figures == [f"{loss / n:.4f}" for loss, n in zip(sums.tolist(), (2, 1, 4, 1), strict=True)]

    # In processes of their own, train_gpt2.py and hellaswag.py are themselves __main__.
    run = run_script(weights, *SAMPLES)
    assert run.returncode == 0, run.stderr
    assert run.stdout == samples
    run = run_script(*evaluate, "--show", "1", script="hellaswag.py")
    assert run.returncode == 0, run.stderr
    assert re.findall(r"loss ([\d.]+)", run.stdout) == figures

    shape = [f"--{name}={value}" for name, value in SHAPE.items()]
    train(weights, *shape, "--max_steps=1", "--eval_interval=0")
    assert names_in(tmp_path / "log") == ["log.txt", "model_00001.pt"]


def test_weights_alone_cannot_be_resumed(lecture, train):
    message = refused(train, "--resume", f"--log_dir={lecture}")
    assert f"it holds weights only: use --init_from={lecture / 'model_19072.pt'}" in message


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT's checkpoints


def nanogpt_checkpoint(weights, bias):
    return {
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": []},
        "model_args": {**SHAPE, "bias": bias, "dropout": 0.0},
        "iter_num": 5,
        "best_val_loss": torch.tensor(3.2),
        "config": {"batch_size": 12, "dataset": "openwebtext", "compile": True},
    }


def plain_forward(weights, idx):
    """nanoGPT's logits, with OpenAI's GELU: biases where the weights have some."""

    def get(name):
        return weights[f"transformer.{name}.weight"], weights.get(f"transformer.{name}.bias")

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], *get(name), 1e-5)

    x = get("wte")[0][idx] + get("wpe")[0][: idx.size(1)]
    for i in range(SHAPE["n_layer"]):
        q, k, v = F.linear(norm(x, f"h.{i}.ln_1"), *get(f"h.{i}.attn.c_attn")).split(SHAPE["n_embd"], dim=2)
        q, k, v = (part.unflatten(2, (SHAPE["n_head"], -1)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        is_later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        y = scores.masked_fill(is_later, -torch.inf).softmax(-1) @ v
        x = x + F.linear(y.transpose(1, 2).flatten(2), *get(f"h.{i}.attn.c_proj"))
        hidden = F.gelu(F.linear(norm(x, f"h.{i}.ln_2"), *get(f"h.{i}.mlp.c_fc")), approximate="tanh")
        x = x + F.linear(hidden, *get(f"h.{i}.mlp.c_proj"))
    return norm(x, "ln_f") @ weights["lm_head.weight"].t()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("prefix", "masks"), [("", {}), ("_orig_mod.", {}), ("_orig_mod.", causal_masks())])
def test_nanogpts_checkpoint_is_read(tmp_path, capsys, bias, prefix, masks):
    weights = {name: tensor for name, tensor in make_model().state_dict().items() if bias or name.endswith("weight")}
    prefixed = {prefix + name: tensor for name, tensor in {**weights, **masks}.items()}
    torch.save(nanogpt_checkpoint(prefixed, bias), tmp_path / "ckpt.pt")
    model = load_model(str(tmp_path / "ckpt.pt"))
    note = "note: nanoGPT computes GELU exactly, this script its approximation"
    assert capsys.readouterr().out.count(note) == 1
    idx = torch.randint(50257, (2, 16))
    assert torch.allclose(model(idx)[0], plain_forward(weights, idx), rtol=1e-4, atol=1e-5)
    assert_same(model, {**{name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}, **weights})


def test_nanogpts_checkpoint_can_be_sampled_and_exported_but_not_resumed(train, tmp_path, capsys):
    (tmp_path / "nanogpt").mkdir()
    path = tmp_path / "nanogpt" / "model_00005.pt"
    weights = make_model().state_dict()
    torch.save(nanogpt_checkpoint(weights, True), path)
    train_gpt2.main([f"--init_from={path}", f"--export={tmp_path / 'folder'}"])
    assert capsys.readouterr().out.count("note: nanoGPT computes GELU") == 1
    assert_same(GPT.from_pretrained(tmp_path / "folder"), cut(weights))
    train_gpt2.main([f"--init_from={path}", *SAMPLES])
    out = capsys.readouterr().out
    assert out.count("note: nanoGPT computes GELU") == out.count("sample 1: To be") == 1
    assert "it holds weights only: use --init_from=" in refused(train, "--resume", f"--log_dir={path.parent}")


# ----------------------------------------------------------------------------------------------------------------------
# The export


def cut(state, vocab_size=50257):
    """A state dict without the rows of padding."""
    rows = {name: state[name][:vocab_size] for name in ("transformer.wte.weight", "lm_head.weight")}
    return {**state, **rows}


def test_config_json_has_what_other_programs_read(tmp_path):
    """llama.cpp and mlx-lm need n_ctx. Without the ids, llama.cpp stops at each comma; without the dropouts,
    transformers and peft fine-tune with 0.1."""
    save_pretrained(make_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    expected = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "vocab_size": 50257,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "n_positions": 16,
        "n_ctx": 16,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(("vocab_size", "exported"), [(50257, 50257), (50260, 50260), (50304, 50257)])
def test_an_export_is_read_by_transformers_and_here(tmp_path, vocab_size, exported):
    """50260: somebody has added three tokens. 50304: padding."""
    model, folder = make_model(vocab_size=vocab_size), tmp_path / "folder"
    save_pretrained(model, folder)
    names = load_file(folder / "model.safetensors").keys()  # as in OpenAI's files, and as mlx-lm needs them
    assert {name.split(".")[0] for name in names} == {"wte", "wpe", "h", "ln_f"}

    theirs, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())  # no missing, unexpected or misshapen tensor
    assert theirs.lm_head.weight.shape == (exported, 8)
    idx = torch.randint(exported, (2, 16))
    logits = theirs.eval()(idx).logits
    assert torch.allclose(model(idx)[0][..., :exported], logits, rtol=1e-4, atol=1e-5)
    assert_same(load_model(str(folder)), cut(model.state_dict(), exported))


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def folder(tmp_path):
    """A folder that transformers saved."""
    torch.manual_seed(2)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def change_tensors(folder, change):
    """Let change(tensors) edit what is in model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("tied", [True, False, None])
def test_an_untied_head_is_refused_whatever_the_config_says(folder, tied):
    edit_json(folder / "config.json", tie_word_embeddings=tied)
    head = {"lm_head.weight": torch.zeros(50257, 8)}
    change_tensors(folder, lambda tensors: tensors.update(head))
    assert f"{folder} cannot be loaded: GPT-2 has wte and lm_head in common" in refused(load_model, folder)


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.wte.weight"])
def test_an_untied_head_of_a_checkpoint_is_refused(tmp_path, name):
    """load_state_dict would copy both into the one matrix that GPT has for them."""
    weights = {**make_model().state_dict(), name: torch.zeros(50304, 8)}
    torch.save(nanogpt_checkpoint(weights, True), tmp_path / "ckpt.pt")
    assert "wte and lm_head in common" in refused(load_model, str(tmp_path / "ckpt.pt"))


def test_a_head_that_is_the_same_or_the_only_one_is_read(folder):
    expected = load_model(folder)
    wte = change_tensors(folder, lambda tensors: None)["transformer.wte.weight"]
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": wte.clone()}))
    assert_same(load_model(folder), expected)
    change_tensors(folder, lambda tensors: tensors.pop("transformer.wte.weight"))
    assert_same(load_model(folder), expected)


def test_of_several_files_those_are_read_that_transformers_would_read(folder):
    expected = load_model(folder)
    other = {name: torch.ones_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "weights.safetensors", metadata={"format": "pt"})
    assert_same(load_model(folder), expected)

    # The parts that an index names
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        part = {name: tensors[name] for name in files if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_same(load_model(folder), expected)

    # model.safetensors before an index
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    state = {name: p.detach().t() for name, p in GPT2LMHeadModel.from_pretrained(folder).named_parameters()}
    assert all(torch.equal(p, torch.ones_like(p)) for p in state.values())
    assert all(torch.equal(p, torch.ones_like(p)) for p in load_model(folder).parameters())


@pytest.mark.parametrize("content", [[], {"weight_map": []}, {"weight_map": {"wte.weight": 5}}, {"weight_map": {}}])
def test_an_index_with_wrong_content_ends_in_one_line(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    assert f"{folder} cannot be loaded: model.safetensors.index.json" in refused(load_model, folder)


def test_a_log_folder_names_its_checkpoint(tmp_path):
    (tmp_path / "model_00005.pt").touch()
    (tmp_path / "model_00010.pt").touch()
    assert f"name a checkpoint in it, {tmp_path / 'model_00010.pt'}" in refused(load_model, tmp_path)


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.h.1.mlp.c_fc.weight"])  # it is not called untied
def test_weights_that_are_not_finite_are_refused(tmp_path, name):
    weights = make_model().state_dict()
    weights[name][0, 0] = float("nan")
    torch.save(nanogpt_checkpoint(weights, True), tmp_path / "ckpt.pt")
    assert "has weights that are not finite" in refused(load_model, str(tmp_path / "ckpt.pt"))


def test_a_lora_adapter_must_be_merged_first(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    save_file({"base_model.lora_A.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    assert re.search("LoRA adapter: merge it", refused(load_model, tmp_path))


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_fast"])
def test_weights_with_another_activation_are_refused(folder, activation):
    edit_json(folder / "config.json", activation_function=activation)
    assert f"activation_function {activation}, not gelu_new" in refused(load_model, folder)


def test_a_small_vocabulary_is_refused_in_one_line(tmp_path):
    """Its tokenizer is another one. Sampling would end in IndexError."""
    config = GPT2Config(vocab_size=500, n_layer=1, n_head=2, n_embd=8, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    model = make_model(vocab_size=65)
    content = nanogpt_checkpoint(model.state_dict(), True)
    content["model_args"]["vocab_size"] = 65  # nanoGPT's characters of Shakespeare
    torch.save(content, tmp_path / "chars.pt")
    assert "chars.pt has 65 tokens, not GPT-2's 50257" in refused(load_model, str(tmp_path / "chars.pt"))
    assert "small has 500 tokens, not GPT-2's 50257" in refused(load_model, tmp_path / "small")
    run = run_script(f"--init_from={tmp_path / 'small'}", *SAMPLES)
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (1, "", 1)
    assert "small has 500 tokens" in run.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Other files


class Other:
    """A class that no checkpoint of a GPT-2 needs."""


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"transformer.h.0.ln_1.weight": 5}},
        {"model": {"transformer.h.0.ln_1.weight": torch.tensor(1.0)}},
        {"model": {1: torch.zeros(1)}},
        {"model": {"transformer.wte.weight": torch.zeros(2, 2).to_sparse()}},
        {"model": [torch.zeros(1)]},
        {"model_args": 5},
        {"model_args": None},
    ],
)
def test_a_checkpoint_like_nanogpts_with_wrong_content_ends_in_one_line(tmp_path, change):
    torch.save({**nanogpt_checkpoint({}, True), **change}, tmp_path / "ckpt.pt")
    assert str(tmp_path / "ckpt.pt") in refused(load_model, str(tmp_path / "ckpt.pt"))


def test_a_foreign_file_is_not_called_damaged_and_no_unsafe_advice_is_passed_on(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": {}, "epoch": 3}, path)
    message = refused(load_model, str(path))
    assert f"{path} is not a checkpoint of this script" in message
    assert "it has the keys model, epoch" in message
    torch.save({"model": Other()}, path)
    pickled = refused(load_model, str(path))
    assert "Unsupported" in pickled
    assert "Other" in pickled
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    old = refused(load_model, str(path))  # the format of PyTorch before 1.6
    for text in (message, pickled, old):
        assert not re.search("damaged|weights_only|trust", text)


# ----------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub's client, which is offline. Returns a function that puts a model there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert huggingface_hub.constants.HF_HUB_OFFLINE

    def put(name, model):
        repo, commit = (
            tmp_path / "hub" / f"models--openai-community--{name}",
            "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        )
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        save_pretrained(model, repo / "snapshots" / commit)

    return put


@pytest.mark.parametrize("name", ["gpt2-medium", "openai-community/gpt2-medium"])
def test_openais_models_have_two_names(hub, train, shards, tmp_path, name):
    model = make_model(vocab_size=50257)
    hub("gpt2-medium", model)
    assert_same(load_model(name), model)
    flags = [f"--init_from={name}", "--total_batch_size=32", "--max_steps=1", "--warmup_steps=0", "--num_samples=0"]
    train_gpt2.main([*flags, f"--data={shards}", f"--log_dir={tmp_path / 'log'}", "--device=cpu", "--hellaswag=off"])
    checkpoint = torch.load(tmp_path / "log" / "model_00001.pt", weights_only=True)
    assert checkpoint["settings"]["max_lr"] == 3e-4  # that of the model


def test_another_model_names_what_to_do(hub):
    for name in ("distilgpt2", "distilbert/distilgpt2"):
        assert f"hf download {name} --local-dir=FOLDER" in refused(load_model, name)
    assert "the Hugging Face hub could not be reached" in refused(load_model, "gpt2")


def test_a_checkpoint_that_is_not_there_names_those_that_are(tmp_path):
    folder = tmp_path / "log"
    missing = str(folder / "model_650.pt")
    assert f"{missing} does not exist, nor does {folder}" in refused(load_model, missing)
    folder.mkdir()
    assert f"{missing} does not exist; {folder} has no checkpoint" in refused(load_model, missing)
    for name in ("ckpt.pt", "model_00700.pt", "earlier_1"):
        (folder / name).mkdir()
    names = f"{folder} has ckpt.pt, model_00700.pt, earlier runs are in {folder / 'earlier_1'}"
    assert f"{missing} does not exist; {names}" in refused(load_model, missing)


class Misspelled(nn.Module):
    """Block with a mistake: ln_1 has another name."""

    def __init__(self, config):
        super().__init__()
        self.ln_one = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = train_gpt2.MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_one(x))
        return x + self.mlp(self.ln_2(x))


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_mistake_in_the_model_keeps_its_traceback(hub, monkeypatch, name):
    hub("gpt2", make_model(vocab_size=50257))
    monkeypatch.setattr(train_gpt2, "Block", Misspelled)
    with pytest.raises(RuntimeError, match=r"Missing key.*h\.0\.ln_one\.weight"):
        load_model(name)


# ----------------------------------------------------------------------------------------------------------------------
# Without assert statements, and twice in one process

CASES = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import fineweb, hellaswag, train_gpt2

folder = Path(sys.argv[1])
sys.argv[0] = "cases.py"


def first_batch(name):
    train_gpt2.DataLoaderLite(1, 4, 0, 1, "train", folder / name).next_batch()


cases = {{
    "flipped bit": lambda: train_gpt2.load_model(str(folder / "flipped.pt")),
    "activation": lambda: train_gpt2.load_model(folder / "relu"),
    "untied head": lambda: train_gpt2.load_model(folder / "untied"),
    "heads": lambda: train_gpt2.load_model(folder / "heads"),
    "vocabulary": lambda: train_gpt2.load_model(folder / "vocabulary"),
    "float64": lambda: first_batch("float64"),
    "token": lambda: first_batch("token"),
    "label": lambda: hellaswag.load_examples(folder / "label.jsonl"),
    "step": lambda: train_gpt2.main(["--total_batch_size=1000", "--block_size=16"]),
    "head flag": lambda: train_gpt2.main(["--n_head=5"]),
}}
print("assert statements:", __debug__)
for name, case in cases.items():
    try:
        fineweb.run_main(case)
    except SystemExit as end:
        print(f"{{name}}: {{end.code}}")
"""
REFUSALS = {
    "flipped bit": "flipped.pt cannot be read as a checkpoint.*checksum",
    "activation": "relu cannot be loaded.*activation_function relu",
    "untied head": "wte and lm_head in common",
    "heads": "n_embd 8 is not a multiple of n_head 3",
    "vocabulary": "vocabulary has 500 tokens",
    "float64": "must hold uint16.*float64",
    "token": "has a token 60000",
    "label": "label from 0 to 3",
    "step": "use --total_batch_size=992",
    "head flag": "n_embd 768 is not a multiple of n_head 5",
}


def write_cases(root):
    model = make_model(n_layer=1)
    torch.save(
        nanogpt_checkpoint(model.state_dict(), True) | {"model_args": {**SHAPE, "n_layer": 1}}, root / "flipped.pt"
    )
    load_model(str(root / "flipped.pt"))
    content = bytearray((root / "flipped.pt").read_bytes())
    content[len(content) // 2] ^= 1  # within wte, which is most of the file
    (root / "flipped.pt").write_bytes(content)
    for name in ("relu", "untied", "heads"):
        save_pretrained(model, root / name)
    edit_json(root / "relu" / "config.json", activation_function="relu")
    edit_json(root / "heads" / "config.json", n_head=3)
    change_tensors(root / "untied", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(50257, 8)}))
    GPT2LMHeadModel(GPT2Config(vocab_size=500, n_layer=1, n_head=2, n_embd=8)).save_pretrained(root / "vocabulary")
    for name, tokens in (("float64", np.ones(50)), ("token", np.array([5, 60000] * 9, dtype=np.uint16))):
        (root / name).mkdir()
        np.save(root / name / "x_train_000001.npy", tokens)
    example = {"ctx": "A man", "endings": ["sits", "runs", "eats", "is"], "label": 4}
    (root / "label.jsonl").write_text(json.dumps(example) + "\n", encoding="utf-8")


@pytest.mark.parametrize("optimize", [[], ["-O"]])
def test_python_O_refuses_what_python_refuses(tmp_path, optimize):
    write_cases(tmp_path)
    command = [sys.executable, *optimize, "-c", CASES.format(root=str(ROOT)), str(tmp_path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"assert statements: {not optimize}\n" in run.stdout
    assert re.findall("^(.*): 1$", run.stdout, re.MULTILINE) == list(REFUSALS)
    assert "Traceback" not in run.stderr
    errors = [line for line in run.stderr.splitlines() if "cases.py: " in line]  # the others are progress bars
    for error, message in zip(errors, REFUSALS.values(), strict=True):
        assert re.search(f"cases.py: .*{message}", error)


def test_a_run_that_failed_can_be_started_again_in_the_same_process(train, tmp_path, monkeypatch):
    """As in Jupyter: the lock of its folder, its log and the handlers of signals are given back."""
    train(f"--log_dir={tmp_path / 'whole'}")
    handlers = [signal.getsignal(number) for number in SIGNALS]
    check_loss = train_gpt2.check_loss

    def fail(step, *args):
        assert [signal.getsignal(number) for number in SIGNALS] != handlers
        check_loss(step, *args)
        if step == 3:
            raise UserError("step 3: made up")

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "check_loss", fail)
        assert refused(train) == "step 3: made up"
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    with FileLock(tmp_path / "log" / ".lock", timeout=0):
        pass
    assert names_in(tmp_path / "log") == ["log.txt", "model_00002.pt"]
    train("--resume")
    assert (tmp_path / "log" / "log.txt").read_bytes() == (tmp_path / "whole" / "log.txt").read_bytes()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
