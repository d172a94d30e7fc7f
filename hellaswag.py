"""
HellaSwag (Zellers et al. 2019): which of four endings continues a context? People find it in 95 % of the 10,042
examples, GPT-2 (124M) in 29.55 %, guessing in 25 %.

    python hellaswag.py -m gpt2              # or gpt2-xl, a folder of weights, a checkpoint like log/model_19073.pt
    python hellaswag.py -m gpt2 --show 3     # also print three examples, the right ending marked with *

A small language model cannot answer a question such as "A, B, C or D?". So it is not asked one. Each ending is appended
to the context, and the model says how likely it finds the tokens of the ending ("completion style"). Its choice is the
ending whose tokens have the lowest mean loss (acc_norm), or the lowest sum of losses (acc), which favors short endings.

gpt2 has acc 0.2859 and acc_norm 0.2955, gpt2-xl 0.3842 and 0.4893. lm-evaluation-harness formats the text in another
way, and its acc_norm divides by characters instead of tokens: do not compare with its figures.
"""

import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import fineweb

OFFICIAL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
TIMEOUT = 10  # seconds without an answer


def download_official():
    """The path of the official file, downloaded if it is not there yet. Raises UserError if that fails."""
    path = fineweb.HERE / "hellaswag" / "hellaswag_val.jsonl"
    if path.is_file():
        return path
    problem = f"HellaSwag could not be downloaded from {OFFICIAL}"
    with fineweb.reported_as(problem, RuntimeError), FileLock(path.with_suffix(".lock")):
        if not path.is_file():  # of the processes of a training run, the first one downloads it
            before = socket.getdefaulttimeout()
            socket.setdefaulttimeout(TIMEOUT)
            try:
                torch.hub.download_url_to_file(OFFICIAL, str(path), hash_prefix=SHA256)
            finally:
                socket.setdefaulttimeout(before)
    return path


def load_examples(source, limit=None):
    """The first `limit` examples of a JSON-lines file: [{"ctx": str, "endings": four str, "label": 0 to 3}, ...].

    source: a path, or "official". Raises UserError if the file cannot be had or is not like the official one."""
    import datasets  # takes seconds, so only here

    path = download_official() if source == "official" else Path(source)
    problem, kind = f"the HellaSwag file {path} cannot be used", datasets.exceptions.DatasetsError
    with fineweb.reported_as(problem, kind), tempfile.TemporaryDirectory() as cache:
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        # A cache of its own, because the usual one may lie in a home folder that cannot be written.
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        examples = rows.select_columns(["ctx", "endings", "label"]).to_list()[:limit]
        for example in examples:
            if not is_example(example):
                raise ValueError(f"this is not a context, four endings and a label from 0 to 3: {example}")
    return examples


def is_example(example):
    endings = example["endings"]
    if not isinstance(endings, list) or len(endings) != 4:
        return False
    are_texts = all(isinstance(text, str) and text for text in [example["ctx"], *endings])
    return are_texts and str(example["label"]) in ("0", "1", "2", "3")


def tokenize_examples(examples, block_size):
    """[(label, rows)]. Each of the four rows is (tokens of context and ending, how many of them are the ending's).

    Of a row longer than block_size + 1 tokens, only the end is kept."""
    encoding = fineweb.gpt2_encoding()
    tokenized = []
    for example in examples:
        context = encoding.encode_ordinary(example["ctx"])
        rows = []
        for text in example["endings"]:
            ending = encoding.encode_ordinary(" " + text)  # in GPT-2's vocabulary, words start with their space
            tokens = torch.tensor(context + ending)[-block_size - 1 :]
            rows.append((tokens, min(len(ending), block_size)))
        tokenized.append((int(example["label"]), rows))
    return tokenized


def load_or_warn(source, block_size):
    """The examples for a training run, tokenized: [] if source is "off", or with a warning if there is no download."""
    if source == "off":
        return []
    try:
        return tokenize_examples(load_examples(source), block_size)
    except fineweb.UserError as error:
        if source != "official":
            raise
        fineweb.print0(f"warning: {error}. Training continues without HellaSwag")
        return []


def attention_for_varying_lengths():
    """A context in which PyTorch does not use cuDNN's attention. On recent GPUs it would prefer that, but cuDNN takes
    0.4 s to prepare for every new sequence length."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@torch.no_grad()
def ending_losses(model, examples, device, rank=0, world_size=1, batch_size=64, progress=False):
    """The loss of each ending, summed over its tokens, in nats: (len(examples), 4).

    Each rank computes every world_size-th batch, then they exchange their losses."""
    rows = [row for _, four_rows in examples for row in four_rows]
    losses = torch.zeros(len(rows), device=device)
    # Rows of similar length go into one batch, which saves padding. The longest come first: if memory is too small for
    # them, that shows at once.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
    starts = range(rank * batch_size, len(rows), world_size * batch_size)
    with attention_for_varying_lengths():
        for start in tqdm(starts, disable=not progress):
            indices = order[start : start + batch_size]
            batch = [rows[i] for i in indices]
            # Padding is at the end of a row, where no token of the ending sees it. R rows, the longest has L tokens.
            idx = pad_sequence([tokens for tokens, _ in batch], batch_first=True).to(device)  # (R, L)
            masks = [torch.arange(len(tokens)) >= len(tokens) - n for tokens, n in batch]  # True for the ending
            mask = pad_sequence(masks, batch_first=True)  # (R, L): False for padding
            # Only the N tokens of the endings are scored. Their places are found on the CPU: the GPU need not wait.
            places = mask[:, 1:].flatten().nonzero().squeeze(1).to(device)  # (N,)
            x = model.hidden(idx[:, :-1])  # (R, L - 1, C)
            logits = model.lm_head(x.flatten(0, 1)[places]).float()  # (N, vocab_size)
            targets = idx[:, 1:].flatten()  # (R * (L - 1),)
            token_losses = torch.zeros(len(targets), device=device)
            token_losses[places] = F.cross_entropy(logits, targets[places], reduction="none")
            losses[indices] = token_losses.view(len(batch), -1).sum(dim=1)
    if dist.is_initialized():
        dist.all_reduce(losses, op=dist.ReduceOp.SUM)
    return losses.view(-1, 4)


def count_correct(losses, examples):
    """(how many right endings have the lowest mean loss, how many the lowest sum). losses: (len(examples), 4)."""
    device = losses.device
    labels = torch.tensor([label for label, _ in examples], device=device)
    lengths = torch.tensor([[n for _, n in rows] for _, rows in examples], device=device)
    by_mean = (losses / lengths).argmin(dim=1) == labels
    by_sum = losses.argmin(dim=1) == labels
    return by_mean.sum().item(), by_sum.sum().item()


def print_example(example, rows, sums):
    """rows: as from tokenize_examples. sums: the four losses."""
    print(f"\nContext: {example['ctx']}")
    for i, (text, (_, n), loss) in enumerate(zip(example["endings"], rows, sums, strict=True)):
        mark = "*" if i == int(example["label"]) else " "
        print(f"{mark} {i} (loss {loss / n:.4f}) {text}")


def main(argv=None):
    from train_gpt2 import load_model, pick_device  # not above: it imports this file

    parser = fineweb.Parser(prog="hellaswag.py", description="Evaluate a GPT-2 on HellaSwag, completion style.")
    add = parser.add_argument
    path = fineweb.expand_home
    add("-m", "--model", default="gpt2", type=path, help="gpt2 to gpt2-xl, a folder, a checkpoint [%(default)s]")
    add("-d", "--device", default="auto", help="auto, cuda, mps or cpu [%(default)s]")
    add("--data", default="official", type=path, help="a JSON-lines file [the official one, downloaded]")
    add("--limit", type=int, help="only the first so many examples [all]")
    add("--show", type=int, default=0, metavar="N", help="print N examples with the losses")
    options = parser.parse_args(argv)
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")

    device = pick_device(options.device)
    torch.set_float32_matmul_precision("high")
    model = load_model(options.model).to(device)
    examples = load_examples(options.data, options.limit)
    tokenized = tokenize_examples(examples, model.config.block_size)
    losses = ending_losses(model, tokenized, device, progress=True)
    for i in range(min(options.show, len(examples))):
        print_example(examples[i], tokenized[i][1], losses[i].tolist())
    acc_norm, acc = (correct / len(examples) for correct in count_correct(losses, tokenized))
    print(f"{options.model}: acc {acc:.4f}, acc_norm {acc_norm:.4f}, N = {len(examples)}, completion style")


if __name__ == "__main__":
    fineweb.run_main(main, interrupted="nothing was kept")
