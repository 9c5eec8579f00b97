"""sample.py and eval.py: answers to instructions, on recordings of any length, and their scores, on a tiny project."""

import io
import json
import math
import re
import types

import jiwer
import numpy as np
import pytest
import sacrebleu
import soundfile
import torch
from test_train import arguments

import data
import eval
import sample
import train
from data import Manifest, fbank, windows
from model import looped
from prepare import mcif, mcif_scores
from prepare.audio import load_audio
from prepare.errors import AudioError
from prepare.instructions import REFUSALS, instruction_of
from sample import Answer, answer_rows, listen


@pytest.fixture(scope="module")
def project(tiny_project, tmp_path_factory):
    """tiny_project with rows of all tasks, its trained ift.pt, and the model of it."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("ask")
    rows = [json.loads(line) for line in (tiny_project / "train.jsonl").read_text().splitlines()]
    made = []
    for i, row in enumerate(rows):
        row |= {"audio": str(tiny_project / row["audio"]), "speaker": "ab"[i % 2]}
        made += [row, {**row, "task": "st", "target_language": "de", "text": row["text"].replace("one", "eins")},
                 {**row, "task": "sqa", "question": "Which?", "text": row["text"] if i % 3 else REFUSALS["en"]}]
    (out / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    train.main(arguments(tiny_project, out, steps=12, eval_every=6))
    train.main(arguments(tiny_project, out, phase="ift", init=out / "align.pt", steps=12, eval_every=6, adapter_lr=1e-3, trust_paths=True,
                         encoder_lr=1e-3, llm_lr=1e-3, data=out / "all.jsonl", dev=out / "all.jsonl", eval_rows=30))
    return types.SimpleNamespace(path=out, tones=tiny_project, rows=list(Manifest(out / "all.jsonl", trust_paths=True)))


@pytest.fixture(scope="module")
def trained(project):
    return sample.load_model(project.path / "ift.pt")


# ------------------------------------------------------------------------------------------------------------- windows


def speech_with_pauses(seconds, every, seed=0, loudness=0.01):
    rng = np.random.default_rng(seed)
    wave = torch.from_numpy(rng.normal(0, 0.1, int(seconds * 16000)).astype("float32"))
    pauses = np.arange(every, seconds, every)
    for at in pauses:
        wave[int((at - 0.15) * 16000):int((at + 0.15) * 16000)] *= loudness
    return wave, pauses


def test_windows_are_the_wave_cut_at_its_pauses():
    wave, pauses = speech_with_pauses(100, 7.0)
    parts = windows(wave, 30)
    assert torch.equal(torch.cat(parts), wave)
    assert all(7.5 * 16000 <= len(part) <= 30 * 16000 for part in parts) and len(parts) <= 7
    ends = np.cumsum([len(part) for part in parts])[:-1] / 16000
    assert all(np.abs(pauses - end).min() < 0.06 for end in ends)


def test_a_slight_pause_is_found():
    found = 0
    for seed in range(10):
        wave, _ = speech_with_pauses(32, 22.0, seed, 0.8)
        found += abs(len(windows(wave, 30)[0]) / 16000 - 22.0) < 0.1
    assert found >= 8


@pytest.mark.parametrize("seconds", [0.04, 0.3, 0.5, 29.99, 30.0, 30.01, 31, 45.3, 61, 300])
def test_windows_of_any_length(seconds):
    wave = torch.randn(int(seconds * 16000))
    parts = windows(wave)
    assert torch.equal(torch.cat(parts)[:len(wave)], wave) and all(8000 <= len(part) <= 480000 for part in parts)
    assert not torch.cat(parts)[len(wave):].any() and len(windows(wave, math.inf)) == 1
    features, lengths = fbank(parts)  # every window can be heard
    assert features.isfinite().all()
    assert [data.feature_length(seconds)] == fbank(windows(wave, math.inf))[1]


def test_joined_texts():
    assert data.join(["One two.", " three", "", "four "]) == "One two. three four"
    assert data.join(["你好。", "世界", "ok", "再见"]) == "你好。世界ok 再见"
    assert data.join([]) == data.join(["", " "]) == ""


# ------------------------------------------------------------------------------------------------------------- answers


def heard_of(model, waves, longest=math.inf):
    return sample.hear_waves(model, waves, longest)


def test_together_is_alone(project, trained):
    """Rows of all tasks that share recordings, in batches, against each row by itself without any cache shared."""
    model, tokenizer, _ = trained
    manifest = Manifest(project.path / "all.jsonl", trust_paths=True)
    rows = [manifest[i] for i in range(24)]
    waves = [load_audio(row["audio"]) for row in rows]
    recordings = heard_of(model, waves[::3])
    together = answer_rows(model, tokenizer, rows, [recordings[i // 3] for i in range(24)], batch_size=5, max_new_tokens=9)
    for row, wave, answer in zip(rows, waves, together):
        features, lengths = fbank(windows(wave))
        ids, _ = data.render({**row, "text": None}, data.adapter_length(lengths[0], model.adapter.config), tokenizer, 0)
        said, = model.generate(torch.tensor(ids), [len(ids)], features, lengths, max_new_tokens=9)
        assert answer.text == tokenizer.decode(said[:len(said) - looped(said)]).strip()


def test_training_evaluation_and_sampling_build_the_same_ids(project, trained, monkeypatch):
    model, tokenizer, state = trained
    seen, read, generate = [], model.read, model.generate
    monkeypatch.setattr(model, "read", lambda ids, sizes, heard: seen.append(ids) or read(ids, sizes, heard=heard))
    monkeypatch.setattr(model, "generate", lambda ids, *rest, **options: seen.append(ids) or generate(ids, *rest, **options))
    manifest = Manifest(project.path / "all.jsonl", trust_paths=True)
    examples = data.Examples([manifest], tokenizer, 0, model.adapter.config)
    for i, row in enumerate(project.rows[:3]):
        frames = examples.frames(0, i, row)
        instruction = instruction_of(row, np.random.default_rng(i))
        ids, answer, _ = examples.example({**row, "instruction": instruction}, frames)
        parts, = listen(model, [[frames]])
        answer_rows(model, tokenizer, [{**row, "instruction": instruction}], [parts], max_new_tokens=1)
        sample.ask(model, tokenizer, {**state, "refuse_above": None}, parts, instruction, max_new_tokens=1)
        assert torch.cat(seen).tolist() == 2 * ids[:-answer]
        seen.clear()


def test_long_recordings(project, trained):
    model, tokenizer, _ = trained
    wave = torch.cat([load_audio(row["audio"]) for row in project.rows[::3][:8]])
    parts, = heard_of(model, [wave], 1.0)
    assert len(parts) > 4
    asr, sqa = (project.rows[k] for k in (0, 2))
    joined, = answer_rows(model, tokenizer, [asr], [parts], max_new_tokens=9)
    alone = [answer_rows(model, tokenizer, [asr], [[part]], max_new_tokens=9)[0].text for part in parts]
    assert joined.text == data.join(alone)
    whole, = answer_rows(model, tokenizer, [sqa], [parts], max_new_tokens=9)
    assert whole == answer_rows(model, tokenizer, [sqa], [[torch.cat(parts)]], max_new_tokens=9)[0]
    seen = []
    read, model.read = model.read, lambda ids, sizes, heard: seen.append(heard) or read(ids, sizes, heard=heard)
    answer_rows(model, tokenizer, [sqa, asr], [parts, parts], max_new_tokens=2)
    del model.read
    assert {n for _, counts in seen for n in counts} == {len(part) for part in parts} | {sum(map(len, parts))}
    long = [parts[0].repeat(200, 1)]
    short, error = answer_rows(model, tokenizer, [asr, sqa], [parts, long], max_new_tokens=9)
    assert short == joined and isinstance(error, AudioError)
    assert re.search(r"s of audio and the instruction take \d+ of the LLM's \d+ positions, .* ask about a shorter part", str(error))


def test_streamed_text_is_the_answer(project, trained):
    model, tokenizer, _ = trained
    wave = torch.cat([load_audio(row["audio"]) for row in project.rows[::3][:5]])
    parts, = heard_of(model, [wave], 1.0)
    for row in project.rows[:3]:
        pieces = []
        answer, = answer_rows(model, tokenizer, [row], [parts], on_text=pieces.append, max_new_tokens=9)
        assert "".join(pieces).strip() == answer.text and len(pieces) >= min(3, len(answer.text.split()))


def test_streaming_over_a_loop_loses_no_window(project, trained, monkeypatch):
    model, tokenizer, _ = trained
    said, spoken = iter([tokenizer.encode("one two " * 12).ids, tokenizer.encode("three four").ids]), []

    def generate(ids, sizes, on_token=None, **options):
        answer = next(said)
        for token in answer if on_token else []:
            on_token(0, token)
        return [answer[:len(answer) - looped(answer)]]

    monkeypatch.setattr(model, "generate", generate)
    parts, = heard_of(model, [load_audio(project.rows[0]["audio"])])
    answer, = answer_rows(model, tokenizer, project.rows[:1], [parts + parts], on_text=spoken.append, batch_size=1)
    assert answer.text.endswith("three four") and "".join(spoken).splitlines()[-1].endswith(answer.text)
    assert len("".join(spoken).splitlines()) == 2


def test_loops_are_caught():
    assert looped([1, 2, 3] * 8) == 21 and looped([9] + [1, 2, 3] * 8) == 21 and looped([5] * 24) == 23
    assert looped([1, 2, 3] * 7) == 0 and looped(list(range(100))) == 0 and looped([5] * 23) == 0
    assert looped(list(range(32)) * 4) == 96 and looped(list(range(33)) * 4) == 0
    assert looped([7, 1, 2] + [3, 1, 2] * 11) == 32  # as far back as it goes: one turn is left


def test_a_looping_answer_ends(project, trained):
    model, tokenizer, _ = trained
    row, parts = project.rows[0], heard_of(model, [load_audio(project.rows[0]["audio"])])[0]
    logits, model.llm.logits = model.llm.logits, lambda hidden: torch.eye(len(tokenizer.get_vocab()))[[70]].expand(
        *hidden.shape[:-1], -1)
    try:
        for beams in (1, 3):
            answer, = answer_rows(model, tokenizer, [row], [parts], num_beams=beams)
            assert answer.text == tokenizer.decode([70])
    finally:
        model.llm.logits = logits


# ------------------------------------------------------------------------------------------------------------ refusals


def log_p(model, tokenizer, ids, features, lengths, text):
    """log p of a text and the end token by one plain forward pass."""
    answer = tokenizer.encode(text).ids + [0]
    row = torch.tensor(ids + answer)
    targets = torch.arange(len(ids), len(row))
    return -model(features, lengths, row, [len(row)], targets)[0].item()


def test_margins_by_hand(project, trained):
    model, tokenizer, _ = trained
    row = {**project.rows[2], "target_language": "en"}
    features, lengths = fbank(windows(load_audio(row["audio"])))
    parts, = listen(model, [[features]])
    answer, = answer_rows(model, tokenizer, [row], [parts], weigh=True, max_new_tokens=9)
    ids, _ = data.render({**row, "text": None}, len(parts[0]), tokenizer, 0)
    with torch.no_grad():
        scores = {text: log_p(model, tokenizer, ids, features, lengths, text) for text in (answer.other, *REFUSALS.values())}
    assert answer.margin == pytest.approx(scores["Not answerable."] - scores[answer.other], abs=1e-3)
    plain, = answer_rows(model, tokenizer, [row], [parts], max_new_tokens=9)
    assert plain == Answer(answer.text, cut=answer.cut) and answer.other == answer.text
    for language, refusal in ((None, max(REFUSALS.values(), key=scores.get)), ("it", REFUSALS["it"])):
        row["target_language"] = language
        assert answer_rows(model, tokenizer, [{**row, "instruction": "Which?"}], [parts], refuse_above=-1e9)[0].text in (
            REFUSALS.values() if language is None else [refusal])
    row["target_language"] = "en"
    assert answer_rows(model, tokenizer, [row], [parts], refuse_above=1e9, max_new_tokens=9)[0].text == answer.other


def test_a_refusing_model_still_has_another_answer(project, trained, monkeypatch):
    model, tokenizer, _ = trained
    row, parts = project.rows[2], heard_of(model, [load_audio(project.rows[2]["audio"])])[0]
    refusal = tokenizer.encode(REFUSALS["en"]).ids
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **options: [refusal] if not options.get("never_first") else
                        generate(*args, **options), raising=False)
    answer, = answer_rows(model, tokenizer, [row], [parts], weigh=True, max_new_tokens=9)
    assert answer.text == REFUSALS["en"] != answer.other and not answer.other.startswith(tokenizer.decode(refusal[:1]))
    assert answer_rows(model, tokenizer, [row], [parts], refuse_above=1e9, max_new_tokens=9)[0].text == answer.other


def test_the_threshold_refuses_as_much_as_an_eighth_of_the_answerable_questions_allows():
    margins, rows, answers = [-9, 0.5, -8, -7, -6, -5, 2, -4, -3, -2, -1, 0, 1, 3, -9, -9], [], []
    for margin in margins:
        rows.append({"target_language": "en", "text": "a"})
        answers.append(Answer("", margin, "a"))
    for margin in (-5, 1.5, 4):
        rows.append({"target_language": "de", "text": REFUSALS["de"]})
        answers.append(Answer("", margin, "b"))
    settled = eval.refusal_threshold(rows, [*answers, AudioError("gone")])["refuse_above"]
    assert settled == 1 and sum(margin > settled for margin in margins) == 2  # 2 of 16 refused, and 1.5 and 4 with them
    assert eval.refusal_threshold(rows[:7], answers[:7]) == {} == eval.refusal_threshold([], [])  # none to be refused
    assert eval.refusal_threshold(rows[-3:], answers[-3:]) == {}  # none to be answered
    few = eval.refusal_threshold(rows[:3] + rows[-1:], answers[:3] + answers[-1:])["refuse_above"]
    assert few == 0.5  # of three answerable ones none may be lost


# -------------------------------------------------------------------------------------------------------------- scores


def item(task, language, reference, hypothesis, **more):
    return {"task": task, "target_language": language, "reference": reference, "hypothesis": hypothesis, "corpus": "c",
            "speaker": "s", "scores": eval.item_scores(task, language, reference, hypothesis)} | more


def test_wer_and_cer_are_jiwers_after_whispers_normalisers():
    pairs = [("Mr. Smith's colour is grey.", "mister smith's color is gray"), ("One, two three", "one three four"),
             ("Hmm.", "a"), ("five", "")]
    items = [item("asr", "en", *pair) for pair in pairs]
    assert items[0]["scores"]["error"] == 0 and items[1]["scores"]["error"] > 0.3
    scores, _ = eval.corpus_scores(items)
    texts = [[eval.normalise(text, "en") for text in column] for column in zip(*pairs)]
    assert scores["WER"][0] == pytest.approx(jiwer.wer(*texts)) and scores["CER"][0] == pytest.approx(jiwer.cer(*texts))
    assert scores["WER"][1] <= scores["WER"][0] <= scores["WER"][2]
    assert item("asr", "de", "Der Hund, ja.", "der hund JA")["scores"]["error"] == 0
    assert item("asr", "de", "colour", "color")["scores"]["word_errors"] == 1
    assert item("asr", "zh", "你好世界", "你好世")["scores"]["word_errors"] == 1  # characters are words
    half = item("asr", "zh", "你好世界", "你好市界")["scores"]
    assert (half["character_errors"], half["characters"], half["words"]) == (1, 4, 4)


def test_bleu_and_chrf_are_sacrebleus():
    for language, tokenize, pairs in (
            ("de", "13a", [("Der gelbe Vogel schläft im Garten.", "Der gelbe Vogel schläft heute im Garten."),
                           ("Das ist ein sehr guter Tag.", "Das ist ein sehr guter Tag.")] * 3),
            ("zh", "zh", [("黄色的鸟每天在花园里睡觉。", "黄鸟每天在花园里睡觉。"), ("今天天气很好。", "今天天气很好。")] * 3)):
        scores, signatures = eval.corpus_scores([item("st", language, *pair) for pair in pairs])
        references, hypotheses = zip(*pairs)
        assert scores["BLEU"][0] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references], tokenize=tokenize).score)
        assert scores["chrF2"][0] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score)
        assert scores["BLEU"][1] < scores["BLEU"][0] < scores["BLEU"][2] and f"tok:{tokenize}" in signatures[f"BLEU {language}"]


def test_questions_are_scored_with_their_refusals():
    no = REFUSALS["de"]
    items = [item("sqa", "de", *pair) for pair in [("Der Hund.", "der Hund"), ("Im Garten", "im grünen Garten"), ("rot", no),
                                                   (no, no), (no, "blau"), (no, REFUSALS["en"])]]
    assert [i["scores"]["error"] for i in items] == [0, pytest.approx(0.6), 1, 0, 1, 0]
    for language in REFUSALS:  # a refusal in any language is one
        assert all(eval.item_scores("sqa", language, "x", refusal)["refused"] for refusal in REFUSALS.values())
    scores = {name: value[0] for name, value in eval.corpus_scores(items)[0].items()}
    assert scores == pytest.approx({"exact match": 1 / 3, "F1": (1 + 0.8 + 0) / 3, "refusal precision": 2 / 3,
                                    "refusal recall": 2 / 3, "false refusals": 1 / 3})


def test_groups_of_the_summary():
    items = [item("asr", "en", "a b", "a b" if i % 2 else "a", speaker=f"s{i % 3 if i < 9 else 0}", corpus="cd"[i % 2])
             for i in range(20)] + [item("st", "de", "ja", "ja")]
    table, _ = eval.summarise(items, least=10)
    found = {(line["task"], line["group"]): line["items"] for line in table}
    assert found == {("asr", "all"): 20, ("asr", "corpus c"): 10, ("asr", "corpus d"): 10, ("asr", "speaker s0"): 14,
                     ("asr", "other speakers"): 6, ("st", "all"): 1}
    wer = {line["group"]: line["scores"]["WER"][0] for line in table if line["task"] == "asr"}
    assert wer["all"] == 0.25 and wer["corpus c"] == 0.5 and wer["corpus d"] == 0


def test_bootstrap_interval_of_a_rate():
    random = np.random.default_rng(0)
    items = [item("sqa", "en", "a", "a" if random.random() < 0.7 else "b") for _ in range(400)]
    value, low, high = eval.corpus_scores(items)[0]["exact match"]
    half = 1.96 * math.sqrt(value * (1 - value) / 400)  # of a binomial share
    assert low == pytest.approx(value - half, abs=0.01) and high == pytest.approx(value + half, abs=0.01)


# ------------------------------------------------------------------------------------------------------------ programs


def run(program, *argv, code=0, capsys=None):
    found, message = 0, ""
    try:
        program.main([str(word) for word in argv])
    except SystemExit as stop:
        message = stop.code if isinstance(stop.code, str) else ""
        found = 1 if message else stop.code or 0
    said = capsys.readouterr()
    assert found == code, (found, message, said)
    return said.out, message or said.err


def test_evaluating_a_manifest(project, tmp_path, capsys, monkeypatch):
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in project.rows[:30]) + json.dumps(
        {**project.rows[0], "audio": "none.wav"}) + "\n")
    argv = [tmp_path / "m.jsonl", "--ckpt", project.path / "ift.pt", "--out", tmp_path / "e", "--trust-paths"]
    out, err = run(eval, *argv, capsys=capsys)
    assert "asr en, all, 10: WER " in out and "st de, all, 10: BLEU " in out and "refusal recall " in out
    assert "left out: " in err and "m.jsonl' line 31: " in err
    path = tmp_path / "e" / "m-ift.jsonl"
    items = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(int(i["id"]) for i in items) == list(range(1, 31))
    for i in items:
        row = project.rows[int(i["id"]) - 1]
        assert (i["reference"], i["task"], i["audio"]) == (row["text"], row["task"], row["audio"])
        assert i["scores"] == eval.item_scores(row["task"], i["target_language"], row["text"], i["hypothesis"])
        assert i["seconds"] == pytest.approx(row["duration"], abs=1e-3) and i["instruction"] == instruction_of(
            {"source_language": "en", "target_language": "en", **row})
    summary = json.loads(path.with_suffix(".json").read_text())
    wer = next(line for line in summary["scores"] if line["task"] == "asr" and line["group"] == "all")["scores"]["WER"][0]
    texts = [(i["reference"], i["hypothesis"]) for i in items if i["task"] == "asr"]
    assert wer == pytest.approx(jiwer.wer(*([eval.normalise(t, "en") for t in column] for column in zip(*texts))), abs=1e-4)
    page = path.with_suffix(".html").read_text()
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    errors = [i["scores"]["error"] for i in shown["items"]]
    assert errors == sorted(errors, reverse=True) and len(errors) == 30 and len(shown["audio"]) == 10
    # stopped in the middle of a line: what is there stays, only the rest is answered
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:12]) + lines[12][:20])
    asked = []
    monkeypatch.setattr(eval, "answer_rows", lambda model, tokenizer, rows, *a, **o: asked.extend(rows) or answer_rows(
        model, tokenizer, rows, *a, **o))
    out, _ = run(eval, *argv, capsys=capsys)
    assert "12 answers are there already" in out and len(asked) == 18
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(again, key=lambda i: int(i["id"])) == sorted(items, key=lambda i: int(i["id"]))
    # a recording that is gone since has no player
    (tmp_path / "gone.jsonl").write_text(json.dumps({**project.rows[0], "audio": "here.wav"}) + "\n")
    soundfile.write(tmp_path / "here.wav", load_audio(project.rows[0]["audio"]).numpy(), 16000)
    gone = [tmp_path / "gone.jsonl", *argv[1:]]
    run(eval, *gone, capsys=capsys)
    (tmp_path / "here.wav").unlink()
    run(eval, *gone, capsys=capsys)
    page = (tmp_path / "e" / "gone-ift.html").read_text()
    assert json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["audio"] == {}
    # another setting is another run, and what was there is kept
    kept = path.read_text()
    out, _ = run(eval, *argv, "--beams", "2", "--tasks", "asr", capsys=capsys)
    assert "held answers of other settings" in out and path.with_suffix(".old.jsonl").read_text() == kept
    out, _ = run(eval, *argv[:2], project.path / "align.pt", *argv[3:], "--tasks", "asr", capsys=capsys)
    assert "there already" not in out and (tmp_path / "e" / "m-align.html").exists() and "st de" not in out


def test_what_eval_refuses(project, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no out/align.pt or out/ift.pt; run python train.py" in run(eval, project.path / "all.jsonl", capsys=capsys, code=1)[1]
    for argv in ([], ["m.jsonl", "--xml", "a.xml"], ["--xml", "a.xml"], ["--xml", "a.xml", "--audio", "d"], ["m.jsonl", "--tasks", "tts"]):
        run(eval, *argv, code=2, capsys=capsys)
    ckpt = ["--ckpt", project.path / "ift.pt"]
    assert "none.jsonl: No such file" in run(eval, "none.jsonl", *ckpt, code=1, capsys=capsys)[1]
    assert "no row of the tasks sqa" in run(eval, project.tones / "dev.jsonl", *ckpt, "--tasks", "sqa", code=1, capsys=capsys)[1]
    (tmp_path / "gone.jsonl").write_text(json.dumps({**project.rows[0], "audio": "none.wav"}) + "\n")
    assert "none of its 1 rows could be answered" in run(eval, "gone.jsonl", *ckpt, code=1, capsys=capsys)[1]


SOURCE = """<?xml version='1.0' encoding='utf-8'?>
<testset name="IWSLT2025"><task track="short" text_lang="de">
<sample id="7"><audio_path>a.wav</audio_path><instruction>Übersetze den englischem Inhalt nach Deutsch.</instruction></sample>
<sample id="3"><audio_path>a.wav</audio_path><instruction>Beantworte die folgende Frage: Wer?</instruction></sample>
<sample id="9"><audio_path>gone.wav</audio_path><instruction>Beantworte die folgende Frage: Was?</instruction></sample>
<sample id="1"><audio_path>gone.wav</audio_path><instruction>Übersetze den englischem Inhalt nach Deutsch.</instruction></sample>
</task></testset>"""
REFERENCE = """<testset name="x"><task track="short" text_lang="de">
<sample id="7,1" iid="t" task="TRANS"><reference>{0}</reference><metadata><transcript>x</transcript></metadata></sample>
<sample id="3" iid="q" task="QA" qa_type="A"><reference>{1}</reference></sample>
<sample id="9" iid="r" task="QA" qa_type="NA"><reference>Nicht zu beantworten.</reference></sample></task></testset>"""


def test_official_files(project, tmp_path, capsys, monkeypatch):
    soundfile.write(tmp_path / "a.wav", load_audio(project.rows[0]["audio"]).numpy(), 16000)
    (tmp_path / "src.xml").write_text(SOURCE, encoding="utf-8")
    argv = ["--xml", tmp_path / "src.xml", "--audio", tmp_path, "--out", tmp_path / "hyp.xml", "--ckpt", project.path / "ift.pt"]
    hostile = ["\x00a\x1b[31m]]> <b>&amp; \ufffe", "\x01"]
    monkeypatch.setattr(eval, "answer_rows", lambda model, tokenizer, rows, *a, **o: [
        Answer(hostile[row["task"] == "sqa"]) for row in rows])
    out, err = run(eval, *argv, code=1, capsys=capsys)
    assert "4 answers, 2 of them for recordings that could not be heard" in out
    assert err.count("gone.wav") >= 2 and "left out: short de 9" in err
    answers = mcif.read_answers(tmp_path / "hyp.xml")["short", "de"]
    assert answers == {"7": "a[31m]]> <b>&amp;", "3": "Nicht zu beantworten.", "9": "Nicht zu beantworten.", "1": ""}
    assert re.findall('id="(.)"', (tmp_path / "hyp.xml").read_text()) == ["7", "3", "9", "1"]
    (tmp_path / "ref.xml").write_text(REFERENCE.format("a[31m]]&gt; &lt;b&gt;&amp;amp;", "der Hund"), encoding="utf-8")
    mcif_scores.main([str(tmp_path / "hyp.xml"), str(tmp_path / "ref.xml")])
    out = capsys.readouterr().out
    assert "short, st de, 1: BLEU " in out and "chrF2 100 " in out and "exact match 0 " in out and "refusal recall 1 " in out
    (tmp_path / "ref.xml").write_text(REFERENCE.replace("7,1", "7,99"), encoding="utf-8")
    with pytest.raises(SystemExit, match="hyp.xml: no answer to '99' and 0 more of track short, language de"):
        mcif_scores.main([str(tmp_path / "hyp.xml"), str(tmp_path / "ref.xml")])


def test_an_official_file_goes_on_where_it_stopped(project, tmp_path, capsys, monkeypatch):
    soundfile.write(tmp_path / "a.wav", load_audio(project.rows[0]["audio"]).numpy(), 16000)
    soundfile.write(tmp_path / "gone.wav", load_audio(project.rows[3]["audio"]).numpy(), 16000)
    (tmp_path / "src.xml").write_text(SOURCE, encoding="utf-8")
    argv = ["--xml", tmp_path / "src.xml", "--audio", tmp_path, "--out", tmp_path / "hyp.xml", "--ckpt", project.path / "ift.pt"]
    monkeypatch.setattr(eval, "GROUP_ROWS", 2)
    calls = []

    def stop_at_second(model, tokenizer, rows, *args, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(rows)
        return answer_rows(model, tokenizer, rows, *args, **options)

    monkeypatch.setattr(eval, "answer_rows", stop_at_second)
    assert "stopped; start again" in run(eval, *argv, code=130, capsys=capsys)[1] and not (tmp_path / "hyp.xml").exists()
    monkeypatch.setattr(eval, "answer_rows", answer_rows)
    out, _ = run(eval, *argv, capsys=capsys)
    assert "2 answers are there already" in out and "4 answers, 0 of them" in out
    torch.save(torch.load(project.path / "ift.pt", weights_only=True) | {"config": {"prompt": "tokens", "phase": "ift"}},
               tmp_path / "tokens.pt")
    assert "knows <|language|><|task|> prompts only" in run(eval, *argv[:-1], tmp_path / "tokens.pt", code=1, capsys=capsys)[1]
    assert set(mcif.read_answers(tmp_path / "hyp.xml")["short", "de"]) == {"7", "3", "9", "1"}


@pytest.mark.parametrize("said, lines, language, pieces", [
    (["a b c d"], ["a b", "c d"], "de", ["a b", "c d"]), (["a x b", "c d"], ["a b", "c d"], "de", ["a x b", "c d"]),
    (["c d"], ["a b", "c d"], "de", ["", "c d"]), (["a b"], ["a b", "c d"], "de", ["a b", ""]), ([""], ["a", "b"], "de", ["", ""]),
    (["你好世界"], ["你好", "世界"], "zh", ["你好", "世界"]), (["one two three"], ["uno two"], "de", ["one two three"]),
    (["我们用 machine learning 来训练", "GPT 4 模型。"], ["我们用 machine learning", "来训练 GPT 4 模型。"], "zh",
     ["我们用 machine learning", "来训练 GPT 4 模型。"])])
def test_resegmentation_by_least_edit_distance(said, lines, language, pieces):
    assert mcif_scores.resegment(said, lines) == pieces
    assert eval.item_scores("st", language, lines[-1], pieces[-1])["error"] <= 1


def test_asking_about_recordings(project, tmp_path, capsys, monkeypatch):
    first, second = (row["audio"] for row in (project.rows[0], project.rows[3]))
    ckpt = ["--ckpt", project.path / "ift.pt"]
    out, err = run(sample, first, "Transcribe.", *ckpt, capsys=capsys)
    text = out.strip()
    assert out.count("\n") == 1 and not err
    out, _ = run(sample, first, second, "Transcribe.", "--json", *ckpt, capsys=capsys)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["audio"] for line in lines] == [first, second] and lines[0]["text"] == text and lines[0]["task"] == "asr"
    out, _ = run(sample, first, second, "Transcribe.", *ckpt, capsys=capsys)
    assert out.splitlines()[0] == f"{first}: {text}" and out.splitlines()[1] == f"{second}: {lines[1]['text']}"
    assert run(sample, first, "Transcribe.", "--beams", "3", *ckpt, capsys=capsys)[0]
    drawn = {run(sample, first, "Transcribe.", "--temperature", "2", "--seed", s, *ckpt, capsys=capsys)[0] for s in (1, 1, 2, 3)}
    assert len(drawn) == 3
    heard = []
    monkeypatch.setattr(sample, "listen", lambda *a: heard.append(1) or listen(*a))
    monkeypatch.setattr("sys.stdin", io.StringIO("Transcribe.\nTranslate to German\n\n"))
    out, _ = run(sample, first, *ckpt, capsys=capsys)
    assert out.splitlines()[0] == text and len(out.splitlines()) >= 2 and len(heard) == 1


def test_what_sample_refuses_and_remarks(project, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wav = project.rows[0]["audio"]
    assert "no out/align.pt or out/ift.pt; run python train.py" in run(sample, wav, "Transcribe.", code=1, capsys=capsys)[1]
    assert not run(sample, wav, "很" * 100, "--ckpt", project.path / "ift.pt", capsys=capsys)[1].startswith("Trace")
    assert "instruction is empty" in run(sample, wav, " ", code=2, capsys=capsys)[1]
    for argv in (["--beams", "0"], ["--temperature", "-1"], ["--top-p", "0"], ["--beams", "2", "--temperature", "1"]):
        assert "--beams is at least 1" in run(sample, wav, "Transcribe.", *argv, code=2, capsys=capsys)[1]
    assert "'none.wav': No such file" in run(sample, "none.wav", "Transcribe.", code=1, capsys=capsys)[1]
    assert "'none.wav': No such file" in run(sample, wav, "none.wav", code=1, capsys=capsys)[1]
    align = ["--ckpt", project.path / "align.pt"]
    assert "trained on transcribing only (phase align); trying" in run(sample, wav, "Translate to German", *align, capsys=capsys)[1]
    assert not run(sample, wav, "Transcribe.", *align, capsys=capsys)[1]
    assert "no word of 'Xyzzy' is known in en, de, it, zh" in run(sample, wav, "Xyzzy", *align, capsys=capsys)[1]
