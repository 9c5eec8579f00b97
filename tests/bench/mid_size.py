"""A pair of models for tests/bench.py: random bfloat16 weights, here and in transformers, each in a process of its own. On the
CPU they are of middle size, on CUDA as large as w2v-BERT 2.0 and Qwen2.5-1.5B.

    python tests/mid_size.py WHO LAYERS THREADS DEVICE     reads tasks from standard input, a JSON object a line, and answers so

WHO is "stock" (transformers as it is), "tuned" (with the head on the targets' rows alone and the position bias gathered
from one product), "ours", and for answers "compiled", "int8" or "int8 compiled".
"""

import ctypes
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import randomise  # noqa: E402
from full_size import ENCODER as LARGE_ENCODER, LLM as LARGE_LLM, memory  # noqa: E402
from prepare.memory import keep_freed  # noqa: E402

NO_CHANCE = dict(layerdrop=0.0, mask_time_prob=0.0, conformer_conv_dropout=0.0)
ENCODER = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048, **NO_CHANCE)
LLM = dict(vocab_size=151936, hidden_size=768, intermediate_size=4480, num_hidden_layers=8, num_attention_heads=12,
           num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None)
LARGE_ENCODER = {name: LARGE_ENCODER[name] for name in ENCODER if name in LARGE_ENCODER} | NO_CHANCE
SIZES = {"cpu": (ENCODER, LLM), "cuda": (LARGE_ENCODER, {name: LARGE_LLM[name] for name in LLM} | {"eos_token_id": None})}
GROUPED = [11.0, 11.2, 11.3, 11.4, 11.4, 11.5, 11.6, 11.6]  # seconds of the rows of a batch, 91 in all
RAGGED = [18.6, 17.0, 14.5, 12.5, 10.5, 8.0, 6.0, 3.9]
INSTRUCTION = 8  # ids
SAID = 3.2  # ids of the answer a second


def rows_of(seconds):
    """Of each row its features (F, 160), audio frames after the adapter, instruction and answer (ids)."""
    from model import AdapterConfig, adapter_length
    random, made = torch.Generator().manual_seed(0), []
    for s in seconds:
        x = torch.randn(int(50 * s), 160, generator=random)
        ids = torch.randint(1000, 150000, (INSTRUCTION + int(SAID * s) + 1,), generator=random)
        made.append((x, adapter_length(len(x), AdapterConfig()), ids[:INSTRUCTION], ids[INSTRUCTION:]))
    return made


# ----------------------------------------------------------------------------------------------------------------------
# The two sides


class Peer(torch.nn.Module):
    """transformers' modules joined as in the reference: audio padded on the right, behind it the text, on the left."""

    def __init__(self, sizes, tuned, device):
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM, Wav2Vec2BertConfig, Wav2Vec2BertModel
        self.tuned, (encoder, llm) = tuned, sizes
        config = Wav2Vec2BertConfig(**encoder, add_adapter=True, num_adapter_layers=2)
        with torch.device("meta"):
            self.encoder, self.proj = Wav2Vec2BertModel(config), torch.nn.Linear(encoder["hidden_size"], llm["hidden_size"])
            self.llm = Qwen2ForCausalLM(Qwen2Config(**llm, bos_token_id=None, pad_token_id=None))
        rotary = type(self.llm.model.rotary_emb)(self.llm.config)  # has buffers, which randomise leaves alone
        randomise(self.bfloat16().to_empty(device=device))
        self.llm.tie_weights()
        self.llm.model.rotary_emb = rotary.to(device)
        self.bfloat16()
        if tuned:
            gather_bias()

    def joined(self, rows, answers):
        """The arguments of the LLM, and the labels (B, T) of the text."""
        features = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True).bfloat16()
        mask, device = torch.arange(features.shape[1]) < torch.tensor([len(row[0]) for row in rows])[:, None], self.proj.weight.device
        audio = self.encoder(features.to(device), attention_mask=mask.long().to(device)).last_hidden_state
        audio = self.proj(audio)  # (B, A, D)
        mask = torch.arange(audio.shape[1]) < torch.tensor([row[1] for row in rows])[:, None]
        texts = [torch.cat(row[2:]) if answers else row[2] for row in rows]
        text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side="left", padding_value=-1)
        mask, text = torch.cat([mask, text >= 0], 1).long().to(device), text.to(device)
        x = torch.cat([audio, self.llm.get_input_embeddings()(text.clamp(min=0))], 1)
        return {"inputs_embeds": x, "attention_mask": mask}, text

    def forward(self, rows):
        arguments, labels = self.joined(rows, True)
        for label, row in zip(labels, rows):
            label[:-len(row[3])] = -1
        if self.tuned:  # the head on the targets' rows alone, as one two-dimensional product
            before = F.pad(labels[:, 1:] >= 0, (arguments["inputs_embeds"].shape[1] - labels.shape[1], 1))
            logits = self.llm(**arguments, use_cache=False, logits_to_keep=before).logits
            return F.cross_entropy(logits.float(), labels[:, 1:][labels[:, 1:] >= 0])
        logits = self.llm(**arguments, use_cache=False, logits_to_keep=labels.shape[1]).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-1)

    @torch.no_grad()
    def answer(self, rows, count):
        return self.llm.generate(**self.joined(rows, False)[0], max_new_tokens=count, do_sample=False, pad_token_id=0)

    def prepare(self, what):
        checkpointing = "checkpointing" in what
        for part in (self.encoder, self.llm):
            part.gradient_checkpointing_enable() if checkpointing else part.gradient_checkpointing_disable()


def gather_bias():
    """Takes the peer's position bias from one product with the 73 distances, instead of a (F, F, d) table."""
    from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert as peer

    def gathered(module, query, key):
        at, left = torch.arange(key.shape[2], device=key.device), module.left_max_position_embeddings
        distance = (at - at[:, None]).clamp(-left, module.right_max_position_embeddings) + left
        bias = query @ module.distance_embedding.weight.T * module.scaling  # (B, H, F, 73)
        return query, bias.gather(-1, distance.expand(*bias.shape[:2], -1, -1))

    peer._apply_relative_key_position_encoding = gathered


class Ours(torch.nn.Module):
    """Our model, of the same weights."""

    def __init__(self, sizes, who, device):
        super().__init__()
        import train  # noqa: F401  before memory is measured
        from model import AdapterConfig, EncoderConfig, LengthAdapter, LLM as Decoder, LLMConfig, SpeechEncoder, SpeechLM
        peer, dtype = Peer(sizes, False, device), torch.bfloat16
        encoder, llm = EncoderConfig(**sizes[0]), LLMConfig(model_type="qwen2", **sizes[1] | {"eos_token_id": []})
        with torch.device("meta"):
            self.model = SpeechLM(SpeechEncoder(encoder, dtype), LengthAdapter(AdapterConfig.between(encoder, llm), dtype),
                                  Decoder(llm, dtype))
        state = {f"llm.{name}": p for name, p in peer.llm.named_parameters()}
        for name, p in peer.encoder.named_parameters():
            state[name if name.startswith("adapter.") else f"encoder.{name}"] = p
        state |= {f"adapter.enc_to_dec_proj.{name}": p for name, p in peer.proj.named_parameters()}
        self.model.load_state_dict(state, strict=True, assign=True)
        self.encoder, self.batches, self.device = self.model.encoder, {}, device
        if who != "ours":
            from prepare.fast_decode import FastDecode, quantise
            quantise(self.model.llm) if "int8" in who else None
            self.model.llm.fast = FastDecode(pays=0) if "compiled" in who else None

    def batch(self, rows, answers=True):
        from data import collate
        from model import AUDIO
        from train import on_device
        made = collate([([AUDIO] * n + instruction.tolist() + answer.tolist() * answers, len(answer) * answers, x)
                        for x, n, instruction, answer in rows])
        return on_device(made, self.device)

    def prepare(self, what):
        self.encoder.checkpointing = self.model.llm.checkpointing = "checkpointing" in what
        self.model.encoder, self.cached = None if "cached" in what else self.encoder, "cached" in what

    def forward(self, rows):
        batch = self.batch(rows)
        if self.cached:  # encoded before, in the first of the runs
            key = tuple(batch["lengths"])
            if key not in self.batches:
                with torch.no_grad():
                    self.batches[key] = self.encoder(batch["features"], batch["lengths"])
            batch["features"] = self.batches[key]
        loss, count = self.model(**batch)
        return loss / count

    def answer(self, rows, count):
        self.prepare("")
        batch = self.batch(rows, False)
        del batch["targets"]
        return self.model.generate(batch.pop("ids"), batch.pop("ids_lengths"), **batch, max_new_tokens=count)


# ----------------------------------------------------------------------------------------------------------------------
# A process that does as it is told


def training_step(side, what, seconds):
    """A function that takes one step: loss, gradients and, where everything is trained, fused AdamW; returns the loss."""
    rows, full, optimizer = rows_of(seconds), "full" in what, None
    side.train().prepare(what)
    for name, p in side.named_parameters():
        p.grad = None
        p.requires_grad_(full or name.startswith(("encoder.adapter.", "proj.", "model.adapter.")))
    trained = [p for p in side.parameters() if p.requires_grad]

    def run():
        nonlocal optimizer
        optimizer = optimizer or full and torch.optim.AdamW(trained, lr=1e-6, fused=True)
        loss = side(rows)
        loss.backward()
        if full:
            optimizer.step()
        for p in trained:
            p.grad = None
        return loss.item()

    return run


def gemm_peak(device):
    """Floating point operations a second of a large matrix product."""
    size = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size).bfloat16().to(device)
    return lambda: a @ b, 2 * size**3


def stream(device, size=2**27):
    """Bytes a second read from memory."""
    x = torch.ones(size if device == "cpu" else 8 * size, dtype=torch.float32, device=device)
    return lambda: x.sum(), x.nbytes


def main():
    who, layers, threads, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(threads)
    peer, sizes = who in ("stock", "tuned"), SIZES[device]
    sizes = [size | {"num_hidden_layers": layers} for size in sizes] if layers else sizes
    side = Peer(sizes, who == "tuned", device) if peer else Ours(sizes, who, device)
    last, run, trim = None, None, ctypes.CDLL("libc.so.6").malloc_trim
    trim(0)  # what was only needed to make the weights
    bare = memory("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()
    if not peer:
        keep_freed()  # as train.py and eval.py do
    print("{}", flush=True)  # ready
    for line in sys.stdin:
        task = json.loads(line)
        if task != last:
            run, work, last = None, None, task
            trim(0)
            if task["do"] == "step":
                run = training_step(side, task["what"], task["seconds"])
            elif task["do"] == "answer":
                rows = rows_of(task["seconds"])
                run = lambda: side.eval().answer(rows, task["count"])  # noqa: E731
            elif task["do"] == "count":
                run = counted(training_step(side, task["what"], task["seconds"]))
            else:
                run, work = {"gemm": gemm_peak, "stream": stream}[task["do"]](device)
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        wall, cpu = time.perf_counter(), time.process_time()
        value = run()
        if device == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = memory("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
        print(json.dumps({"wall": wall, "cpu": cpu, "peak": (peak - bare) / 1e9, "work": work,
                          "value": value if isinstance(value, float | int) else None}), flush=True)


def counted(run):
    import model
    from torch.utils.flop_counter import FlopCounterMode

    def count():
        fused, model.fused = model.fused, lambda x: False  # in compiled layers there would be nothing to count
        in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **more: 2 * math.prod(a) * b[-1]}  # which it does not know
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            run()
        model.fused = fused
        return counter.get_total_flops()

    return count


class Worker:
    """Such a process, seen from outside; ask it as a function, once it is ready."""

    def __init__(self, who, layers=0, threads=1, device="cpu"):
        self.process = subprocess.Popen([sys.executable, __file__, who, str(layers), str(threads), device], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ready(self):
        self.reply("starting")
        return self

    def __call__(self, **task):
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self.reply(task)

    def reply(self, task):
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args[2]}: ended on {task}")

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


if __name__ == "__main__":
    main()
