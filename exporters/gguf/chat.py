"""What a chat template does, found by asking it.

A chat template is a program (Jinja) that makes one text of a list of messages. Ollama has another template language, and its own templates
are written by hand. Here the program is run on probe conversations, whose messages are words that occur nowhere else, and the text
between the words is read off:

    start | before_user USER after_user | before_assistant ASSISTANT after_assistant | before_user USER after_user | generation

The system message stands in one of three places: at the start (X SYSTEM Y instead of start), inside the first user's turn (Llama 2,
Gemma), or inside the last user's turn (Mistral). Then all probes are rendered from what was found, and must be what the template renders; a
template that depends on anything else is None here, not nearly right.

Templates that print today's date (Llama 3.2, SmolLM3, gpt-oss, …) are run with a mark in its place, which says in which format they want
it, and once more on one fixed day, for which the marks must then be good.

What is not found out: tools, images, reasoning. Text that a template strips around messages is taken as given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise, takewhile
from typing import Any

Messages = list[dict[str, str]]

SYSTEM, USERS, ASSISTANTS = "Qsystemq", ("Quserq", "Qsecondq", "Qthirdq"), ("Qassistantq", "Qanswerq")
"""Words of the probes."""
NOW = datetime(2024, 7, 26)
"""What templates that print the date are told: Llama 3's own default."""
MARK = re.compile("\ue000(.*?)\ue001")
"""Where the date stands, and in which format; from Unicode's private use area."""
FORMS = ("%Y", "%y", "%m", "%-m", "%d", "%-d", "%B", "%b", "%A", "%a", "%H", "%M", "%S")
"""Parts of a date that templates ask for."""
DATE = "strftime_now"
"""The function with which they ask; transformers takes no other in its place, so that a macro of the same name goes before the template."""


@dataclass(frozen=True)
class Turns:
    """The text around messages; `MARK` where the date stands."""

    start: str
    """Before the first turn where there is no system message."""
    system: tuple[str, str] | None
    """Around the system message; null if the template has none."""
    place: str
    """Of the system message: start (in place of `start`), first (before the first user's text), last (before the last user's)."""
    before_user: str
    after_user: str
    before_assistant: str
    after_assistant: str
    last_assistant: str
    """Instead of before_assistant where the message is the last one, which the model goes on writing."""
    generation: str
    """Instead of before_assistant where the model writes the message."""
    fixed_date: bool = False
    """Whether the template asks for the date, and does with it what cannot be marked: it is then `NOW`, in these texts."""

    @property
    def dates(self) -> list[str]:
        """The formats in which the texts have the date."""
        values = [text for value in vars(self).values() for text in (value if isinstance(value, tuple) else (str(value),))]
        return list(dict.fromkeys(form for text in values for form in MARK.findall(text)))

    def render(self, messages: Messages) -> str:
        """What the template makes of ``messages`` on the day `NOW`; the last is a user's, after which the model writes, or an assistant's,
        not ended."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        rest = [m for m in messages if m["role"] != "system"]
        said = system.join(self.system) if system and self.system is not None else ""
        parts = [said if said and self.place == "start" else self.start]
        first = True
        for i, message in enumerate(rest):
            last, text = i == len(rest) - 1, message["content"]
            if message["role"] == "user":
                inside = said if (self.place == "first" and first) or (self.place == "last" and last) else ""
                parts += [self.before_user, inside, text, self.after_user]
                first = False
            else:
                parts += [self.last_assistant if last else self.before_assistant, text, "" if last else self.after_assistant]
            if last and message["role"] == "user":
                parts.append(self.generation)
        return MARK.sub(lambda mark: NOW.strftime(mark[1]), "".join(parts))


def turns(tokenizer: Any) -> Turns | None:
    """What the chat template of ``tokenizer`` does; null if it has none, or it cannot be said in turns."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    plain = _Asked(tokenizer)
    for ask in ([_Asked(tokenizer, marked=True)] if plain.dated else []) + [plain]:
        try:
            found = _find(ask)
        except _Odd:
            continue
        if all(found.render(probe) == plain(probe) for probe in probes(found.system is not None) if plain.renders(probe)):
            return found
    return None


def stops(found: Turns, tokenizer: Any) -> list[str]:
    """Texts at which the model's turn is over: what ends it, and what begins another; tokens where there are some."""
    tokens, next_turn = _control(tokenizer), found.before_user.removeprefix(tokenizer.bos_token or "")
    ends = _first(found.after_assistant, tokens) or found.after_assistant.strip()
    begins = _first(next_turn, tokens) or next_turn.strip()
    return [text for text in dict.fromkeys((ends, begins)) if text]


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends the model's turn; null if there is no chat template, or no such token."""
    found = turns(tokenizer)
    text = "" if found is None else _first(found.after_assistant, _control(tokenizer))
    return int(tokenizer.convert_tokens_to_ids(text)) if text else None


def probes(system: bool) -> list[Messages]:
    """Conversations that a template must render alike."""
    talk = [("user", USERS[0]), ("assistant", ASSISTANTS[0]), ("user", USERS[1]), ("assistant", ASSISTANTS[1]), ("user", USERS[2])]
    texts = {USERS[0]: "Zwei Zeilen:\n\n1. é 😀\n2. {{ x }}", ASSISTANTS[0]: "ok", USERS[1]: '[INST] "quoted" <b>', ASSISTANTS[1]: "a\tb"}
    found: list[list[tuple[str, str]]] = [talk[:n] for n in range(1, 6)]
    found += [[(role, texts.get(text, text)) for role, text in part] for part in found]
    found += [[("system", text), *part] for part in found for text in (SYSTEM, "Two\n\nlines.")] if system else []
    return [[{"role": role, "content": text} for role, text in part] for part in found]


class _Odd(Exception):
    """The template is not made of turns."""


class _Asked:
    """The template, as a function of messages, on the day `NOW`; or, ``marked``, with `MARK` instead of the date."""

    def __init__(self, tokenizer: Any, marked: bool = False) -> None:
        template = tokenizer.chat_template
        template = template.get("default", "") if isinstance(template, dict) else template
        self.tokenizer, self.dated, self.marked = tokenizer, DATE in template, marked
        self._template = _macro(marked) + template if self.dated else None

    def __call__(self, messages: Messages) -> str:
        """The text after which the model writes.

        Raises:
            _Odd: if the template refuses the messages.
        """
        ends = messages[-1]["role"] == "assistant"
        try:
            if not ends:
                return self._render(messages, True)
            text = self._render(messages, False)
        except Exception as error:  # a template may raise anything
            raise _Odd from error
        at = text.rfind(messages[-1]["content"])
        if at < 0:
            raise _Odd
        return text[: at + len(messages[-1]["content"])]

    def renders(self, messages: Messages) -> bool:
        """Whether the template takes ``messages``."""
        try:
            self(messages)
        except _Odd:
            return False
        return True

    def closed(self, messages: Messages) -> str:
        """The text of finished turns."""
        try:
            return self._render(messages, False)
        except Exception as error:
            raise _Odd from error

    def _render(self, messages: Messages, generation: bool) -> str:
        given = {"chat_template": self._template} if self._template else {}
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **given))


def _macro(marked: bool) -> str:
    """A macro that formats `NOW`, or only marks the place and the format."""
    value = "'\ue000' + form + '\ue001'" if marked else "form" + "".join(f" | replace('{f}', '{NOW.strftime(f)}')" for f in FORMS)
    return f"{{% macro {DATE}(form) %}}{{{{ {value} }}}}{{% endmacro %}}"


def _talk(count: int, system: bool = False) -> Messages:
    words = [("user", USERS[0]), ("assistant", ASSISTANTS[0]), ("user", USERS[1]), ("assistant", ASSISTANTS[1]), ("user", USERS[2])]
    found = [("system", SYSTEM)] if system else []
    return [{"role": role, "content": text} for role, text in [*found, *words[:count]]]


def _between(text: str, words: list[str]) -> list[str]:
    """The text before, between and after ``words``, which must each occur once, in this order."""
    if any(text.count(word) != 1 for word in words):
        raise _Odd
    at = [text.index(word) for word in words]
    if any(a >= b for a, b in pairwise(at)):
        raise _Odd
    ends = [0, *(a + len(w) for a, w in zip(at, words, strict=True))]
    return [text[a:b] for a, b in zip(ends, [*at, len(text)], strict=True)]


def _common(tokens: list[str], *texts: str) -> str:
    """What all texts begin with, in whole tokens."""
    units = [re.findall("|".join([*map(re.escape, tokens), "."]), text, re.DOTALL) for text in texts]
    return "".join(row[0] for row in takewhile(lambda row: len(set(row)) == 1, zip(*units, strict=False)))


def _find(ask: _Asked) -> Turns:
    words, tokens = [USERS[0], ASSISTANTS[0], USERS[1]], _control(ask.tokenizer)
    head, to_assistant, to_user, end = _between(ask(_talk(3)), words)
    alone = _between(ask.closed(_talk(1)), words[:1])[1]
    finished = _between(ask.closed(_talk(2)), words[:2])[2]
    after_user, after_assistant = _common(tokens, alone, to_assistant, end), _common(tokens, finished, to_user)
    while not head.endswith(to_user.removeprefix(after_assistant)):
        after_assistant = after_assistant[:-1]  # what is left over begins the next turn
        if not after_assistant and not head.endswith(to_user):
            raise _Odd
    before_user = to_user.removeprefix(after_assistant)
    last = _between(ask(_talk(2)), words[:2])[1]
    if not last.startswith(after_user):
        raise _Odd
    plain = {
        "start": head.removesuffix(before_user),
        "before_user": before_user,
        "after_user": after_user,
        "before_assistant": to_assistant.removeprefix(after_user),
        "after_assistant": after_assistant,
        "last_assistant": last.removeprefix(after_user),
        "generation": end.removeprefix(after_user),
    }
    system, place = _system(ask, plain["start"], before_user) if ask.renders(_talk(1, True)) else (None, "start")
    return Turns(**plain, system=system, place=place, fixed_date=ask.dated and not ask.marked)


def _system(ask: _Asked, start: str, before_user: str) -> tuple[tuple[str, str] | None, str]:
    """What stands around the system message, and where."""
    text = ask(_talk(3, True))
    if SYSTEM not in text:
        return None, "start"  # taken, and left out
    if text.index(SYSTEM) > text.index(ASSISTANTS[0]):
        _, _, around, after, _ = _between(text, [USERS[0], ASSISTANTS[0], SYSTEM, USERS[1]])
        at = around.rindex(before_user) + len(before_user) if before_user in around else len(around)
        return (around[at:], after), "last"
    before, after = _between(text, [SYSTEM, USERS[0]])[:2]
    if before.startswith(start + before_user) and not after.endswith(before_user):
        return (before.removeprefix(start + before_user), after), "first"
    if not after.endswith(before_user):
        raise _Odd
    return (before, after.removesuffix(before_user)), "start"


def _control(tokenizer: Any) -> list[str]:
    """Special tokens, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted({str(t) for t in added if t.special or str(t).startswith("<")}, key=len, reverse=True)


def _first(text: str, tokens: list[str]) -> str:
    """The token that comes first in ``text``."""
    at = {token: text.index(token) for token in tokens if token in text}
    return min(at, key=lambda token: (at[token], -len(token)), default="")
