"""Every page in English has a twin in Japanese that says the same: block by block, whatever can be counted is equal."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "examples/README.md")
PAGES = [
    path.relative_to(ROOT).as_posix()
    for place in PLACES
    for path in sorted(ROOT.glob(place))
    if ".ja." not in path.name
]
WORDS = {
    "zero": 0,
    "second two twice both half double doubles doubled": 2,
    "third thirds three": 3,
    "fourth four quarter quarters": 4,
    "fifth fifths five": 5,
    "sixth six": 6,
    "seventh seven": 7,
    "eighth eight": 8,
    "ninth nine": 9,
    "tenth tenths tenfold ten": 10,
    "eleven november": 11,
    "twelve": 12,
    "sixteenth sixteen": 16,
    "twenty": 20,
    "thirtieth thirty": 30,
    "fifty": 50,
    "sixty": 60,
    "hundred hundreds": 100,
    "thousand thousands": 1_000,
    "million": 1_000_000,
}
VALUES = {word: float(value) for words, value in WORDS.items() for word in words.split()}
SHORTEST, LONGEST = 0.36, 0.92  # Japanese letters for one of English; outside of this, somebody says less
Block = tuple[str, str]
"""Kind and text: what stands between empty lines, an item of a list, a heading, or code."""


def japanese(page: str) -> str:
    return page.removesuffix(".md") + ".ja.md"


def blocks(page: str) -> Iterator[Block]:
    text = unicodedata.normalize("NFKC", (ROOT / page).read_text(encoding="utf-8"))
    for piece in re.split(r"^(```.*?^```|#+ [^\n]*)$", text, flags=re.MULTILINE | re.DOTALL):
        if piece.startswith("```"):
            yield "code", re.sub(r"\s*#.*|print\(f\".*\"\)", "", piece)  # what is said in it is translated
        else:
            start = r"\n\s*\n|^(?=\s*(?:[-*]|\d+\.) )"  # of an item, or of the next paragraph
            found = re.split(start, piece, flags=re.MULTILINE)
            yield from ((kind(block), block) for block in found if block.strip())


def kind(block: str) -> str:
    if block.startswith("|"):
        rows = block.strip().splitlines()
        columns = [len(re.split(r"(?<!\\)\|", row)) - 2 for row in rows]
        return f"table with rows of {columns}"
    starts = {r"#+": "heading", r"\s*[-*] ": "item", r"\s*\d+\. ": "number", r"!\[|<img": "picture"}
    return next((name for start, name in starts.items() if re.match(start, block)), "paragraph")


def difference(english: Block, twin: Block) -> str:
    """What one of two blocks says and the other does not; empty where they say the same."""
    if english[0] == "code" or english[0] != twin[0]:
        return "" if english == twin else f"{twin[0]} in place of {english[0]}"
    if english[0] == "heading":
        one, other = (text.split(" ")[0] for _, text in (english, twin))
        return "" if one == other else f"{other} in place of {one}"
    for what in (links, code_spans, emphases):
        one, other = what(english[1]), what(twin[1])
        missing, more = one - other, other - one
        if what is code_spans:  # Japanese may have more of it, and words of its own in it: `[height, width]`
            translated = [name for name in more.elements() if re.search(r"[ぁ-ヿ一-鿿]", name)]
            missing, more = Counter(list(missing.elements())[len(translated) :]), Counter()
        if missing or more:
            return f"{what.__name__} only in English {set(missing)}, only in Japanese {set(more)}"
    one, other = (prose(text) for _, text in (english, twin))
    rows = [(one, other)]
    if english[0].startswith("table"):
        rows = list(zip(one.strip().splitlines(), other.strip().splitlines(), strict=True))
    unequal = next(filter(None, (unequal_numbers(*row) for row in rows)), "")
    return missing_names(one, other) or unequal or unequal_lengths(one, other)


def links(text: str) -> Counter[str]:
    """Targets of links and pictures, without language and anchor."""
    found = re.findall(r"\]\(([^)]*)\)|(?:src|href)=\"([^\"]*)\"", text)
    return Counter(re.sub(r"\.ja\b|#.*", "", one or other) for one, other in found)


def code_spans(text: str) -> Counter[str]:
    return Counter(" ".join(name.split()) for name in re.findall(r"`([^`]+)`", text))


def emphases(text: str) -> Counter[str]:
    """How many, of whatever kind: Japanese is bold where English is slanted."""
    return Counter("*" for _ in re.findall(r"\*\*[^*]+\*\*|\*(?! )[^*]+\*", text))


def prose(text: str) -> str:
    """Text without links' targets, tags and code."""
    return re.sub(r"\]\([^)]*\)|<[^>]*>|`[^`]+`", " ", text)


def missing_names(english: str, twin: str) -> str:
    """Names of things (CartPole, GPUs) that Japanese leaves out."""
    one, other = (
        {name.rstrip("s") for name in re.findall(r"\b(?:[A-Z][a-z]*\d*){2,}", text, flags=re.ASCII)}
        for text in (english, twin)
    )
    return f"not in Japanese: {one - other}" if one - other else ""


def unequal_numbers(english: str, twin: str) -> str:
    (one, _), (other, large) = numbers(english), numbers(twin)
    spelled = Counter(VALUES[word] for word in re.findall(r"[a-z]+", english.lower()) if word in VALUES)
    missing, more = one - other, other - one - spelled
    more.pop(1.0, None)  # Japanese counts where English has "a"
    missing.pop(0.0, None)  # what is below 0 is negative
    for value in large:
        near = (
            number
            for number in missing | spelled
            for power in range(10)
            if round(number * 10**power) == value
        )
        match = next(near, None)
        if match is None:
            more[value] += 1
        missing -= Counter([match])
    return (
        f"numbers only in English {dict(missing)}, only in Japanese {dict(more)}" if missing or more else ""
    )


def numbers(text: str) -> tuple[Counter[float], list[float]]:
    """Numbers without their signs, and those in units of 万 and 億 apart."""
    text = re.sub(r"(?<=\d)(?:,(?=\d{3}(?!\d))| (?=000\b))|^\s*\d+\. ", "", text, flags=re.MULTILINE)
    number, units = r"(?<![A-Za-z\d.])\d+(?:\.\d+)?(?:e-?\d+)?", {"億": 1e8, "百万": 1e6, "万": 1e4}
    one = rf"({number}) ?({'|'.join(units)})"
    large = []
    for whole in re.finditer(rf"(?:{one} ?)+", text):
        large.append(
            float(round(sum(float(value) * units[unit] for value, unit in re.findall(one, whole[0]))))
        )
    return Counter(map(float, re.findall(number, re.sub(one, "", text)))), large


def unequal_lengths(english: str, twin: str) -> str:
    """Whether one has sentences more, by the letters that are not those of words in both (names, units)."""
    shared = len(re.findall(r"[A-Za-z]", twin))
    expected = len(re.findall(r"[A-Za-z]", english)) - shared
    found = len(re.findall(r"[ぁ-ヿ一-鿿]", twin))
    fits = SHORTEST * expected <= found <= LONGEST * expected
    return "" if expected < 80 or fits else f"{found} Japanese letters for {expected} of English"


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_say_the_same(page):
    for english, twin in zip_longest(blocks(page), blocks(japanese(page)), fillvalue=("nothing", "")):
        found = difference(english, twin)
        assert not found, f"{page}: {found}, in\n{english[1].strip()[:300]}\n{twin[1].strip()[:300]}"


@pytest.mark.parametrize("page", [page for english in PAGES for page in (english, japanese(english))])
def test_headings_that_are_linked_exist(page):
    for target, anchor in re.findall(r"\]\(([^):]*)#([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        place = (ROOT / page).parent / target if target else ROOT / page
        headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), flags=re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs, f"{page}: no heading {anchor} in {place.name}"


@pytest.mark.parametrize("page", PAGES)
def test_terms_are_those_of_the_glossary(page):
    others = r"双子|リターン|雑音|地図|帳簿|検査和|シミュレーター|尺度"
    assert not re.findall(others, (ROOT / japanese(page)).read_text(encoding="utf-8"))
