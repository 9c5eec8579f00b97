"""Exported models: transformers alone gives our answers, and our programs take them, too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import arguments
from test_whisper import peer_whisper

import data
import eval
import model
import sample
import train
from conftest import (
    ROOT,
    make_project,
    make_tokenizer,
    refused,
    relative_error,
    save_base,
    tiny_llm,
)
from prepare import export

INSTRUCTIONS = ("Transcribe the speech.", "Translate to German.", "Who speaks? <|endoftext|>", "é")
CHATML = ("<|im_start|>", "<|im_end|>")
FAMILIES = ("qwen2", "qwen2 untied", "qwen3", "llama", "llama untied")
PEER = """
import sys, torch
from transformers import AutoModel, AutoProcessor

for directory, recordings, out in zip(*(sys.argv[i::3] for i in (1, 2, 3)), strict=True):
    options = dict(trust_remote_code=True)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32, **options).eval()
    processor = AutoProcessor.from_pretrained(directory, **options)
    waves, texts, results = *torch.load(recordings), {}
    for size in (1, 8):
        logits, ids = [], []
        for i in range(0, len(waves), size):
            inputs = processor(audio=waves[i : i + size], text=texts[i : i + size])
            with torch.no_grad():
                logits += model(**inputs).logits[:, -1]
            answers = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            ids += answers[:, inputs["input_ids"].shape[1] :].tolist()
        results[size] = torch.stack(logits), ids
    model.set_attn_implementation("eager")
    with torch.no_grad():
        results["eager"] = model(**inputs).logits[:, -1]
    assert not any(name.split(".")[0] in ("data", "sample", "prepare") for name in sys.modules)
    torch.save(results, out)
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def make_checkpoint(directory, encoder="w2v-BERT", family="qwen2", lora=2, **options):
    """A project and a checkpoint of it whose trained tensors are random. Returns its path. Of the
    LLMs, that of Qwen3 chats in ChatML."""
    make_project(directory, CHATML if family == "qwen3" else ())
    tokenizer = model.load_tokenizer(directory / "llm")
    end = tokenizer.token_to_id("<|im_end|>") or 0
    llm = tiny_llm(family, vocab_size=tokenizer.get_vocab_size(), eos_token_id=end)
    save_base(llm, directory / "llm")
    if encoder == "whisper":
        (directory / "encoder" / "model.safetensors").unlink()
        peer_whisper().save_pretrained(directory / "encoder")
    values = {"steps": 1, "eval_every": 1, "phase": "ift", "encoder_lr": 1e-3, "max_seconds": 2}
    train.main(arguments(directory, directory / "out", **values, lora_rank=lora, **options))
    path = directory / "out" / "ift.pt"
    checkpoint = torch.load(path)
    for tensor in checkpoint["model"].values():
        tensor += 0.2 * tensor.std().clamp(min=0.3) * torch.randn_like(tensor)
    torch.save(checkpoint, path)
    return path


def run_peer(*jobs):
    """Runs PEER in a process that finds no module of this project."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(Path(jobs[0]).parent / "modules")}
    command = [sys.executable, "-I", "-c", PEER, *map(str, jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@torch.no_grad()
def our_results(speech_lm, waves, texts):
    """Logits (B, V) of the first token of each answer, and ids of the answers up to their end."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(list(CHATML) if speech_lm.prompt == "chat" else [])
    prompt = data.make_prompt(tokenizer, speech_lm.llm.config.eos_token_id, speech_lm.prompt)
    logits, answers = [], []
    for wave, text in zip(waves, texts, strict=True):
        (windows,) = sample.encode_waves(speech_lm, [wave], 30)
        (audio,) = windows
        ids, _ = data.render({"instruction": text}, len(audio), tokenizer, prompt)
        x = speech_lm.embed(torch.tensor(ids), audio)
        last = torch.tensor([len(ids) - 1])
        logits.append(speech_lm.llm.logits(speech_lm.llm.hidden(x, [len(ids)], wanted=last))[0])
        answers += sample.generate(speech_lm.llm, x, [len(ids)], max_new_tokens=12)
    return torch.stack(logits), answers


def draw_recordings(path, count):
    """Noise of several lengths, one below the shortest window, and instructions; saved at path."""
    waves = [0.1 * torch.randn(6000 + 1117 * i) for i in range(count)]
    texts = [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(count)]
    torch.save((waves, texts), path)
    return waves, texts


# ------------------------------------------------------------------------------
# In transformers


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every LLM family, both encoders: {name: (checkpoint, directory, results of the peer)}."""
    root, jobs, cases = tmp_path_factory.mktemp("exported"), [], {}
    recordings = root / "recordings.pt"
    draw_recordings(recordings, 10)
    for name in (*FAMILIES, "whisper"):
        family = "llama" if name == "whisper" else name
        path = make_checkpoint(root / name, name, family, lora=0 if name == "qwen3" else 2)
        export.main([str(path), str(root / name / "hub"), "--dtype", "float32"])
        jobs += [root / name / "hub", recordings, root / name / "results.pt"]
        cases[name] = path, root / name / "hub", root / name / "results.pt"
    run_peer(*jobs)
    return {name: (path, hub, torch.load(out)) for name, (path, hub, out) in cases.items()}


@pytest.mark.parametrize("name", [*FAMILIES, "whisper"])
def test_transformers_gives_our_answers(exported, name):
    path, hub, results = exported[name]
    waves, texts = torch.load(hub.parent.parent / "recordings.pt")
    speech_lm = model.SpeechLM.from_pretrained(path, torch.float32)
    assert speech_lm.prompt == ("chat" if name == "qwen3" else "plain")
    logits, answers = our_results(speech_lm, waves, texts)
    ends = set(speech_lm.llm.config.eos_token_id)
    assert len({tuple(answer) for answer in answers}) > 3
    assert relative_error(logits[8:], results.pop("eager")) < 1e-4
    for size, (theirs, ids) in results.items():
        assert relative_error(logits, theirs) < 1e-4, size
        for answer, row in zip(answers, ids, strict=True):
            assert row[: len(answer)] == answer and set(row[len(answer) :]) <= ends, size


@pytest.mark.parametrize("part", ["encoder", "adapter", "llm"])
def test_a_part_that_is_left_out_shows(exported, part):
    """So the comparison above would fail without the trained adapter, encoder, or updates."""
    path, hub, results = exported["qwen2"]
    waves, texts = torch.load(hub.parent.parent / "recordings.pt")
    checkpoint = torch.load(path)
    speech_lm = model.SpeechLM.from_pretrained(path, torch.float32)
    shared = checkpoint["bases"]["encoder"]["path"], checkpoint["bases"]["llm"]["path"]
    untrained = model.SpeechLM.from_parts(*shared, torch.float32, **checkpoint["adapter"])
    setattr(speech_lm, part, getattr(untrained, part))
    logits, _ = our_results(speech_lm, waves, texts)
    assert relative_error(logits, results[1][0]) > 1e-2


def test_shards_and_bfloat16(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD", 20000)
    path, _, _ = exported["llama untied"]
    export.main([str(path), str(tmp_path / "hub")])
    files = sorted((tmp_path / "hub").glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    state = model.SpeechLM.from_pretrained(path, torch.bfloat16).state_dict()
    again = model.SpeechLM.from_pretrained(tmp_path / "hub", torch.bfloat16).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


# ------------------------------------------------------------------------------
# Back again


@pytest.mark.parametrize("name", ["qwen2", "llama untied", "whisper"])
def test_an_exported_directory_is_a_checkpoint(exported, name):
    path, hub, _ = exported[name]
    waves, texts = torch.load(hub.parent.parent / "recordings.pt")
    ours, tokenizer, checkpoint = sample.load_model(path)
    again, same_tokenizer, same_checkpoint = sample.load_model(hub)
    state = ours.state_dict()
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())
    assert tokenizer.to_str() == same_tokenizer.to_str()
    for key in ("data", "window", "step", "adapter"):
        assert checkpoint[key] == same_checkpoint[key], key
    assert our_results(ours, waves, texts)[1] == our_results(again, waves, texts)[1]


def test_the_programs_take_an_exported_directory(exported, tmp_path, capsys):
    path, hub, _ = exported["qwen2"]
    project = path.parent.parent
    audio, manifest = str(project / "dev0.wav"), str(project / "dev.jsonl")
    texts = []
    for checkpoint in (path, hub):
        sample.main([audio, "Transcribe the speech.", "--ckpt", str(checkpoint)])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    eval.main([manifest, "--ckpt", str(hub), "--out", str(tmp_path / "eval")])
    values = {"phase": "ift", "init": hub, "steps": 2, "encoder": False, "llm": False}
    train.main(arguments(project, tmp_path / "out", **values))
    trained, _, checkpoint = sample.load_model(tmp_path / "out" / "ift.pt")
    assert checkpoint["bases"]["llm"]["path"] == str(hub.resolve())
    before = model.SpeechLM.from_pretrained(hub, torch.float32).state_dict()
    shares = [
        (trained.state_dict()[name] - p).norm() / (1e-6 + p.norm()) for name, p in before.items()
    ]
    assert 0 < max(shares) < 0.5  # it went on from there


def test_a_hub_id_is_an_exported_directory(exported, tmp_path):
    """It is looked up in the Hub's cache; a file that is not there is not taken for one."""
    _, hub, _ = exported["qwen2"]
    folder = tmp_path / "hub" / "models--org--speech"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "snapshots" / "abc").symlink_to(hub)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    code = "import sample; print(sample.load_model('org/speech')[2]['bases']['llm']['path'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "org/speech", done.stderr


def test_the_directory_explains_itself(exported, tmp_path):
    path, hub, _ = exported["qwen2"]
    scores = {"WER": [0.25, 0.125, 0.5]}
    line = {"task": "asr", "language": "en", "group": "all", "items": 7, "scores": scores}
    (tmp_path / "scores.json").write_text(json.dumps({"scores": [line]}))
    options = ["--scores", str(tmp_path / "scores.json")]
    export.main([str(path), str(tmp_path / "hub"), *options])
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| tones | CC0-1.0 | en | 0.01 |" in card and "phase `ift`" in card
    assert "| asr | en | 7 | WER 0.25 (0.125 to 0.5) |" in card
    assert "processor(audio=[wave]" in card and "{" not in card
    assert (tmp_path / "hub" / "NOTICE").read_text() == (path.parent / "ift.NOTICE").read_text()
    config = (tmp_path / "hub" / "config.json").read_text()
    assert str(path.parent.parent) not in config  # no place of the machine


# ------------------------------------------------------------------------------
# Bad input


def test_bad_input_is_refused_in_one_line(exported, tmp_path, monkeypatch):
    path, hub, _ = exported["qwen2"]
    call = lambda source, *more: export.export(source, *more, torch.float32, "")  # noqa: E731
    refused("is not empty; give a new directory", call, path, hub)
    torch.save({"model": {}}, tmp_path / "old.pt")
    refused("not a checkpoint of this project", call, tmp_path / "old.pt", tmp_path / "hub")
    checkpoint = torch.load(path)
    checkpoint["bases"]["llm"]["path"] = str(tmp_path / "gone")
    torch.save(checkpoint, tmp_path / "gone.pt")
    refused("gone: no such directory", call, tmp_path / "gone.pt", tmp_path / "hub")
    checkpoint["bases"]["llm"] = checkpoint["bases"]["encoder"] | {"sha256": "other"}
    torch.save(checkpoint, tmp_path / "differs.pt")
    refused("model_type", call, tmp_path / "differs.pt", tmp_path / "hub")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full_disk)
    refused("hub: No space left on device; make room", call, path, tmp_path / "hub")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["differs.pt", "gone.pt", "old.pt"]


def test_a_directory_of_something_else_is_no_checkpoint(exported, tmp_path):
    path, hub, _ = exported["qwen2"]
    refused("model_type is 'qwen2'", model.load_checkpoint, path.parent.parent / "llm")
    config = json.loads((hub / "config.json").read_text())
    for name in ("text_config", "training"):
        broken = tmp_path / name
        broken.mkdir()
        (broken / "config.json").write_text(json.dumps({**config, name: None}))
        for file in hub.iterdir():
            if file.name != "config.json":
                (broken / file.name).symlink_to(file)
        refused(str(broken), sample.load_model, broken)
    refused("no-such.pt: No such file", model.load_checkpoint, "out/no-such.pt")


def test_the_processor_refuses_what_it_cannot_read(exported):
    _, hub, _ = exported["whisper"]
    sys.path.insert(0, str(export.CODE.parent))
    try:
        from modeling_speech_lm import SpeechLMProcessor

        processor = SpeechLMProcessor.from_pretrained(hub, trust_remote_code=True)
    finally:
        sys.path.remove(str(export.CODE.parent))
    for wave in (torch.zeros(2, 16000), torch.zeros(300), torch.zeros(16000 * 3)):
        with pytest.raises(ValueError, match="expected one channel of 0.035 s to 2 s"):
            processor(audio=wave, text="Transcribe.")
    with pytest.raises(ValueError, match="expected as many, of 16000 Hz"):
        processor(audio=[torch.zeros(16000)], text=["a", "b"])
    with pytest.raises(ValueError, match="expected as many, of 16000 Hz"):
        processor(audio=torch.zeros(16000), text="a", sampling_rate=8000)
