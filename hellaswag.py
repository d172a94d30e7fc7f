"""
HellaSwag (Zellers et al. 2019): which of four endings continues a context? People find it in 95 % of the 10,042
examples, GPT-2 (124M) in 29.55 %, guessing in 25 %.

    python hellaswag.py -m gpt2              # or gpt2-xl, a folder of weights, a checkpoint like log/model_19073.pt
    python hellaswag.py -m gpt2 --show 3     # also print three examples, the right ending marked with *

This is "completion style": each ending is appended to the context, and the model's choice is the ending whose tokens
have the lowest mean loss (acc_norm), or the lowest sum of losses (acc). gpt2 has acc 0.2859 and acc_norm 0.2955,
gpt2-xl 0.3842 and 0.4893. lm-evaluation-harness formats the text in another way: do not compare with its figures.
"""

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fineweb import Parser, gpt2_encoding, reported_as, run_main

HERE = Path(__file__).resolve().parent
OFFICIAL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
TIMEOUT = 10  # seconds without an answer
# On recent GPUs, PyTorch prefers cuDNN's attention, which takes 0.4 s to prepare for every new sequence length.
# Functions with this decorator use the other kernels.
without_cudnn = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def load_examples(source, limit=None):
    """The first `limit` examples of a JSON-lines file, or of the official one: [{"ctx", "endings", "label"}, ...].

    source: a path, or "official". Raises UserError if the file cannot be downloaded or is not like the official one.
    """
    import datasets  # takes seconds, so only here

    path = Path(source)
    if source == "official":
        path = HERE / "hellaswag" / "hellaswag_val.jsonl"
        with reported_as(f"HellaSwag could not be downloaded from {OFFICIAL}"), FileLock(path.with_suffix(".lock")):
            if not path.is_file():  # of the processes of a training run, the first one downloads it
                socket.setdefaulttimeout(TIMEOUT)
                torch.hub.download_url_to_file(OFFICIAL, str(path), hash_prefix=SHA256)
    with reported_as(f"the HellaSwag file {path} cannot be used"):
        rows = datasets.load_dataset("json", data_files=str(path), split="train")
        examples = rows.select_columns(["ctx", "endings", "label"]).to_list()[:limit]
        assert examples, "it has no examples"
        for example in examples:
            texts = [example["ctx"]] + example["endings"]  # a TypeError, reported too, if endings is not a list
            is_good = len(texts) == 5 and all(isinstance(text, str) and text for text in texts)
            is_good = is_good and str(example["label"]) in ("0", "1", "2", "3")
            assert is_good, f"this is not a context, four endings and a label from 0 to 3: {example}"
    return examples


def tokenize(examples, block_size):
    """[(label, rows)]. Each of the four rows is (tokens of context and ending, mask), the mask being 1 for the ending.

    Of a row longer than block_size + 1 tokens, only the end is kept.
    """
    encoding = gpt2_encoding()
    tokenized = []
    for example in examples:
        context = encoding.encode_ordinary(example["ctx"])
        rows = []
        for text in example["endings"]:
            ending = encoding.encode_ordinary(" " + text)  # in GPT-2's vocabulary, words start with their space
            tokens = torch.tensor((context + ending)[-block_size - 1 :])
            mask = torch.tensor(([0] * len(context) + [1] * len(ending))[-block_size - 1 :])
            rows.append((tokens, mask))
        tokenized.append((int(example["label"]), rows))
    return tokenized


@torch.no_grad()
@without_cudnn
def ending_losses(model, examples, device, rank=0, world_size=1, batch_size=32, progress=False):
    """The loss of each ending, summed over its tokens, in nats: (len(examples), 4).

    Each rank computes every world_size-th batch, then they exchange their losses.
    """
    rows = [row for _, four_rows in examples for row in four_rows]
    losses = torch.zeros(len(rows), device=device)
    # Rows of similar length go into one batch, which saves padding. The longest come first, as they need most memory.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
    for start in tqdm(range(rank * batch_size, len(rows), world_size * batch_size), disable=not progress):
        batch = order[start : start + batch_size]
        # Padding is at the end of a row, where no token of the ending sees it. R rows, L tokens in the longest one.
        idx = pad_sequence([rows[i][0] for i in batch], batch_first=True).to(device)  # (R, L)
        mask = pad_sequence([rows[i][1] for i in batch], batch_first=True).to(device)  # (R, L)
        logits, _ = model(idx[:, :-1])  # (R, L - 1, vocab_size)
        token_losses = F.cross_entropy(logits.float().flatten(0, 1), idx[:, 1:].flatten(), reduction="none")
        losses[batch] = (token_losses.view(len(batch), -1) * mask[:, 1:]).sum(dim=1)
    if dist.is_initialized():
        dist.all_reduce(losses, op=dist.ReduceOp.SUM)
    return losses.view(-1, 4)


def count_correct(losses, examples):
    """(how many right endings have the lowest mean loss, how many the lowest sum). losses: (len(examples), 4)."""
    labels = torch.tensor([label for label, _ in examples], device=losses.device)
    lengths = torch.tensor([[mask[1:].sum() for _, mask in rows] for _, rows in examples], device=losses.device)
    return tuple((score.argmin(dim=1) == labels).sum().item() for score in (losses / lengths, losses))


def main(argv=None):
    from train_gpt2 import Settings, build_model, pick_device  # not above: it imports this file

    parser = Parser(prog="hellaswag.py", description="Evaluate a GPT-2 on HellaSwag, completion style.")
    parser.add_argument("-m", "--model", default="gpt2", help="gpt2 to gpt2-xl, a folder or a checkpoint [%(default)s]")
    parser.add_argument("-d", "--device", default="auto", help="auto, cuda, mps or cpu [%(default)s]")
    parser.add_argument("--data", default="official", help="a local JSON-lines file [the official one, downloaded]")
    parser.add_argument("--limit", type=int, help="only the first so many examples [all]")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N examples with the losses")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    torch.set_float32_matmul_precision("high")
    model = build_model(Settings(init_from=options.model), {}, None).to(device)
    examples = load_examples(options.data, options.limit)
    tokenized = tokenize(examples, model.config.block_size)
    losses = ending_losses(model, tokenized, device, progress=True)
    for example, (label, rows), sums in zip(examples[: options.show], tokenized, losses.tolist(), strict=False):
        print(f"\nContext: {example['ctx']}")
        for i, ((_, mask), loss) in enumerate(zip(rows, sums, strict=True)):
            print(f"{'*' if i == label else ' '} {i} (loss {loss / mask[1:].sum():.4f}) {example['endings'][i]}")
    acc_norm, acc = (correct / len(examples) for correct in count_correct(losses, tokenized))
    print(f"{options.model}: acc {acc:.4f}, acc_norm {acc_norm:.4f}, N = {len(examples)}, completion style")


if __name__ == "__main__":
    run_main(main, interrupted="nothing was kept")
