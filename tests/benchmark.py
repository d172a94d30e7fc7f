"""
What the speed is, beside what one would use instead: interleaved rounds, medians.

    python tests/benchmark.py tokenize             # fineweb.py beside a plain loop
    python tests/benchmark.py hellaswag            # hellaswag.py beside one example at a time

--json FILE keeps the figures. Quote the ratios: machines differ, and so do their days.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fineweb
import hellaswag
from train_gpt2 import GPT, GPTConfig, keep_freed_memory, pick_device


def print_table(title, rows):
    """rows: [(label, number, unit)]."""
    print(f"\n{title}")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    for label, number, unit in rows:
        print(f"  {label:52s} {number:14,.2f} {unit}")


# ----------------------------------------------------------------------------------------------------------------------
# tokenize


def write_documents(folder, count):
    """Parquet in the layout of FineWeb-Edu's sample, with documents of web length: about a thousand tokens, few short."""
    import pyarrow as pa
    from pyarrow import parquet

    text, rng = (ROOT / "input.txt").read_text(encoding="utf-8"), random.Random(0)
    (folder / "sample" / "10BT").mkdir(parents=True)
    header = (
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    (folder / "README.md").write_text(header, encoding="utf-8")
    documents = []
    for _ in range(count):
        length = min(100_000, max(200, int(rng.lognormvariate(7.8, 0.8))))
        start = rng.randrange(len(text) - length)
        documents.append(text[start : start + length])
    parquet.write_table(pa.table({"text": documents}), folder / "sample" / "10BT" / "000.parquet", row_group_size=1000)


def plain_tokenize(document):
    encoding = fineweb.gpt2_encoding()
    return np.array([encoding.eot_token, *encoding.encode_ordinary(document["text"])], dtype=np.uint16)


def plain_loop(dataset, out):
    """As the reference script has it on two cores: one worker, documents pickled to it in chunks of 16."""
    from datasets import load_dataset

    documents = load_dataset(dataset, name="sample-10BT", split="train")
    tokens = np.empty(100_000_000, dtype=np.uint16)
    filled = 0
    with multiprocessing.Pool(1) as pool:
        for piece in pool.imap(plain_tokenize, documents, chunksize=16):
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
    np.save(Path(out) / "plain.npy", tokens[:filled])
    print(filled)


def encode_for(seconds, queue):
    """Tokens a second of encode_to_numpy alone, on text that is in memory."""
    text, rng, encoding = (ROOT / "input.txt").read_text(encoding="utf-8"), random.Random(1), fineweb.gpt2_encoding()
    documents = [text[i : i + 3000] for i in (rng.randrange(len(text) - 3000) for _ in range(2000))]
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for document in documents[:100]:
            count += len(encoding.encode_to_numpy(document, disallowed_special=()))
    queue.put(count / (time.perf_counter() - start))


def raw_rate(processes, seconds=5.0):
    queue = multiprocessing.Queue()
    workers = [multiprocessing.Process(target=encode_for, args=(seconds, queue)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    total = sum(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


def benchmark_tokenize(options):
    seconds = {"plain": [], "ours": [], "ours, half": []}
    raw, tokens = [], {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["HF_HOME"] = str(folder / "cache")
        write_documents(folder / "whole", options.documents)
        write_documents(folder / "half", options.documents // 2)
        plain = [sys.executable, __file__, "plain_loop", str(folder / "whole"), str(folder)]
        ours = [sys.executable, str(ROOT / "fineweb.py"), f"--num_proc={os.cpu_count()}"]
        for i in range(options.rounds + 1):  # the first one fills the data set's cache
            commands = {
                "plain": plain,
                "ours": [*ours, f"--dataset={folder / 'whole'}", f"--out={folder / f'whole_{i}'}"],
                "ours, half": [*ours, f"--dataset={folder / 'half'}", f"--out={folder / f'half_{i}'}"],
            }
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                if i > 0:
                    seconds[name].append(time.perf_counter() - start)
            raw.append(raw_rate(os.cpu_count()))
        for name in ("whole", "half"):
            index = json.loads((folder / f"{name}_0" / "index.json").read_text(encoding="utf-8"))
            tokens[name] = index["tokens"]
        same = np.array_equal(
            np.load(folder / "plain.npy"),
            np.concatenate([np.load(path) for path in sorted((folder / "whole_0").glob("*.npy"), reverse=True)]),
        )
    assert same, "the two make different tokens"
    median = {name: statistics.median(values) for name, values in seconds.items()}
    running = (tokens["whole"] - tokens["half"]) / (median["ours"] - median["ours, half"])
    figures = {
        "tokens": tokens["whole"],
        "plain_tokens_per_second": tokens["whole"] / median["plain"],
        "ours_tokens_per_second": tokens["whole"] / median["ours"],
        "ratio": median["plain"] / median["ours"],
        "running_tokens_per_second": running,
        "encode_to_numpy_tokens_per_second": statistics.median(raw),
        "running_share": running / statistics.median(raw),
    }
    rows = [
        ("plain loop, one worker, encode_ordinary", figures["plain_tokens_per_second"], "tokens/s"),
        (f"fineweb.py, {os.cpu_count()} workers, start to end", figures["ours_tokens_per_second"], "tokens/s"),
        ("ratio", figures["ratio"], ""),
        ("fineweb.py once running", running, "tokens/s"),
        (
            f"encode_to_numpy alone, {os.cpu_count()} processes",
            figures["encode_to_numpy_tokens_per_second"],
            "tokens/s",
        ),
        ("share of it", 100 * figures["running_share"], "%"),
    ]
    print_table(f"tokenize: {tokens['whole']:,} tokens in {options.documents:,} documents", rows)
    return figures


# ----------------------------------------------------------------------------------------------------------------------
# hellaswag


@torch.no_grad()
def one_at_a_time(model, rows, device):
    """As the reference script has it: the four rows of an example padded to one batch, all logits: (M, 4) sums."""
    sums, place = [], 0
    for lengths, endings in zip(rows.lengths.view(-1, 4).tolist(), rows.endings.view(-1, 4).tolist(), strict=True):
        idx = torch.zeros(4, max(lengths), dtype=torch.int64)
        mask = torch.zeros(4, max(lengths))
        for i, (length, ending) in enumerate(zip(lengths, endings, strict=True)):
            idx[i, :length] = rows.tokens[place : place + length]
            mask[i, length - ending : length] = 1
            place += length
        idx, mask = idx.to(device), mask.to(device)
        logits = model(idx)[0][:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), idx[:, 1:].flatten(), reduction="none")
        sums.append((losses.view(4, -1) * mask[:, 1:]).sum(1))
        sums[-1].argmin().item()  # it looks at each prediction
    return torch.stack(sums)


def benchmark_hellaswag(options):
    device = pick_device(options.device, local_rank=0, world_size=1)
    if device.type == "cpu":
        keep_freed_memory()
    examples = hellaswag.load_examples(options.data)
    examples = examples[:: max(1, len(examples) // options.examples)]  # short ones come first: take some of all
    rows = hellaswag.tokenize(examples)
    torch.manual_seed(0)
    shape = {"n_layer": options.n_layer, "n_head": options.n_embd // 64, "n_embd": options.n_embd}
    model = GPT(GPTConfig(vocab_size=50304, **shape)).to(device)
    seconds, sums = {"plain": [], "ours": []}, {}
    for i in range(options.rounds + 1):
        for name, run in (("plain", one_at_a_time), ("ours", hellaswag.ending_losses)):
            start = time.perf_counter()
            sums[name] = run(model, rows, device).cpu()
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    counts = rows.endings.view(-1, 4)
    differ = sum(
        int((a.argmin(1) != b.argmin(1)).sum())
        for a, b in ((sums["plain"], sums["ours"]), (sums["plain"] / counts, sums["ours"] / counts))
    )
    rates = {name: len(examples) / statistics.median(values) for name, values in seconds.items()}
    figures = {"examples": len(examples), **shape, "plain": rates["plain"], "ours": rates["ours"]}
    figures |= {"ratio": rates["ours"] / rates["plain"], "predictions_that_differ": differ}
    title = f"hellaswag: {len(examples)} examples, {shape['n_layer']} layers, {shape['n_embd']} wide, float32, {device.type}"
    rows = [
        ("one example at a time, all logits", rates["plain"], "examples/s"),
        ("hellaswag.py", rates["ours"], "examples/s"),
        ("ratio", figures["ratio"], ""),
        ("predictions that differ", differ, ""),
    ]
    print_table(title, rows)
    return figures


def main():
    if sys.argv[1:2] == ["plain_loop"]:
        plain_loop(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tokenize = commands.add_parser("tokenize")
    tokenize.add_argument("--documents", type=int, default=90_000, help="at most 95,000: they must fit one shard")
    hella = commands.add_parser("hellaswag")
    hella.add_argument("--data", default="official", help="a local JSON-lines file")
    hella.add_argument("--examples", type=int, default=300)
    hella.add_argument("--n_layer", type=int, default=4)
    hella.add_argument("--n_embd", type=int, default=128)
    hella.add_argument("--device", default="auto")
    for command in (tokenize, hella):
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    figures = {"tokenize": benchmark_tokenize, "hellaswag": benchmark_hellaswag}[options.command](options)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
