"""A pair of models for bench.py: random bfloat16 weights, here and in transformers, each side in a
process of its own. On a CPU they are of middle size, on CUDA as large as w2v-BERT 2.0 and
Qwen2.5-1.5B.

    python tests/bench/pair.py SIDE LAYERS THREADS DEVICE

reads tasks from standard input, a JSON object a line, and answers each by such a line. LAYERS 0
stands for the usual number. SIDE is one of
    stock                    transformers as it is
    tuned                    with the head on targets alone and one product for the position bias
    ours                     this repository
    plain                    the same without extras/
    replayed, compiled, int8, int8 compiled    as ours, for answers
"""

import ctypes
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from full_size import ENCODER as LARGE_ENCODER  # noqa: E402
from full_size import LLM as LARGE_LLM  # noqa: E402
from full_size import memory  # noqa: E402

from conftest import randomise  # noqa: E402

NO_CHANCE = dict(layerdrop=0.0, mask_time_prob=0.0, conformer_conv_dropout=0.0)
ENCODER = dict(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048, **NO_CHANCE
)
LLM = dict(
    vocab_size=151936,
    hidden_size=768,
    intermediate_size=4480,
    num_hidden_layers=8,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    eos_token_id=None,
)
SIZES = {
    "cpu": (ENCODER, LLM),
    "cuda": (
        {name: LARGE_ENCODER.get(name, value) for name, value in ENCODER.items()},
        {name: LARGE_LLM[name] for name in LLM} | {"eos_token_id": None},
    ),
}
# Seconds of the recordings of a batch, 91 in all: of like length, or ragged.
GROUPED = [11.0, 11.2, 11.3, 11.4, 11.4, 11.5, 11.6, 11.6]
RAGGED = [18.6, 17.0, 14.5, 12.5, 10.5, 8.0, 6.0, 3.9]
INSTRUCTION_IDS = 8
ANSWER_IDS = 3.2  # a second of audio
PEERS = ("stock", "tuned")


def make_sequences(seconds: list[float]) -> list[tuple]:
    """For each recording its features (F, 160), how many audio frames the adapter makes of them,
    the ids of an instruction and of an answer."""
    from model import AdapterConfig, adapter_length

    random = torch.Generator().manual_seed(0)
    sequences = []
    for s in seconds:
        features = torch.randn(int(50 * s), 160, generator=random)
        count = INSTRUCTION_IDS + int(ANSWER_IDS * s) + 1
        ids = torch.randint(1000, 150000, (count,), generator=random)
        frames = adapter_length(len(features), AdapterConfig())
        sequences.append((features, frames, ids[:INSTRUCTION_IDS], ids[INSTRUCTION_IDS:]))
    return sequences


# --- The two sides


class Peer(nn.Module):
    """transformers' modules joined as in the reference: audio padded on the right, behind it the
    text, padded on the left."""

    def __init__(self, sizes: tuple[dict, dict], tuned: bool, device: str):
        super().__init__()
        from transformers import (
            Qwen2Config,
            Qwen2ForCausalLM,
            Wav2Vec2BertConfig,
            Wav2Vec2BertModel,
        )

        encoder, llm = sizes
        encoder_config = Wav2Vec2BertConfig(**encoder, add_adapter=True, num_adapter_layers=2)
        llm_config = Qwen2Config(**llm, bos_token_id=None, pad_token_id=None)
        with torch.device("meta"):
            self.encoder = Wav2Vec2BertModel(encoder_config)
            self.proj = nn.Linear(encoder["hidden_size"], llm["hidden_size"])
            self.llm = Qwen2ForCausalLM(llm_config)
        # The rotary embedding has buffers, which randomise would leave alone.
        rotary = type(self.llm.model.rotary_emb)(self.llm.config)
        randomise(self.bfloat16().to_empty(device=device))
        self.llm.tie_weights()
        self.llm.model.rotary_emb = rotary.to(device)
        self.bfloat16()
        self.tuned, self.device = tuned, device
        if tuned:
            gather_bias()

    def join(self, sequences: list[tuple], answers: bool) -> tuple[dict, Tensor]:
        """The arguments of the LLM, and the ids (B, T) of the text, -1 where there is none."""
        pad = nn.utils.rnn.pad_sequence
        features = pad([x for x, *_ in sequences], batch_first=True).bfloat16()
        lengths = torch.tensor([len(x) for x, *_ in sequences])
        mask = (torch.arange(features.shape[1]) < lengths[:, None]).long().to(self.device)
        states = self.encoder(features.to(self.device), attention_mask=mask).last_hidden_state
        audio = self.proj(states)  # (B, A, D)

        lengths = torch.tensor([frames for _, frames, *_ in sequences])
        mask = torch.arange(audio.shape[1]) < lengths[:, None]
        texts = [torch.cat(ids) if answers else ids[0] for _, _, *ids in sequences]
        text = pad(texts, batch_first=True, padding_side="left", padding_value=-1)
        mask = torch.cat([mask, text >= 0], 1).long().to(self.device)
        text = text.to(self.device)
        x = torch.cat([audio, self.llm.get_input_embeddings()(text.clamp(min=0))], 1)
        return {"inputs_embeds": x, "attention_mask": mask}, text

    def forward(self, sequences: list[tuple]) -> Tensor:
        arguments, labels = self.join(sequences, True)
        for label, (*_, answer) in zip(labels, sequences, strict=True):
            label[: -len(answer)] = -1
        size = labels.shape[1]
        if not self.tuned:
            logits = self.llm(**arguments, use_cache=False, logits_to_keep=size).logits
            logits = logits[:, :-1].float().flatten(0, 1)
            return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-1)
        # The head on the positions before targets alone, as one product of two dimensions.
        before = F.pad(labels[:, 1:] >= 0, (arguments["inputs_embeds"].shape[1] - size, 1))
        logits = self.llm(**arguments, use_cache=False, logits_to_keep=before).logits
        return F.cross_entropy(logits.float(), labels[:, 1:][labels[:, 1:] >= 0])

    @torch.no_grad()
    def answer(self, sequences: list[tuple], count: int):
        arguments, _ = self.join(sequences, False)
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return self.llm.generate(**arguments, **options)

    def prepare(self, what: str) -> None:
        for part in (self.encoder, self.llm):
            if "checkpointing" in what:
                part.activation_checkpointing_enable()
            else:
                part.activation_checkpointing_disable()


def gather_bias() -> None:
    """Takes the peer's position bias from one product with the distances that have an embedding,
    instead of a table (F, F, d)."""
    from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert as peer

    def gathered(module, query, key):
        at = torch.arange(key.shape[2], device=key.device)
        left, right = module.left_max_position_embeddings, module.right_max_position_embeddings
        distance = (at - at[:, None]).clamp(-left, right) + left
        bias = query @ module.distance_embedding.weight.T * module.scaling
        return query, bias.gather(-1, distance.expand(*bias.shape[:2], -1, -1))

    peer._apply_relative_key_position_encoding = gathered


class Ours(nn.Module):
    """Our model, of the same weights."""

    def __init__(self, sizes: tuple[dict, dict], side: str, device: str):
        super().__init__()
        import train  # noqa: F401  (before memory is measured)
        from sample import decode_step

        self.sizes, self.side, self.device = sizes, side, device
        self.state = peer_state(Peer(sizes, False, device))
        self.states = {}  # lengths -> encoder states of the batch
        self.step = decode_step
        self.prepare("")
        if "int8" in side:
            from extras.int8 import quantise

            quantise(self.model.llm)
        if "compiled" in side or "replayed" in side:
            from extras.decode import FastDecode

            self.step = FastDecode(decode_step, pays=0 if "compiled" in side else math.inf)

    def build(self, kernels) -> nn.Module:
        """The model with these operators; all models that are built share their weights."""
        import model

        encoder_config = model.EncoderConfig(**self.sizes[0])
        llm_config = model.LLMConfig(model_type="qwen2", **self.sizes[1] | {"eos_token_id": []})
        adapter_config = model.AdapterConfig.between(encoder_config, llm_config)
        with torch.device("meta"):
            encoder = model.SpeechEncoder(encoder_config, torch.bfloat16, kernels)
            adapter = model.LengthAdapter(adapter_config, torch.bfloat16, kernels)
            llm = model.LLM(llm_config, torch.bfloat16, kernels)
        speech_lm = model.SpeechLM(encoder, adapter, llm)
        speech_lm.load_state_dict(self.state, strict=True, assign=True)
        return speech_lm

    def prepare(self, what: str) -> None:
        from model import PLAIN
        from train import can_compile, training_kernels

        compiled = self.device == "cuda" and self.side != "plain" and can_compile()
        kernels = training_kernels(self.device, "checkpointing" in what, compiled)
        if self.side == "plain":
            kernels = replace(PLAIN, call_layer=kernels.call_layer)
        self.model = self.build(kernels)
        self.cached = "cached" in what

    def batch(self, sequences: list[tuple], answers: bool = True) -> dict:
        from data import collate
        from model import AUDIO
        from train import on_device

        examples = []
        for features, frames, instruction, answer in sequences:
            ids = [AUDIO] * frames + instruction.tolist() + answer.tolist() * answers
            examples.append((ids, len(answer) * answers, features))
        return on_device(collate(examples), self.device)

    def forward(self, sequences: list[tuple]) -> Tensor:
        from model import SpeechLM
        from train import CachedEncoder

        batch, model = self.batch(sequences), self.model
        if self.cached:  # the first of the runs computes the encoder's states
            key = tuple(batch["lengths"])
            if key not in self.states:
                with torch.no_grad():
                    self.states[key] = model.encoder(batch["features"], batch["lengths"])
            batch["features"] = self.states[key]
            model = SpeechLM(CachedEncoder(), model.adapter, model.llm)
        loss, count = model(**batch)
        return loss / count

    @torch.no_grad()
    def answer(self, sequences: list[tuple], count: int) -> list[list[int]]:
        from sample import generate

        batch = self.batch(sequences, False)
        audio, _ = self.model.encode(batch["features"], batch["lengths"])
        x = self.model.embed(batch["ids"], audio)
        options = {"max_new_tokens": count, "step": self.step}
        return generate(self.model.llm, x, batch["ids_lengths"], **options)


def peer_state(peer: Peer) -> dict[str, Tensor]:
    """The peer's weights by our names."""
    state = {f"llm.{name}": p for name, p in peer.llm.named_parameters()}
    for name, p in peer.encoder.named_parameters():
        state[name if name.startswith("adapter.") else f"encoder.{name}"] = p
    for name, p in peer.proj.named_parameters():
        state[f"adapter.enc_to_dec_proj.{name}"] = p
    return state


# --- Tasks


def training_step(side: nn.Module, what: str, seconds: list[float]) -> Callable[[], float]:
    """A function that takes one step: loss, gradients and, where everything is trained, fused
    AdamW. It returns the loss."""
    sequences = make_sequences(seconds)
    full = "full" in what
    side.prepare(what)
    side.train()
    adapter = ("encoder.adapter.", "proj.", "model.adapter.")
    for name, p in side.named_parameters():
        p.grad = None
        p.requires_grad_(full or name.startswith(adapter))
    trained = [p for p in side.parameters() if p.requires_grad]
    optimizer = None

    def run() -> float:
        nonlocal optimizer
        for p in trained:  # those of a run that did not fit into memory
            p.grad = None
        if full and optimizer is None:
            optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        loss = side(sequences)
        loss.backward()
        if full:
            optimizer.step()
        for p in trained:
            p.grad = None
        return loss.item()

    return run


def count_operations(side: Ours, what: str, seconds: list[float]) -> Callable[[], int]:
    """A function that returns the floating point operations of a step's products."""
    from torch.utils.flop_counter import FlopCounterMode

    from model import default_kernels

    def products(_, a, b, **options) -> int:
        return 2 * math.prod(a) * b[-1]

    def count() -> int:
        run = training_step(side, what, seconds)
        side.model = side.build(default_kernels("cpu"))  # plain products, not compiled
        side.train()
        # The counter does not know the product that adds in place.
        in_place = {torch.ops.aten.baddbmm_: products}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            run()
        return counter.get_total_flops()

    return count


def multiply(device: str) -> tuple[Callable, int]:
    """A large product in bfloat16, and its floating point operations."""
    size = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size).bfloat16().to(device)
    return lambda: a @ b, 2 * size**3


def read(device: str) -> tuple[Callable, int]:
    """A large sum, and the bytes that it reads."""
    x = torch.ones(2**27 if device == "cpu" else 2**30, dtype=torch.float32, device=device)
    return lambda: x.sum(), x.nbytes


def profile(side: nn.Module, what: str, seconds: list[float], device: str) -> Callable:
    """A function that returns the kernels of a step, [name, times, seconds], the longest first."""
    from torch.profiler import ProfilerActivity

    run = training_step(side, what, seconds)
    kind = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA}[device]

    def table() -> list[list]:
        run()
        with torch.profiler.profile(activities=[kind]) as profiler:
            run()
        rows = []
        for event in profiler.key_averages():
            spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            if spent > 0:  # calls of the host take none of the device
                rows.append([event.key, event.count, spent / 1e6])
        return sorted(rows, key=lambda row: -row[2])

    return table


def make_run(side: nn.Module, task: dict, device: str) -> tuple[Callable, int | None]:
    """A function that does a task, and how much work that is, where it is known."""
    if task["do"] == "step":
        return training_step(side, task["what"], task["seconds"]), None
    if task["do"] == "count":
        return count_operations(side, task["what"], task["seconds"]), None
    if task["do"] == "profile":
        return profile(side, task["what"], task["seconds"], device), None
    if task["do"] == "answer":
        sequences = make_sequences(task["seconds"])
        side.eval()
        return lambda: side.answer(sequences, task["count"]), None
    if task["do"] == "rest":
        return lambda: None, None
    return {"multiply": multiply, "read": read}[task["do"]](device)


def measure(run: Callable, device: str) -> dict:
    """Seconds, infinitely many if it does not fit into memory, and the peak of memory of a run, in
    bytes, and what it returns, if that is a number or a table."""
    on_cpu = device == "cpu"
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    wall, cpu = time.perf_counter(), time.process_time()
    fits, value = True, None
    try:
        value = run()
    except torch.OutOfMemoryError:
        fits = False
    if not on_cpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    wall = wall if fits else math.inf
    peak = memory("VmHWM") if on_cpu else torch.cuda.max_memory_allocated()
    value = value if isinstance(value, float | int | list) else None
    return {"wall": wall, "cpu": cpu, "peak": peak, "value": value}


def main() -> None:
    name, layers, threads, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(threads)
    sizes = SIZES[device]
    if layers:
        sizes = tuple(size | {"num_hidden_layers": layers} for size in sizes)
    if name in PEERS:
        side = Peer(sizes, name == "tuned", device)
    else:
        side = Ours(sizes, name, device)
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    trim(0)  # what was only needed to make the weights
    bare = memory("VmRSS") if device == "cpu" else 0
    if name not in PEERS:
        from model import keep_freed_memory

        keep_freed_memory()  # as train.py and eval.py do
    print("{}", flush=True)  # ready

    last, run, work = None, None, None
    for line in sys.stdin:
        task = json.loads(line)
        if task != last:
            run, last = None, task  # gives its memory back first, to the other sides, too
            trim(0)
            if device == "cuda":
                torch.cuda.empty_cache()
            run, work = make_run(side, task, device)
        reply = measure(run, device)
        reply["peak"] = (reply["peak"] - bare) / 1e9  # in GB, on a CPU above libraries and weights
        print(json.dumps(reply | {"work": work}), flush=True)


class Worker:
    """Such a process, seen from outside: call it with a task, once it is ready."""

    def __init__(self, side: str, layers: int = 0, threads: int = 1, device: str = "cpu"):
        environment = dict(os.environ)
        if side not in PEERS:  # what train.py sets, which counts only before torch is loaded
            environment |= {"GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}
        self.side = side
        self.process = subprocess.Popen(
            [sys.executable, __file__, side, str(layers), str(threads), device],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def wait(self, task: object = "starting") -> dict:
        """The next reply. Raises RuntimeError if the process has ended."""
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.side}: ended on {task}")

    def __call__(self, **task) -> dict:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self.wait(task)


if __name__ == "__main__":
    main()
