"""A chat template as an Ollama Modelfile, proven on the conversation that it was derived from."""

from collections.abc import Sequence

_SYSTEM, _ASKED, _ANSWER, _NEXT = "\x01system\x01", "\x01asked\x01", "\x01answer\x01", "\x01next\x01"
QUESTION = [{"role": "user", "content": _ASKED}]
CONVERSATION = [
    {"role": "system", "content": _SYSTEM},
    {"role": "user", "content": _ASKED},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _NEXT},
]


def modelfile(gguf: str, conversations: Sequence[str], system: str, stops: Sequence[str]) -> str | None:
    """The Modelfile of a GGUF. None if Ollama's template, which has no loop over a conversation here, cannot express it.

    conversations: QUESTION and CONVERSATION as the chat template writes them, up to where an answer begins. system: the system
    prompt of training; if empty, the one that the template itself puts first, if any.
    https://docs.ollama.com/modelfile
    """
    found = _pieces(*conversations)
    if found is None:
        return None
    head, asks, answers, ends, own = found
    system = system or own
    if not system or any(mark in text for text in (*found, system, *stops) for mark in ('"""', "{{", "}}")):
        return None
    template = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{{{{ end }}}}{asks}{{{{ .Prompt }}}}{answers}{{{{ .Response }}}}{ends}"
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""', f'SYSTEM """{system}"""', "PARAMETER temperature 0"]
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops), ""])


def _pieces(question: str, conversation: str) -> tuple[str, str, str, str, str] | None:
    """Text before the system prompt, before a question, before its answer, after it; and the template's own system prompt.

    None if the text before a later question differs from that before the first one.
    """
    parts = [conversation]
    for mark in (_SYSTEM, _ASKED, _ANSWER, _NEXT):
        before, found, after = parts.pop().partition(mark)
        if not found:
            return None
        parts += [before, after]
    head, asks, answers, again, last = parts
    if last != answers or not again.endswith(asks):
        return None
    first = question.partition(_ASKED)[0]
    has_own = first.startswith(head) and first.endswith(asks) and len(first) >= len(head) + len(asks)
    return head, asks, answers, again.removesuffix(asks), first[len(head) : len(first) - len(asks)] if has_own else ""
