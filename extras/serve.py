"""The page of python sample.py --serve: it records, asks and shows answers as they are made.

The server is that of the standard library. Its threads talk to browsers; the model runs in the main
thread, one job after another. An answer is lines of JSON. Nothing is written to disk, and of a
recording only its embeddings stay in memory, those of the newest few.
"""

import io
import ipaddress
import json
import queue
import secrets
import select
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch.nn.functional as F
from torch import Tensor

import data
from model import first_line, one_line_errors

PAGE = Path(__file__).with_name("page.html")
MOST_SECONDS = 600  # of a recording
MOST_BYTES = 128 * 2**20  # of an audio file: ten minutes at 48 kHz in stereo are 110 MiB
MOST_WORDS = 10000  # bytes of an instruction
MOST_RECORDINGS = 8  # of which the embeddings are in memory
MOST_JOBS = 16  # that wait
PEAKS = 300  # values of the picture of a recording
HEADERS = {"Cache-Control": "no-store", "X-Frame-Options": "DENY"}
LANGUAGES = ("German", "Italian", "Chinese")
INSTRUCTIONS = ["Transcribe.", *(f"Translate to {language}." for language in LANGUAGES)]


def serve_page(host: str, port: int, encode_waves, ask, loaded: tuple, options: dict) -> None:
    """Serves the page until the program is ended. encode_waves and ask are those of sample.py,
    loaded is what its load_model gave, options are those of ask. Raises UserError."""
    with one_line_errors(f"{host}, port {port}", "choose another --host or --port"):
        server = Server(host, port, encode_waves, ask, loaded, options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{server.server_port}/ has the page; Ctrl-C ends it", flush=True)
    server.work()


class Refusal(Exception):
    """A request that is not followed: its HTTP status, and one line that says why."""


class Job(NamedTuple):
    """What a request wants of the model."""

    run: Callable[["Job"], None]
    is_gone: Callable[[], bool]  # whether nobody waits for it any more
    lines: queue.SimpleQueue  # of its answer; None is behind the last

    def work(self) -> None:
        """Does it, if somebody still waits for it."""
        try:
            if not self.is_gone():
                self.run(self)
        except ConnectionAbortedError:
            pass
        except Exception as error:  # whatever it is, the next job may go well
            self.lines.put({"error": first_line(error)})
        self.lines.put(None)


class Server(ThreadingHTTPServer):
    """The page, a queue of jobs, and the embeddings of the newest recordings by their keys."""

    daemon_threads = True

    def __init__(self, host: str, port: int, encode_waves, ask, loaded: tuple, options: dict):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.host, self.encode_waves, self.ask = host, encode_waves, ask
        self.loaded, self.options = loaded, options
        self.recordings: dict[str, list[Tensor]] = {}
        self.jobs: queue.Queue = queue.Queue(MOST_JOBS)
        self.uploads = threading.BoundedSemaphore(2)  # bounds the memory of files
        facts = {"instructions": INSTRUCTIONS, "seconds": MOST_SECONDS, "bytes": MOST_BYTES}
        with one_line_errors(PAGE, "copy it again"):
            template = PAGE.read_text(encoding="utf-8")
        self.page = template.replace("{{facts}}", json.dumps(facts)).encode()

    def work(self) -> None:
        """Does jobs in the order in which they came, until it gets None."""
        for job in iter(self.jobs.get, None):
            job.work()
            self.jobs.task_done()

    def encode(self, wave: Tensor, job: Job) -> None:
        """Encodes a 16 kHz wave (N,), and lets go of the oldest recording."""
        model, _, checkpoint = self.loaded
        (recording,) = self.encode_waves(model, [wave], checkpoint["window"])
        key = secrets.token_urlsafe(16)
        self.recordings[key] = recording
        for oldest in list(self.recordings)[:-MOST_RECORDINGS]:
            del self.recordings[oldest]
        peaks = F.adaptive_max_pool1d(wave.abs()[None], PEAKS)[0]
        line = {"recording": key, "seconds": len(wave) / data.SAMPLE_RATE}
        job.lines.put(line | {"peaks": [round(peak, 3) for peak in peaks.tolist()]})

    def answer(self, recording: list[Tensor], instruction: str, job: Job) -> None:
        """Answers as the command does. A client that goes away ends it before the next token."""
        step = self.options["step"]

        def checked_step(*inputs):
            if job.is_gone():
                raise ConnectionAbortedError
            return step(*inputs)

        options = {"step": checked_step, "on_text": lambda text: job.lines.put({"piece": text})}
        options = self.options | options
        task, answer = self.ask(*self.loaded, recording, instruction, **options)
        job.lines.put({"task": task, "text": answer.text, "cut": answer.cut})


def read_recording(content: bytes) -> Tensor:
    """The 16 kHz wave (N,) of the bytes of an audio file. Raises Refusal."""
    file = io.BytesIO(content)
    try:
        with data.open_sound(file) as (sound, _):
            most = MOST_SECONDS * sound.samplerate
            frames = sound.frames
            if frames > 2**35:  # so libsndfile says that the header says none
                frames = len(data.read_samples(sound, file, 0, most + 1))
        if frames > most:
            line = f"the recording is longer than {MOST_SECONDS // 60} minutes; choose a part of it"
            raise Refusal(413, line)
        return data.load_audio(file)
    except data.AudioError as error:
        raise Refusal(415, str(error).removeprefix(f"{file}: ")) from None


def is_direct(host: str, name: str) -> bool:
    """Whether a Host header names an address, localhost, or this name."""
    try:
        hostname = urlsplit(f"//{host}").hostname or ""
        return hostname in ("localhost", name.lower()) or bool(ipaddress.ip_address(hostname))
    except ValueError:
        return False


class Handler(BaseHTTPRequestHandler):
    """One request and its answer. server is a Server."""

    timeout = 60  # seconds that a client may let the server wait for bytes
    server_version, sys_version = "sample.py", ""

    def do_GET(self) -> None:
        self.follow({"/": self.send_page})

    def do_POST(self) -> None:
        self.follow({"/recordings": self.take_recording, "/answers": self.take_instruction})

    def follow(self, routes: dict[str, Callable]) -> None:
        try:
            self.check_sender()
            if self.path not in routes:
                raise Refusal(404, f"nothing is at {self.path[:100]}; the page is at /")
            routes[self.path]()
        except Refusal as refusal:
            status, line = refusal.args
            self.send_head(status, "application/json")
            self.send_line({"error": line})
        except (ConnectionError, TimeoutError):
            pass  # the client went away

    def check_sender(self) -> None:
        """Lets only the page itself and programs ask, not the pages of other sites. Those may give
        their names this address (DNS rebinding), so that a Host of another name is refused."""
        host = self.headers.get("Host", "")
        if not is_direct(host, self.server.host):
            raise Refusal(403, "found a Host that is no address, localhost, or that of --host")
        origin = self.headers.get("Origin", f"http://{host}")
        if origin.partition("://")[2] != host:
            raise Refusal(403, "found an Origin that is not this page's; open the page itself")

    def send_head(self, status: int, kind: str) -> None:
        self.send_response(status)
        for name, value in (HEADERS | {"Content-Type": f"{kind}; charset=utf-8"}).items():
            self.send_header(name, value)
        self.end_headers()

    def send_line(self, line: dict) -> None:
        self.wfile.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def send_page(self) -> None:
        self.send_head(200, "text/html")
        self.wfile.write(self.server.page)

    def read_body(self, most: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refusal(411, "the request does not say its length in bytes")
        size = int(length[:15])
        if size > most:
            line = f"found {size:,} bytes, expected at most {most:,}; send less"
            raise Refusal(413, line)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionAbortedError
        return body

    def take_recording(self) -> None:
        with self.server.uploads:
            wave = read_recording(self.read_body(MOST_BYTES))
        self.run_job(lambda job: self.server.encode(wave, job))

    def take_instruction(self) -> None:
        body = self.read_body(MOST_WORDS)
        try:
            request = json.loads(body)
            key, instruction = str(request["recording"]), str(request["instruction"]).strip()
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refusal(400, "expected JSON with a recording and an instruction") from None
        if not instruction:
            raise Refusal(400, "expected an instruction that is not empty")
        recording = self.server.recordings.get(key)
        if recording is None:
            raise Refusal(404, "this recording is no longer here; send it again")
        self.run_job(lambda job: self.server.answer(recording, instruction, job))

    def run_job(self, run: Callable[[Job], None]) -> None:
        """Lets the model do a job in its turn, and sends lines of JSON as they are made."""
        job = Job(run, self.is_gone, queue.SimpleQueue())
        ahead = self.server.jobs.unfinished_tasks
        try:
            self.server.jobs.put_nowait(job)
        except queue.Full:
            raise Refusal(503, "too many requests are waiting; try again later") from None
        self.send_head(200, "application/x-ndjson")
        notices = [{"waiting": ahead}] if ahead else []
        for line in chain(notices, iter(job.lines.get, None)):
            self.send_line(line)

    def is_gone(self) -> bool:
        """Whether the client has closed its connection, without waiting for it."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):  # it is closed on this side, too
            return True

    def log_message(self, *_) -> None:
        """Logs nothing: what is asked is nobody else's business."""
