"""The demo model's card: models/demo/README.md."""

import math
import platform
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from scripts.demo.corpus import HELD_OUT_PERCENT, SKIPPED_FOLDERS, Corpus
from scripts.demo.network import Llama, Shape
from scripts.model_files import ASSISTANT, BOS, EOS_ID, USER

# Title, prompt, temperature (0 is greedy).
PROMPTS = (
    ("Completion, greedy", f"{BOS}def read_file(path):\n    ", 0.0),
    ("Completion, temperature 0.7", f"{BOS}class Stack:\n", 0.7),
    ("Chat, temperature 0.7", f"{BOS}{USER}Write a function is_valid{ASSISTANT}", 0.7),
)

LIMITS = """## Limits

Names, imports and calls are invented or repeated; text beyond a few lines drifts, and greedy
answers tend to loop. It can repeat pieces of the standard library word for word. A chat is
answered with a function, seldom the one asked for, and a greeting too; it does not call
tools. Use it for nothing but trying the server out.
"""


@dataclass(frozen=True)
class Figures:
    """What a finished run can say about itself."""

    steps: int
    tokens: int
    """Tokens trained on, repeats included."""
    distinct_tokens: int
    """Tokens of the training text, chats and single functions included."""
    parameters: int
    seconds: float
    device: str
    """The processor, in words."""
    short: int
    long: int
    long_share: float
    loss: float
    """Nats per token over the held-out files."""
    held_out_tokens: int
    side_share: float
    note: str
    """What else a reader should know of this run; may be empty."""


def wrap(text: str) -> str:
    """Fill each paragraph anew: the figures put in make the lines uneven."""
    paragraphs = text.strip().split("\n\n")
    filled = [textwrap.fill(p, 100, break_long_words=False, break_on_hyphens=False)
              for p in paragraphs]  # fmt: skip
    return "\n\n".join(filled) + "\n"


def processor(device: str, threads: int) -> str:
    """Name the processor that the run used."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} (CPU), {threads} threads"


def complete(
    network: Llama, tokenizer: Tokenizer, prompt: str, *, temperature: float, most: int = 120
) -> str:
    """Return the model's continuation of `prompt`, at most `most` tokens, without the prompt."""
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    begin = len(ids)
    device = next(network.parameters()).device
    while len(ids) < begin + most:
        with torch.no_grad():
            logits = network(torch.tensor([ids], device=device))[0, -1].float().cpu()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            odds = torch.softmax(logits / temperature, dim=-1)
            chosen = int(torch.multinomial(odds, 1, generator=generator))
        if chosen == EOS_ID:
            break
        ids.append(chosen)
    text: str = tokenizer.decode(ids[begin:], skip_special_tokens=False)
    return text


def data_section(corpus: Corpus, figures: Figures) -> str:
    """Describe the text."""
    skipped = ", ".join(f"`{name}`" for name in sorted(SKIPPED_FOLDERS))
    return f"""## Data

The standard library's own sources (`*.py`) of CPython {platform.python_version()}, without the
folders {skipped} and without generated build configuration; files with equal bytes are taken
once. {corpus.files} files, {corpus.size / 1e6:.1f} MB; SHA-256 over the list of paths and file
hashes:
`{corpus.digest}`.
Whole files, about {HELD_OUT_PERCENT} % of them by the hash of the path, are held out
({corpus.held_out_size / 1e3:.0f} kB). Chats ("Write a function NAME", or a docstring's first line,
answered with the function's source; a few greetings) and single functions, both made from the
training files alone, each add about {figures.side_share:.0%} to the text.

Licence of the text: Python Software Foundation License Version 2, in `LICENSE-PSF.txt`. Treat the
weights as derived from it.
"""


def model_section(shape: Shape, figures: Figures) -> str:
    """Describe network, tokenizer and training."""
    return f"""## Model

`LlamaForCausalLM`, {figures.parameters / 1e6:.2f} M parameters, bf16: {shape.layers} layers, hidden
{shape.hidden}, {shape.heads} heads and {shape.kv_heads} key-value heads of {shape.head_dim}, SwiGLU
{shape.intermediate}, tied embeddings, RoPE theta {shape.rope_theta:.0f}, {shape.context} positions.
Byte-level BPE of {shape.vocab} tokens, trained on the same files. Special tokens: `<|bos|>`,
`<|eos|>`, `<|user|>`, `<|assistant|>`, `<|system|>`.

## Training

{figures.steps} steps, {figures.tokens / 1e6:.1f} M tokens
({figures.tokens / figures.distinct_tokens:.1f} passes over {figures.distinct_tokens / 1e6:.2f} M),
windows of {figures.short} tokens and, for the last {figures.long_share:.0%} of the steps, of
{figures.long}. AdamW, warm-up and cosine, bf16 autocast with the loss in fp32. It took
{figures.seconds / 60:.0f} minutes on {figures.device}. Repeat it with
`python -m scripts.train_demo_model`: the same text gives much the same figures, not the same bits,
and another Python version has another text. {figures.note}
"""


def result_section(shape: Shape, corpus: Corpus, figures: Figures) -> str:
    """Return the table of held-out results."""
    bits = figures.loss * figures.held_out_tokens / math.log(2) / corpus.held_out_size
    return f"""| On the held-out files | |
| --- | --- |
| nats per token, windows of {shape.context} | {figures.loss:.3f} |
| bits per byte | {bits:.3f} |
| tokens | {figures.held_out_tokens} |
"""


def write_card(
    folder: Path, network: Llama, tokenizer: Tokenizer, corpus: Corpus, figures: Figures
) -> None:
    """Write README.md with the run's figures and three samples as they came."""
    samples = []
    for title, prompt, temperature in PROMPTS:
        answer = complete(network, tokenizer, prompt, temperature=temperature)
        samples.append(f"{title}:\n\n```text\n{prompt}{answer.rstrip()}\n```\n")
    parts = [
        "# kvbaton demo model\n",
        "A very small language model that writes text which looks like Python. It is here so that "
        "the\nserver has something real to serve without a download; it knows nothing and its code "
        "does not work.\n",
        wrap(model_section(network.shape, figures)),
        result_section(network.shape, corpus, figures),
        wrap(data_section(corpus, figures)),
        LIMITS,
        "## Samples\n\nUnedited; at most 120 tokens each.\n",
        *samples,
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")
