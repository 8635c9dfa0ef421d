"""The demo model's byte-level BPE tokenizer."""

from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from scripts.model_files import BOS, BOS_ID, EOS, SPECIAL_TOKENS

# GPT-2's pieces, but newlines and a line's indentation are pieces of their own. GPT-2 joins the
# newline with all of the indentation save its last space, so a prompt that ends with a newline, or
# with the indentation, would begin the model's answer at a place it has never seen in training.
PIECES = r"\n+|(?<=\n)[ \t]+| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"

Ids = np.ndarray[tuple[int], np.dtype[np.uint16]]


def train_tokenizer(texts: tuple[str, ...], vocab: int) -> Tokenizer:
    """Train on `texts`; the special tokens take the first ids, in the order they are listed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def load_or_train(path: Path, texts: tuple[str, ...], vocab: int) -> Tokenizer:
    """Read the tokenizer at `path`, or train it and save it there."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer(texts, vocab)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Ids:
    """Return one row of ids for all documents; special tokens in the text become their ids."""
    rows = tokenizer.encode_batch(documents, add_special_tokens=False)
    return np.concatenate([np.asarray(row.ids, dtype=np.uint16) for row in rows])


def held_out_documents(texts: tuple[str, ...]) -> list[str]:
    """Return the held-out files as documents."""
    return [f"{BOS}{text}{EOS}" for text in texts]
