"""Speed: python tests/bench.py features | manifest | loader | corpora | step | decode | plan [--rounds N] [--threads N] [--cpu]

features: ours and transformers' take turns, round by round; printed are medians and their ratio. manifest: a manifest
of a million rows. loader: how fast the demo's batches are read, against how fast a step without the encoder cache
uses them. corpora: 100,000 tiny clips in the layout of Common Voice made into a manifest. step, decode: training steps and answers of a mid-size pair (encoder 512 x 8 layers, LLM 768 x 8 layers,
vocabulary 151,936), 8 rows, on random bfloat16 weights that transformers has too; the table is left in out/bench/ as
JSON. plan: what train.py --dry-run says of the peak memory of runs of that size, against what they then take.
"""

import argparse
import gc
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import randomise
from full_size import memory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


CLOCK = time.perf_counter  # or process_time, see --cpu


def interleaved(rounds, *runs):
    """Median seconds of each run, taken in turns; the first round only warms up."""
    times = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, taken in zip(runs, times):
            start = CLOCK()
            run()
            taken.append(CLOCK() - start)
    return [statistics.median(taken[1:]) for taken in times]


def features(rounds):
    from data import fbank
    from transformers import SeamlessM4TFeatureExtractor
    extractor = SeamlessM4TFeatureExtractor()
    print(f"{'features':24}{'peer ms':>10}{'ours ms':>10}{'ratio':>8}{'ours, audio-s/s':>18}")
    for name, seconds in [("1 x 2 s", [2]), ("1 x 10 s", [10]), ("1 x 60 s", [60]), ("8 x 3 to 17 s", range(3, 19, 2))]:
        waves = [0.1 * torch.randn(16000 * s) for s in seconds]
        arrays = [wave.numpy() for wave in waves]
        peer, ours = interleaved(rounds, lambda: extractor(arrays, sampling_rate=16000, return_tensors="pt"),
                                 lambda: fbank(waves))
        print(f"{name:24}{1e3 * peer:10.1f}{1e3 * ours:10.1f}{peer / ours:7.1f}x{sum(seconds) / ours:18.0f}")


def manifest(_):
    from data import Manifest
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for i in range(1_000_000):
            file.write(json.dumps({
                "audio": f"train-{i // 1000:03d}.tar/{i}.flac", "duration": 3 + i % 2000 / 100, "text": "some words " * 12,
                "task": "asr", "speaker": f"s{i % 900}", "corpus": "c", "licence": "CC-BY-4.0"}) + "\n")
        file.flush()
        print(f"before: {memory('VmRSS') / 2**20:.0f} MB")
        start = time.perf_counter()
        rows = Manifest(file.name)
        print(f"opened {len(rows):,} rows in {time.perf_counter() - start:.2f} s, peak {memory('VmHWM') / 2**20:.0f} MB")
        start = time.perf_counter()
        rows.split(["asr"], 30, lambda row: None)
        print(f"read through in {time.perf_counter() - start:.2f} s, peak {memory('VmHWM') / 2**20:.0f} MB")


def loader(_):
    import train
    from data import Examples, schedule
    cfg = train.parse(["--cache-gb", "0"])
    cfg, rates, tasks = train.settle(cfg)
    manifests, weights, dev, *_ = train.open_manifests(cfg, tasks)
    model, tokenizer, _ = train.build(cfg, rates)
    examples = Examples([*manifests, dev], tokenizer, model.llm.config.eos_token_id[0], model.adapter.config)
    order = schedule(manifests, weights, examples.size, cfg.batch_frames, cfg.batch_tokens, 0)
    scheduled = list(itertools.islice(order, 12))
    start = time.perf_counter()
    batches = [examples[batch] for batch in scheduled]
    read = time.perf_counter() - start
    audio = sum(sum(batch["lengths"]) for batch in batches) / 50
    steps = []
    for batch in batches[:4]:
        start = time.perf_counter()
        loss, count = model(**train.on_device(batch, "cpu"))
        (loss / count).backward()
        steps.append((time.perf_counter() - start) / (sum(batch["lengths"]) / 50))
    step = statistics.median(steps)
    print(f"one worker reads {audio / read:.0f} audio-s/s, a step uses {1 / step:.0f}: {step * audio / read:.1f} times")


# ----------------------------------------------------------------------------------------------------------------------
# The mid-size pair

ENCODER = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048, layerdrop=0.0,
               mask_time_prob=0.0, conformer_conv_dropout=0.0)
LLM = dict(vocab_size=151936, hidden_size=768, intermediate_size=4480, num_hidden_layers=8, num_attention_heads=12,
           num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None)
SECONDS = {"grouped": [11.0, 11.2, 11.3, 11.4, 11.4, 11.5, 11.6, 11.6],  # 91 s of audio each
           "ragged": [18.6, 17.0, 14.5, 12.5, 10.5, 8.0, 6.0, 3.9]}
INSTRUCTION = 8  # ids
SAID = 3.2  # ids of the answer a second


def rows_of(kind):
    """Of each row its features (F, 160), audio frames after the adapter, instruction and answer (ids)."""
    from model import AdapterConfig, adapter_length
    random, made = torch.Generator().manual_seed(0), []
    for seconds in SECONDS[kind]:
        x = torch.randn(int(50 * seconds), 160, generator=random)
        ids = torch.randint(1000, 150000, (INSTRUCTION + int(SAID * seconds) + 1,), generator=random)
        made.append((x, adapter_length(len(x), AdapterConfig()), ids[:INSTRUCTION], ids[INSTRUCTION:]))
    return made


class Peer(torch.nn.Module):
    """transformers' modules joined as in the reference: audio padded on the right, behind it the text, on the left."""

    def __init__(self):
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM, Wav2Vec2BertConfig, Wav2Vec2BertModel
        config = Wav2Vec2BertConfig(**ENCODER, add_adapter=True, num_adapter_layers=2)
        with torch.device("meta"):
            self.encoder, self.proj = Wav2Vec2BertModel(config), torch.nn.Linear(512, 768)
            self.llm = Qwen2ForCausalLM(Qwen2Config(**LLM, bos_token_id=None, pad_token_id=None))
        rotary = type(self.llm.model.rotary_emb)(self.llm.config)  # has buffers, which randomise leaves alone
        randomise(self.bfloat16().to_empty(device="cpu"))
        self.llm.tie_weights()
        self.llm.model.rotary_emb = rotary
        self.bfloat16()

    def heard(self, rows):
        """Features of rows -> audio embeddings (B, A, D), their mask."""
        features = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True).bfloat16()
        mask = torch.arange(features.shape[1]) < torch.tensor([len(row[0]) for row in rows])[:, None]
        audio = self.encoder(features, attention_mask=mask.long()).last_hidden_state
        return self.proj(audio), torch.arange(audio.shape[1]) < torch.tensor([row[1] for row in rows])[:, None]

    def joined(self, rows, answers):
        """The arguments of the LLM, and the labels (B, T) of the text."""
        audio, mask = self.heard(rows)
        texts = [torch.cat(row[2:]) if answers else row[2] for row in rows]
        text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side="left", padding_value=-1)
        x = torch.cat([audio, self.llm.get_input_embeddings()(text.clamp(min=0))], 1)
        return {"inputs_embeds": x, "attention_mask": torch.cat([mask, text >= 0], 1).long()}, text

    def forward(self, rows, tuned):
        arguments, labels = self.joined(rows, True)
        for label, row in zip(labels, rows):
            label[:-len(row[3])] = -1
        if tuned:  # the head on the targets' rows alone, as one two-dimensional product
            before = F.pad(labels[:, 1:] >= 0, (arguments["inputs_embeds"].shape[1] - labels.shape[1], 1))
            logits = self.llm(**arguments, use_cache=False, logits_to_keep=before).logits
            return F.cross_entropy(logits.float(), labels[:, 1:][labels[:, 1:] >= 0])
        logits = self.llm(**arguments, use_cache=False, logits_to_keep=labels.shape[1]).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-1)


def tune(on):
    """Lets the peer gather its position bias from one product with the 73 distances, instead of a (F, F, d) table."""
    from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert as peer

    def gathered(module, query, key):
        at, left = torch.arange(key.shape[2]), module.left_max_position_embeddings
        distance = (at - at[:, None]).clamp(-left, module.right_max_position_embeddings) + left
        bias = query @ module.distance_embedding.weight.T * module.scaling  # (B, H, F, 73)
        return query, bias.gather(-1, distance.expand(*bias.shape[:2], -1, -1))

    peer.stock = getattr(peer, "stock", peer._apply_relative_key_position_encoding)
    peer._apply_relative_key_position_encoding = gathered if on else peer.stock


def ours_of(peer):
    """Our model on the peer's weights, shared with it."""
    from model import AdapterConfig, EncoderConfig, LengthAdapter, LLM as Ours, LLMConfig, SpeechEncoder, SpeechLM
    with torch.device("meta"):
        llm = LLMConfig.from_dict({"model_type": "qwen2", **LLM, "rope_theta": 10000.0})
        model = SpeechLM(SpeechEncoder(EncoderConfig(**ENCODER), torch.bfloat16),
                         LengthAdapter(AdapterConfig(**ENCODER, output_size=768), torch.bfloat16), Ours(llm, torch.bfloat16))
    state = {f"llm.{name}": p for name, p in peer.llm.named_parameters()}
    for name, p in peer.encoder.named_parameters():
        state[name if name.startswith("adapter.") else f"encoder.{name}"] = p
    state |= {f"adapter.enc_to_dec_proj.{name}": p for name, p in peer.proj.named_parameters()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.train()


def batch_of(rows):
    from data import collate
    from model import AUDIO
    return collate([([AUDIO] * n + instruction.tolist() + answer.tolist(), len(answer), x)
                    for x, n, instruction, answer in rows])


def step_of(who, model, what, kind):
    """A function that takes one training step (loss and gradients, no optimizer) and returns the loss."""
    rows = rows_of(kind)
    batch = batch_of(rows)
    if who == "ours" and "cached" in what:
        with torch.no_grad():
            batch["features"] = model.encoder(batch["features"], batch["lengths"])

    def step():
        for name, p in model.named_parameters():
            p.grad = None
            p.requires_grad_("full" in what or name.startswith(("adapter.", "encoder.adapter.", "proj.")))
        if who == "ours":
            encoder = model.encoder
            encoder.checkpointing = model.llm.checkpointing = "checkpointing" in what
            if "cached" in what:
                model.encoder = None
            loss, count = model(**batch)
            (loss / count).backward()
            model.encoder = encoder
            return loss.item() / count
        tune(who == "peer, tuned")
        loss = model(rows, who == "peer, tuned")
        loss.backward()
        return loss.item()

    return step


def peak_of(who, what, kind):
    """Peak memory in GB of one step in a process of its own, above that of the modules and libraries."""
    command = [sys.executable, __file__, "peak", "--of", who, what, kind]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def write(name, rows):
    path = ROOT / "out/bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    path.write_text(json.dumps({"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
                                "rows": rows}, indent=2) + "\n")
    print(path.relative_to(ROOT))


def step(rounds):
    peer = Peer().train()
    ours, found = ours_of(peer), []
    audio = rows_of("grouped")[0][0][:16 * 4]  # of a row whose length divides by 4 both have the same loss
    whole = [(audio, 16, *rows_of("grouped")[0][2:])]
    loss, count = ours(**batch_of(whole))
    print(f"loss of one row: ours {loss.item() / count:.4f}, peer {peer(whole, False).item():.4f}, "
          f"tuned {peer(whole, True).item():.4f}")
    print(f"{'one step, 91 s of audio':34}{'stock s':>9}{'tuned s':>9}{'ours s':>9}{'stock/ours':>11}{'tuned/ours':>11}"
          f"{'peak GB, tuned':>16}{'ours':>7}{'padding, peer':>15}")
    whats = [("align", kind) for kind in SECONDS] + [("align, cached encoder", "grouped"), ("full", "grouped"),
                                                    ("full", "ragged"), ("full, checkpointing", "ragged")]
    for what, kind in whats:
        runs = [step_of("peer, stock", peer, what, kind), step_of("peer, tuned", peer, what, kind),
                step_of("ours", ours, what, kind)]
        stock, tuned, own = interleaved(rounds, *runs)
        gc.collect()
        peaks = [peak_of(who, what, kind) for who in ("peer, tuned", "ours")]
        padding = 1 - sum(SECONDS[kind]) / len(SECONDS[kind]) / max(SECONDS[kind])
        found.append(dict(step=what, batch=kind, stock_s=stock, tuned_s=tuned, ours_s=own, peak_tuned_gb=peaks[0],
                          peak_ours_gb=peaks[1], padding_peer=padding))
        print(f"{what + ', ' + kind:34}{stock:9.2f}{tuned:9.2f}{own:9.2f}{stock / own:10.2f}x{tuned / own:10.2f}x"
              f"{peaks[0]:16.2f}{peaks[1]:7.2f}{100 * padding:14.1f}%", flush=True)
    write("step", found)


def peak(_, who, what, kind):
    peer = Peer().train()
    run = step_of(who, ours_of(peer) if who == "ours" else peer, what, kind)
    before = memory("VmRSS")
    run()
    print((memory("VmHWM") - before) / 1e9)


@torch.no_grad()
def decode(rounds):
    peer = Peer()
    ours, rows, found = ours_of(peer).eval(), rows_of("ragged"), []
    tune(False)

    def own(some, count):
        batch = batch_of([(*row[:3], row[3][:0]) for row in some])
        del batch["targets"]
        return ours.generate(batch.pop("ids"), batch.pop("ids_lengths"), **batch, max_new_tokens=count)

    def theirs(some, count):
        return peer.llm.generate(**peer.joined(some, False)[0], max_new_tokens=count, do_sample=False, pad_token_id=0)

    print(f"{'decoding':34}{'peer ms':>9}{'ours ms':>9}{'peer/ours':>11}")
    for some in (rows[:1], rows):
        first, own_first, more, own_more = interleaved(
            rounds, lambda: theirs(some, 1), lambda: own(some, 1), lambda: theirs(some, 33), lambda: own(some, 33))
        for name, a, b in (("first token", first, own_first), ("each later", (more - first) / 32, (own_more - own_first) / 32)):
            found.append(dict(figure=name, batch=len(some), peer_s=a, ours_s=b))
            print(f"{f'{name}, batch {len(some)}':34}{1e3 * a:9.1f}{1e3 * b:9.1f}{a / b:10.2f}x", flush=True)
    write("decode", found)


def corpora(_rounds, count=100_000):
    import numpy as np
    import soundfile
    from prepare import corpora
    with tempfile.TemporaryDirectory() as place:
        clips = Path(place) / "cv" / "en" / "clips"
        clips.mkdir(parents=True)
        soundfile.write(clips / "0.mp3", np.zeros(1600, np.int16), 16000, format="WAV")
        data = (clips / "0.mp3").read_bytes()
        with open(clips.parent / "train.tsv", "w") as rows, open(clips.parent / "clip_durations.tsv", "w") as durations:
            rows.write("client_id\tpath\tsentence\n")
            durations.write("clip\tduration[ms]\n")
            for i in range(int(count)):
                (clips / f"{i}.mp3").write_bytes(data)
                rows.write(f"s{i % 900}\t{i}.mp3\tThis is sentence {i} of so many.\n")
                durations.write(f"{i}.mp3\t100\n")
        start = time.perf_counter()
        corpora.main(["commonvoice", f"{place}/cv", f"{place}/out.jsonl"])
        print(f"{int(count):,} clips in {time.perf_counter() - start:.1f} s, peak {memory('VmHWM') / 2**20:.0f} MB")


PLANS = {"align": [], "align, no encoder cache": ["--cache-gb", "0"], "ift": ["--phase", "ift"],
         "ift, --checkpointing": ["--phase", "ift", "--checkpointing"],
         "ift, --lora-rank 16": ["--phase", "ift", "--lora-rank", "16"]}


def plan(_rounds):
    import os

    import numpy as np
    import soundfile
    from conftest import make_project
    from model import LLM as Ours, EncoderConfig, LLMConfig, SpeechEncoder
    with tempfile.TemporaryDirectory() as place:
        place, random = Path(place), np.random.default_rng(0)
        make_project(place)
        tokenizer = (place / "llm" / "tokenizer.json").read_bytes()
        SpeechEncoder(EncoderConfig(**ENCODER)).save_pretrained(place / "encoder")
        Ours(LLMConfig.from_dict({"model_type": "qwen2", **LLM, "eos_token_id": 0})).bfloat16().save_pretrained(place / "llm")
        (place / "llm" / "tokenizer.json").write_bytes(tokenizer)
        for split in ("train", "dev"):
            rows = []
            for i, seconds in enumerate(2 * SECONDS["ragged"]):
                soundfile.write(place / f"{split}{i}.wav", 0.1 * random.standard_normal(int(16000 * seconds)), 16000)
                rows.append({"audio": f"{split}{i}.wav", "duration": seconds, "text": "one two " * int(seconds),
                             "task": "asr", "corpus": "noise", "licence": "CC0-1.0"})
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = [sys.executable, ROOT / "train.py", "--encoder", place / "encoder", "--llm", place / "llm", "--data",
               place / "train.jsonl", "--dev", place / "dev.jsonl", "--out", place / "out", "--steps", "2", "--eval-rows",
               "2", "--eval-clips", "1", "--workers", "0"]
        print(f"{'peak memory of a run':34}{'planned GB':>11}{'measured GB':>12}{'ratio':>7}")
        for name, options in PLANS.items():
            said = subprocess.run([*own, *options, "--dry-run"], capture_output=True, text=True, check=True).stdout
            planned = float(re.search(r"peak ([\d.]+) GB", said)[1])
            run = subprocess.Popen([*own, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, used = os.wait4(run.pid, 0)
            run.returncode = os.waitstatus_to_exitcode(status)
            measured = used.ru_maxrss * 1024 / 1e9
            print(f"{name:34}{planned:11.2f}{measured:12.2f}{planned / measured:7.2f}" + " failed" * bool(status), flush=True)


if __name__ == "__main__":
    runs = {f.__name__: f for f in (features, manifest, loader, corpora, step, decode, peak, plan)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="features", choices=runs)
    parser.add_argument("--rounds", type=int, default=7, help="of which the medians are taken")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="seconds of CPU instead of the wall's, on a busy machine")
    parser.add_argument("--of", nargs=3, default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    CLOCK = time.process_time if args.cpu else CLOCK
    runs[args.what](args.rounds, *args.of)
