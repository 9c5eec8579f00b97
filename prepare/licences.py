"""Which licences training accepts, what a derived row inherits, and whom a trained model owes a mention."""

import hashlib
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from prepare.errors import ManifestError
from prepare.paths import read_bytes

LARGEST = 2**27  # bytes of a file of fingerprints
FREE = re.compile(r"CC0-1\.0|PDDL-1\.0|LicenseRef-PublicDomain|public domain|MIT|Apache-2\.0"
                  r"|CC-BY(-[1-4]\.\d(-(?!NC|ND|SA)[A-Z]{2,3})?)?", re.I)


@lru_cache
def accepted(licence, allowed=()):
    """Whether training takes data of an SPDX licence: CC0, public domain, CC-BY, MIT, Apache-2.0, or one that is named
    in `allowed`. Of "A AND B" both must be accepted, of "A OR B" one."""
    if licence in allowed:
        return True
    choices = [choice.split(" AND ") for choice in licence.strip("() ").split(" OR ")]
    return any(all(FREE.fullmatch(part.strip()) or part.strip() in allowed for part in parts) for parts in choices)


# from the freest to the strictest; within a line all versions are alike
RANKS = [r"CC0-.*|PDDL-.*|LicenseRef-PublicDomain|public domain", r"MIT|Apache-.*", r"CC-BY(-\d.*)?", r"CC-BY-SA-.*",
         r"CC-BY-ND-.*", r"CC-BY-NC-\d.*", r"CC-BY-NC-SA-.*", r"CC-BY-NC-ND-.*"]


def strictest(licences):
    """The licence of a row made from rows of these licences: the strictest; one that is not known is stricter than all
    that are. Where two bind in different ways (share-alike and non-commercial), both, as "A AND B"; of "A OR B" the
    freer."""
    def rank(licence):
        return next((i for i, known in enumerate(RANKS) if re.fullmatch(known, licence, re.I)), len(RANKS))

    chosen = [min((choice.split(" AND ") for choice in licence.strip("() ").split(" OR ")),
                  key=lambda parts: max(map(rank, parts))) for licence in licences]
    found = sorted({part for parts in chosen for part in parts}, key=lambda x: (rank(x), x))
    if not found:
        return "unknown"
    binding = [licence for licence in found if rank(licence) > 2]
    return " AND ".join(binding) if binding else found[-1]


def letters(text):
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def letter_count(text):
    """How many letters there are to know a text by, a Chinese character counting as three."""
    return sum(3 if "\u4e00" <= c <= "\u9fff" else 1 for c in letters(text))


def fingerprint(text):
    """16 hexadecimal digits that are the same for texts that differ only in case, punctuation and spaces."""
    return hashlib.sha256(letters(text).encode("utf-8", "replace")).hexdigest()[:16]


def test_fingerprints(manifests):
    """The fingerprints of test-only texts: the lines of all *.fingerprints files beside the given manifests."""
    files = {file for manifest in manifests for file in Path(manifest).parent.glob("*.fingerprints")}
    try:
        return frozenset(line for file in files for line in read_bytes(file, LARGEST).decode().split())
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{', '.join(map(str, files))}: {error}, expected what prepare.corpora mcif writes; "
                            "convert it again or remove it") from error


def check_row(row, allowed, test_texts):
    """Raises ManifestError if a manifest row must not be trained on: its licence or that of a source is not accepted, it
    is marked test_only, or its text (of a question, the question) is among the fingerprints test_texts. Texts of under
    20 letters, a Chinese character counting as three, are too short to tell where they are from."""
    for corpus, licence in ((row["corpus"], row["licence"]), *row.get("sources", ())):
        if not accepted(licence, allowed):
            raise ManifestError(f"{row['where']}: the corpus {corpus!r} has the licence {licence!r}, expected CC0-1.0, "
                                "public domain, CC-BY, MIT or Apache-2.0; leave it out or, if you may use it, give "
                                f"--allow-licence {licence!r}")
    if row.get("test_only"):
        raise ManifestError(f"{row['where']}: the corpus {row['corpus']!r} is for testing only; leave it out of "
                            "training and validation")
    if test_texts:
        text = row["question"] if row["task"] == "sqa" else row["text"]
        if letter_count(text) >= 20 and fingerprint(text) in test_texts:
            raise ManifestError(f"{row['where']}: {text[:60]!r} is a text of a test-only corpus (a *.fingerprints file "
                                "beside the manifests has it); leave the row out")


def used(*data):
    """Lists of (corpus, licence, language, seconds) as one, of equal entries the longest."""
    hours = {}
    for *key, seconds in (entry for some in data for entry in some):
        hours[tuple(key)] = max(seconds, hours.get(tuple(key), 0))
    return [[*key, seconds] for key, seconds in sorted(hours.items())]


def notice(data):
    """The text that goes with a trained model: whom its training data came from. data: as used gives it."""
    from prepare.corpora import CORPORA  # which need not be read unless a model is saved
    corpora = {}
    for corpus, licence, language, seconds in data:
        corpora.setdefault((corpus, licence), []).append(f"{seconds / 3600:.2f} h into {language}")
    lines = ["This model was trained on the following data.", ""]
    for (corpus, licence), hours in corpora.items():
        credit = "no attribution is on record here; whoever made the manifest knows it"
        if corpus in CORPORA:
            credit = CORPORA[corpus].attribution
        elif re.fullmatch(RANKS[0], licence, re.I):
            credit = "needs no attribution"
        lines += [f"{corpus}, {licence}: {', '.join(hours)}", f"  {credit}"]
    return "\n".join(lines) + "\n"
