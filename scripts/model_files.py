"""Files that every model folder made here shares: special tokens, chat template, JSON files."""

import json
from pathlib import Path
from typing import Any

BOS = "<|bos|>"
EOS = "<|eos|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SYSTEM = "<|system|>"
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, SYSTEM)
BOS_ID = 0
EOS_ID = 1

# Every message is its role's token and its text; an assistant's message also ends with <|eos|>, so
# that a server which stops at <|eos|> hands back exactly the message. A role the model has not
# seen is read as the user's. Tools are told of in the way of Hermes; the model has seen none.
CHAT_TEMPLATE = (
    "{{- bos_token -}}\n"
    "{%- if tools -%}\n"
    "{{- '<|system|># Tools\\n' -}}\n"
    "{%- for tool in tools -%}\n"
    "{{- (tool['function'] | tojson) + '\\n' -}}\n"
    "{%- endfor -%}\n"
    '{{- \'# To call one: <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>\\n\' -}}\n'
    "{%- endif -%}\n"
    "{%- for message in messages -%}\n"
    "{%- if message['role'] == 'assistant' -%}\n"
    "{{- '<|assistant|>' + (message['content'] or '') -}}\n"
    "{%- for call in message['tool_calls'] or [] -%}\n"
    "{{- '<tool_call>' + (call['function'] | tojson) + '</tool_call>' -}}\n"
    "{%- endfor -%}\n"
    "{{- eos_token -}}\n"
    "{%- elif message['role'] == 'system' -%}\n"
    "{{- '<|system|>' + (message['content'] or '') -}}\n"
    "{%- elif message['role'] == 'tool' -%}\n"
    "{{- '<|user|><tool_response>' + (message['content'] or '') + '</tool_response>' -}}\n"
    "{%- else -%}\n"
    "{{- '<|user|>' + (message['content'] or '') -}}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|assistant|>' -}}\n"
    "{%- endif -%}\n"
)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON with a final newline; the same value gives the same bytes."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer_config(folder: Path, context: int) -> None:
    """Write tokenizer_config.json and chat_template.jinja.

    The template stands in both: older readers know the JSON key alone, newer ones prefer the file.
    `context` is the longest text in tokens.
    """
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
