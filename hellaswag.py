"""
HellaSwag (Zellers et al. 2019): which of four endings goes on from a context? People find the right one in 95 % of the
10,042 examples, guessing finds it in 25 %, GPT-2 (124M) in 29.55 %.

    python hellaswag.py -m gpt2                    # or gpt2-xl, a folder, a checkpoint such as log/model_19073.pt
    python hellaswag.py -m gpt2 --show 3           # with the losses of three examples' endings

Completion style: a row is the context and one ending, and the prediction is the ending to which the model gives the
lowest mean loss over the ending's own tokens (acc_norm), or the lowest sum (acc). GPT-2: acc 0.2859, acc_norm 0.2955;
gpt2-xl: 0.3842, 0.4893. lm-evaluation-harness formats and normalizes otherwise (GPT-2: 0.2892, 0.3114): compare only
figures of one kind.

Importing this file runs nothing, needs no network, and does not import `datasets`.
"""

import http.client
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fineweb import OneLineParser, UserError, gpt2_encoding, reason_of, replace_file, run_script

HERE = Path(__file__).resolve().parent
OFFICIAL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
TIMEOUT = 30  # seconds that the download may stand still; in all it may take twenty times as long


class Rows(NamedTuple):
    """M tokenized examples, four rows each, as tensors: processes can send them to one another."""

    tokens: torch.Tensor  # of all rows, end to end (all int64)
    lengths: torch.Tensor  # tokens in a row (4M,)
    ending_lengths: torch.Tensor  # tokens at the end of a row that belong to the ending (4M,)
    labels: torch.Tensor  # the right ending, 0 to 3 (M,)


def fetch(path):
    """Download the official file. Raises UserError where that does not work, after a bounded wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content, deadline = b"", time.monotonic() + 20 * TIMEOUT
        with urllib.request.urlopen(OFFICIAL, timeout=TIMEOUT) as response:
            while piece := response.read1():
                content += piece
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{len(content)} bytes in {20 * TIMEOUT} seconds")
        replace_file(path, lambda temporary: temporary.write_bytes(content))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"HellaSwag could not be fetched from {OFFICIAL} ({error}): name a local copy") from error


def load_examples(source, limit=None):
    """The examples of a JSON-lines file, or with "official" of the official one: [{"ctx", "endings", "label"}].

    That one is downloaded to hellaswag/ beside this script, once. Raises UserError where the file cannot be had, or is
    not laid out like the official one.
    """
    path = HERE / "hellaswag" / "hellaswag_val.jsonl" if source == "official" else Path(source)
    if source == "official" and not path.is_file():
        fetch(path)
    if not path.is_file():
        raise UserError(f"the HellaSwag file {source} is not there: name a copy of hellaswag_val.jsonl")
    import datasets  # takes seconds, so only where it is needed

    try:
        examples = datasets.load_dataset("json", data_files=str(path), split="train")
        examples = examples.select_columns(["ctx", "endings", "label"]).to_list()[:limit]
        for example in examples:
            texts = [example["ctx"], *example["endings"]]
            if not all(isinstance(text, str) and text for text in texts) or not isinstance(example["endings"], list):
                raise ValueError("a context or an ending is empty or not text")
            if len(texts) != 5 or str(example["label"]) not in ("0", "1", "2", "3"):
                raise ValueError(f"label {example['label']}, {len(texts) - 1} endings")
    except Exception as error:
        raise UserError(f"the HellaSwag file {path} cannot be used ({reason_of(error)}): name another copy") from error
    if not examples:
        raise UserError(f"the HellaSwag file {path} holds no example: name another copy")
    return examples


def tokenize(examples):
    """Rows of context + " " + ending for each example and ending."""
    encoding = gpt2_encoding()
    tokens, lengths, endings = [], [], []
    for example in examples:
        context = encoding.encode_ordinary(example["ctx"])
        for text in example["endings"]:
            ending = encoding.encode_ordinary(" " + text)  # GPT-2's words begin with their space
            tokens += context + ending
            lengths.append(len(context) + len(ending))
            endings.append(len(ending))
    labels = [int(example["label"]) for example in examples]
    return Rows(*(torch.tensor(values) for values in (tokens, lengths, endings, labels)))


def batches(lengths, batch_tokens):
    """Row numbers in batches of rows of similar length, at most batch_tokens tokens each with the padding."""
    order = torch.argsort(lengths, descending=True, stable=True)  # longest first: if memory runs out, then at once
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + count]
        start += count


@torch.no_grad()
def ending_losses(model, rows, device, rank=0, world_size=1, batch_tokens=None, progress=None):
    """The summed loss of each ending, in nats: (M, 4) float32 on the device. Processes take turns at the batches, the
    others' entries are 0.

    Rows are padded at their end, where no token sees the padding, and the head computes only what counts: the logits
    from which an ending's tokens are predicted, 39 % of all. The context is computed four times, once for each ending:
    sharing it would cut the tokens from 3.0 to 1.6 million, but save only 0.2 % of a training run, and the model would
    need a second kind of attention for it.
    """
    batch_tokens = batch_tokens or (16384 if device.type == "cuda" else 2048)  # larger ones gain nothing
    starts = rows.lengths.cumsum(0) - rows.lengths
    longest = model.config.block_size + 1  # of a longer row, the end: the last token is only ever a target
    lengths, ending_lengths = rows.lengths.clamp(max=longest), rows.ending_lengths.clamp(max=longest - 1)
    sums = torch.zeros(len(lengths), device=device)
    for number, batch in enumerate(batches(lengths, batch_tokens)):
        if number % world_size != rank:
            continue
        width = int(lengths[batch[0]])
        column = torch.arange(width)  # (width,)
        first = (starts + rows.lengths - lengths)[batch]  # where a row's kept part begins (R,)
        places = first[:, None] + torch.minimum(column, lengths[batch, None] - 1)  # (R, width)
        idx = rows.tokens[places]
        # The token at column j is predicted at column j - 1.
        ends = lengths[batch, None]
        in_ending = (column >= ends - ending_lengths[batch, None]) & (column < ends)  # (R, width)
        which = in_ending[:, 1:].flatten().nonzero().squeeze(1).to(device)  # (N,)
        idx = idx.to(device)
        x = model.hidden(idx[:, :-1]).flatten(0, 1)[which]  # (N, C)
        targets = idx[:, 1:].flatten()[which]  # (N,)
        losses = torch.zeros(in_ending[:, 1:].numel(), device=device)
        losses[which] = F.cross_entropy(model.lm_head(x).float(), targets, reduction="none")
        sums[batch.to(device)] = losses.view(len(batch), width - 1).sum(1)
        if progress is not None:
            progress.update(len(batch))
    return sums.view(-1, 4)


def count_correct(sums, rows, block_size):
    """How many predictions are right: (by the mean loss, by the sum)."""
    counts = rows.ending_lengths.clamp(max=block_size).view(-1, 4).to(sums.device)
    labels = rows.labels.to(sums.device)
    by_mean = ((sums / counts).argmin(1) == labels).sum()
    by_sum = (sums.argmin(1) == labels).sum()
    return int(by_mean), int(by_sum)


def show(examples, sums, counts):
    """Print examples with the mean loss of each ending. sums: (M, 4), counts: the ending's tokens, (M, 4)."""
    means = (sums.cpu() / counts).tolist()
    for example, losses in zip(examples, means, strict=True):
        print(f"\nContext: {example['ctx']}")
        for i, (ending, loss) in enumerate(zip(example["endings"], losses, strict=True)):
            marks = ("  <- right" if i == int(example["label"]) else "") + (
                " <- predicted" if loss == min(losses) else ""
            )
            print(f"  {i} (loss {loss:.4f}) {ending}{marks}")


def main(argv=None):
    from tqdm import tqdm

    from train_gpt2 import Settings, build_model, pick_device  # not above: it imports this file

    parser = OneLineParser(prog="hellaswag.py", description="Evaluate a GPT-2 on HellaSwag, completion style.")
    add = parser.add_argument
    add("-m", "--model", default="gpt2", help="gpt2 to gpt2-xl, a folder of weights, or a checkpoint [%(default)s]")
    add("-d", "--device", default="auto", help="auto, cuda, mps or cpu [%(default)s]")
    add("--data", default="official", help="a local JSON-lines file [the official one, downloaded]")
    add("--limit", type=int, help="only the first so many examples [all]")
    add("--show", type=int, default=0, metavar="N", help="print the first N examples with the loss of each ending")
    options = parser.parse_args(argv)
    if (options.limit is not None and options.limit < 1) or options.show < 0:
        parser.error("--limit and --show take a number of examples")

    device = pick_device(options.device, local_rank=0, world_size=1)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    examples = load_examples(options.data, options.limit)
    rows = tokenize(examples)
    model = build_model(Settings(init_from=options.model), {}, None).to(device)
    with tqdm(total=len(rows.lengths), unit="row") as progress:
        sums = ending_losses(model, rows, device, progress=progress)
    counts = rows.ending_lengths.clamp(max=model.config.block_size).view(-1, 4)
    show(examples[: options.show], sums[: options.show], counts[: options.show])
    by_mean, by_sum = count_correct(sums, rows, model.config.block_size)
    n = len(examples)
    print(f"{options.model}: acc {by_sum / n:.4f}, acc_norm {by_mean / n:.4f}, N = {n}, completion style")


if __name__ == "__main__":
    run_script(main, "hellaswag.py", interrupted="nothing was kept")
