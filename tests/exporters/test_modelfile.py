"""The Modelfile: Ollama's template makes the same text as the chat template, for every family that it can be said for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from exporters.gguf.chat import NOW, Messages, probes, stops, turns
from exporters.gguf.modelfile import modelfile, shortfalls, template
from tests.exporters.test_gguf_tokenizers import small

# What models' own templates do, in our words; {S}, {U}, {A} are messages.

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|stop|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
DATED = (
    "{{ bos_token + '<|start|>system\nToday: ' + strftime_now('%d %b %Y') + '\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}{{ '<|eot|>' }}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "a day of 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|stop|>\\n\\n" }}
{{- "What I know ends in: May 2024\\n" }}
{{- "Today is: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}"""
ISO = "{{ 'Today: ' + strftime_now('%Y-%m-%d') + '\n' }}" + CHATML
WEEKDAY = "{{ 'It is ' + strftime_now('%A') + ', ' + strftime_now('%B %-d, %Y') + '\n' }}" + CHATML
CUT = "{{ strftime_now('%d %b %Y')[:6] + '\n' }}" + CHATML
UNUSED = "{% set today = strftime_now('%d %b %Y') %}" + CHATML
IN_FIRST_USER = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
IN_LAST_USER = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' + (s if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
    "{{ '<start>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '')"
    " + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS_WITH_EOS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
OPENS_THOUGHT = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
AWKWARD = (
    "{% for m in messages %}{{ '{{ ' + m.role + ' }} \"\"\" ' + m.content + ' \n \n' }}{% endfor %}"
    '{% if add_generation_prompt %}{{ \'  {{ assistant }} """ \' }}{% endif %}'
)

TEMPLATES = {
    "chatml": (CHATML, ["<|im_end|>", "<|im_start|>"]),
    "default system": (DEFAULT_SYSTEM, ["<|im_end|>", "<|im_start|>"]),
    "headers": (HEADERS, ["<|eot|>", "<|start|>"]),
    "dated": (DATED, ["<|eot|>", "<|start|>"]),
    "of Llama 3.2's shape": (LLAMA3, ["<|eot|>", "<|start|>"]),
    "dated like Ollama": (ISO, ["<|im_end|>", "<|im_start|>"]),
    "the day of the week": (WEEKDAY, ["<|im_end|>", "<|im_start|>"]),
    "a part of the date": (CUT, ["<|im_end|>", "<|im_start|>"]),
    "asks for the date": (UNUSED, ["<|im_end|>", "<|im_start|>"]),
    "in the first user's turn": (IN_FIRST_USER, ["<|end|>", "[INST]"]),
    "in the last user's turn": (IN_LAST_USER, ["<|end|>", "[INST]"]),
    "no system": (NO_SYSTEM, ["<end>", "<start>"]),
    "thinking": (THINKING, ["<|im_end|>", "<|im_start|>"]),
    "ends with eos": (ENDS_WITH_EOS, ["<|end|>", "<|user|>"]),
    "opens a thought": (OPENS_THOUGHT, ["<|im_end|>", "<|im_start|>"]),
    "awkward text": (AWKWARD, None),
}
TOKENS = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>", "<start>", "<end>", "<|user|>", "<|assistant|>", "<|system|>"]


def talking(chat_template: str | None, adds_bos: bool = False) -> Any:
    """A tokenizer with this chat template."""
    from tokenizers import processors

    tokenizer = small()
    tokenizer.add_tokens(TOKENS)
    tokenizer.chat_template = chat_template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return tokenizer


class Go:
    """The part of Go's text/template that Modelfiles here have: if, else, range, variables, a few functions, trimming."""

    def __init__(self, text: str) -> None:
        self.parts = list(self._split(text))

    @staticmethod
    def _split(text: str) -> Iterator[tuple[str, str]]:
        """Texts and actions; {{- takes the white space before it away, -}} that after it."""
        trim = False
        for i, part in enumerate(re.split(r"(\{\{-? .*?\}\}|\{\{.*?\}\})", text, flags=re.DOTALL)):
            if i % 2:
                inner = part[2:-2]
                yield "action", inner.removeprefix("- ").removesuffix(" -").strip()
                trim = inner.endswith(" -")
            else:
                yield "text", part.lstrip() if trim else part
        return

    @staticmethod
    def trimmed(text: str) -> str:
        """``text`` with the white space before each {{- gone."""
        return re.sub(r"\s+\{\{- ", "{{- ", text)

    def run(self, messages: Messages) -> str:
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        root = {".System": system, ".Messages": messages}
        self.variables: dict[str, Any] = {}
        out, at = self._block(0, root, root, True)
        assert at == len(self.parts), "an action has no end"
        return out

    def _block(self, at: int, dot: Any, root: Any, live: bool) -> tuple[str, int]:
        """Run up to the action that ends this block; its place."""
        out = []
        while at < len(self.parts):
            kind, part = self.parts[at]
            if kind == "text":
                out.append(part if live else "")
            elif part == "end" or part.startswith("else"):
                break
            elif part.startswith("if "):
                text, at = self._if(at, dot, root, live)
                out.append(text)
            elif part.startswith("range "):
                text, at = self._range(at, root, live)
                out.append(text)
            elif found := re.fullmatch(r"(\$\w+) :?= (.*)", part):
                if live:
                    self.variables[found[1]] = self.value(found[2], dot, root)
            elif live:
                out.append(str(self.value(part, dot, root)))
            at += 1
        return "".join(out), at

    def _if(self, at: int, dot: Any, root: Any, live: bool) -> tuple[str, int]:
        out, done = "", False
        while True:
            part = self.parts[at][1]
            condition = part.removeprefix("else").strip().removeprefix("if ")
            yes = live and not done and (part == "else" or bool(self.value(condition, dot, root)))
            text, at = self._block(at + 1, dot, root, yes)
            out, done = out + text, done or yes
            if self.parts[at][1] == "end":
                return out, at

    def _range(self, at: int, root: Any, live: bool) -> tuple[str, int]:
        assert self.parts[at][1] == "range $i, $_ := .Messages"
        out, end = "", self._block(at + 1, {".Role": "", ".Content": ""}, root, False)[1]
        for i, message in enumerate(root[".Messages"] if live else []):
            self.variables["$i"] = i
            dot = {".Role": message["role"], ".Content": message["content"]}
            out += self._block(at + 1, dot, root, True)[0]
        return out, end

    def value(self, expression: str, dot: Any, root: Any) -> Any:
        words = re.findall(r'"(?:\\.|[^"\\])*"|[()]|[^\s()]+', expression)
        found, rest = self._call(words, dot, root)
        assert not rest, expression
        return found

    def _call(self, words: list[str], dot: Any, root: Any) -> tuple[Any, list[str]]:
        functions: dict[str, Any] = {
            "eq": lambda a, b: a == b,
            "ne": lambda a, b: a != b,
            "and": lambda a, b: a and b,
            "or": lambda a, b: a or b,
            "not": lambda a: not a,
            "len": len,
            "slice": lambda a, b: a[b:],
            "currentDate": lambda: "2024-07-26",  # Ollama's own function, which takes no notice of a format
        }
        if words[0] not in functions:
            return self._operand(words, dot, root)
        function, words, arguments = functions[words[0]], words[1:], []
        while words and words[0] != ")":
            argument, words = self._operand(words, dot, root)
            arguments.append(argument)
        return function(*arguments), words

    def _operand(self, words: list[str], dot: Any, root: Any) -> tuple[Any, list[str]]:
        first, rest = words[0], words[1:]
        if first == "(":
            found, rest = self._call(rest, dot, root)
            assert rest[0] == ")"
            return found, rest[1:]
        if first.startswith('"'):
            return first[1:-1].replace('\\"', '"'), rest
        if first in ("true", "false"):
            return first == "true", rest
        if first.isdigit():
            return int(first), rest
        if first.startswith("$."):
            return root[first[1:]], rest
        return (self.variables if first.startswith("$") else dot)[first], rest


def go(text: str, messages: Messages) -> str:
    return Go(Go.trimmed(text)).run(messages)


def in_jinja(tokenizer: Any, messages: Messages) -> str:
    """The chat template's own text: after a user the model's turn begins; an assistant's last message is left open."""
    opens = messages[-1]["role"] == "user"
    today = re.sub(r"strftime_now\(['\"](.*?)['\"]\)", lambda call: repr(NOW.strftime(call[1])), tokenizer.chat_template)
    text = tokenizer.apply_chat_template(messages, chat_template=today, tokenize=False, add_generation_prompt=opens)
    return text if opens else text[: text.rindex(messages[-1]["content"]) + len(messages[-1]["content"])]


def in_ollama(text: str) -> str:
    """``text`` with today's date as Ollama writes it, where it is whole."""
    return text.replace("26 Jul 2024", "2024-07-26").replace("July 26, 2024", "2024-07-26")


@pytest.mark.parametrize("adds_bos", [False, True], ids=["", "bos"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_text_as_the_chat_template(name: str, adds_bos: bool) -> None:
    chat, ends = TEMPLATES[name]
    tokenizer = talking(chat, adds_bos)
    found = turns(tokenizer)
    assert found is not None
    text = modelfile(tokenizer, "model.gguf", 2048)
    inside = text.split('TEMPLATE """')[1].split('"""')[0]
    bos = "<|begin|>" if adds_bos else ""
    for messages in probes(found.system is not None):
        expected = in_jinja(tokenizer, messages)
        assert go(inside, messages) == in_ollama(expected.removeprefix(bos)), messages
        assert found.render(messages) == expected
    assert ends is None or stops(found, tokenizer) == ends
    assert all(f'PARAMETER stop "{end}"\n' in text for end in ends or [])


def test_the_whole_file() -> None:
    assert modelfile(talking(CHATML), "model-00001-of-00002.gguf", 2048) == (
        "# ollama create NAME -f Modelfile\n"
        "FROM ./model-00001-of-00002.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n'
        "{{ $.System }}<|im_end|>\n"
        "{{ end }}\n"
        "{{- range $i, $_ := .Messages }}\n"
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
        '{{- if eq .Role "user" }}<|im_start|>user\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}{{ if not $last }}<|im_end|>\n"
        "{{ end }}{{ end }}\n"
        '{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant\n'
        "{{ end }}\n"
        '{{- end }}"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|im_start|>"\n'
        "PARAMETER num_ctx 2048\n"
    )


@pytest.mark.parametrize(
    "chat",
    [
        "{{ messages | length }}",
        "{% for m in messages %}{{ loop.index }}. {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_what_cannot_be_said_is_left_out(chat: str) -> None:
    text = modelfile(talking(chat), "model.gguf", 10)
    assert "TEMPLATE " not in text.replace("No TEMPLATE", "")
    assert "cannot be said in Ollama's language" in text
    assert text.endswith("PARAMETER num_ctx 10\n")


def test_without_a_chat_template() -> None:
    assert "has no chat template" in modelfile(talking(None), "model.gguf", 10)


@pytest.mark.parametrize(
    ("chat", "lost", "needs"),
    [
        (LLAMA3, ["The chat template prints today's date as 26 Jul 2024 (%d %b %Y), Ollama's {{ currentDate }} as 2024-07-26"], True),
        (ISO, [], True),
        (
            WEEKDAY,
            [
                "The chat template prints today's date as Friday (%A), which Ollama's language cannot; it is a fixed one here",
                "The chat template prints today's date as July 26, 2024 (%B %-d, %Y), Ollama's {{ currentDate }} as 2024-07-26",
            ],
            True,
        ),
        (CUT, ["The chat template prints today's date, which Ollama's language cannot do like this; it is 26 Jul 2024 here"], False),
        (UNUSED, [], False),
        (CHATML, [], False),
        ("{{ messages | length }}", ["No TEMPLATE: the tokenizer's chat template cannot be said in Ollama's language"], False),
        (None, [], False),
    ],
    ids=["llama 3.2", "iso", "weekday", "cut", "unused", "no date", "not said", "none"],
)
def test_what_is_lost_stands_in_the_file_and_in_the_record(chat: str | None, lost: list[str], needs: bool) -> None:
    tokenizer = talking(chat)
    text = modelfile(tokenizer, "model.gguf", 10)
    assert shortfalls(tokenizer) == lost and all(f"# {why}.\n" in text for why in lost)
    assert ("# {{ currentDate }} needs Ollama 0.11.1 or newer.\n" in text) == needs == ("{{ currentDate }}" in text.split("TEMPLATE")[-1])


def test_comments_say_what_is_not_there() -> None:
    assert "# The chat template has no place for a system message" in modelfile(talking(NO_SYSTEM), "model.gguf", 10)


def test_a_context_without_tokens() -> None:
    with pytest.raises(ValueError, match=r"num_ctx is 0.*export.gguf.num_ctx=4096"):
        modelfile(talking(CHATML), "model.gguf", 0)


def test_template_of_no_special_text() -> None:
    """Turns that are told apart by words alone."""
    chat = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    found = turns(talking(chat))
    assert found is not None
    assert stops(found, talking(chat)) == ["user:"]
    assert go(template(found), [{"role": "user", "content": "hi"}]) == "user: hi\nassistant: "
