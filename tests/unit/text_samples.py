"""Strings that tokenizers get wrong: scripts, spaces, digits, code, marks, emoji, special tokens, seeded mixtures."""

import random
import unicodedata

WRITTEN = [
    "", " ", "  ", "   a", "a   ", "\n", "\n\n\n", "\t\tx", " \n \n ", "\r\n", "a\r\nb\r\n\r\nc", "\u00a0x\u3000y",
    "Hello, world!", "don't I'LL we've they'd it's YOU'RE 'tis ''s", "can’t won’t", "…—–“quoted”", "a.b.c... ?!?!",
    "MixedCaseWords camelCase snake_case kebab-case SCREAMING", "x=1;y+=2**3//4", "1234567890 12 3.14 1,000,000 0x1F",
    "½ Ⅷ ٣٤ ௧௨ ²³ ①", "def f(x):\n    return {'a': [1, 2, (3,)]}\n\n\nclass A:\n\tpass\n",
    "<html><body class=\"x\">&amp;</body></html>", "https://example.com/a?b=c&d=%20#e", "héllo naïve Ünïcode ß ﬀ ǆ",
    "日本語のテキスト、漢字とカナ。", "한국어 문장", "Привет, мир! Ёлка", "مرحبا بالعالم", "שלום עולם", "हिन्दी में पाठ",
    "ไทยไม่มีช่องว่าง", "👍🏽 👩‍👩‍👧‍👦 🇫🇷 😀😀", "e\u0301 vs é, A\u030a vs Å", "\u200b\u200d\ufeff", "\x00\x01\x7f",
    "a" * 300, "ab" * 100 + " " * 50 + "\n" * 20, "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀", "\ufffd\uffff", "▁▁a▁b Ġword Ċ", "<0x0A> <unk> <s>",
]  # fmt: skip

_ALPHABETS = [
    "abcdefgXYZ ", "0123456789 .,", " \t\n\r", "!?.,;:'\"()[]{}<>|/\\@#$%^&*-_=+~`", "éüñçßøåæœ ",
    "日本語漢字かなカナ、。",
    "абвгдЖЩЫ ", "مرحبا ", "हिन्दी ", "😀👍🏽‍🇫🇷", "\u0300\u0301\u0327\u200b\u200d", "ĠĊ▁<s>0x",
]  # fmt: skip


def samples(count: int = 300) -> list[str]:
    """The written strings, and count more of seeded mixtures."""
    rng = random.Random(20)
    mixed = []
    for _ in range(count):
        runs = [rng.choice(_ALPHABETS) for _ in range(rng.randrange(1, 8))]
        mixed.append("".join("".join(rng.choices(run, k=rng.randrange(1, 12))) for run in runs))
    return WRITTEN + mixed


def without_numbers(text: str) -> str:
    return "".join(character for character in text if not unicodedata.category(character).startswith("N"))
