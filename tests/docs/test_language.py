"""Words that must not come back: British spellings, and phrases that read translated. See CONTRIBUTING.md, Language."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BRITISH = (
    r"\w*colour\w*", r"\w*behaviour\w*", r"\w*neighbour\w*", r"\w*favour\w*", r"centre[sd]?", r"centred", r"grey",
    r"licence", r"catalogue", r"artefacts?", r"judgement", r"programme", r"towards", r"whilst", r"labelled",
    r"modelling", r"learnt", r"initialis\w+", r"normalis\w+", r"summaris\w+", r"randomis\w+", r"optimis\w+",
    r"vectoris\w+",
    r"realis\w+", r"synchronis\w+", r"serialis\w+", r"minimis\w+", r"maximis\w+", r"generalis\w+", r"utilis\w+",
    r"recognis\w+", r"organis\w+", r"quantis\w+", r"visualis\w+", r"analys(?:e|ed|es|ing)\b",
)  # fmt: skip
TRANSLATED = {
    r"is no (?:whole|run|shard|key|real|complete|integer|number|folder|video|directory|valid|such)\b": "is not a ...",
    r"put(?:s|ting)? up with": "allow",
    r"heart has stopped": "no heartbeat for 60 s",
    r"gives? \w+ back\b": "returns",
    r"whole number from": "integer >= 1",
    r"a run puts": "allowed per epoch",
    r"\bwish(?:es)?\b": "request",
    r"\bafresh\b": "again, from scratch",
    r"\banew\b": "again",
    r"\bonce more\b": "again",
    r"\bof late\b": "recently",
    r"\blikewise\b": "say it",
    r"\bat hand\b": "available",
    r"sees to it": "ensures",
    r"make do with": "use",
    r"for ever\b": "forever",
    r"in company": "together",
    r"be it\b": "whether",
    r"of (?:its|their|his|her) own\b": "separate, a new ...",
    r"\b(?:goes|go) on\b": "continue",
    r"\bstands? beside\b": "is listed with",
    r"\bnobody\b": "no one, or say who",
    r"\bhands? (?:it|them|back)\b": "return, pass",
    r"\btells? of\b": "report",
    r"\btrial of the\b": "test of",
    r"\bcomputed again\b": "recomputed",
    r"\b(?:MB|GB|GiB|milliseconds|packs?|clips?|tokens) a (?:pack|rank|GPU|node|second)\b": "per",
}
"""Pattern, and what to write instead."""
HERE = Path(__file__).name
# Not constraints*.txt, whose names others gave.
TEXTS = [
    ROOT / name
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if (Path(name).suffix in (".py", ".md", ".yaml", ".sh", ".toml") or name in ("Makefile", ".ci/run"))
    and Path(name).name != HERE
]


def found(patterns, text):
    """Lines with a word of the list: (line number, word)."""
    search = re.compile("|".join(rf"(?:{pattern})" for pattern in patterns), re.IGNORECASE)
    return [
        (number, match[0]) for number, line in enumerate(text.splitlines(), start=1) for match in search.finditer(line)
    ]


@pytest.mark.parametrize("patterns", [[rf"\b{w}\b" for w in BRITISH], list(TRANSLATED)], ids=["british", "translated"])
def test_no_word_of_the_list_is_used(patterns):
    assert TEXTS or not (ROOT / ".git").exists()
    hits = {str(path.relative_to(ROOT)): found(patterns, path.read_text()) for path in TEXTS if path.exists()}
    assert {name: lines for name, lines in hits.items() if lines} == {}


def test_a_word_of_the_list_would_be_found():
    assert found([r"\bcolour\b"], "a color\nThe Colour of it") == [(2, "Colour")]
    assert found(list(TRANSLATED), "give x back\nit gives memory back\nthis is no shard set") == [
        (1, "give x back"),
        (2, "gives memory back"),
        (3, "is no shard"),
    ]
