'''The Modelfile with which `ollama create NAME -f Modelfile` takes a GGUF file in.

    FROM ./model.gguf
    TEMPLATE """…"""            Go's template language (text/template), made from the tokenizer's chat template (`chat.py`)
    PARAMETER stop "<|im_end|>"
    PARAMETER num_ctx 4096

Ollama gives the template .System (all system messages) and .Messages (everything, .Role and .Content each), and puts BOS before the text
itself if the file says so, so that a BOS at the start of the chat template is left out here. The last message is the user's, after which
the template begins the assistant's turn, or an assistant's, which is left open for the model to go on with.

In Go's language {{- removes the white space before it, across line ends, but only as far as the last action. So the template's own lines
begin with {{- and follow an action, never a text.

Today's date is {{ currentDate }}, which Ollama has since 0.11.1 (template/template.go) and always writes as 2024-07-26, whatever the chat
template asks for.

A chat template that cannot be said this way is left out, with a comment that says so; Ollama then takes its own for the model, if it knows
one. Tools are not in the template. `shortfalls` says the same for the record.
'''

from __future__ import annotations

import re
from typing import Any

from exporters.gguf.chat import MARK, NOW, Turns, stops, turns
from exporters.gguf.tokenizers import surroundings

TODAY = "{{ currentDate }}"
TODAYS_FORMAT = "%Y-%m-%d"
"""How Ollama writes it."""


def modelfile(tokenizer: Any, gguf_name: str, num_ctx: int, adapter: str | None = None) -> str:
    """The text of the Modelfile.

    Args:
        gguf_name: name of the file beside it; of a split model the first one.
        num_ctx: context, tokens.
        adapter: name of a LoRA's file beside it.

    Raises:
        ValueError: for a context without tokens.
    """
    if num_ctx < 1:
        raise ValueError(f"export.gguf.num_ctx is {num_ctx}; a context has at least 1 token. Set export.gguf.num_ctx=4096")
    lines = [f"# ollama create NAME -f Modelfile\nFROM ./{gguf_name}"]
    lines += [f"ADAPTER ./{adapter}"] if adapter is not None else []
    found = turns(tokenizer)
    lines += [f"# {text}." for text in _shortfalls(tokenizer, found)]
    if found is None and not _has_template(tokenizer):
        lines.append("# No TEMPLATE: the tokenizer has no chat template.")
    if found is not None:
        lines += _comments(found)
        lines.append(f'TEMPLATE """{template(found, leading_bos(tokenizer))}"""')
        lines += [f"PARAMETER stop {_quoted(text)}" for text in stops(found, tokenizer)]
    return "\n".join([*lines, f"PARAMETER num_ctx {num_ctx}", ""])


def shortfalls(tokenizer: Any) -> list[str]:
    """What the chat template does and the Modelfile cannot, one sentence each, without a full stop."""
    return _shortfalls(tokenizer, turns(tokenizer))


def _shortfalls(tokenizer: Any, found: Turns | None) -> list[str]:
    if found is None:
        return ["No TEMPLATE: the tokenizer's chat template cannot be said in Ollama's language"] if _has_template(tokenizer) else []
    lost = []
    for form in found.dates:
        asked, there = f"The chat template prints today's date as {NOW.strftime(form)} ({form})", NOW.strftime(TODAYS_FORMAT)
        if not _is_whole(form):
            lost.append(f"{asked}, which Ollama's language cannot; it is a fixed one here")
        elif form != TODAYS_FORMAT:
            lost.append(f"{asked}, Ollama's {TODAY} as {there}")
    if found.fixed_date:
        lost.append(f"The chat template prints today's date, which Ollama's language cannot do like this; it is {NOW:%d %b %Y} here")
    return lost


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _is_whole(form: str) -> bool:
    """Whether a format names day, month and year, so that Ollama's date says the same."""
    parts = set(re.findall(r"%-?([A-Za-z])", form))
    return all(parts & names for names in ({"d"}, {"m", "b", "B"}, {"Y", "y"}))


def leading_bos(tokenizer: Any) -> str:
    """BOS as text, if Ollama puts it before every text."""
    before, _ = surroundings(tokenizer)
    return str(tokenizer.bos_token) if before and before == [tokenizer.bos_token_id] else ""


def template(found: Turns, bos: str = "") -> str:
    """Go's template.

    Args:
        bos: what is put before the text by itself.
    """
    start, lead = found.start.removeprefix(bos), ""
    if bos and not found.start and found.before_user.startswith(bos):
        lead = bos  # every user's turn begins with it, and the first one has it already
    head, inside = _system(found, start, bos)
    counts = bool(lead) or "$first" in inside
    other = "not $first" if found.system is None or found.place != "start" else "or $.System (not $first)"
    user = [_when(other, lead), _text(found.before_user.removeprefix(lead)), inside, "{{ .Content }}", _text(found.after_user)]
    assistant = [
        _either("$last", found.last_assistant, found.before_assistant),
        "{{ .Content }}",
        _when("not $last", found.after_assistant),
    ]
    lines = [
        head + ("{{ $first := true }}" if counts else '{{ "" }}' if head and not head.endswith("}}") else ""),
        "{{- range $i, $_ := .Messages }}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
        f'{{{{- if eq .Role "user" }}}}{"".join(user)}{"{{ $first = false }}" if counts else ""}'
        f'{{{{ else if eq .Role "assistant" }}}}{"".join(assistant)}{{{{ end }}}}',
        f'{{{{- if and $last (ne .Role "assistant") }}}}{_text(found.generation)}{{{{ end }}}}',
        "{{- end }}",
    ]
    return "\n".join(line for line in lines if line)


def _system(found: Turns, start: str, bos: str) -> tuple[str, str]:
    """What stands at the head, and inside the user's turn."""
    if found.system is None:
        return _text(start), ""
    before, after = found.system
    said = f"{{{{ $.System }}}}{_text(after)}"
    if found.place == "start":
        either = f"{{{{ else }}}}{_text(start)}" if start else ""
        return f"{{{{ if .System }}}}{_text(before.removeprefix(bos))}{said}{either}{{{{ end }}}}", ""
    return _text(start), f"{{{{ if and $.System ${found.place} }}}}{_text(before)}{said}{{{{ end }}}}"


def _text(text: str) -> str:
    """Text in which nothing is an action but today's date, nor ends Ollama's quotes."""
    quoted = text.replace("{{", '{{ "{{" }}').replace('"""', '""{{ "\\"" }}')
    return MARK.sub(lambda mark: TODAY if _is_whole(mark[1]) else NOW.strftime(mark[1]), quoted)


def _when(condition: str, text: str) -> str:
    return f"{{{{ if {condition} }}}}{_text(text)}{{{{ end }}}}" if text else ""


def _either(condition: str, yes: str, no: str) -> str:
    return _text(no) if yes == no else f"{{{{ if {condition} }}}}{_text(yes)}{{{{ else }}}}{_text(no)}{{{{ end }}}}"


def _comments(found: Turns) -> list[str]:
    lines = []
    if any(map(_is_whole, found.dates)):
        lines.append(f"# {TODAY} needs Ollama 0.11.1 or newer.")
    if found.system is None:
        lines.append("# The chat template has no place for a system message; it is left out.")
    return lines


def _quoted(text: str) -> str:
    """As Ollama reads values, which knows no escapes."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
