"""Scores an official answer file where no downloaded model is needed: python -m prepare.mcif_scores HYP.xml REF.xml

WER by talk, BLEU and chrF after re-segmentation, exact match and F1 of the questions; not COMET and BERTScore.
"""

import argparse
import re
import sys

import numpy as np

from eval import item_scores, normalise, summarise
from prepare.mcif import FormatError, read_answers, read_references

TASKS = {"ASR": "asr", "TRANS": "st", "QA": "sqa"}


WORD = re.compile(r"\s*(?:[\u3000-\u9fff\uff00-\uffef]|[^\s\u3000-\u9fff\uff00-\uffef]+)")  # with the space before it


def resegment(said, lines):
    """Cuts the words of what was said (a list of texts) into one piece for each reference line: where an alignment of
    least edit distance puts the lines' ends (Matusov et al., IWSLT 2005). Chinese characters are words."""
    words, reference = WORD.findall(" ".join(said)), [WORD.findall(line) for line in lines]
    number = {}
    h, r = (np.array([number.setdefault(unit.strip(), len(number)) for unit in some], int)
            for some in (words, sum(reference, [])))
    steps = np.arange(len(h) + 1)
    distance = np.zeros((len(r) + 1, len(h) + 1), np.int32)  # between the first i and the first j units
    distance[0] = steps
    for i, unit in enumerate(r, 1):
        row = distance[i - 1] + 1
        row[1:] = np.minimum(row[1:], distance[i - 1, :-1] + (h != unit))
        distance[i] = np.minimum.accumulate(row - steps) + steps  # insertions
    ends, cuts, j = np.cumsum([0, *map(len, reference)]).tolist(), [], len(h)
    for i in range(len(r), -1, -1):
        cuts += [j] * ends.count(i)
        # back to where i - 1 units end: over what was inserted, then the unit itself or its absence
        while i and j and distance[i, j] not in (distance[i - 1, j] + 1, distance[i - 1, j - 1] + (h[j - 1] != r[i - 1])):
            j -= 1
        if i and j and distance[i, j] == distance[i - 1, j - 1] + (h[j - 1] != r[i - 1]):
            j -= 1
    cuts = [0, *cuts[::-1][1:-1], len(h)]
    return ["".join(words[a:b]).strip() for a, b in zip(cuts, cuts[1:])]


def score(hypothesis_path, reference_path):
    """The lines of eval.summarise for every track and language of the reference. Raises FormatError."""
    found = read_answers(hypothesis_path)
    for (track, language), wanted in read_references(reference_path).items():
        answers, items = found.get((track, language), {}), []
        missing = [i for reference in wanted if reference.task in TASKS for i in reference.ids if i not in answers]
        if missing:
            raise FormatError(f"{hypothesis_path}: no answer to {missing[0]!r} and {len(missing) - 1} more of track {track}, "
                              f"language {language}; answer every id")
        for reference in wanted:
            if reference.task not in TASKS:
                continue
            task, said, lines = TASKS[reference.task], [answers[i] for i in reference.ids], reference.lines
            if task == "asr":  # each segment is normalised before they are joined, as the official scorer does
                said, lines = ([normalise(text, language) for text in some] for some in (said, reference.lines))
            pairs = [(" ".join(lines), " ".join(said))]
            if task == "st":
                pairs = zip(lines, resegment(said, lines))
            items += [{"task": task, "target_language": language, "corpus": "", "speaker": "", "reference": line,
                       "hypothesis": text, "scores": item_scores(task, language, line, text)} for line, text in pairs]
        for line in summarise(items)[0]:
            yield track, line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hypothesis")
    parser.add_argument("reference")
    args = parser.parse_args(argv)
    try:
        for track, line in score(args.hypothesis, args.reference):
            scores = ", ".join(f"{name} {value:.4g} ({low:.4g}-{high:.4g})"
                               for name, (value, low, high) in line["scores"].items())
            print(f"{track}, {line['task']} {line['language']}, {line['items']}: {scores}")
    except FormatError as error:
        sys.exit(f"mcif_scores: {error}")


if __name__ == "__main__":
    main()
