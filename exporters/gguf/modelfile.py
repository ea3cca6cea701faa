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

A chat template that cannot be said this way is left out, with a comment that says so; Ollama then takes its own for the model, if it knows
one. Tools are not in the template.
'''

from __future__ import annotations

from typing import Any

from exporters.gguf.chat import Turns, stops, turns
from exporters.gguf.tokenizers import surroundings


def modelfile(tokenizer: Any, gguf_name: str, num_ctx: int) -> str:
    """The text of the Modelfile.

    Args:
        gguf_name: name of the file beside it; of a split model the first one.
        num_ctx: context, tokens.

    Raises:
        ValueError: for a context without tokens.
    """
    if num_ctx < 1:
        raise ValueError(f"export.gguf.num_ctx is {num_ctx}; a context has at least 1 token. Set export.gguf.num_ctx=4096")
    lines = [f"# ollama create NAME -f Modelfile\nFROM ./{gguf_name}"]
    found = turns(tokenizer)
    if found is None:
        has = bool(getattr(tokenizer, "chat_template", None))
        why = "the tokenizer's chat template cannot be said in Ollama's language" if has else "the tokenizer has no chat template"
        lines.append(f"# No TEMPLATE: {why}.")
    else:
        lines += _comments(found)
        lines.append(f'TEMPLATE """{template(found, leading_bos(tokenizer))}"""')
        lines += [f"PARAMETER stop {_quoted(text)}" for text in stops(found, tokenizer)]
    return "\n".join([*lines, f"PARAMETER num_ctx {num_ctx}", ""])


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
    """Text in which nothing is an action, nor ends Ollama's quotes."""
    return text.replace("{{", '{{ "{{" }}').replace('"""', '""{{ "\\"" }}')


def _when(condition: str, text: str) -> str:
    return f"{{{{ if {condition} }}}}{_text(text)}{{{{ end }}}}" if text else ""


def _either(condition: str, yes: str, no: str) -> str:
    return _text(no) if yes == no else f"{{{{ if {condition} }}}}{_text(yes)}{{{{ else }}}}{_text(no)}{{{{ end }}}}"


def _comments(found: Turns) -> list[str]:
    lines = []
    if found.dated:
        lines.append("# The chat template prints today's date, which Ollama's language cannot; the date here is a fixed one.")
    if found.system is None:
        lines.append("# The chat template has no place for a system message; it is left out.")
    return lines


def _quoted(text: str) -> str:
    """As Ollama reads values, which knows no escapes."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
