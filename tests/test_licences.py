"""The licence gate: what training takes, what derived rows inherit, what is written beside a model."""

import json
import re

import pytest
import torch
from test_train import arguments

import train
from data import Manifest
from prepare.errors import ManifestError
from prepare.instructions import INSTRUCTIONS, instruction_of, language_of, task_of
from prepare.licences import accepted, check_row, fingerprint, notice, strictest, test_fingerprints, used

test_fingerprints.__test__ = False  # pytest would take it for a test


@pytest.mark.parametrize("licence, taken", [
    ("CC0-1.0", True), ("PDDL-1.0", True), ("public domain", True), ("LicenseRef-PublicDomain", True), ("MIT", True),
    ("Apache-2.0", True), ("CC-BY-4.0", True), ("CC-BY-2.5-AU", True), ("cc-by-3.0", True), ("CC-BY", True),
    ("CC-BY-SA-4.0", False), ("CC-BY-NC-4.0", False), ("CC-BY-ND-4.0", False), ("CC-BY-NC-SA-4.0", False),
    ("unknown", False), ("", False), ("GPL-3.0-only", False), ("CC-BY-4.0-NC", False), ("LicenseRef-MIT-like", False),
    ("CC-BY-4.0 AND MIT", True), ("CC-BY-4.0 AND CC-BY-NC-4.0", False), ("GPL-3.0-only OR MIT", True)])
def test_what_training_takes(licence, taken):
    assert accepted(licence) == taken


def test_a_named_licence_is_taken_and_no_other():
    allowed = ("CC-BY-SA-4.0",)
    assert accepted("CC-BY-SA-4.0", allowed) and accepted("CC-BY-SA-4.0 AND CC-BY-4.0", allowed)
    assert not accepted("CC-BY-SA-3.0", allowed) and not accepted("CC-BY-SA-4.0 AND CC-BY-NC-4.0", allowed)


@pytest.mark.parametrize("licences, inherited", [
    (["CC0-1.0", "CC0-1.0"], "CC0-1.0"), (["CC0-1.0", "CC-BY-4.0"], "CC-BY-4.0"), (["MIT", "CC0-1.0"], "MIT"),
    (["CC-BY-4.0", "CC-BY-SA-4.0"], "CC-BY-SA-4.0"), (["CC-BY-NC-4.0", "CC-BY-4.0"], "CC-BY-NC-4.0"),
    (["CC-BY-SA-4.0", "CC-BY-NC-4.0"], "CC-BY-SA-4.0 AND CC-BY-NC-4.0"), (["CC-BY-4.0", "unknown"], "unknown"),
    (["CC-BY-SA-4.0 AND CC-BY-NC-4.0", "MIT"], "CC-BY-SA-4.0 AND CC-BY-NC-4.0"), ([], "unknown"),
    (["CC-BY-NC-4.0", "GPL-3.0-only OR MIT"], "CC-BY-NC-4.0"), (["GPL-3.0-only OR MIT", "CC0-1.0"], "MIT")])
def test_derived_rows_inherit_the_strictest_licence(licences, inherited):
    assert strictest(licences) == inherited
    free = bool(licences) and all(map(accepted, licences))
    assert accepted(inherited) == free  # no mixture is freer than its parts


def copy_rows(tiny_project, path, **changes):
    """The tiny training manifest with its audio by absolute path; the last row changed."""
    rows = [json.loads(line) for line in (tiny_project / "train.jsonl").read_text().splitlines()]
    rows = [row | {"audio": str(tiny_project / row["audio"])} for row in rows]
    rows[-1] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("changes, message", [
    ({"licence": "CC-BY-NC-4.0", "corpus": "europarl-st"},
     "line 40: the corpus 'europarl-st' has the licence 'CC-BY-NC-4.0', expected .* --allow-licence 'CC-BY-NC-4.0'"),
    ({"licence": None}, "line 40: the corpus 'tones' has the licence 'unknown'"),
    ({"sources": [["tones", "CC0-1.0"], ["squad", "CC-BY-SA-4.0"]]},
     "line 40: the corpus 'squad' has the licence 'CC-BY-SA-4.0'"),
    ({"test_only": True}, "line 40: the corpus 'tones' is for testing only; leave it out")])
def test_one_refused_row_stops_a_run_before_any_weight_is_loaded(tiny_project, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(train, "build", lambda *_: pytest.fail("weights were loaded"))
    bad = copy_rows(tiny_project, tmp_path / "bad.jsonl", **changes)
    for where in ({"data": bad}, {"dev": bad}):
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(tiny_project, tmp_path / "out", trust_paths=True, **where))
        assert re.search(message, str(stop.value)) and "bad.jsonl" in str(stop.value)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_rows_of_other_tasks_are_not_looked_at(tiny_project, tmp_path):
    bad = Manifest(copy_rows(tiny_project, tmp_path / "bad.jsonl", task="st", target_language="de", licence="unknown"),
                   trust_paths=True)
    bad.split(["asr"], 30, lambda row: check_row(row, (), frozenset()))
    with pytest.raises(ManifestError, match="unknown"):
        bad.split(["asr", "st"], 30, lambda row: check_row(row, (), frozenset()))


def test_texts_of_test_only_corpora_are_refused_by_their_fingerprints(tiny_project, tmp_path):
    """Whatever corpus a row claims to be from; but short texts are everybody's."""
    secret = "We present a corpus of talks, and it is for testing."
    lines = [fingerprint(text) for text in (secret, "What is it?", "一个用于测试的语料库", "one two")]
    (tmp_path / "mcif.fingerprints").write_text("\n".join(lines) + "\n")
    known = test_fingerprints([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert known == set(lines) and not test_fingerprints([tiny_project / "train.jsonl"])

    def refused(**row):
        try:
            check_row({"corpus": "c", "licence": "CC0-1.0", "task": "asr", "where": "'m' line 1", **row}, (), known)
        except ManifestError as error:
            return str(error)

    assert "is a text of a test-only corpus" in refused(text="we present a corpus of talks and it is for testing")
    assert refused(text="一个用于测试的语料库。") and refused(task="sqa", question=secret, text="Yes.")
    assert refused(text="We present a corpus.") is None and refused(text="one two") is None
    assert refused(task="sqa", question="What is it?", text=secret) is None  # of a question, the question is looked at
    bad = copy_rows(tiny_project, tmp_path / "bad.jsonl", text=secret.upper())
    with pytest.raises(SystemExit, match="line 40: 'WE PRESENT"):
        train.main(arguments(tiny_project, tmp_path / "out", trust_paths=True, data=bad))


def test_the_notice_lists_every_corpus_of_every_phase(tiny_project, tmp_path):
    data = copy_rows(tiny_project, tmp_path / "data.jsonl", corpus="librispeech", licence="CC-BY-4.0")
    train.main(arguments(tiny_project, tmp_path, trust_paths=True, data=data, steps=2))
    text = (tmp_path / "align.NOTICE").read_text(encoding="utf-8")
    assert "tones, CC0-1.0: 0.01 h into en\n  needs no attribution" in text and "librispeech, CC-BY-4.0: 0.00 h" in text
    assert "Panayotov" in text
    other = copy_rows(tiny_project, tmp_path / "other.jsonl", corpus="mine", licence="CC-BY-SA-4.0", task="st",
                      target_language="de")
    train.main([*arguments(tiny_project, tmp_path, phase="ift", init=tmp_path / "align.pt", data=other, steps=2),
                "--trust-paths", "--allow-licence", "CC-BY-SA-4.0"])
    text = (tmp_path / "ift.NOTICE").read_text(encoding="utf-8")
    assert "librispeech, CC-BY-4.0" in text and "mine, CC-BY-SA-4.0: 0.00 h into de\n  no attribution is on record" in text
    state = torch.load(tmp_path / "ift.pt", weights_only=True)
    assert {(corpus, licence) for corpus, licence, *_ in state["data"]} == {
        ("tones", "CC0-1.0"), ("librispeech", "CC-BY-4.0"), ("mine", "CC-BY-SA-4.0")}


def test_hours_of_two_phases_are_not_added_up():
    assert used([["a", "MIT", "en", 50]], [["a", "MIT", "en", 70], ["b", "MIT", "de", 1]]) == [
        ["a", "MIT", "en", 70], ["b", "MIT", "de", 1]]
    assert notice([["a", "MIT", "de", 3600], ["a", "MIT", "en", 1800]]).count("a, MIT: 1.00 h into de, 0.50 h into en") == 1


def test_bare_transcripts_are_asked_for_as_such():
    """A text without case and punctuation is never the answer to an instruction that does not ask for it."""
    row = {"task": "asr", "source_language": "en", "target_language": "en"}
    bare = INSTRUCTIONS["asr bare"]
    written = {w for key in ("asr", "asr of English") for some in INSTRUCTIONS[key].values() for w in some}
    assert instruction_of(row | {"style": "bare"}) == bare["en"][0] and instruction_of(row) in written
    for language, some in bare.items():
        assert len(set(some)) >= 10 and not written & set(some)
        assert {(task_of(wording), language_of(wording)) for wording in some} == {("asr", language)}
