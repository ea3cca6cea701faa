"""Strings on which two tokenizers are compared.

A tokenizer that differs in one rule agrees on almost all English sentences. So the strings are of what rules are about: several spaces,
line ends and tabs in every order, digits in runs, contractions in every case, punctuation in runs, code, web addresses, twenty scripts,
emoji of several code points, marks, zero-width and control characters, special tokens in the middle of a text, and mixtures of all.
They are the same in every run and on every machine. All characters are of Unicode 9 or older, which every table in use has, and texts
are in NFC but for the few that are about it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

TEXTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "It's what they've said: I'm sure we'll go, you'd know, they're wrong. 'Tis THE BOYS' game, ISN'T IT? I'D SAY WE'RE OK.",
    "def main(argv):\n    for i in range(10):\n\t\tprint(f'{i:>4} {argv[i]!r}')  # comment\n\n\n    return {'a': [1, 2.5e-3], 'b': None}\n",
    "for (int i = 0; i < n; ++i) { x[i] += 3 * (y[i] >> 2) & 0xFF; } // TODO(me): fix\r\n#include <stdio.h>\r\n",
    "https://example.org/a/b?q=1&r=%20x#top, me@example.com; C:\\Users\\name\\file.txt and /usr/lib64/libc.so.6",
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 1,234,567.89 -0.5e+10 1/2 50% $3.50 2024-01-31T23:59:59Z",
    "Hello World HELLO WORLD helloWorld HelloWorldAgain snake_case kebab-case CamelCASE iPhone eBay McDonald's",
    "Was für ein schöner Tag! Die Straße ist naß, das Mädchen heißt Zoë; Größe: 5 µm², 20 °C.",
    "C'est l'été à Noël, où l'œuvre d'Hélène s'achève ; « Ça va ? » Oui, merci.",
    "¿Dónde está el niño? ¡Mañana, señor! El pingüino corrió.",
    "Não há razão para isso; coração, pão, avó e avô.",
    "Вчера я видел, как нещо на Български и украї́нською мовою читали.",
    "Το γρήγορο καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί.",
    "Cảm ơn bạn rất nhiều, tiếng Việt có nhiều dấu.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Zażółć gęślą jaźń.",
    "İstanbul'da ılık bir gün; IŞIK ve ışık.",
    "我想在apple工作1314151天～ 今天天氣很好，我們去公園吧！「你好」，他說。",
    "吾輩は猫である。名前はまだ無い。カタカナとひらがな、ﾊﾝｶｸ、ＡＢＣ１２３。",
    "안녕하세요, 저는 한국어를 조금 합니다. 2024년 3월.",
    "السلام عليكم ورحمة الله، كيف حالك؟ ١٢٣٤٥",
    "שלום עולם, מה שלומך היום?",
    "नमस्ते दुनिया, आप कैसे हैं? १२३ रुपये।",
    "বাংলা ভাষায় কথা বলা। ১২৩",
    "สวัสดีครับ วันนี้อากาศดีมาก ๑๒๓",
    "កាន់តែពិសេសអាច ភាសាខ្មែរ",
    "தமிழ் மொழி எனக்குப் பிடிக்கும்.",
    "გამარჯობა მსოფლიო; Բարեւ աշխարհ; ሰላም ዓለም",
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪🇯🇵 1️⃣ ❤️ ☺️ ©️",
    "∑_{i=0}^{n} x² ≤ √2 · π ≈ 3.14159 ⇒ ∀ε>0 ∃δ: |f(x)−L|<ε; ½ ¼ Ⅷ ① ℃ № ™",
    "| a | b |\n|---|:-:|\n| **x** | `y` |\n\n> quote\n\n* item\n  1. sub\n\n```python\npass\n```\n<b>bold</b>&nbsp;&amp;",
    "''''''```````\"\"\"\"......!!!!!!?????? ------=======~~~~~ ((())) [[]] {{}} <<>> //// \\\\ || && ## @@ ^^ ::: ;;; ,,, ___ +++ ***",
    "“Quotes” ‘single’ „low“ – en — em … ellipsis • bullet § ¶ † ‡ € £ ¥ ¢ ° ± × ÷",
    "a\u0301e\u0300n\u0303 re\u0301sume\u0301 (decomposed) and café résumé (composed) ﬁ ligature",
    "zero\u200bwidth, soft\u00adhyphen, no\u00a0break, thin\u2009space, ideographic\u3000space, left\u200eright\u200f, bom\ufeff",
)
"""One text of each kind."""

GAPS = (
    *(" " * n for n in (1, 2, 3, 4, 8, 17)),
    *("\n" * n for n in (1, 2, 3)),
    *("\r\n", "\r\n\r\n", "\t", "\t\t", " \n", "\n ", " \n \n ", "\t \n", "\n\t\t", "  \t", ""),
)
"""What stands between pieces."""

WORDS = (
    *("the", "The", "THE", " a", "I'm", "DON'T", "x1", "v2.0", "don’t", "naïve", "Ünïcödé", "ЖУК", "жук", "日本", "かな", "한글"),
    *("عربي", "हिन्दी", "ไทย", "😀", "👍🏽", "7", "42", "2024", "1000000", "3.14", "!", "?!", "...", "--", "=>", "</", "/>", "(", ")"),
    *('"', "'", "`", "_", "\\n", "%", "$", "€", "#", "@", "<0x41>", "[UNK]", "ﬃ", "ǅ", "ª", "²", "٣", "½"),
    *("\u200d", "\u0301", "\u00a0", "\u3000", "\x07", "\x7f", "\ue000"),
)
"""What mixtures are made of."""


def varied_strings(count: int = 1000, special: Sequence[str] = ()) -> list[str]:
    """``count`` strings, always the same.

    Args:
        special: tokens of the tokenizer that appear in some of the strings, such as "<s>".
    """
    found = list(dict.fromkeys(_plain()))
    chance = _Chance(len(special))
    while len(found) < count:
        found.append(_mixed(chance, special))
    return found[:count]


def _plain() -> list[str]:
    """Every text, every gap at each end of a word, and the empty string."""
    around = [f"{gap}{word}{gap}" for gap in GAPS for word in ("a", "Hello", "7", "!", "")]
    tails = ("'s", "'S", "'t", "'re", "'RE", "'Ve", "'m", "'ll", "'LL", "'d", "'x", "’s")
    cases = [f"{word}{tail}" for word in ("we", "It", "1", "é") for tail in tails]
    runs = [character * length for character in "7 a.\n-" for length in range(1, 13)]
    return [*TEXTS, *around, *cases, *runs]


class _Chance:
    """A reproducible sequence: `random.Random.random` is the same in all versions of Python."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"varied strings {seed}")

    def pick(self, values: Sequence[str]) -> str:
        return values[self.below(len(values))]

    def below(self, count: int) -> int:
        return int(self._random.random() * count)


def _mixed(chance: _Chance, special: Sequence[str]) -> str:
    """Pieces of texts, words, gaps and special tokens."""
    parts = []
    for _ in range(1 + chance.below(6)):
        kind = chance.below(10)
        if kind < 4:
            text = chance.pick(TEXTS)
            start = chance.below(len(text))
            parts.append(text[start : start + 1 + chance.below(40)])
        elif kind < 9 or not special:
            parts += [chance.pick(WORDS) for _ in range(1 + chance.below(4))]
        else:
            parts.append(chance.pick(special))
        parts.append(chance.pick(GAPS))
    return "".join(parts)
