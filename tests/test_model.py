"""The model against transformers' GPT-2, and the recipe's numbers."""

import json
import math

import pytest
import torch
from conftest import ROOT, edit_json
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import hellaswag
from fineweb import UserError, gpt2_encoding
from train_gpt2 import GPT, DataLoaderLite, GPTConfig, evaluate, get_lr, merge_settings, save_pretrained

SHAPES = {
    "tiny": {"n_layer": 3, "n_head": 4, "n_embd": 48, "n_positions": 40, "vocab_size": 1000},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257},
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def oracle(folder, shape="tiny"):
    """A GPT2LMHeadModel with every tensor random, the biases and norms too, saved to the folder."""
    torch.manual_seed(1)
    config = GPT2Config(**SHAPES[shape], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(tmp_path, shape):
    theirs = oracle(tmp_path, shape)
    ours = GPT.from_pretrained(tmp_path)
    tokens = torch.randint(SHAPES[shape]["vocab_size"], (2, 33))
    x, y = tokens[:, :-1], tokens[:, 1:]
    their_logits = theirs(x).logits
    assert relative(ours(x)[0], their_logits) < 1e-4
    their_loss = F.cross_entropy(their_logits.reshape(-1, their_logits.size(-1)), y.reshape(-1))
    our_loss = ours(x, y)[1]
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    our_loss.backward()
    their_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert len(gradients) == len(list(ours.named_parameters())) == 4 + 12 * SHAPES[shape]["n_layer"]
    for name, p in ours.named_parameters():
        expected = gradients[name].t() if name.endswith(TRANSPOSED) else gradients[name]
        assert relative(p.grad, expected) < 1e-4, name


def test_saved_folder_is_read_by_transformers(tmp_path):
    torch.manual_seed(2)
    model = GPT(GPTConfig(block_size=24, vocab_size=50304, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    save_pretrained(model, tmp_path)
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())  # no missing, unexpected or misshapen tensor
    x = torch.randint(50257, (2, 24))
    assert relative(theirs.eval()(x).logits, model(x)[0][:, :, :50257]) < 1e-5
    again = GPT.from_pretrained(tmp_path)
    assert again.config.vocab_size == 50257
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight[:50257])


def test_both_key_layouts_and_split_files_load(tmp_path):
    oracle(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()  # OpenAI's files also hold the causal masks
    names = sorted(short)
    (tmp_path / "b").mkdir()
    save_file({name: short[name] for name in names[::2]}, tmp_path / "b" / "model-00001-of-00002.safetensors")
    save_file({name: short[name] for name in names[1::2]}, tmp_path / "b" / "model-00002-of-00002.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (tmp_path / "b" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    a, b = GPT.from_pretrained(tmp_path / "a"), GPT.from_pretrained(tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def remove_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors")


def misshape_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.2.ln_1.bias"] = torch.zeros(47)
    save_file(tensors, folder / "model.safetensors")


def pickled_weights_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tensor, r"Missing key.*h\.1\.mlp\.c_fc\.weight"),
        (misshape_tensor, r"size mismatch for .*h\.2\.ln_1\.bias.*\[47\].*\[48\]"),
        (pickled_weights_only, r"no model\.safetensors \(pickled \.bin is not read\)"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "cannot be loaded"),
        (lambda folder: edit_json(folder / "config.json", n_layer="3"), "cannot be loaded"),
        (lambda folder: edit_json(folder / "config.json", model_type="llama"), "model_type llama"),
        (lambda folder: edit_json(folder / "config.json", activation_function="relu"), "activation_function relu"),
        (lambda folder: edit_json(folder / "config.json", scale_attn_by_inverse_layer_idx=True), "scale_attn"),
    ],
)
def test_unusable_folder_is_refused_by_name(tmp_path, damage, message):
    oracle(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("vocab_size", "total", "decayed", "other"),
    [(50257, 124_439_808, 124_318_464, 121_344), (50304, 124_475_904, 124_354_560, 121_344)],
)
def test_parameter_counts_and_optimizer_groups(vocab_size, total, decayed, other):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=vocab_size))
    assert sum(p.numel() for p in model.parameters()) == total
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4)
    decay, no_decay = optimizer.param_groups
    assert (len(decay["params"]), sum(p.numel() for p in decay["params"])) == (50, decayed)
    assert (len(no_decay["params"]), sum(p.numel() for p in no_decay["params"])) == (98, other)
    assert all(p.dim() >= 2 for p in decay["params"])
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (6e-4, (0.9, 0.95), 1e-8, True)


def test_initialization_and_first_loss():
    torch.manual_seed(1337)
    model = GPT(GPTConfig(vocab_size=50304))
    assert model.transformer.wte.weight is model.lm_head.weight
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.all(p == 0), name
        elif ".ln_" in name:
            assert torch.all(p == 1), name
        else:
            std = 0.02 / math.sqrt(24) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.01), name
            assert abs(p.mean().item()) < 1e-4, name
    x, y = DataLoaderLite(4, 128, 0, 1, "train", ROOT / "input.txt").next_batch()
    assert 10.8 < model(x, y)[1].item() < 11.0


def test_learning_rate():
    def lr(step):
        return get_lr(step, max_steps=19073, warmup_steps=715, max_lr=6e-4, min_lr=6e-5)

    assert lr(0) == pytest.approx(6e-4 / 715, rel=1e-12)
    assert lr(714) == pytest.approx(6e-4, rel=1e-12)
    assert lr(715) == pytest.approx(6e-4, rel=1e-12)
    assert lr(715 + (19073 - 715) // 2) == pytest.approx(3.3e-4, rel=1e-12)
    assert lr(19072) == pytest.approx(6e-5, rel=1e-6)
    assert lr(19072) > 6e-5
    assert lr(19073) == lr(30000) == 6e-5
    assert all(lr(step) > lr(step + 1) for step in range(715, 19072, 97))
    assert get_lr(3, max_steps=4, warmup_steps=4, max_lr=1.0, min_lr=0.1) == 1.0  # warm-up all the way
    assert get_lr(0, max_steps=1, warmup_steps=0, max_lr=1.0, min_lr=0.1) == 1.0  # none at all


def test_five_hundred_steps_have_the_learning_rates_of_the_recipe():
    """So the README's ten-minute check, --max_steps=500, can be compared with published runs of all 19,073 steps."""
    check = merge_settings({"max_steps": 500, "data": str(ROOT / "tests")})
    recipe = merge_settings({"data": str(ROOT / "tests")})
    assert (recipe.max_steps, recipe.warmup_steps, recipe.max_lr) == (19073, 715, 6e-4)
    rates = [
        [get_lr(step, run.max_steps, run.warmup_steps, run.max_lr, 0.1 * run.max_lr) for step in range(500)]
        for run in (check, recipe)
    ]
    assert rates[0] == rates[1]
    assert {**vars(check), "max_steps": 19073} == vars(recipe)


def test_loss_counts_only_targets_that_are_given():
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=8, vocab_size=100, n_layer=1, n_head=1, n_embd=8))
    x, y = torch.randint(100, (2, 8)), torch.randint(100, (2, 8))
    y[1] = -1
    assert model(x, y)[1].item() == pytest.approx(model(x[:1], y[:1])[1].item(), rel=1e-6)


def test_cross_entropy_gets_float32_logits_under_autocast(monkeypatch):
    """Autocast makes the logits bfloat16, and a loss computed from those would be rounded."""
    model, autocast = small_model(), torch.autocast("cpu", dtype=torch.bfloat16)
    cross_entropy, given, computed = F.cross_entropy, [], []

    def record(logits, *args, **kwargs):
        given.append(logits.dtype)
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", record)
    model.lm_head.register_forward_hook(lambda module, args, logits: computed.append(logits.dtype))
    x, y = torch.randint(50257, (2, 8)), torch.randint(50257, (2, 8))
    with autocast:
        loss = model(x, y)[1]
    assert loss.dtype == torch.float32
    evaluate(model, DataLoaderLite(2, 8, 0, 1, "val", ROOT / "input.txt"), 20, x.device, autocast)
    example = {"ctx": "A man", "endings": ["sits", "runs", "eats", "is"], "label": 3}
    with autocast:
        hellaswag.ending_losses(model, hellaswag.tokenize_examples([example], 8), x.device)
    assert len(given) == 4  # one to train, two batches to evaluate, one of HellaSwag
    assert set(given) == {torch.float32}
    assert set(computed) == {torch.bfloat16}


def small_model(vocab_size=50304):
    torch.manual_seed(4)
    return GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=8))


@pytest.mark.parametrize("top_k", [None, 0, 1, 50, 60000])
def test_padded_ids_are_never_sampled(top_k):
    model = small_model()
    idx = torch.zeros(4, 3, dtype=torch.long)
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: original(x).index_fill(-1, torch.arange(50257, 50304), 1e4)
    assert model(idx)[0].argmax(-1).min() >= 50257  # the largest logits by far
    for temperature in (0, 1.0, 100.0):
        out = model.generate(idx, 5, temperature=temperature, top_k=top_k)
        assert out.shape == (4, 8)
        assert out.max() < 50257


def test_generate_draws_as_told():
    model = small_model()
    idx = torch.randint(50257, (2, 5))
    state = torch.get_rng_state()
    first = model.generate(idx, 12, generator=torch.Generator().manual_seed(5))
    again = model.generate(idx, 12, generator=torch.Generator().manual_seed(5))
    other = model.generate(idx, 12, generator=torch.Generator().manual_seed(6))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[:, :5], idx)
    # Greedy is the largest logit, and past the context (8) the window slides.
    expected = idx
    for _ in range(12):
        logits = model(expected[:, -8:])[0][:, -1, :50257]
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(idx, 12, temperature=0), expected)
    assert torch.equal(model.generate(idx, 12, top_k=1), expected)
    # top_k draws from exactly the k likeliest.
    logits = model(idx[:1])[0][0, -1, :50257]
    drawn = model.generate(idx[:1].repeat(500, 1), 1, top_k=3, temperature=5.0)[:, -1]
    assert set(drawn.tolist()) == set(logits.topk(3).indices.tolist())


def test_context_is_causal_and_bounded():
    model = small_model()
    idx = torch.randint(50257, (1, 8))
    changed = idx.clone()
    changed[0, 5] += 1
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])
    with pytest.raises(AssertionError, match="9 tokens do not fit into a context of 8"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_config_json_says_gpt2(tmp_path):
    save_pretrained(small_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["vocab_size"], config["n_positions"]) == ("gpt2", 50257, 8)


def test_an_exported_folder_serves_transformers_offline(tmp_path):
    """Its AutoTokenizer gives tiktoken's ids, and its AutoModel the same text as this one."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)  # so that the likeliest token is far ahead, and rounding decides nothing
    folder = tmp_path / "saved"
    save_pretrained(model, folder)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read one file may read all

    tokenizer, encoding = AutoTokenizer.from_pretrained(folder), gpt2_encoding()
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:20_000]
    text += (
        "\t\r\n  x  I'LL it's 12345,67 \u00e4\u00df\u4e2d\u6587\U0001f600 \u200b\u00a0 def f(x):\n    return {}\n\n\n"
    )
    assert tokenizer(text)["input_ids"] == encoding.encode_ordinary(text)
    assert tokenizer.decode(encoding.encode_ordinary(text), clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id == encoding.eot_token
    assert tokenizer.model_max_length == 64

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.lm_head.weight.shape[0] == 50257
    idx = torch.tensor([encoding.encode_ordinary("Hello, I'm a language model,")])
    mask = torch.ones_like(idx)
    expected = theirs.generate(idx, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(idx, 40, temperature=0), expected)
