"""A byte-level BPE tokenizer that needs no training text."""

import itertools
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from scripts.model_files import BOS, BOS_ID, SPECIAL_TOKENS

SPACE = "\u0120"  # how byte-level BPE writes a space
SMALLEST = len(SPECIAL_TOKENS) + 256
# English letters, the commonest first, so that a small vocabulary already holds "the" and "and".
LETTERS = "etaoinshrdlucmfwypgbvkjxqz"


def merges() -> Iterator[tuple[str, str]]:
    """Yield merges without end: indentation, then words of two, three, four, ... letters.

    A merge's halves are bytes or results of earlier merges, and no two give the same token.
    """
    yield SPACE, SPACE
    yield SPACE * 2, SPACE * 2
    yield SPACE * 4, SPACE * 4
    for size in itertools.count(2):
        for letters in itertools.product(LETTERS, repeat=size):
            word = "".join(letters)
            yield word[:-1], word[-1]
            yield SPACE, word


def random_tokenizer(vocab: int) -> Tokenizer:
    """Return a tokenizer of exactly `vocab` tokens: specials first, then bytes, then merges.

    Raises ValueError if `vocab` has no room for the special tokens and the 256 bytes.
    """
    if vocab < SMALLEST:
        raise ValueError(f"vocab is {vocab}: it must be at least {SMALLEST}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    chosen = list(itertools.islice(merges(), vocab - SMALLEST))
    tokens = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in chosen)]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=chosen))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer
