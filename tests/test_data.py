"""DataLoaderLite: the stream is complete, and its position depends on the step alone."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_bin
from hypothesis import given, settings
from hypothesis import strategies as st

from fineweb import UserError, gpt2_encoding
from train_gpt2 import DataLoaderLite

shard_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) >= 2)
few = st.integers(1, 5)


def make_stream(folder, sizes, as_bin):
    """Shards that hold 0, 1, 2, ... end to end."""
    start = 0
    for i, size in enumerate(sizes):
        tokens = np.arange(start, start + size, dtype=np.uint16)
        if as_bin:
            write_bin(Path(folder) / f"x_train_{i:06d}.bin", tokens)
        else:
            np.save(Path(folder) / f"x_train_{i:06d}.npy", tokens)
        start += size
    return start


@settings(deadline=None, max_examples=150)
@given(sizes=shard_sizes, B=few, T=few, ranks=few, micro_steps=st.integers(1, 8), as_bin=st.booleans())
def test_ranks_together_read_the_stream_once_and_in_order(sizes, B, T, ranks, micro_steps, as_bin):
    with tempfile.TemporaryDirectory() as folder:
        total = make_stream(folder, sizes, as_bin)
        loaders = [DataLoaderLite(B, T, rank, ranks, "train", folder) for rank in range(ranks)]
        xs, ys = [], []
        for _ in range(micro_steps):
            for loader in loaders:
                x, y = loader.next_batch()
                assert x.shape == y.shape == (B, T)
                assert x.dtype == y.dtype == torch.int64
                xs.append(x.flatten())
                ys.append(y.flatten())
        n = micro_steps * ranks * B * T
        stream = torch.arange(n + 1) % total  # across the ends of shards, and from the start again
        assert torch.equal(torch.cat(xs), stream[:-1])
        assert torch.equal(torch.cat(ys), stream[1:])


@settings(deadline=None, max_examples=100)
@given(sizes=shard_sizes, B=few, T=few, rank=st.integers(0, 2), steps=st.integers(0, 20), shuffle=st.booleans())
def test_setting_the_position_equals_stepping_there(sizes, B, T, rank, steps, shuffle):
    with tempfile.TemporaryDirectory() as folder:
        make_stream(folder, sizes, as_bin=False)
        stepped = DataLoaderLite(B, T, rank, 3, "train", folder, shuffle)
        for _ in range(steps):
            stepped.next_batch()
        jumped = DataLoaderLite(B, T, rank, 3, "train", folder, shuffle)
        jumped.batch_index = steps
        for a, b in zip(stepped.next_batch(), jumped.next_batch(), strict=True):
            assert torch.equal(a, b)


@settings(deadline=None, max_examples=50)
@given(sizes=shard_sizes, step=st.integers(0, 30), shuffle=st.booleans())
def test_another_micro_batch_and_number_of_ranks_read_the_same_step(sizes, step, shuffle):
    with tempfile.TemporaryDirectory() as folder:
        make_stream(folder, sizes, as_bin=False)
        reads = []
        for B, ranks in [(12, 1), (4, 3), (1, 2), (2, 6), (3, 1)]:  # a step is 12 sequences
            micro_steps = 12 // (B * ranks)
            loaders = [DataLoaderLite(B, 4, rank, ranks, "train", folder, shuffle) for rank in range(ranks)]
            for loader in loaders:
                loader.batch_index = step * micro_steps
            reads.append(torch.cat([loader.next_batch()[0] for _ in range(micro_steps) for loader in loaders]))
        assert all(torch.equal(read, reads[0]) for read in reads)


@settings(deadline=None, max_examples=150)
@given(sizes=shard_sizes, B=few, T=few, ranks=few, seed=st.integers(0, 3))
def test_a_shuffled_epoch_has_every_whole_window_once(sizes, B, T, ranks, seed):
    with tempfile.TemporaryDirectory() as folder:
        total = make_stream(folder, sizes, as_bin=False)
        loaders = [DataLoaderLite(B, T, rank, ranks, "train", folder, True, seed) for rank in range(ranks)]
        num_windows, xs, ys = max(1, (total - 1) // T), [], []
        while sum(map(len, xs)) < 3 * num_windows:
            for loader in loaders:
                x, y = loader.next_batch()
                assert x.shape == y.shape == (B, T)
                xs.append(x)
                ys.append(y)
        x, y = torch.cat(xs), torch.cat(ys)
        assert torch.equal(y, (x + 1) % total)  # of consecutive numbers, y has the next ones
        assert torch.equal(x, (x[:, :1] + torch.arange(T)) % total)
        epochs = x[: 3 * num_windows, 0].view(3, num_windows)
        for epoch in epochs:
            assert sorted(epoch.tolist()) == [i * T for i in range(num_windows)]
        if num_windows > 20:  # then two equal orders are less likely than 1 in 20!
            plain = torch.arange(num_windows) * T
            assert not any(torch.equal(a, b) for a, b in [(epochs[0], plain), (epochs[0], epochs[1])])
            other = DataLoaderLite(num_windows, T, 0, 1, "train", folder, True, seed + 1).next_batch()[0][:, 0]
            assert not torch.equal(epochs[0], other)


def test_text_file_is_split_nine_to_one(tmp_path):
    text = "To be, or not to be: that is the question.\n" * 50
    (tmp_path / "play.txt").write_text(text, encoding="utf-8")
    tokens = gpt2_encoding().encode_ordinary(text)
    train = DataLoaderLite(1, 4, 0, 1, "train", tmp_path / "play.txt")
    val = DataLoaderLite(1, 4, 0, 1, "val", str(tmp_path / "play.txt"))
    split = len(tokens) * 9 // 10
    assert train.read(0, train.num_tokens).tolist() == tokens[:split]
    assert val.read(0, val.num_tokens).tolist() == tokens[split:]


def test_a_text_that_has_changed_is_read_again(tmp_path):
    """In one process, too, as in Jupyter."""
    path = tmp_path / "play.txt"
    for text in ("To be, or not to be. " * 30, "What's in a name? " * 50):
        path.write_text(text, encoding="utf-8")
        tokens = gpt2_encoding().encode_ordinary(text)
        loader = DataLoaderLite(1, 4, 0, 1, "train", path)
        assert loader.read(0, loader.num_tokens).tolist() == tokens[: len(tokens) * 9 // 10]
    path.write_text("Too short.", encoding="utf-8")
    with pytest.raises(UserError, match=r"play\.txt cannot be used: it has changed since the start"):
        loader.read(0, 10)


def test_one_shard_is_not_both_splits(tmp_path):
    """As a text file is: it would validate on what it trains on."""
    good_folder(tmp_path)
    with pytest.raises(UserError, match=r"x_train_000000\.npy must be a text file, or a folder that has"):
        DataLoaderLite(1, 4, 0, 1, "val", tmp_path / "x_train_000000.npy")


def test_a_shard_belongs_to_the_split_before_its_number(tmp_path):
    for name in ("my_train_val_000000.npy", "my_train_train_000001.npy", "my_train_texts.npy", ".x_val_000000.npy"):
        np.save(tmp_path / name, np.arange(50, dtype=np.uint16))
    for split, name in {"val": "my_train_val_000000.npy", "train": "my_train_train_000001.npy"}.items():
        assert [path.name for path in DataLoaderLite(1, 4, 0, 1, split, tmp_path).shards] == [name]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_without_a_number(tmp_path, split):
    """As llm.c's tiny_shakespeare_train.bin."""
    write_bin(tmp_path / f"tiny_shakespeare_{split}.bin", np.arange(50, dtype=np.uint16))
    assert DataLoaderLite(1, 4, 0, 1, split, tmp_path).num_tokens == 50


def good_folder(folder):
    np.save(folder / "x_train_000000.npy", np.arange(50, dtype=np.uint16))
    np.save(folder / "x_train_000001.npy", np.arange(50, dtype=np.uint16))


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


BAD_SHARDS = {
    "empty file": lambda path: path.write_bytes(b""),
    "no tokens": lambda path: np.save(path, np.zeros(0, dtype=np.uint16)),
    "truncated": lambda path: truncate(path, -10),
    "truncated header": lambda path: truncate(path, 20),
    "int32": lambda path: np.save(path, np.arange(50, dtype=np.int32)),
    "big-endian": lambda path: np.save(path, np.arange(50, dtype=">u2")),
    "two-dimensional": lambda path: np.save(path, np.zeros((5, 10), dtype=np.uint16)),
    "one number": lambda path: np.save(path, np.uint16(7)),
    "pickled objects": lambda path: np.save(path, np.array([{}, []], dtype=object), allow_pickle=True),
    "not numpy": lambda path: path.write_bytes(b"hello, this is no array at all" * 10),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", BAD_SHARDS)
def test_bad_npy_shard_is_named_at_once(tmp_path, damage):
    good_folder(tmp_path)
    BAD_SHARDS[damage](tmp_path / "x_train_000001.npy")
    with pytest.raises(UserError, match=r"x_train_000001\.npy") as error:
        DataLoaderLite(1, 4, 0, 1, "train", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["short", "long", "magic", "version", "header", "empty"])
def test_bad_bin_shard_is_named_at_once(tmp_path, damage):
    path = tmp_path / "x_train_000000.bin"
    write_bin(path, np.arange(0 if damage == "empty" else 50))
    content = bytearray(path.read_bytes())
    if damage == "magic":
        content[0] ^= 1
    if damage == "version":
        content[4] = 2
    path.write_bytes({"short": content[:-2], "long": content + b"xx", "header": content[:100]}.get(damage, content))
    with pytest.raises(UserError, match=r"x_train_000000\.bin") as error:
        DataLoaderLite(1, 4, 0, 1, "train", tmp_path)
    assert "\n" not in str(error.value)


def test_token_beyond_the_vocabulary_is_named_when_it_is_read(tmp_path):
    good_folder(tmp_path)
    tokens = np.arange(50, dtype=np.uint16)
    tokens[17] = 50257
    np.save(tmp_path / "x_train_000001.npy", tokens)
    loader = DataLoaderLite(1, 60, 0, 1, "train", tmp_path)
    tokens[17] = 50256
    with pytest.raises(UserError, match=r"x_train_000001\.npy .*has a token 50257"):
        loader.read(0, 100)
    np.save(tmp_path / "x_train_000001.npy", tokens)
    assert loader.read(0, 100).max() == 50256


def test_shard_that_changes_during_training_is_named(tmp_path):
    good_folder(tmp_path)
    path = tmp_path / "x_train_000001.npy"
    loader = DataLoaderLite(1, 60, 0, 1, "train", tmp_path)
    truncate(path, -40)
    with pytest.raises(UserError, match=r"x_train_000001\.npy cannot be used"):
        loader.read(0, 100)
    np.save(path, np.arange(30, dtype=np.uint16))  # a whole shard, but a shorter one
    with pytest.raises(UserError, match=r"x_train_000001\.npy cannot be used: it has changed since the start"):
        loader.read(0, 100)
    path.unlink()
    with pytest.raises(UserError, match=r"x_train_000001\.npy cannot be used"):
        loader.read(0, 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "must be a text file, or a folder that has .*_val_NNNNNN.npy"),
        (lambda path: path.mkdir(), "a folder that has .*_val_NNNNNN.npy"),
        (lambda path: path.write_text(""), "data cannot be used as val data: it is empty"),
        (lambda path: path.write_text("Hi"), "1 val tokens"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00" * 40), "data cannot be used.*utf-8"),
    ],
)
def test_unusable_data_is_refused(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message) as error:
        DataLoaderLite(1, 4, 0, 1, "val", tmp_path / "data")
    assert "\n" not in str(error.value)
