"""Makes the folder demo/: a speech corpus, a tiny speech encoder and a tiny LLM, all from a grammar of our own.

    python -m prepare.demo            every stage in turn
    python -m prepare.demo corpus     speech and manifests; needs the programs espeak-ng and flite
    python -m prepare.demo clips      the encoder's own training clips, about 0.3 GB in the work folder; needs festival
                              with festvox-kdlpc16k and festvox-us-slt-hts, and the Python package py-nanotts, too
    python -m prepare.demo encoder    CTC pretraining on characters
    python -m prepare.demo llm        pretraining on text: copying, translation, questions
    python -m prepare.demo report     the figures of demo/README.md

Sentences fall into train, dev and test by a checksum of their English text, so no stage can see another split's.
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
from dataclasses import asdict
from pathlib import Path

import numpy as np
import sacrebleu
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data import fbank
from model import LLM, EncoderConfig, LLMConfig, SpeechEncoder, encoder_dict, generate
from prepare.audio import SAMPLE_RATE, encode_opus, load_audio
from prepare.checkpoint import save
from prepare.demo_grammar import LANGUAGES, REFUSALS, count_sentences, example
from prepare.instructions import instruction_of

DEMO = Path(__file__).parent.parent / "demo"
WORK = Path(tempfile.gettempdir()) / "demo_work"  # intermediate files
EN = LANGUAGES.index("en")
COMPUTE = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32  # elsewhere bfloat16 is far slower

# ----------------------------------------------------------------------------------------------------------------------
# Speech

ESPEAK = [f"{accent}+{variant}" for accent in ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland")
          for variant in ("m1", "m2", "m3", "m4", "m7", "f1", "f2", "f3", "f4", "f5", "klatt", "klatt2", "klatt3")]
FLITE = ["slt", "awb", "kal16", "kal"]
FESTIVAL = ["ked_diphone", "cmu_us_slt_arctic_hts"]
PICO = ["en-US", "en-GB"]
TEST_VOICE = "flite-rms"
CLIPS_PER_FILE = 16  # joined, because every ogg file starts with some kilobytes of tables
COMPRESSION = 0.96  # of Opus: 17 kbit/s
CORPUS = {"train": 116, "dev": 10, "test": 10, "test-rms": 8}  # files
PRETRAINING_FILES = 400


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


def speak(text, voice, rng):
    """The text in a voice ("flite-slt", "espeak-en-us+f3", "festival-ked_diphone", "pico-en-GB") at a random speed and
    pitch: a (N,) wave, 16 kHz, with the silence around it cut to 50 ms."""
    engine, name = voice.split("-", 1)
    with tempfile.TemporaryDirectory() as folder:
        wav = f"{folder}/speech.wav"
        if engine == "flite":
            stretch = f"duration_stretch={rng.uniform(0.8, 1.1):.2f}"
            run("flite", "-voice", name, "--setf", stretch, "-t", text, "-o", wav)
            warp = 1.0 if voice == TEST_VOICE else rng.uniform(0.82, 1.2)
        elif engine == "festival":
            stretch = f"(Parameter.set 'Duration_Stretch {rng.uniform(0.8, 1.1):.2f})"
            Path(f"{folder}/text").write_text(text)
            run("text2wave", "-eval", f"(voice_{name})", "-eval", stretch, f"{folder}/text", "-o", wav)
            warp = rng.uniform(0.8, 1.25)
        elif engine == "pico":
            import py_nanotts
            pcm = py_nanotts.NanoTTS().speak(text, name, rng.uniform(0.9, 1.25), rng.uniform(0.75, 1.15))
            soundfile.write(wav, np.frombuffer(pcm, np.int16), SAMPLE_RATE)
            warp = rng.uniform(0.75, 1.2)
        else:
            speed, pitch = str(rng.randint(160, 210)), str(rng.randint(25, 75))
            run("espeak-ng", "-v", name, "-s", speed, "-p", pitch, "-w", wav, text)
            warp = rng.uniform(0.92, 1.08)
        samples, rate = soundfile.read(wav, dtype="float32")
        # another sample rate in the header shifts pitch and formants: another speaker
        soundfile.write(wav, samples, round(rate * warp / 400) * 400, subtype="FLOAT")
        wave = load_audio(wav)
    loud = (wave.abs() > 0.02 * wave.abs().max()).nonzero()
    margin = SAMPLE_RATE // 20
    wave = wave[max(0, int(loud[0]) - margin):int(loud[-1]) + margin]
    return 0.6 * wave / wave.abs().max()


def draw_voice(rng, split):
    """Any voice but the test's; those of festival and pico for the encoder's pretraining alone."""
    if split == "pretraining" and rng.random() < 0.5:
        return rng.choice([*(f"festival-{name}" for name in FESTIVAL), *(f"pico-{name}" for name in PICO)])
    return f"flite-{rng.choice(FLITE)}" if rng.random() < 0.5 else f"espeak-{rng.choice(ESPEAK)}"


def speech_file(job):
    """One ogg file of a split: its bytes, and for each clip (example, voice, start, duration), times in seconds."""
    split, index = job
    torch.set_num_threads(1)
    rng = random.Random(f"{split} {index}")
    clips, waves, start = [], [], 0
    for _ in range(CLIPS_PER_FILE):
        sentence = example(rng, {"test-rms": "test", "pretraining": "train"}.get(split, split))
        voice = TEST_VOICE if split == "test-rms" else draw_voice(rng, split)
        wave = speak(sentence[0][EN], voice, rng)
        clips.append((sentence, voice, start / SAMPLE_RATE, len(wave) / SAMPLE_RATE))
        waves.append(wave.numpy())
        start += len(wave)
    return encode_opus(np.concatenate(waves), compression_level=COMPRESSION), clips


def speech_files(split, count):
    with multiprocessing.Pool() as pool:
        jobs = [(split, i) for i in range(count)]
        yield from enumerate(tqdm(pool.imap(speech_file, jobs), split, count, mininterval=10))


def corpus():
    (DEMO / "audio").mkdir(parents=True, exist_ok=True)
    rows = {"train": [], "dev": [], "test": []}
    for split, count in CORPUS.items():
        shard = f"audio/{split}-000.tar"
        rng = random.Random(f"rows {split}")
        with tarfile.open(DEMO / shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index, (audio, clips) in speech_files(split, count):
                member = tarfile.TarInfo(f"{index:04d}.ogg")
                member.size = len(audio)
                tar.addfile(member, io.BytesIO(audio))
                for clip in clips:
                    rows[split.split("-")[0]] += manifest_rows(rng, f"{shard}/{member.name}", *clip)
    for split, found in rows.items():
        found.sort(key=lambda row: row["task"] != "asr")  # asr first; the order within is kept
        with open(DEMO / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for row in found:
                file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    row = next(row for row in rows["dev"] if row["speaker"] == "flite-slt")
    wave = load_audio(DEMO / row["audio"], row.get("start", 0.0), row["duration"])
    soundfile.write(DEMO / "sample.wav", wave, SAMPLE_RATE)


def manifest_rows(rng, audio, sentence, voice, start, duration):
    """A clip's rows: one asr, three st, and two questions in different languages."""
    texts, facts, traps = sentence
    place = {"audio": audio} | ({"start": round(start, 4)} if start else {}) | {"duration": round(duration, 4)}

    def row(task, target, text, **more):
        return place | {"text": text, "task": task, "source_language": "en", "target_language": target} | more | {
            "speaker": voice, "corpus": "demo", "licence": "CC0-1.0"}

    rows = [row("asr" if target == "en" else "st", target, text) for target, text in zip(LANGUAGES, texts)]
    for i in rng.sample(range(len(LANGUAGES)), 2):
        question, answer = draw_question(rng, facts, traps)
        rows.append(row("sqa", LANGUAGES[i], answer[i], question=question[i]))
    return rows


def draw_question(rng, facts, traps, unanswerable=0.25):
    """A question and its answer, each in four languages; unanswerable is the share of those with a refusal."""
    return (rng.choice(traps), REFUSALS) if rng.random() < unanswerable else rng.choice(facts)


# ----------------------------------------------------------------------------------------------------------------------
# Encoder: CTC on characters

CHARACTERS = " abcdefghijklmnopqrstuvwxyz"  # CTC classes 1 to 27; 0 is the blank
ENCODER = EncoderConfig(hidden_size=192, num_hidden_layers=5, num_attention_heads=4, intermediate_size=512,
                        layerdrop=0.0, conformer_conv_dropout=0.1, mask_time_prob=0.1, mask_time_length=8)
ENCODER_STEPS, ENCODER_BATCH, ENCODER_RATE = 3000, 24, 2e-3


def letters(text):
    return "".join(c for c in text.lower() if c in CHARACTERS)


def pretraining_clips():
    """Writes the features and transcripts of the encoder's training clips to the work folder, 50 files a piece."""
    torch.set_num_threads(1)
    piece = []
    for index, (audio, clips) in speech_files("pretraining", PRETRAINING_FILES):
        wave = torch.from_numpy(soundfile.read(io.BytesIO(audio), dtype="float32")[0])
        for sentence, _, start, duration in clips:
            first = round(start * SAMPLE_RATE)
            features, _ = fbank([wave[first:first + round(duration * SAMPLE_RATE)]])
            piece.append((features.half(), letters(sentence[0][EN])))
        if (index + 1) % 50 == 0:
            torch.save(piece, WORK / f"clips-{index // 50:03d}.pt")
            piece = []


def corpus_clips(split, voice=None):
    """(features, letters) of a shipped split's clips, or of one voice's."""
    rows = [json.loads(line) for line in open(DEMO / f"{split}.jsonl", encoding="utf-8")]
    rows = [r for r in rows if r["task"] == "asr" and (r["speaker"] == TEST_VOICE) == (voice == TEST_VOICE)]
    clips = []
    for r in rows:
        features, _ = fbank([load_audio(DEMO / r["audio"], r.get("start", 0.0), r["duration"])])
        clips.append((features.half(), letters(r["text"])))
    return clips


def disguise(clips, rng):
    """Another speaker: stretches a batch of features in time by -15 to 35 % and along its 80 mel channels by up to 15 %,
    adds noise to every row and zeroes a random band of up to 20 of its channels. Returns a list of (F, 160)."""
    features = torch.nn.utils.rnn.pad_sequence([x.float() for x, _ in clips], batch_first=True)  # (B, F, 160)
    frames, seconds, mels = features.shape[1], rng.uniform(0.85, 1.35), rng.uniform(0.85, 1.15)
    x = features.view(len(features), 1, -1, 80)  # (B, 1, 10 ms frames, 80)
    x = F.interpolate(x, (2 * round(frames * seconds), round(80 * mels)), mode="bilinear")[:, 0, :, :80]
    x = F.pad(x, (0, 80 - x.shape[-1]))
    for row in x:
        row += rng.uniform(0, 0.4) * torch.randn(row.shape)
        first = rng.randrange(80)
        row[:, first:first + rng.randrange(21)] = 0
    x = x.reshape(len(x), -1, 160)
    return [row[:len(clip) * x.shape[1] // frames] for row, (clip, _) in zip(x, clips)]


def optimizers(model, rate):
    """Muon for the hidden layers' matrices, AdamW for everything else."""
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and "layers" in name and "distance" not in name]
    other = [p for _, p in named if not any(p is h for h in hidden)]
    return (torch.optim.Muon(hidden, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(other, lr=rate, betas=(0.9, 0.98), weight_decay=0.01))


def step(model, optimizers, loss, rate):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def schedule(i, steps, peak):
    """Linear warm-up over 3 % of the steps, then a cosine to 1 % of the peak."""
    return peak * min(1, (i + 1) / (0.03 * steps)) * (0.01 + 0.99 * (1 + math.cos(math.pi * i / steps)) / 2)


def word_errors(pairs):
    """Word error rate in percent of (reference, hypothesis) texts."""
    errors = words = 0
    for reference, hypothesis in pairs:
        r, h = reference.split(), hypothesis.split()
        row = list(range(len(h) + 1))
        for i, word in enumerate(r, 1):
            diagonal, row[0] = row[0], i
            for j, guess in enumerate(h, 1):
                diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != guess))
        errors, words = errors + row[-1], words + len(r)
    return 100 * errors / words


@torch.no_grad()
def ctc_word_errors(encoder, head, clips):
    """Word error rate in percent of the likeliest class of every frame, repeats and blanks left out."""
    encoder.eval()
    pairs = []
    for i in range(0, len(clips), 16):
        batch = clips[i:i + 16]
        lengths = [len(x) for x, _ in batch]
        hidden = encoder(torch.cat([x.float() for x, _ in batch]), lengths)
        for row, (_, text) in zip(head(hidden.float()).argmax(-1).split(lengths), batch):
            classes = row.unique_consecutive().tolist()
            pairs.append((text, "".join(CHARACTERS[c - 1] for c in classes if c)))
    encoder.train()
    return word_errors(pairs)


def batches(clips, size, rng):
    """Endless shuffled batches of clips of similar length."""
    while True:
        order = sorted(range(len(clips)), key=lambda i: len(clips[i][0]) * rng.uniform(0.9, 1.1))
        groups = [order[i:i + size] for i in range(0, len(order) - size + 1, size)]
        rng.shuffle(groups)
        yield from ([clips[i] for i in group] for group in groups)


def pretrain_encoder():
    torch.manual_seed(0)
    rng = random.Random(0)
    clips = [clip for piece in sorted(WORK.glob("clips-*.pt")) for clip in torch.load(piece)] + corpus_clips("train")
    encoder = SpeechEncoder(ENCODER, COMPUTE).train()
    head = torch.nn.Linear(ENCODER.hidden_size, len(CHARACTERS) + 1)
    model = torch.nn.ModuleList([encoder, head])
    dev, tools = corpus_clips("dev"), optimizers(model, ENCODER_RATE)
    bar = tqdm(batches(clips, ENCODER_BATCH, rng), "encoder", ENCODER_STEPS, mininterval=10)
    for i, batch in enumerate(itertools.islice(bar, ENCODER_STEPS)):
        features = disguise(batch, rng)
        lengths = [len(x) for x in features]
        logs = head(encoder(torch.cat(features), lengths).float()).log_softmax(-1).split(lengths)
        targets = [[CHARACTERS.index(c) + 1 for c in text] for _, text in batch]
        loss = F.ctc_loss(torch.nn.utils.rnn.pad_sequence(logs), torch.tensor(sum(targets, [])), torch.tensor(lengths),
                          torch.tensor([len(t) for t in targets]), zero_infinity=True)  # of (F, B, 28)
        step(model, tools, loss, schedule(i, ENCODER_STEPS, ENCODER_RATE))
        if i % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (i + 1) % 100 == 0 or i + 1 == ENCODER_STEPS:
            bar.write(f"step {i + 1}: loss {loss.item():.3f}, dev WER {ctc_word_errors(encoder, head, dev):.2f} %")
            weights = encoder.state_dict() | {f"lm_head.{name}": p for name, p in head.state_dict().items()}
            save_bfloat16(DEMO / "encoder", encoder_dict(ENCODER), weights)


def save_bfloat16(directory, config, weights):
    save(directory, config, {name: p.bfloat16() for name, p in weights.items()})


def load_encoder():
    """The shipped encoder and its CTC head, which training the speech model leaves aside."""
    encoder = SpeechEncoder.from_pretrained(DEMO / "encoder")
    weights = load_file(DEMO / "encoder" / "model.safetensors")
    head = torch.nn.Linear(ENCODER.hidden_size, len(CHARACTERS) + 1)
    head.load_state_dict({name: weights[f"lm_head.{name}"] for name in ("weight", "bias")})
    return encoder, head

# ----------------------------------------------------------------------------------------------------------------------
# LLM: rows laid out as the speech model sees them, the English sentence where the audio will be

END, CHAT = "<|endoftext|>", ("<|im_start|>", "<|im_end|>")
VOCABULARY, CONTEXT = 3000, 1024
LLM_STAGES = (  # until this step: share of noised rows, tasks and their weights
    (400, 0.0, {"salad": 1, "asr": 1}),
    (2000, 0.0, {"salad": 1, "asr": 2, "st": 4, "sqa": 5}),
    (2400, 0.0, {"asr": 1, "st": 1, "sqa": 1, "plain": 9}),
    (3400, 0.3, {"salad": 1, "asr": 3, "st": 4, "sqa": 16}),
)
LLM_STEPS, LLM_BATCH, LLM_RATE = LLM_STAGES[-1][0], 96, 3e-3
BEFORE = ("", "User: ", "Audio: ", "<|im_start|>user\n",  # texts around the audio and the instruction
          "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
BETWEEN = ("\n", " ", "")
AFTER = ("\n", " ", "\nAnswer: ", "\nAssistant: ", "<|im_end|>\n<|im_start|>assistant\n")


def draw_instruction(rng, task, target, question):
    return instruction_of({"task": task, "source_language": "en", "target_language": target, "question": question}, rng)


def train_tokenizer():
    """Byte-level BPE on the grammar's own text; every Chinese character is split off first."""
    rng = random.Random(0)

    def texts():
        for _ in range(20000):
            sentence, facts, traps = example(rng)
            task, target = rng.choice(("asr", "st", "sqa")), rng.choice(LANGUAGES[1:])
            question, answer = draw_question(rng, facts, traps)
            yield from (*sentence, *answer, draw_instruction(rng, task, target, question[LANGUAGES.index(target)]))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, *CHAT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return tokenizer


class Rows:
    """Draws text rows: ids before the answer, and ids of the answer with the end token."""

    def __init__(self, tokenizer, rng, split="train"):
        self.tokenizer, self.rng, self.split = tokenizer, rng, split
        self.end = tokenizer.token_to_id(END)
        self.around = {text: self.ids(text) for text in BEFORE + BETWEEN + AFTER}

    def ids(self, text):
        return self.tokenizer.encode(text).ids

    def draw(self, task, noise=False, unanswerable=0.25):
        """task: salad (copy random tokens), asr (copy), st, sqa, or plain (an English question without more words).
        Returns (prompt ids, answer ids, language of the answer)."""
        rng = self.rng
        texts, facts, traps = example(rng, self.split)
        target = {"st": rng.choice(LANGUAGES[1:]), "sqa": rng.choice(LANGUAGES)}.get(task, "en")
        source, answer, question = self.source(texts[EN], noise), texts, texts
        if task in ("sqa", "plain"):
            question, answer = draw_question(rng, facts, traps, unanswerable)
        question, answer = (four[LANGUAGES.index(target)] for four in (question, answer))
        answer = self.ids(answer)
        if task == "salad":
            source = answer = [rng.randrange(259, self.tokenizer.get_vocab_size()) for _ in range(rng.randint(4, 14))]
        if noise and rng.random() < 0.4:
            source = self.stretch(source)
        if task == "plain":
            instruction, around = question, ("", "\n", "\n")
        else:
            instruction = draw_instruction(rng, "asr" if task == "salad" else task, target, question)
            around = [rng.choice(texts) for texts in (BEFORE, BETWEEN, AFTER)]
        before, between, after = (self.around[text] for text in around)
        return before + source + between + self.ids(instruction) + after, answer + [self.end], target

    def source(self, text, noise):
        """Ids of an English sentence; with noise, now and then a misspelt word."""
        rng = self.rng
        if noise and rng.random() < 0.4:
            words = text.split(" ")
            for i, word in enumerate(words):
                if rng.random() < 0.15:
                    at = rng.randrange(len(word))
                    letter = rng.choice(("", rng.choice(CHARACTERS[1:]), word[at] + rng.choice(CHARACTERS[1:])))
                    words[i] = word[:at] + letter + word[at + 1:]
            text = " ".join(words)
        return self.ids(text)

    def stretch(self, source):
        """Repeats every token one to four times and fills gaps with one other token, as speech takes its time."""
        rng, filler, longest = self.rng, self.rng.choice(self.ids("\n. ")), self.rng.randint(2, 4)
        ids = []
        for token in source:
            ids += [token] * rng.randint(1, longest) + [filler] * rng.choice((0, 0, 1, 2))
        return ids


def text_batches(rows):
    """Batches of rows of similar length, stage by stage. First the LLM must copy, else it writes fluent sentences with
    wrong words. Refusing is learned last: a spell of plain questions makes it compare question and sentence at all."""
    for i in range(0, LLM_STEPS, 8):
        noise, mix = next(stage[1:] for stage in LLM_STAGES if i < stage[0])
        tasks = rows.rng.choices(list(mix), mix.values(), k=8 * LLM_BATCH)
        drawn = [rows.draw(task, rows.rng.random() < noise, unanswerable=0.45) for task in tasks]
        drawn.sort(key=lambda row: len(row[0] + row[1]))
        groups = [drawn[j:j + LLM_BATCH] for j in range(0, len(drawn), LLM_BATCH)]
        rows.rng.shuffle(groups)
        yield from groups


def pretrain_llm():
    torch.manual_seed(0)
    rng = random.Random(0)
    directory = DEMO / "llm"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    rows = Rows(tokenizer, rng)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": rows.end}) + "\n", encoding="utf-8")
    model = LLM(LLMConfig(
        model_type="qwen2", vocab_size=tokenizer.get_vocab_size(), hidden_size=192, intermediate_size=512,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=48,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, eos_token_id=[rows.end]), COMPUTE).train()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.06)
    tools = optimizers(model, LLM_RATE)
    bar = tqdm(text_batches(rows), "llm", LLM_STEPS, mininterval=10)
    for i, batch in enumerate(bar):
        ids = torch.tensor([token for prompt, answer, _ in batch for token in prompt + answer])
        weights = torch.tensor([w / len(a) / len(batch) for p, a, _ in batch for w in [0.0] * len(p) + [1.0] * len(a)])
        answers, = weights.nonzero(as_tuple=True)  # the answers' tokens: every row counts the same
        hidden = model.hidden(model.embed(ids), [len(p) + len(a) for p, a, _ in batch])[answers - 1]
        loss = weights[answers] @ F.cross_entropy(model.logits(hidden), ids[answers], reduction="none")
        step(model, tools, loss, schedule(i, LLM_STEPS, LLM_RATE))
        if i % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (i + 1) % 100 == 0 or i + 1 == LLM_STEPS:
            bar.write(f"step {i + 1}: loss {loss.item():.3f}, {llm_figures(model, tokenizer, 'dev', 120)}")
            save_bfloat16(directory, asdict(model.config), model.state_dict())


@torch.no_grad()
def answers_of(model, prompts):
    """Greedy answers, as ids, to prompts of ids."""
    model.eval()
    found = []
    for i in range(0, len(prompts), 64):
        batch = prompts[i:i + 64]
        x = model.embed(torch.tensor([token for prompt in batch for token in prompt]))
        found += generate(model, x, [len(p) for p in batch], max_new_tokens=48)
    model.train()
    return found


def llm_figures(model, tokenizer, split, count):
    """Text in, text out, on `count` unseen sentences a task: copy WER, translations exactly right, and questions."""
    rows, figures = Rows(tokenizer, random.Random(split), split), {}
    for task in ("asr", "st", "sqa"):
        drawn = [rows.draw(task) for _ in range(count)]
        texts = [(tokenizer.decode(answer), tokenizer.decode(found), target)
                 for (_, answer, target), found in zip(drawn, answers_of(model, [d[0] for d in drawn]))]
        if task == "asr":
            figures["copy WER"] = round(word_errors([t[:2] for t in texts]), 2)
        elif task == "st":
            for target in LANGUAGES[1:]:
                figures[f"BLEU {target}"] = bleu([t[:2] for t in texts if t[2] == target], target)
        else:
            answerable = [(r, h) for r, h, _ in texts if r not in REFUSALS]
            refusable = [h for r, h, _ in texts if r in REFUSALS]
            figures["exact match"] = percent([r == h for r, h in answerable])
            figures["false refusals"] = percent([h in REFUSALS for _, h in answerable])
            figures["refusals"] = percent([h in REFUSALS for h in refusable])
    return figures


def percent(flags):
    return round(100 * sum(flags) / max(1, len(flags)), 1)


def bleu(pairs, target):
    references, hypotheses = zip(*pairs)
    return round(sacrebleu.corpus_bleu(hypotheses, [references], tokenize="zh" if target == "zh" else "13a").score, 1)


# ----------------------------------------------------------------------------------------------------------------------


def report():
    """Prints the figures of demo/README.md."""
    print(f"sentences of the grammar: {sum(count_sentences().values()):,}")
    for path in sorted(DEMO.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:12,} bytes  {path.relative_to(DEMO)}")
    encoder, head = load_encoder()
    for name, clips in (("dev", corpus_clips("dev")), ("test", corpus_clips("test")),
                        (f"test, {TEST_VOICE}", corpus_clips("test", TEST_VOICE))):
        print(f"encoder, CTC, {name}: WER {ctc_word_errors(encoder, head, clips):.2f} % of {len(clips)} clips")
    model = LLM.from_pretrained(DEMO / "llm")
    tokenizer = Tokenizer.from_file(str(DEMO / "llm" / "tokenizer.json"))
    for split in ("dev", "test"):
        print(f"LLM, text input, {split}:", json.dumps(llm_figures(model, tokenizer, split, 600)))


STAGES = {"corpus": corpus, "clips": pretraining_clips, "encoder": pretrain_encoder, "llm": pretrain_llm,
          "report": report}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=STAGES, help="all in turn if none is given")
    stage = parser.parse_args().stage
    WORK.mkdir(parents=True, exist_ok=True)
    for name in [stage] if stage else STAGES:
        STAGES[name]()
