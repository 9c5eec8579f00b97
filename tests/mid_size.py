"""A mid-size pair for tests/bench.py: random bfloat16 weights, here and in transformers, each in a process of its own.

    python tests/mid_size.py WHO LAYERS THREADS     reads tasks from standard input, a JSON object a line, and answers so

WHO is "stock" (transformers as it is), "tuned" (with the head on the targets' rows alone and the position bias gathered
from one product), "ours", and for answers "compiled", "int8" or "int8 compiled".
"""

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import randomise  # noqa: E402
from full_size import memory  # noqa: E402
from prepare.memory import keep_freed  # noqa: E402

ENCODER = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048, layerdrop=0.0,
               mask_time_prob=0.0, conformer_conv_dropout=0.0)
LLM = dict(vocab_size=151936, hidden_size=768, intermediate_size=4480, num_hidden_layers=8, num_attention_heads=12,
           num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None)
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

    def __init__(self, layers, tuned):
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM, Wav2Vec2BertConfig, Wav2Vec2BertModel
        self.tuned = tuned
        config = Wav2Vec2BertConfig(**ENCODER | {"num_hidden_layers": layers}, add_adapter=True, num_adapter_layers=2)
        with torch.device("meta"):
            self.encoder, self.proj = Wav2Vec2BertModel(config), torch.nn.Linear(512, 768)
            self.llm = Qwen2ForCausalLM(Qwen2Config(**LLM | {"num_hidden_layers": layers}, bos_token_id=None,
                                                    pad_token_id=None))
        rotary = type(self.llm.model.rotary_emb)(self.llm.config)  # has buffers, which randomise leaves alone
        randomise(self.bfloat16().to_empty(device="cpu"))
        self.llm.tie_weights()
        self.llm.model.rotary_emb = rotary
        self.bfloat16()
        if tuned:
            gather_bias()

    def joined(self, rows, answers):
        """The arguments of the LLM, and the labels (B, T) of the text."""
        features = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True).bfloat16()
        mask = torch.arange(features.shape[1]) < torch.tensor([len(row[0]) for row in rows])[:, None]
        audio = self.proj(self.encoder(features, attention_mask=mask.long()).last_hidden_state)  # (B, A, D)
        mask = torch.arange(audio.shape[1]) < torch.tensor([row[1] for row in rows])[:, None]
        texts = [torch.cat(row[2:]) if answers else row[2] for row in rows]
        text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side="left", padding_value=-1)
        x = torch.cat([audio, self.llm.get_input_embeddings()(text.clamp(min=0))], 1)
        return {"inputs_embeds": x, "attention_mask": torch.cat([mask, text >= 0], 1).long()}, text

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
        at, left = torch.arange(key.shape[2]), module.left_max_position_embeddings
        distance = (at - at[:, None]).clamp(-left, module.right_max_position_embeddings) + left
        bias = query @ module.distance_embedding.weight.T * module.scaling  # (B, H, F, 73)
        return query, bias.gather(-1, distance.expand(*bias.shape[:2], -1, -1))

    peer._apply_relative_key_position_encoding = gathered


class Ours(torch.nn.Module):
    """Our model, of the same weights."""

    def __init__(self, layers, who):
        super().__init__()
        from model import AdapterConfig, EncoderConfig, LengthAdapter, LLM as Decoder, LLMConfig, SpeechEncoder, SpeechLM
        peer, dtype = Peer(layers, False), torch.bfloat16
        config = ENCODER | {"num_hidden_layers": layers}
        with torch.device("meta"):
            llm = LLMConfig(model_type="qwen2", **LLM | {"num_hidden_layers": layers, "eos_token_id": []})
            self.model = SpeechLM(SpeechEncoder(EncoderConfig(**config), dtype),
                                  LengthAdapter(AdapterConfig(**config, output_size=768), dtype), Decoder(llm, dtype))
        state = {f"llm.{name}": p for name, p in peer.llm.named_parameters()}
        for name, p in peer.encoder.named_parameters():
            state[name if name.startswith("adapter.") else f"encoder.{name}"] = p
        state |= {f"adapter.enc_to_dec_proj.{name}": p for name, p in peer.proj.named_parameters()}
        self.model.load_state_dict(state, strict=True, assign=True)
        self.encoder, self.batches = self.model.encoder, {}
        if who != "ours":
            from prepare.fast_decode import FastDecode, quantise
            quantise(self.model.llm) if "int8" in who else None
            self.model.llm.fast = FastDecode(pays=0) if "compiled" in who else None

    def batch(self, rows, answers=True):
        from data import collate
        from model import AUDIO
        return collate([([AUDIO] * n + instruction.tolist() + answer.tolist() * answers, len(answer) * answers, x)
                        for x, n, instruction, answer in rows])

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


def gemm_peak(_side, size=2048):
    """Floating point operations a second of a large matrix product."""
    a, b = torch.randn(2, size, size).bfloat16()
    return lambda: a @ b, 2 * size**3


def stream(_side, size=2**27):
    """Bytes a second read from memory."""
    x = torch.ones(size, dtype=torch.float32)
    return lambda: x.sum(), x.nbytes


def main():
    who, layers, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    peer = who in ("stock", "tuned")
    side = Peer(layers, who == "tuned") if peer else Ours(layers, who)
    last, run, trim = None, None, ctypes.CDLL("libc.so.6").malloc_trim
    trim(0)  # what was only needed to make the weights
    bare = memory("VmRSS")
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
                run, work = {"gemm": gemm_peak, "stream": stream}[task["do"]](side)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        wall, cpu = time.perf_counter(), time.process_time()
        value = run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu, "peak": (memory("VmHWM") - bare) / 1e9, "work": work,
                          "value": value if isinstance(value, float | int) else None}), flush=True)


def counted(run):
    from torch.utils.flop_counter import FlopCounterMode

    def count():
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    return count


class Worker:
    """Such a process, seen from outside; ask it as a function."""

    def __init__(self, who, layers=8, threads=1):
        self.process = subprocess.Popen([sys.executable, __file__, who, str(layers), str(threads)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.reply("starting")

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
