"""Makes the folder demo/: a speech corpus, a tiny speech encoder and a tiny LLM, from a grammar.

    python -m demo.make            every stage in turn
    python -m demo.make corpus     speech and manifests; needs the programs espeak-ng and flite
    python -m demo.make clips      the encoder's own training clips, 0.5 GB of intermediate files;
                                   needs festival with festvox-kdlpc16k and festvox-us-slt-hts, and
                                   the Python packages py-nanotts and hibari-tts, too
    python -m demo.make encoder    CTC pretraining on characters
    python -m demo.make llm        pretraining on text: copying, translation, questions
    python -m demo.make report     the figures of demo/README.md

Sentences fall into train, dev and test by a checksum of their English text, so that no stage can
see another split's.
"""

import argparse
import io
import itertools
import json
import math
import multiprocessing
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import sacrebleu
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from data import (
    SAMPLE_RATE,
    Manifest,
    augment,
    fbank,
    instruction_of,
    load_audio,
    read_lines,
)
from demo import grammar
from demo.grammar import LANGUAGES, REFUSALS
from model import (
    LLM,
    EncoderConfig,
    LLMConfig,
    SpeechEncoder,
    default_kernels,
)
from sample import generate

DEMO = Path(__file__).parent
WORK = Path(tempfile.gettempdir()) / "demo_work"  # intermediate files
EN = LANGUAGES.index("en")
# Where the CPU has no instructions for bfloat16, it is far slower than float32.
COMPUTE = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32

# --------------------------------------------------------------------------------------------------
# Speech

ACCENTS = "en-us en-gb en-gb-x-rp en-gb-scotland".split()
VARIANTS = "m1 m2 m3 m4 m7 f1 f2 f3 f4 f5 klatt klatt2 klatt3".split()
ESPEAK = [f"{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS]
FLITE = ["slt", "awb", "kal16", "kal"]
PRETRAINING_VOICES = [  # of the encoder's own clips alone
    "festival-ked_diphone",
    "festival-cmu_us_slt_arctic_hts",
    "pico-en-US",
    "pico-en-GB",
    "hibari-heart",
]
TEST_VOICE = "flite-rms"
CLIPS_PER_FILE = 16  # joined, because every ogg file starts with some kilobytes of tables
COMPRESSION = 0.96  # of Opus: 17 kbit/s
CORPUS = {"train": 116, "dev": 10, "test": 10, "test-rms": 8}  # files
PRETRAINING_FILES = 400


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


# Each engine writes the text as speech at a random speed to a wav file, and returns the factor by
# which the speaker is to be changed afterwards.


def speak_flite(text, name, wav, rng):
    stretch = f"duration_stretch={rng.uniform(0.8, 1.1):.2f}"
    run("flite", "-voice", name, "--setf", stretch, "-t", text, "-o", wav)
    return 1.0 if f"flite-{name}" == TEST_VOICE else rng.uniform(0.82, 1.2)


def speak_festival(text, name, wav, rng):
    stretch = f"(Parameter.set 'Duration_Stretch {rng.uniform(0.8, 1.1):.2f})"
    text_file = Path(wav).with_suffix(".txt")
    text_file.write_text(text)
    run("text2wave", "-eval", f"(voice_{name})", "-eval", stretch, text_file, "-o", wav)
    return rng.uniform(0.8, 1.25)


def speak_pico(text, name, wav, rng):
    import py_nanotts

    speed = rng.uniform(0.9, 1.25)
    pitch = rng.uniform(0.75, 1.15)
    pcm = py_nanotts.NanoTTS().speak(text, name, speed, pitch)
    soundfile.write(wav, np.frombuffer(pcm, np.int16), SAMPLE_RATE)
    return rng.uniform(0.75, 1.2)


def speak_hibari(text, name, wav, rng):
    import hibari

    samples = hibari.Hibari(name, threads=1)(text, speed=rng.uniform(0.85, 1.2))
    soundfile.write(wav, samples, 24000)
    return rng.uniform(0.75, 1.15)


def speak_espeak(text, name, wav, rng):
    speed = str(rng.randint(160, 210))
    pitch = str(rng.randint(25, 75))
    run("espeak-ng", "-v", name, "-s", speed, "-p", pitch, "-w", wav, text)
    return rng.uniform(0.92, 1.08)


ENGINES = {
    "flite": speak_flite,
    "festival": speak_festival,
    "pico": speak_pico,
    "hibari": speak_hibari,
    "espeak": speak_espeak,
}


def speak(text: str, voice: str, rng: random.Random) -> Tensor:
    """The text in a voice ("flite-slt", "espeak-en-us+f3", "festival-ked_diphone", "pico-en-GB") at
    a random speed and pitch: a (N,) wave, 16 kHz, with the silence around it cut to 50 ms."""
    engine, name = voice.split("-", 1)
    with tempfile.TemporaryDirectory() as folder:
        wav = f"{folder}/speech.wav"
        warp = ENGINES[engine](text, name, wav, rng)
        samples, rate = soundfile.read(wav, dtype="float32")
        # Another sample rate in the header shifts pitch and formants: another speaker.
        soundfile.write(wav, samples, round(rate * warp / 400) * 400, subtype="FLOAT")
        wave = load_audio(wav)
    # Silence is what stays below 2 % of the peak.
    loud = (wave.abs() > 0.02 * wave.abs().max()).nonzero()
    margin = SAMPLE_RATE // 20
    wave = wave[max(0, int(loud[0]) - margin) : int(loud[-1]) + margin]
    return 0.6 * wave / wave.abs().max()


def draw_voice(rng, split):
    """Any voice but the test's; half of the encoder's pretraining has voices of its own."""
    if split == "pretraining" and rng.random() < 0.5:
        return rng.choice(PRETRAINING_VOICES)
    if rng.random() < 0.5:
        return f"flite-{rng.choice(FLITE)}"
    return f"espeak-{rng.choice(ESPEAK)}"


def speech_file(job: tuple[str, int]) -> tuple[bytes, list]:
    """One ogg file of a split: its bytes, and for each clip (sentence, voice, start, duration), the
    sentence as grammar.example returns it, times in seconds."""
    split, index = job
    torch.set_num_threads(1)
    rng = random.Random(f"{split} {index}")
    text_split = {"test-rms": "test", "pretraining": "train"}.get(split, split)
    clips = []
    waves = []
    start = 0  # samples
    for _ in range(CLIPS_PER_FILE):
        sentence = grammar.example(rng, text_split)
        voice = TEST_VOICE if split == "test-rms" else draw_voice(rng, split)
        wave = speak(sentence[0][EN], voice, rng)
        clips.append((sentence, voice, start / SAMPLE_RATE, len(wave) / SAMPLE_RATE))
        waves.append(wave.numpy())
        start += len(wave)
    buffer = io.BytesIO()
    options = {"format": "OGG", "compression_level": COMPRESSION}
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, "OPUS", **options) as file:
        for wave in waves:  # libsndfile crashes on minutes in one call
            file.write(wave)
    return buffer.getvalue(), clips


def speech_files(split, count):
    jobs = [(split, index) for index in range(count)]
    with multiprocessing.Pool() as pool:
        yield from enumerate(tqdm(pool.imap(speech_file, jobs), split, count, mininterval=10))


def make_corpus():
    """Writes demo/audio/*.tar, the three manifests and sample.wav."""
    (DEMO / "audio").mkdir(parents=True, exist_ok=True)
    manifests = {"train": [], "dev": [], "test": []}
    # Every split of the audio is one tar; the two of the test share a manifest.
    for split, count in CORPUS.items():
        shard = f"audio/{split}-000.tar"
        rng = random.Random(f"rows {split}")
        with tarfile.open(DEMO / shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index, (audio, clips) in speech_files(split, count):
                member = tarfile.TarInfo(f"{index:04d}.ogg")
                member.size = len(audio)
                tar.addfile(member, io.BytesIO(audio))
                for clip in clips:
                    examples = clip_examples(rng, f"{shard}/{member.name}", *clip)
                    manifests[split.split("-")[0]] += examples
    # The manifests are written once all speech is there.
    for split, examples in manifests.items():
        examples.sort(key=lambda example: example["task"] != "asr")  # stable: asr first
        with open(DEMO / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for example in examples:
                line = json.dumps(example, ensure_ascii=False, separators=(",", ":"))
                file.write(line + "\n")
    first = next(example for example in manifests["dev"] if example["speaker"] == "flite-slt")
    soundfile.write(DEMO / "sample.wav", clip_wave(first), SAMPLE_RATE)


def clip_wave(example: dict) -> Tensor:
    return load_audio(DEMO / example["audio"], example.get("start", 0.0), example["duration"])


def clip_examples(rng, audio, sentence, voice, start, duration) -> list[dict]:
    """A clip's examples: one asr, three st, and two questions in different languages."""
    texts, facts, traps = sentence
    place = {"audio": audio, "duration": round(duration, 4)}
    if start:
        place = {"audio": audio, "start": round(start, 4), "duration": round(duration, 4)}

    def make_example(task, target, text, **question):
        return {
            **place,
            "text": text,
            "task": task,
            "source_language": "en",
            "target_language": target,
            **question,
            "speaker": voice,
            "corpus": "demo",
            "licence": "CC0-1.0",
        }

    examples = []
    for target, text in zip(LANGUAGES, texts, strict=True):
        task = "asr" if target == "en" else "st"
        examples.append(make_example(task, target, text))
    for language in rng.sample(range(len(LANGUAGES)), 2):
        question, answer = draw_question(rng, facts, traps)
        target = LANGUAGES[language]
        examples.append(make_example("sqa", target, answer[language], question=question[language]))
    return examples


def draw_question(rng, facts, traps, unanswerable=0.25):
    """A question and its answer, each in four languages; `unanswerable` is the share of those whose
    answer is a refusal."""
    if rng.random() < unanswerable:
        return rng.choice(traps), REFUSALS
    return rng.choice(facts)


# --------------------------------------------------------------------------------------------------
# Training, for both models


def make_optimizers(model, rate):
    """Muon for the hidden layers' matrices, AdamW for everything else."""
    hidden = []
    other = []
    for name, p in model.named_parameters():
        is_hidden = p.ndim == 2 and "layers" in name and "distance" not in name
        (hidden if is_hidden else other).append(p)
    return (
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    )


def update(model, optimizers, loss, rate):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def learning_rate(i, steps, peak):
    """Linear warm-up over 3 % of the steps, then a cosine to 1 % of the peak."""
    warm_up = min(1, (i + 1) / (0.03 * steps))
    cosine = (1 + math.cos(math.pi * i / steps)) / 2
    return peak * warm_up * (0.01 + 0.99 * cosine)


def save_bfloat16(directory, config, weights):
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: p.bfloat16().contiguous() for name, p in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def word_error_rate(pairs: list[tuple[str, str]]) -> float:
    """Word error rate in percent of (reference, hypothesis) texts."""
    errors = words = 0
    for reference, hypothesis in pairs:
        r, h = reference.split(), hypothesis.split()
        row = list(range(len(h) + 1))
        for i, word in enumerate(r, 1):
            diagonal, row[0] = row[0], i
            for j, guess in enumerate(h, 1):
                cost = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != guess))
                diagonal, row[j] = row[j], cost
        errors += row[-1]
        words += len(r)
    return 100 * errors / words


# --------------------------------------------------------------------------------------------------
# Encoder: CTC on characters. A clip is its wave (N,) of 16-bit samples, and its characters.

CHARACTERS = " abcdefghijklmnopqrstuvwxyz"  # CTC classes 1 to 27; 0 is the blank
ENCODER = EncoderConfig(
    hidden_size=192,
    num_hidden_layers=5,
    num_attention_heads=4,
    intermediate_size=512,
    layerdrop=0.0,
    conformer_conv_dropout=0.1,
    mask_time_prob=0.1,
    mask_time_length=8,
)
ENCODER_STAGES = (  # steps, learning rate, share of clips in noise, rooms and the like
    (3000, 2e-3, 0.0),
    (1500, 1e-3, 0.7),
    (1400, 8e-4, 0.7),
)
ENCODER_BATCH = 24


def plain_letters(text):
    return "".join(c for c in text.lower() if c in CHARACTERS)


def make_pretraining_clips():
    """Writes the encoder's own training clips to the work folder, 50 ogg files in each of its."""
    clips = []
    for index, (audio, spoken) in speech_files("pretraining", PRETRAINING_FILES):
        wave = torch.from_numpy(soundfile.read(io.BytesIO(audio), dtype="int16")[0])
        for sentence, _, start, duration in spoken:
            first = round(start * SAMPLE_RATE)
            clip = wave[first : first + round(duration * SAMPLE_RATE)].clone()
            clips.append((clip, plain_letters(sentence[0][EN])))
        if (index + 1) % 50 == 0:
            torch.save(clips, WORK / f"clips-{index // 50:03d}.pt")
            clips = []


def corpus_clips(split, test_voice=False) -> list[tuple[Tensor, str]]:
    """The clips of a shipped split, those in the test's voice apart from the others."""
    clips = []
    for example in read_lines(DEMO / f"{split}.jsonl"):
        is_wanted = (example["speaker"] == TEST_VOICE) == test_voice
        if example["task"] == "asr" and is_wanted:
            wave = (clip_wave(example) * 32767).short()
            clips.append((wave, plain_letters(example["text"])))
    return clips


def clip_features(waves: list[Tensor]) -> list[Tensor]:
    """A list of (F, 160) of waves (N,) of 16-bit samples."""
    features, lengths = fbank([wave / 32768 for wave in waves])
    return list(features.split(lengths))


def disguise(features: list[Tensor], rng) -> list[Tensor]:
    """Another speaker: stretches a batch of features in time by -15 to 35 % and along its 80 mel
    channels by up to 15 %, adds noise to every clip and zeroes a random band of up to 20 of its
    channels. Takes and returns a list of (F, 160)."""
    # All clips are stretched together, as one picture of 10 ms frames and mel channels.
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)  # (B, F, 160)
    frames = padded.shape[1]
    time_factor = rng.uniform(0.85, 1.35)
    mel_factor = rng.uniform(0.85, 1.15)
    size = (2 * round(frames * time_factor), round(80 * mel_factor))
    x = padded.view(len(padded), 1, -1, 80)  # (B, 1, 10 ms frames, 80)
    x = F.interpolate(x, size, mode="bilinear")[:, 0, :, :80]
    x = F.pad(x, (0, 80 - x.shape[-1]))
    # Noise and the missing band differ from clip to clip.
    for clip in x:
        clip += rng.uniform(0, 0.4) * torch.randn(clip.shape)
        first = rng.randrange(80)
        clip[:, first : first + rng.randrange(21)] = 0
    # Each clip takes its share of the stretched frames, two of them stacked again.
    x = x.reshape(len(x), -1, 160)
    lengths = [len(clip) * x.shape[1] // frames for clip in features]
    return [clip[:length] for clip, length in zip(x, lengths, strict=True)]


@torch.no_grad()
def ctc_word_error_rate(encoder, head, clips) -> float:
    """In percent, of the likeliest class of every frame, repeats and blanks left out."""
    encoder.eval()
    pairs = []
    for i in range(0, len(clips), 16):
        batch = clips[i : i + 16]
        features = clip_features([wave for wave, _ in batch])
        lengths = [len(x) for x in features]
        hidden = encoder(torch.cat(features), lengths)
        classes = head(hidden.float()).argmax(-1).split(lengths)
        for frames, (_, text) in zip(classes, batch, strict=True):
            distinct = frames.unique_consecutive().tolist()
            pairs.append((text, "".join(CHARACTERS[c - 1] for c in distinct if c)))
    encoder.train()
    return word_error_rate(pairs)


def clip_batches(clips, size, rng) -> Iterator[list]:
    """Endless shuffled batches of clips of similar length."""
    while True:
        # Lengths are blurred a little, so that a clip meets others every time.
        order = sorted(range(len(clips)), key=lambda i: len(clips[i][0]) * rng.uniform(0.9, 1.1))
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        rng.shuffle(groups)
        for group in groups:
            yield [clips[i] for i in group]


def ctc_loss(encoder, head, features, texts):
    lengths = [len(x) for x in features]
    logs = head(encoder(torch.cat(features), lengths).float()).log_softmax(-1).split(lengths)
    targets = [CHARACTERS.index(c) + 1 for text in texts for c in text]
    return F.ctc_loss(
        torch.nn.utils.rnn.pad_sequence(logs),  # (F, B, 28)
        torch.tensor(targets),
        torch.tensor(lengths),
        torch.tensor([len(text) for text in texts]),
        zero_infinity=True,
    )


def pretrain_encoder():
    torch.manual_seed(0)
    rng = random.Random(0)
    clips = []
    for path in sorted(WORK.glob("clips-*.pt")):
        clips += torch.load(path)
    clips += corpus_clips("train")
    encoder = SpeechEncoder(ENCODER, COMPUTE, default_kernels("cpu")).train()
    head = torch.nn.Linear(ENCODER.hidden_size, len(CHARACTERS) + 1)
    for stage in ENCODER_STAGES:
        pretrain_encoder_stage(encoder, head, clips, rng, *stage)


def pretrain_encoder_stage(encoder, head, clips, rng, steps, rate, augmented):
    model = torch.nn.ModuleList([encoder, head])
    dev = corpus_clips("dev")
    places = np.random.default_rng(rng.randrange(2**32))
    others = Manifest(DEMO / "train.jsonl")  # who babble
    optimizers = make_optimizers(model, rate)
    batches = clip_batches(clips, ENCODER_BATCH, rng)
    bar = tqdm(batches, "encoder", steps, mininterval=10)
    # The word error rate is taken, and the weights are saved, every 100 steps.
    for i, batch in enumerate(itertools.islice(bar, steps)):
        waves = []
        for wave, _ in batch:
            if rng.random() < augmented:
                wave = 32767 * augment(wave / 32768, places, others)
            waves.append(wave)
        features = disguise(clip_features(waves), rng)
        loss = ctc_loss(encoder, head, features, [text for _, text in batch])
        update(model, optimizers, loss, learning_rate(i, steps, rate))
        if i % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (i + 1) % 100 == 0 or i + 1 == steps:
            wer = ctc_word_error_rate(encoder, head, dev)
            bar.write(f"step {i + 1}: loss {loss.item():.3f}, dev WER {wer:.2f} %")
            weights = encoder.state_dict()
            weights |= {f"lm_head.{name}": p for name, p in head.state_dict().items()}
            save_bfloat16(DEMO / "encoder", ENCODER.to_dict(), weights)


def load_encoder():
    """The shipped encoder and its CTC head, which training the speech model leaves aside."""
    encoder = SpeechEncoder.from_pretrained(DEMO / "encoder")
    weights = load_file(DEMO / "encoder" / "model.safetensors")
    head = torch.nn.Linear(ENCODER.hidden_size, len(CHARACTERS) + 1)
    head.load_state_dict({name: weights[f"lm_head.{name}"] for name in ("weight", "bias")})
    return encoder, head


# --------------------------------------------------------------------------------------------------
# LLM: text laid out as the speech model sees it, the English sentence where the audio will be

END, CHAT = "<|endoftext|>", ("<|im_start|>", "<|im_end|>")
VOCABULARY, CONTEXT = 3000, 1024
LLM_STAGES = (  # until this step: share of noised sentences, tasks and their weights
    (400, 0.0, {"salad": 1, "asr": 1}),
    (2000, 0.0, {"salad": 1, "asr": 2, "st": 4, "sqa": 5}),
    (2400, 0.0, {"asr": 1, "st": 1, "sqa": 1, "plain": 9}),
    (3400, 0.3, {"salad": 1, "asr": 3, "st": 4, "sqa": 16}),
)
LLM_STEPS, LLM_BATCH, LLM_RATE = LLM_STAGES[-1][0], 96, 3e-3
BEFORE = (  # texts around the audio and the instruction
    "",
    "User: ",
    "Audio: ",
    "<|im_start|>user\n",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
)
BETWEEN = ("\n", " ", "")
AFTER = ("\n", " ", "\nAnswer: ", "\nAssistant: ", "<|im_end|>\n<|im_start|>assistant\n")


def draw_instruction(rng, task, target, question):
    wanted = {"task": task, "source_language": "en", "target_language": target}
    return instruction_of({**wanted, "question": question}, rng)


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE on the grammar's own text; every Chinese character is split off first."""
    rng = random.Random(0)

    def texts():
        for _ in range(20000):
            sentence, facts, traps = grammar.example(rng)
            task = rng.choice(("asr", "st", "sqa"))
            target = rng.choice(LANGUAGES[1:])
            question, answer = draw_question(rng, facts, traps)
            yield from (*sentence, *answer)
            yield draw_instruction(rng, task, target, question[LANGUAGES.index(target)])

    tokenizer = Tokenizer(models.BPE())
    split_chinese = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_chinese, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, *CHAT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


class TextSequences:
    """Draws sequences of text: ids before the answer, and ids of the answer with the end token."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random, split="train"):
        self.tokenizer, self.rng, self.split = tokenizer, rng, split
        self.end = tokenizer.token_to_id(END)

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def draw(self, task: str, noise=False, unanswerable=0.25) -> tuple[list[int], list[int], str]:
        """task: salad (copy random tokens), asr (copy), st, sqa, or plain (an English question and
        nothing around it). Returns (prompt ids, answer ids, language of the answer)."""
        rng = self.rng
        texts, facts, traps = grammar.example(rng, self.split)
        target = {"st": rng.choice(LANGUAGES[1:]), "sqa": rng.choice(LANGUAGES)}.get(task, "en")
        language = LANGUAGES.index(target)

        # What stands where the audio will be, and the answer.
        sentence = self.misspell(texts[EN]) if noise and rng.random() < 0.4 else texts[EN]
        source = self.encode(sentence)
        question = answer = texts
        if task in ("sqa", "plain"):
            question, answer = draw_question(rng, facts, traps, unanswerable)
        answer_ids = self.encode(answer[language])
        if task == "salad":
            vocabulary = self.tokenizer.get_vocab_size()
            source = [rng.randrange(259, vocabulary) for _ in range(rng.randint(4, 14))]
            answer_ids = source
        if noise and rng.random() < 0.4:
            source = self.stretch(source)

        # The instruction, and the texts around the two.
        if task == "plain":
            instruction = question[language]
            before, between, after = "", "\n", "\n"
        else:
            asked = "asr" if task == "salad" else task
            instruction = draw_instruction(rng, asked, target, question[language])
            before, between, after = [rng.choice(texts) for texts in (BEFORE, BETWEEN, AFTER)]
        prompt = self.encode(before) + source
        prompt += self.encode(between) + self.encode(instruction) + self.encode(after)
        return prompt, answer_ids + [self.end], target

    def misspell(self, text):
        """An English sentence with now and then a letter missing, wrong or too much."""
        rng = self.rng
        words = text.split(" ")
        for i, word in enumerate(words):
            if rng.random() < 0.15:
                at = rng.randrange(len(word))
                wrong = rng.choice(CHARACTERS[1:])
                added = word[at] + rng.choice(CHARACTERS[1:])
                words[i] = word[:at] + rng.choice(("", wrong, added)) + word[at + 1 :]
        return " ".join(words)

    def stretch(self, source):
        """Repeats every token one to four times and fills gaps with one other token, as speech
        takes its time."""
        rng = self.rng
        filler = rng.choice(self.encode("\n. "))
        longest = rng.randint(2, 4)
        ids = []
        for token in source:
            ids += [token] * rng.randint(1, longest)
            ids += [filler] * rng.choice((0, 0, 1, 2))
        return ids


def text_batches(sequences: TextSequences) -> Iterator[list]:
    """Batches of sequences of similar length, stage by stage. First the LLM must copy, else it
    writes fluent sentences with wrong words. Refusing is learned last: a spell of plain questions
    makes it compare question and sentence at all."""
    rng = sequences.rng
    for i in range(0, LLM_STEPS, 8):
        _, noise, mix = next(stage for stage in LLM_STAGES if i < stage[0])
        tasks = rng.choices(list(mix), mix.values(), k=8 * LLM_BATCH)
        drawn = []
        for task in tasks:
            is_noised = rng.random() < noise
            drawn.append(sequences.draw(task, is_noised, unanswerable=0.45))
        drawn.sort(key=lambda sequence: len(sequence[0] + sequence[1]))
        groups = [drawn[j : j + LLM_BATCH] for j in range(0, len(drawn), LLM_BATCH)]
        rng.shuffle(groups)
        yield from groups


def answer_loss(model, batch):
    """The cross entropy of the answers' tokens, in which every sequence counts the same."""
    ids = []
    weights = []
    for prompt, answer, _ in batch:
        ids += prompt + answer
        weights += [0.0] * len(prompt) + [1 / len(answer) / len(batch)] * len(answer)
    ids = torch.tensor(ids)
    weights = torch.tensor(weights)
    lengths = [len(prompt) + len(answer) for prompt, answer, _ in batch]
    (targets,) = weights.nonzero(as_tuple=True)
    hidden = model.hidden(model.embed(ids), lengths, wanted=targets - 1)
    losses = F.cross_entropy(model.logits(hidden), ids[targets], reduction="none")
    return weights[targets] @ losses


def pretrain_llm():
    torch.manual_seed(0)
    directory = DEMO / "llm"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    sequences = TextSequences(tokenizer, random.Random(0))
    config = LLMConfig(
        model_type="qwen2",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=[sequences.end],
    )
    model = LLM(config, COMPUTE, default_kernels("cpu")).train()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.06)
    optimizers = make_optimizers(model, LLM_RATE)
    # The figures are taken, and the weights are saved, every 100 steps.
    bar = tqdm(text_batches(sequences), "llm", LLM_STEPS, mininterval=10)
    for i, batch in enumerate(bar):
        loss = answer_loss(model, batch)
        update(model, optimizers, loss, learning_rate(i, LLM_STEPS, LLM_RATE))
        if i % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (i + 1) % 100 == 0 or i + 1 == LLM_STEPS:
            figures = llm_figures(model, tokenizer, "dev", 120)
            bar.write(f"step {i + 1}: loss {loss.item():.3f}, {figures}")
            save_bfloat16(directory, asdict(config), model.state_dict())


@torch.no_grad()
def greedy_answers(model, prompts: list[list[int]]) -> list[list[int]]:
    model.eval()
    answers = []
    for i in range(0, len(prompts), 64):
        batch = prompts[i : i + 64]
        x = model.embed(torch.tensor([token for prompt in batch for token in prompt]))
        answers += generate(model, x, [len(prompt) for prompt in batch], max_new_tokens=48)
    model.train()
    return answers


def llm_figures(model, tokenizer, split, count) -> dict:
    """Text in, text out, on `count` unseen sentences a task: copy WER, BLEU, and questions."""
    sequences = TextSequences(tokenizer, random.Random(split), split)
    figures = {}
    for task in ("asr", "st", "sqa"):
        drawn = [sequences.draw(task) for _ in range(count)]
        answers = greedy_answers(model, [prompt for prompt, _, _ in drawn])
        triples = []
        for (_, reference, target), answer in zip(drawn, answers, strict=True):
            triples.append((tokenizer.decode(reference), tokenizer.decode(answer), target))
        if task == "asr":
            figures["copy WER"] = round(word_error_rate([t[:2] for t in triples]), 2)
        elif task == "st":
            for target in LANGUAGES[1:]:
                pairs = [t[:2] for t in triples if t[2] == target]
                figures[f"BLEU {target}"] = bleu(pairs, target)
        else:
            figures |= question_figures(triples)
    return figures


def question_figures(triples):
    answerable = [(r, h) for r, h, _ in triples if r not in REFUSALS]
    refusable = [h for r, h, _ in triples if r in REFUSALS]
    return {
        "exact match": percent([r == h for r, h in answerable]),
        "false refusals": percent([h in REFUSALS for _, h in answerable]),
        "refusals": percent([h in REFUSALS for h in refusable]),
    }


def percent(flags):
    return round(100 * sum(flags) / max(1, len(flags)), 1)


def bleu(pairs, target):
    references, hypotheses = zip(*pairs, strict=True)
    tokenize = "zh" if target == "zh" else "13a"
    return round(sacrebleu.corpus_bleu(hypotheses, [references], tokenize=tokenize).score, 1)


# --------------------------------------------------------------------------------------------------
# The program


def report():
    """Prints the figures of demo/README.md."""
    print(f"sentences of the grammar: {sum(grammar.count_sentences().values()):,}")
    for path in sorted(DEMO.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:12,} bytes  {path.relative_to(DEMO)}")
    encoder, head = load_encoder()
    clips = {
        "dev": corpus_clips("dev"),
        "test": corpus_clips("test"),
        f"test, {TEST_VOICE}": corpus_clips("test", test_voice=True),
    }
    for name, split_clips in clips.items():
        wer = ctc_word_error_rate(encoder, head, split_clips)
        print(f"encoder, CTC, {name}: WER {wer:.2f} % of {len(split_clips)} clips")
    model = LLM.from_pretrained(DEMO / "llm")
    tokenizer = Tokenizer.from_file(str(DEMO / "llm" / "tokenizer.json"))
    for split in ("dev", "test"):
        print(f"LLM, text input, {split}:", json.dumps(llm_figures(model, tokenizer, split, 600)))


STAGES = {
    "corpus": make_corpus,
    "clips": make_pretraining_clips,
    "encoder": pretrain_encoder,
    "llm": pretrain_llm,
    "report": report,
}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("stage", nargs="?", choices=STAGES, help="all in turn if none is given")
    stage = parser.parse_args().stage
    WORK.mkdir(parents=True, exist_ok=True)
    for name in [stage] if stage else STAGES:
        STAGES[name]()


if __name__ == "__main__":
    main()
