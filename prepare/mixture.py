"""What a run is trained on: its manifests, task by task, and how often each is drawn."""

import copy
import re
from collections import Counter
from functools import partial

import numpy as np

from data import LANGUAGE_CODES, Manifest
from prepare.errors import ManifestError, TrainError, visible
from prepare.instructions import instruction_of
from prepare.licences import check_row, test_fingerprints


def open_manifests(cfg, tasks):
    """The training manifests, one for each task and target language of a file; how often each is to be drawn; the dev
    manifest; the hours, which are printed; the seconds of the longest row. Only rows of the phase's tasks, all of which
    must be free to be trained on."""
    named = [(path, float(weight)) for path, weight in
             (re.fullmatch(r"(.*?)(?:=(\d*[.]?\d+))?", path).groups("1") for path in cfg.data)]
    check = partial(check_row, allowed=tuple(cfg.allow_licence),
                    test_texts=test_fingerprints([cfg.dev, *(path for path, _ in named)]))

    def read(path, least):
        parts, seconds, window = Manifest(path, cfg.trust_paths).split(tasks, cfg.max_seconds, check)
        found, languages = sum(map(len, parts.values())), {language for _, language in parts}
        if found < least:
            raise ManifestError(f"{path!r}: {found} rows of the tasks this phase trains, {', '.join(tasks)}, expected at "
                                f"least {least}; give another manifest")
        if cfg.prompt == "tokens" and not languages <= set(LANGUAGE_CODES):
            raise ManifestError(f"{path!r}: --prompt tokens has no token for "
                                f"{', '.join(sorted(languages - set(LANGUAGE_CODES)))}")
        for part in parts.values() if cfg.prompt == "text" else ():
            instruction_of(part[0])  # raises if its language has no wordings
        return parts, seconds, window

    manifests, groups, weights, hours, longest = [], [], [], Counter(), 0.0
    for path, weight in named:
        if not weight:
            raise TrainError(f"{path}=0: a manifest of weight 0; leave it out")
        parts, seconds, window = read(path, 1)
        manifests, groups, hours = manifests + list(parts.values()), groups + list(parts), hours + seconds
        # a file's weight counts per row, so that PATH=2 is the same as naming PATH twice
        weights += [weight * len(part) for part in parts.values()]
        longest = max(longest, window)
    parts, *_ = read(cfg.dev, 2)
    dev = copy.copy(next(iter(parts.values())))
    dev.lines = np.sort(np.concatenate([part.lines for part in parts.values()]))
    size = Counter()
    for group, weight in zip(groups, weights):
        size[group] += weight
    weights = [weight * size[group] ** (1 / cfg.temperature - 1) for group, weight in zip(groups, weights)]
    for group in sorted(size):
        share = sum(w for g, w in zip(groups, weights) if g == group) / sum(weights)
        print(f"data: {group[0]} into {visible(group[1])}: {size[group]:.0f} rows, {100 * share:.1f} % of those drawn")
    for (corpus, licence, language), total in sorted(hours.items()):
        print(visible(f"data: {corpus}, {licence}, into {language}: {total / 3600:.2f} h"))
    return manifests, weights, dev, [[*key, round(total)] for key, total in sorted(hours.items())], longest
