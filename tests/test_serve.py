"""The server of the page: what it answers equals the command, what it refuses, that jobs wait for
each other and stop when nobody waits for them. tests/bench/serve_page.py uses the page itself."""

import http.client
import io
import json
import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import soundfile
import torch
from test_sample import ASK, SAY, make_folder, run

import data
import sample
from conftest import ESCAPES
from extras import serve
from sample import Answer

GERMAN = "translate to german"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("served"))
    loaded = sample.load_model(folder / "ift.pt")
    return SimpleNamespace(folder=folder, loaded=loaded, wav=folder / "train0.wav")


@pytest.fixture
def page(project):
    """A server in two threads, which counts what it encodes."""
    page = SimpleNamespace(project=project, encoded=[])

    def encode_waves(model, waves, longest):
        page.encoded += waves
        return sample.encode_waves(model, waves, longest)

    options = {"num_beams": 1, "step": sample.decode_step, "max_new_tokens": 9}
    arguments = encode_waves, sample.ask, project.loaded, options | {"on_text": print}
    page.server = server = serve.Server("127.0.0.1", 0, *arguments)
    for target in (lambda: server.serve_forever(0.01), server.work):
        threading.Thread(target=target, daemon=True).start()
    yield page
    server.jobs.put(None)
    server.shutdown()
    server.server_close()


def start(page, path, body=b"", method="POST", **headers):
    """The answer to a request, of which nothing is read yet. To close it is to go away."""
    connection = http.client.HTTPConnection("127.0.0.1", page.server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    if method == "POST" and "Content_Length" not in headers:
        headers["Content_Length"] = str(len(body))
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    return connection.getresponse()


def post(page, path, body=b"", **headers):
    """The status of a request, and the lines of its answer."""
    response = start(page, path, body, **headers)
    text = response.read().decode("utf-8")
    assert text.endswith("\n")
    return response.status, [json.loads(line) for line in text.splitlines()]


def upload(page, content=None):
    content = page.project.wav.read_bytes() if content is None else content
    status, lines = post(page, "/recordings", content)
    assert status == 200, lines
    return lines[-1]


def question(key, instruction):
    return json.dumps({"recording": key, "instruction": instruction}).encode()


def refuse(page, expected, path, body=b"", words="", **headers):
    """Checks that a request gets this status and one line."""
    status, (line,) = post(page, path, body, **headers)
    assert status == expected and list(line) == ["error"], (status, line)
    assert "\n" not in line["error"] and not ESCAPES.search(line["error"])
    assert words in line["error"] and "BytesIO" not in line["error"], line


def file_bytes(wave, rate=16000, kind="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind)
    return buffer.getvalue()


# ------------------------------------------------------------------------------
# Answers


def test_the_page_loads_nothing_else(page):
    response = start(page, "/", method="GET")
    text = response.read().decode("utf-8")
    assert response.status == 200 and response.headers["Content-Type"].startswith("text/html")
    assert "{{" not in text and "<script src" not in text and "http:" not in text
    assert "https:" not in text and "default-src 'none'" in text
    for instruction in serve.INSTRUCTIONS:
        assert json.dumps(instruction) in text and data.recognise(instruction)[0] in ("asr", "st")


def test_answers_equal_those_of_the_command(page):
    """And two questions and more encode once."""
    content = file_bytes(data.load_audio(page.project.wav).repeat(6))  # of several windows
    wave = data.load_audio(io.BytesIO(content))
    recording = upload(page, content)
    assert recording["seconds"] == len(wave) / 16000
    assert max(recording["peaks"]) == pytest.approx(wave.abs().max().item(), abs=1e-3)
    (twin,) = sample.encode_waves(page.project.loaded[0], [wave], 1.0)
    texts = set()
    for instruction in (SAY, GERMAN, ASK):
        status, lines = post(page, "/answers", question(recording["recording"], instruction))
        task, answer = sample.ask(*page.project.loaded, twin, instruction, max_new_tokens=9)
        *pieces, last = lines
        assert status == 200 and "".join(line["piece"] for line in pieces) == last["text"]
        assert (last["task"], last["text"], last["cut"]) == (task, answer.text, answer.cut)
        texts.add(answer.text)
    assert len(page.encoded) == 1 and len(texts) == 3


def test_pieces_come_as_utf_8_while_the_answer_is_made(page):
    go_on = threading.Event()

    def ask(*_, on_text, **options):
        on_text("黄色")
        assert go_on.wait(20)
        on_text(" é😀")
        return "st", Answer("黄色 é😀")

    page.server.ask = ask
    response = start(page, "/answers", question(upload(page)["recording"], SAY))
    assert response.headers["Content-Type"] == "application/x-ndjson; charset=utf-8"
    assert response.readline() == '{"piece": "黄色"}\n'.encode()
    go_on.set()
    lines = response.read().splitlines()
    assert lines[0].decode() == '{"piece": " é😀"}' and json.loads(lines[1])["text"] == "黄色 é😀"


def test_what_goes_wrong_in_an_answer_is_one_line(page):
    key = upload(page)["recording"]
    errors = [data.AudioError("600 s of audio take too much"), MemoryError(), RuntimeError("a\nb")]
    for error in errors:

        def ask(*_, error=error, **options):
            raise error

        page.server.ask = ask
        status, lines = post(page, "/answers", question(key, SAY))
        (message,) = (line["error"] for line in lines)
        assert status == 200 and message == (str(error).split("\n")[0] or "MemoryError")
    page.server.ask = sample.ask
    assert "text" in post(page, "/answers", question(key, SAY))[1][-1]


def test_the_oldest_recording_goes(page, monkeypatch):
    monkeypatch.setattr(serve, "MOST_RECORDINGS", 2)
    keys = [upload(page)["recording"] for _ in range(3)]
    assert len(set(keys)) == 3 and list(page.server.recordings) == keys[1:]
    refuse(page, 404, "/answers", question(keys[0], SAY), "send it again")
    for key in keys[1:]:
        assert "text" in post(page, "/answers", question(key, SAY))[1][-1]


WRITES = []  # what was opened for writing while it holds a list


def watch(event, arguments):
    if event == "open" and WRITES and isinstance(arguments[2], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            WRITES[0].append(arguments[0])


def test_nothing_is_written_to_disk(page, tmp_path):
    sys.addaudithook(watch)
    written = []
    WRITES.append(written)
    try:
        (tmp_path / "seen").write_text("so the hook sees writing")
        assert len(written) == 1
        flac = file_bytes(data.load_audio(page.project.wav), kind="FLAC")
        for content in (None, flac):
            post(page, "/answers", question(upload(page, content)["recording"], ASK))
        refuse(page, 415, "/recordings", b"no audio")
    finally:
        WRITES.clear()
    assert len(written) == 1, written


# ------------------------------------------------------------------------------
# What is refused


def test_bounds(page, monkeypatch):
    key = upload(page)["recording"]
    refuse(page, 413, "/recordings", words="bytes", Content_Length=str(serve.MOST_BYTES + 1))
    refuse(page, 413, "/recordings", words="bytes", Content_Length="9" * 5000)
    refuse(page, 413, "/answers", question(key, "x" * serve.MOST_WORDS), "bytes")
    for length in (None, "", "-1", "many"):
        refuse(page, 411, "/recordings", words="length", Content_Length=length)
    hour = file_bytes(torch.zeros(3600 * 1000), 1000, "FLAC")
    refuse(page, 413, "/recordings", hour, "longer than 10 minutes")
    # A stream whose header says no length is not read beyond the bound either.
    endless = bytearray(file_bytes(torch.rand(2 * 16000), kind="FLAC"))
    endless[21] &= 0xF0
    endless[22:26] = bytes(4)
    assert upload(page, bytes(endless))["seconds"] == 2
    counts, read = [], data.read_samples
    monkeypatch.setattr(serve, "MOST_SECONDS", 1)
    monkeypatch.setattr(data, "read_samples", lambda *a: counts.append(a[3]) or read(*a))
    refuse(page, 413, "/recordings", bytes(endless), "longer than")
    assert counts == [16001] and len(page.encoded) == 2


def test_bad_files(page):
    wav = page.project.wav.read_bytes()
    nan = io.BytesIO()
    soundfile.write(nan, torch.full((8000,), float("nan")), 16000, "FLOAT", format="WAV")
    for content, words in (
        (b"", "0 bytes"),
        (b"\0\x1b[31m" * 99, "expected audio"),
        (wav[: len(wav) // 2], "the file is cut or damaged"),
        (file_bytes(torch.zeros(100)), "at least 35 ms"),
        (nan.getvalue(), "found NaN"),
    ):
        refuse(page, 415, "/recordings", content, words)
    assert not page.encoded and not page.server.recordings


@pytest.mark.parametrize("body", ["", "[]", "{}", "[" * 9000, '{"recording": "x"}', "\xff", "null"])
def test_bad_questions(page, body):
    refuse(page, 400, "/answers", body.encode("latin-1"), "expected JSON")


def test_questions_about_nothing(page):
    refuse(page, 404, "/answers", question("x", SAY), "send it again")
    refuse(page, 400, "/answers", question(upload(page)["recording"], " \n"), "empty")
    refuse(page, 404, "/other", b"", "the page is at /")
    refuse(page, 404, "/page.html", method="GET")


@pytest.mark.parametrize(
    "host", [None, "", "evil.example", "localhost.evil.example", "[::1", "1.2"]
)
def test_other_hosts(page, host):
    """Their names may lead here by DNS."""
    headers = {"Host": host}
    refuse(page, 403, "/recordings", page.project.wav.read_bytes(), "Host", **headers)
    refuse(page, 403, "/", method="GET", words="Host", **headers)
    assert not page.encoded


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", ""])
def test_other_origins(page, origin):
    port = page.server.server_port
    headers = {"Origin": origin, "Host": f"localhost:{port}"}
    refuse(page, 403, "/recordings", page.project.wav.read_bytes(), "Origin", **headers)
    assert not page.encoded


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "192.168.1.2", "LOCALHOST"])
def test_the_page_itself_may_ask(page, host):
    host = f"{host}:{page.server.server_port}"
    headers = {"Host": host, "Origin": f"http://{host}"}
    refuse(page, 400, "/answers", b"{}", "expected JSON", **headers)
    page.server.host = "Named.example"
    refuse(page, 400, "/answers", b"{}", "expected JSON", Host="named.example:80")


# ------------------------------------------------------------------------------
# One model, several clients


class SlowModel:
    """In place of sample.ask: 2,000 steps of 2 ms, with or without pieces."""

    def __init__(self, page, streams=True):
        self.steps, self.streams, self.seen = 0, streams, []
        page.server.ask, page.server.options = self.ask, {"step": self.step}

    def step(self):
        self.steps += 1
        time.sleep(0.002)

    def ask(self, model, tokenizer, checkpoint, recording, instruction, on_text, step):
        self.seen.append(instruction)
        for _ in range(2000 if instruction == "long" else 1):
            step()
            if self.streams:
                on_text("a ")
        return "asr", Answer(instruction)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("streams", [True, False])
def test_who_goes_away_stops_the_answer(page, streams):
    key, slow = upload(page)["recording"], SlowModel(page, streams)
    response = start(page, "/answers", question(key, "long"))
    wait_until(lambda: slow.steps > 5)
    if streams:
        assert json.loads(response.readline()) == {"piece": "a "}
    response.close()
    steps = slow.steps
    status, lines = post(page, "/answers", question(key, "short"))
    assert status == 200 and lines[-1]["text"] == "short"
    assert slow.steps - steps < 10 and slow.seen == ["long", "short"]


def test_clients_wait_for_each_other(page):
    """Also, one that goes away before its turn never gets it."""
    key, slow = upload(page)["recording"], SlowModel(page)
    first = start(page, "/answers", question(key, "long"))
    wait_until(lambda: slow.steps > 5)
    impatient = start(page, "/answers", question(key, "impatient"))
    assert json.loads(impatient.readline()) == {"waiting": 1}
    patient = start(page, "/answers", question(key, "patient"))
    assert json.loads(patient.readline()) == {"waiting": 2}
    uploading = start(page, "/recordings", page.project.wav.read_bytes())
    assert json.loads(uploading.readline()) == {"waiting": 3}
    impatient.close()
    assert slow.seen == ["long"]
    first.close()
    assert json.loads(patient.read().splitlines()[-1])["text"] == "patient"
    assert "recording" in json.loads(uploading.read())
    assert slow.seen == ["long", "patient"]


def test_a_full_queue(page, monkeypatch):
    key, slow = upload(page)["recording"], SlowModel(page)
    assert page.server.jobs.maxsize == serve.MOST_JOBS
    page.server.jobs.maxsize = 1
    first = start(page, "/answers", question(key, "long"))
    wait_until(lambda: slow.steps > 0)
    second = start(page, "/answers", question(key, "short"))
    refuse(page, 503, "/answers", question(key, "short"), "too many")
    first.close()
    assert json.loads(second.read().splitlines()[-1])["text"] == "short"


# ------------------------------------------------------------------------------
# The command


def test_the_command(page, capsys, monkeypatch):
    served = []

    def stop(server):
        server.shutdown()
        server.server_close()
        served.append(server)

    monkeypatch.setattr(serve.Server, "work", stop)
    ckpt = ["--ckpt", page.project.folder / "ift.pt"]
    out, _ = run(sample, capsys, "--serve", "--port", 0, "--beams", 2, *ckpt)
    assert out == f"http://127.0.0.1:{served[0].server_port}/ has the page; Ctrl-C ends it\n"
    assert served[0].options["num_beams"] == 2 and served[0].server_address[0] == "127.0.0.1"
    taken = page.server.server_port
    for options in (["--port", taken], ["--port", 99999], ["--host", "no.such.host.invalid"]):
        _, err = run(sample, capsys, "--serve", *options, *ckpt, code=1)
        assert "choose another --host or --port" in err
    _, err = run(sample, capsys, "--serve", "a.wav", code=2)
    assert "--serve, without them" in err


def test_without_its_file_one_line_says_so(page, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "extras.serve", None)
    _, err = run(sample, capsys, "--serve", "--ckpt", page.project.folder / "ift.pt", code=1)
    assert err.startswith("sample.py: --serve needs extras/serve.py beside sample.py")
