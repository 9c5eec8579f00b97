"""data.py: what training does to recordings and instructions, and recordings without speech."""

import json
import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import soundfile
import torch

import data
from data import SPEECHLESS_CLIPS, Examples, Manifest
from model import AdapterConfig, load_tokenizer

RATE = 16000


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def seeded(seed=0):
    return np.random.default_rng(seed)


def decibels(wave):
    return 10 * math.log10(wave.double().square().mean())


def speech(size=24000):
    """Something that is loud here and faint there."""
    return data.noise(size, 1, seeded(9)) * (torch.arange(size) / 900).sin() * 0.1


def write_manifest(folder, waves, *rows):
    """A manifest of these waves, one a row, with more fields for each."""
    lines = []
    for i, (wave, row) in enumerate(zip(waves, rows or [{}] * len(waves), strict=True)):
        soundfile.write(folder / f"{i}.wav", wave.numpy(), RATE, subtype="FLOAT")
        given = {"audio": f"{i}.wav", "duration": len(wave) / RATE, "text": f"text {i}"}
        lines.append(json.dumps({"task": "asr"} | given | row))
    (folder / "m.jsonl").write_text("\n".join(lines))
    return Manifest(folder / "m.jsonl")


# ------------------------------------------------------------------------------
# Single changes


@pytest.mark.parametrize("exponent", [0, 1, 1.5, 2])
def test_the_colour_of_noise(exponent):
    wave = data.noise(400001, exponent, seeded())
    assert len(wave) == 400001 and decibels(wave) == pytest.approx(0, abs=0.01)
    power = torch.fft.rfft(wave.double()).abs().square()
    hertz = torch.fft.rfftfreq(len(wave), 1 / RATE)
    octaves = [power[(hertz > f) & (hertz < 2 * f)].mean().log2() for f in (100, 200, 800, 3200)]
    slopes = [(octaves[-1] - octaves[0]) / 5, (octaves[2] - octaves[1]) / 2]
    assert slopes == [pytest.approx(-exponent, abs=0.1)] * 2
    low, lower = (power[(hertz > f) & (hertz < 2 * f)].mean() for f in (20, 5))
    assert low / lower == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("wanted", [-5.0, 0.0, 10.0, 30.0])
def test_noise_is_mixed_in_at_a_ratio(wanted):
    wave, noise = speech(), 7 * data.noise(24000, 2, seeded(3))
    mixed = data.mix(wave, noise, wanted)
    assert decibels(wave) - decibels(mixed - wave) == pytest.approx(wanted, abs=0.1)
    silence = torch.zeros(24000)
    assert torch.equal(data.mix(wave, silence, wanted), wave)
    assert torch.equal(data.mix(silence, noise, wanted), silence)


def test_babble_is_three_recordings_over_and_over(tmp_path):
    impulse = torch.zeros(9000)
    impulse[100] = 0.5
    manifest = write_manifest(tmp_path, [impulse])
    heard_at = set()
    for seed in range(9):
        noise = data.babble(18000, manifest, seeded(seed))
        assert len(noise) == 18000 and torch.equal(noise[:9000], noise[9000:])
        assert noise[:9000].sum() == 1.5 and torch.equal(
            noise, data.babble(18000, manifest, seeded(seed))
        )
        heard_at.add(int(noise.argmax()))
    assert len(heard_at) == 9
    (tmp_path / "0.wav").write_text("no audio")
    assert torch.equal(data.babble(5, manifest, seeded()), torch.zeros(5))


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8])
def test_a_room_decays_by_60_db(seconds):
    impulse = torch.zeros(20000)
    impulse[0] = 1
    slopes = []
    for seed in range(5):
        response = data.reverberate(impulse, seconds, seeded(seed)).double()
        assert response.square().sum() == pytest.approx(1, abs=1e-4)
        assert response[0] == response.abs().max() == pytest.approx(math.sqrt(0.5), abs=1e-3)
        # Schroeder's integral from -5 to -25 dB of what is behind the direct path.
        energy = response[1:].flip(0).square().cumsum(0).flip(0)
        level = 10 * (energy / energy[0]).log10()
        inside = ((level < -5) & (level > -25)).nonzero()[:, 0].numpy()
        slopes.append(np.polyfit(inside / RATE, level[inside].numpy(), 1)[0])
    assert -60 / np.mean(slopes) == pytest.approx(seconds, rel=0.05)


def test_a_room_is_a_convolution_without_delay():
    wave, impulse = speech(5001), torch.zeros(5001)
    impulse[0] = 1
    response = data.reverberate(impulse, 0.3, seeded(4)).numpy()
    expected = np.convolve(wave.numpy(), response)[:5001]
    assert np.allclose(data.reverberate(wave, 0.3, seeded(4)), expected, atol=1e-5)
    assert not np.allclose(data.reverberate(wave, 0.3, seeded(5)), expected, atol=1e-2)


@pytest.mark.parametrize("size", [16000, 16001, 48000])
def test_the_band_of_a_telephone(size):
    time, gains = torch.arange(size).double() / RATE, []
    for hertz in (100, 240, 300, 360, 1000, 3340, 3400, 3460, 6000):
        wave = (2 * math.pi * hertz * time).sin()
        out = data.telephone(wave)
        assert out.shape == wave.shape
        inner = slice(4000, -4000)
        gains.append(10 ** ((decibels(out[inner]) - decibels(wave[inner])) / 20))
    assert gains == pytest.approx([0, 0, 0.5, 1, 1, 1, 0.5, 0, 0], abs=0.02)


# ------------------------------------------------------------------------------
# What is drawn of them


@pytest.fixture
def recordings(tmp_path):
    return write_manifest(tmp_path, [speech(9000 + 500 * i) for i in range(4)])


def test_a_changed_recording_follows_from_its_seed(recordings):
    wave = speech()
    waves = [data.augment(wave, seeded(seed), recordings) for seed in range(60)]
    for seed, changed in enumerate(waves):
        assert changed.dtype == torch.float32 and changed.isfinite().all()
        assert changed.abs().max() <= 1 and 0.9 < len(changed) / len(wave) < 1.12
        assert torch.equal(changed, data.augment(wave, seeded(seed), recordings))
    assert len({changed.sum().item() for changed in waves}) == 60
    lengths = {len(changed) for changed in waves}
    assert lengths == {math.ceil(24000 * 20 / n) for n in (18, 19, 20, 21, 22)}
    silence = data.augment(torch.zeros(9000), seeded(1), recordings)
    assert not silence.any()


def test_how_often_each_change_is_drawn(recordings, monkeypatch):
    counts, wave = Counter(), speech(2000)

    def count(name, change, *args):
        counts[name] += 1
        return change(*args)

    for name in ("resample", "reverberate", "babble", "telephone"):
        monkeypatch.setattr(data, name, partial(count, name, getattr(data, name)))
    peaks = []
    for seed in range(1000):
        peaks.append(data.augment(wave, seeded(seed), recordings).abs().max().item())
    shares = [counts[name] / 1000 for name in ("resample", "reverberate", "babble", "telephone")]
    assert shares == pytest.approx([0.3, 0.3, 0.2, 0.1], abs=0.05)
    peaks = 20 * np.log10(peaks)
    assert peaks.min() == pytest.approx(-30, abs=0.5) and np.median(peaks) < -10
    assert np.mean(peaks == 0) == pytest.approx(6 / 36, abs=0.05)  # clipped


def test_no_recording_gets_longer_than_30_s(recordings, monkeypatch):
    monkeypatch.setattr(data, "reverberate", lambda wave, *rest: wave)
    lengths = set()
    for seconds in (26, 28, 30):
        wave = torch.ones(seconds * RATE)
        lengths |= {len(data.augment(wave, seeded(seed), recordings)) for seed in range(50)}
    assert 29 * RATE < max(lengths) <= 30 * RATE and min(lengths) < 25 * RATE


# ------------------------------------------------------------------------------
# Recordings in which nobody speaks


def test_speechless_recordings():
    kinds, levels = Counter(), []
    for path, number, seconds in SPEECHLESS_CLIPS:
        wave = data.load_clip((path, number, seconds))
        assert torch.equal(wave, data.load_clip((path, number, seconds)))
        assert len(wave) == round(seconds * RATE) and wave.dtype == torch.float32
        periodic = torch.equal(wave[320:], wave[:-320])
        kinds["silence" if not wave.any() else "hum" if periodic else "noise"] += 1
        if wave.any():
            levels.append(decibels(wave))
        assert data.fbank([wave])[0].isfinite().all()
    assert kinds == {"silence": 24, "hum": 24, "noise": 48}
    assert -81 < min(levels) < -60 and -40 < max(levels) < -19
    assert {seconds for *_, seconds in SPEECHLESS_CLIPS} == {1 + k / 8 for k in range(32)}
    assert len(data.load_clip(("", 3, 0.1))) == RATE // 2


def rows_of_tasks():
    """A row of each task, and a question in a language without a refusal."""
    question = {"task": "sqa", "question": "Where?", "target_language": "de"}
    other = question | {"source_language": "fr", "target_language": "fr", "instruction": "Où ?"}
    return {}, {"task": "st", "target_language": "it"}, question, other


def make_examples(manifest, tiny_project, **options):
    tokenizer = load_tokenizer(tiny_project / "llm")
    prompt = data.make_prompt(tokenizer, [0])
    return Examples([manifest], tokenizer, prompt, AdapterConfig(), **options)


def test_what_is_right_where_nobody_speaks(tiny_project, tmp_path):
    manifest = write_manifest(tmp_path, [speech()] * 4, *rows_of_tasks())
    plain = make_examples(manifest, tiny_project)
    examples = make_examples(manifest, tiny_project, shares=(0, 1))
    drawn = [examples.example(0, i, 2) for i in range(4)]
    texts = [example["text"] for example in drawn]
    assert texts == ["", "", "Nicht zu beantworten.", "text 3"]
    assert drawn[3] == plain.example(0, 3, 2)
    batch = examples[{}, [(0, i, 2) for i in range(4)]]
    frames = batch["features"].split(batch["lengths"])
    for i, example in enumerate(drawn[:3]):
        clip = example["audio"], example["start"], example["duration"]
        assert clip[0] == "" and 1 <= clip[2] < 5 and batch["examples"][i] == example
        assert torch.equal(frames[i], data.fbank([data.load_clip(clip)])[0])
        assert example["instruction"] == plain.example(0, i, 2)["instruction"]
        assert examples.size(0, i, 2) == (batch["lengths"][i], batch["ids_lengths"][i])
    # Of an empty answer, its end alone is to be learned.
    _, size, _ = examples.sequence(drawn[0], frames[0])
    ids = data.render(drawn[0], 3, examples.tokenizer, examples.prompt)[0]
    assert size == 1 and ids[-1] == 0


def test_the_encoder_is_asked_for_the_same_clips(tiny_project, tmp_path):
    manifest, clips = write_manifest(tmp_path, [speech()]), []
    options = {"states": lambda clip: clips.append(clip) or torch.ones(50, 8), "shares": (0, 0.4)}
    examples = make_examples(manifest, tiny_project, **options)
    for turn in range(300):
        examples[{}, [(0, 0, turn)]]
    speechless = [clip for clip in clips if clip in SPEECHLESS_CLIPS]
    assert len(clips) == 300 and len(speechless) / 300 == pytest.approx(0.4, abs=0.08)
    assert len(set(speechless)) > 25
    assert set(clips) - set(speechless) == {manifest.clip(manifest[0])}


# ------------------------------------------------------------------------------
# Examples


def batches_of(examples, workers, turns=6):
    """The batches of these turns of four rows, by so many worker processes."""
    keys = [({}, [(0, i, turn) for i in range(4)]) for turn in range(turns)]
    options = {"batch_size": None, "sampler": keys, "num_workers": workers}
    return list(torch.utils.data.DataLoader(examples, **options))


def test_changes_follow_from_the_row_and_its_turn_alone(recordings, tiny_project):
    """Any order and any number of processes gives the same; another row, turn or seed does not."""
    examples = make_examples(recordings, tiny_project, shares=(0.5, 0.1))
    batches = batches_of(examples, 0)
    for workers in (1, 2):
        for one, other in zip(batches, batches_of(examples, workers), strict=True):
            assert torch.equal(one["features"], other["features"])
            assert torch.equal(one["ids"], other["ids"]) and one["examples"] == other["examples"]
    frames = {tuple(x.flatten()[:9].tolist()) for b in batches for x in b["features"].split(20)}
    assert len(frames) > 12
    other = make_examples(recordings, tiny_project, shares=(0.5, 0.1), seed=1)
    assert not torch.equal(batches[0]["features"], batches_of(other, 0, 1)[0]["features"])


def test_the_share_of_changed_recordings(recordings, tiny_project, monkeypatch):
    examples = make_examples(recordings, tiny_project, shares=(0.5, 0))
    clean = [data.fbank([recordings.audio(row)])[0] for row in recordings]
    monkeypatch.setattr(data, "augment", lambda wave, *rest: wave * 0)
    changed = []
    for batch in batches_of(examples, 0, 100):
        for x, expected in zip(batch["features"].split(batch["lengths"]), clean, strict=True):
            changed.append(not x.any())
            assert changed[-1] or torch.equal(x, expected)
    assert np.mean(changed) == pytest.approx(0.5, abs=0.07)
    # A validation hears what was recorded.
    assert torch.equal(examples.frames(0, recordings[1]), clean[1])
    # Nothing is drawn where nothing is asked for.
    plain = make_examples(recordings, tiny_project)
    for batch in batches_of(plain, 0, 20):
        assert torch.equal(batch["features"], torch.cat(clean))


def test_states_lose_spans_of_frames(recordings, tiny_project):
    states = torch.randn(140, 8)
    before = states.clone()
    options = {"states": lambda clip: states, "shares": (1, 0)}
    examples = make_examples(recordings, tiny_project, **options)
    lost, spans = [], Counter()
    for i in range(400):
        x = examples[{}, [(0, 0, i)]]["features"]
        assert torch.equal(x, examples[{}, [(0, 0, i)]]["features"])
        zero = ~x.any(1)
        assert torch.equal(x[~zero], states[~zero])
        lost.append(zero.float().mean().item())
        ends = np.flatnonzero(np.diff(zero.int().numpy(), prepend=0, append=0))
        spans.update((ends[1::2] - ends[::2]).tolist())
    assert 0.06 < np.mean(lost) < 0.09 and min(spans) == 1 and 9 <= max(spans) < 40
    assert all(spans[length] > 20 for length in range(1, 11))
    assert torch.equal(states, before) and torch.equal(examples.frames(0, recordings[0]), states)


def test_instructions_as_people_type_them(tiny_project, tmp_path):
    manifest = write_manifest(tmp_path, [speech()] * 4, *rows_of_tasks())
    plain = make_examples(manifest, tiny_project)
    examples = make_examples(manifest, tiny_project, shares=(0.5, 0))
    kinds, differs = Counter(), 0
    for key in [(0, i, turn) for i in range(3) for turn in range(400)]:
        usual, typed = (x.example(*key)["instruction"] for x in (plain, examples))
        assert examples.example(*key)["instruction"] == typed
        differs += typed != usual
        if typed != usual:
            # What is typed so is understood as what it stands for; the question stays.
            kinds[typed.islower(), typed.isupper(), "  " in typed, typed.startswith("please")] += 1
            assert data.plain(typed) == data.plain(usual)
            assert "where" in typed.lower() or key[1] < 2
    assert differs / 1200 == pytest.approx(0.3 * 0.5, abs=0.04) and len(kinds) >= 5
