"""Conversations rendered by a tokenizer's chat template, and their token ids.

The template's control tokens are encoded as tokens. The content of a message is encoded as text, even where it looks like a
control token (`<s>`): otherwise a document could end its own turn, or begin another one.
"""

from __future__ import annotations

import re

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from longspan.core.tokens import encode
from longspan.util.errors import NotSupported

Messages = list[dict[str, str]]
QUESTION = "\u2063question\u2063"
"""Stands for a question about a document where the template is rendered."""
_BEGIN, _END = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode that mark what looks like a control token in a message while the template is rendered."""
_MARKED = re.compile(f"{_BEGIN}([^{_BEGIN}{_END}]*){_END}")


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """The conversation as marked text, up to where the next answer begins, for `encode_rendered`.

    Raises `NotSupported` for a tokenizer without a template, and for a conversation that the template refuses.
    """
    if tokenizer.chat_template is None:
        raise NotSupported("this model's tokenizer has no chat template; use an instruction-tuned model, or plain text")
    marked = [{**m, "content": _mark(tokenizer, m["content"], m["role"])} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise NotSupported(f"the model's chat template refuses the conversation: {error}") from error


def encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the text that `render` returns, or of a part of it."""
    ids: list[int] = []
    for number, part in enumerate(_MARKED.split(text)):
        if number % 2:
            ids += _as_text(tokenizer, part)
        elif part := part.replace(_BEGIN, "").replace(_END, ""):  # a template may have cut between two marks
            ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _mark(tokenizer: PreTrainedTokenizerBase, text: str, role: str) -> str:
    """`text` with marks around its control tokens: all special ones, and others that the template writes.

    In an answer those others stay control tokens, such as the ones around a model's reasoning, by which templates cut it.
    """
    template = "" if role == "assistant" else str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.values()
    controls = {t.content for t in added if t.special or (t.content in template and not t.content.isspace())}
    controls |= set(tokenizer.all_special_tokens)  # not all of which every tokenizer lists as added
    text = text.replace(_BEGIN, "").replace(_END, "")
    if not any(control in text for control in controls):
        return text
    pattern = "|".join(map(re.escape, sorted(controls, key=len, reverse=True)))
    return re.sub(pattern, lambda found: f"{_BEGIN}{found[0]}{_END}", text)


def _as_text(tokenizer: PreTrainedTokenizerBase, control: str) -> list[int]:
    """A control token's name as ordinary token ids, in two parts where the tokenizer would encode it as the control token."""
    ids = encode(tokenizer, control)
    if ids == [tokenizer.convert_tokens_to_ids(control)] and len(control) > 1:
        return encode(tokenizer, control[:1]) + encode(tokenizer, control[1:])
    return ids
