"""Uses the page of sample.py --serve in headless Chromium, with a file in place of a microphone.

    apt-get install chromium fonts-noto-cjk && pip install playwright
    python tests/bench/serve_page.py --ckpt out/ift.pt [--chromium PATH] [--pictures FOLDER]

Records and asks, drops files, and does what goes wrong: bad files, an hour of audio, no microphone,
a denied one, a second client, an answer that is stopped, a server that goes away and comes back.
Checks that two questions encode once, that nothing is fetched from elsewhere and that no script
fails; prints how long after the end of a recording its first answer was complete.
"""

import argparse
import io
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLE = ROOT / "demo" / "sample.wav"
RATE = 16000  # of the sample
TRANSCRIPT = re.compile("yellow bird sleeps in the garden every day", re.IGNORECASE)
FAKE = "--use-fake-device-for-media-stream"
ALLOW = "--use-fake-ui-for-media-stream"
TURNS = 5  # recordings that are timed


@contextmanager
def serving(ckpt, port=0):
    """A server in a process of its own, and its address."""
    command = [sys.executable, "sample.py", "--serve", "--port", str(port), "--ckpt", ckpt]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process, re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.kill()
        process.wait()


def wav_bytes(wave, rate=RATE, subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, subtype, format="WAV")
    return buffer.getvalue()


def give(page: Page, name: str, content: bytes, kind="audio/wav") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def newest(page: Page):
    return page.locator("#answers li").first


def ask(page: Page, text: str, done=r"Answered in") -> str:
    """The answer to what is typed, or to one of the buttons."""
    button = page.get_by_role("button", name=text, exact=True)
    if button.count():
        button.click()
    else:
        page.get_by_label("in your own words").fill(text)
        page.keyboard.press("Enter")
    expect(newest(page).locator("h3")).to_have_text(text)
    expect(newest(page).locator(".note").last).to_contain_text(re.compile(done), timeout=120000)
    return newest(page).locator(".answer").text_content()


def record(page: Page, seconds: float) -> None:
    page.get_by_role("button", name="Record", exact=True).click()
    expect(page.locator("#status")).to_contain_text("Recording")
    page.wait_for_timeout(1000 * seconds)
    page.get_by_role("button", name="Stop recording").click()


def timed_answer(page: Page, seconds: float) -> float:
    """Seconds from the end of a recording to the last word of its transcript, in the browser."""
    page.evaluate("""() => {
      get("record").addEventListener("click", () => window.begin = performance.now(), true);
      window.seen = new MutationObserver(() => {
        if (/^Answered/.test(get("status").textContent)) window.end = performance.now();
      });
      seen.observe(get("status"), {childList: true});
    }""")
    record(page, seconds)
    page.evaluate("get('usual').children[0].click()")
    expect(page.locator("#status")).to_contain_text("Answered", timeout=60000)
    return page.evaluate("() => { seen.disconnect(); return (end - begin) / 1000; }")


def check_recording(page: Page, addresses: list) -> None:
    """Records, transcribes, translates, asks: four answers about one recording."""
    record(page, 3.2)
    assert TRANSCRIPT.search(ask(page, "Transcribe.")), newest(page).text_content()
    assert re.search("Vogel", ask(page, "Translate to German."))
    assert re.search("鸟", ask(page, "Translate to Chinese."))
    assert ask(page, "Who sleeps in the garden?").strip()
    assert sum(url.endswith("/recordings") for url in addresses) == 1, addresses
    assert page.locator("#answers li").count() == 4
    player = page.locator("#player")
    player.evaluate("async p => { await p.play(); await new Promise(f => setTimeout(f, 500)); }")
    assert player.evaluate("p => { p.pause(); return p.currentTime; }") > 0.2
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and "Vogel" in lines[1]


def check_files(page: Page, sample: np.ndarray) -> None:
    drop = """async bytes => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], "dropped.flac", {type: "audio/flac"}));
      document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
    }"""
    flac = io.BytesIO()
    soundfile.write(flac, np.repeat(sample, 3), 3 * RATE, format="FLAC")
    page.evaluate(drop, list(flac.getvalue()))
    expect(page.locator("#about")).to_contain_text("dropped.flac")
    assert TRANSCRIPT.search(ask(page, "Transcribe."))
    error = page.locator("#error")
    give(page, "bad.wav", b"this is no audio at all" * 9)
    expect(error).to_contain_text("“bad.wav”: found content that starts with")
    give(page, "hour.wav", wav_bytes(np.zeros(3600 * 8000), 8000, "PCM_U8"))
    expect(error).to_contain_text("longer than 10 minutes", timeout=30000)
    expect(page.locator("#about")).to_contain_text("dropped.flac")
    # The recording from before is still the one that is asked about.
    assert "Vogel" in ask(page, "Translate to German.")
    expect(error).to_have_text("")
    # A format that libsndfile does not read is decoded by the browser.
    page.evaluate("""async () => {
      const stream = await navigator.mediaDevices.getUserMedia({audio: true}), parts = [];
      const coder = new MediaRecorder(stream);
      coder.ondataavailable = event => parts.push(event.data);
      coder.start();
      await new Promise(resolve => setTimeout(resolve, 3500));
      await new Promise(resolve => { coder.onstop = resolve; coder.stop(); });
      stream.getTracks()[0].stop();
      take("clip.webm", new Blob(parts, {type: coder.mimeType}));
    }""")
    expect(page.locator("#about")).to_contain_text("clip.webm", timeout=30000)
    assert "bird" in ask(page, "Transcribe.")
    give(page, "silence.wav", wav_bytes(np.zeros(2 * RATE)))
    expect(page.locator("#about")).to_contain_text("silence.wav")
    print("silence is answered with:", ask(page, "Transcribe."))


def check_stopping(page: Page, other: Page, sample: np.ndarray) -> None:
    """A long answer lets a second client wait, and stops when it is told to."""
    long = wav_bytes(np.tile(sample, int(590 * RATE / len(sample))))
    give(page, "long.wav", long)
    expect(page.locator("#status")).to_contain_text("Ready", timeout=120000)
    give(other, "short.wav", SAMPLE.read_bytes())
    expect(other.locator("#status")).to_contain_text("Ready", timeout=60000)
    click = (
        "text => [...document.querySelectorAll('button')].find(b => b.textContent === text).click()"
    )
    page.evaluate(click, "Transcribe.")
    other.evaluate(click, "Transcribe.")
    expect(other.locator("#status")).to_have_text("Waiting: 1 request is before this one.")
    page.evaluate(click, "Ask")
    assert page.locator("#error").text_content().startswith("An answer is being made.")
    expect(newest(page).locator(".answer")).to_contain_text("bird")
    page.keyboard.press("Escape")
    expect(newest(page).locator(".note").last).to_have_text("Stopped before its end.")
    expect(other.locator("#status")).to_contain_text("Answered", timeout=3000)
    assert "bird" in newest(page).locator(".answer").text_content()
    assert len(newest(page).locator(".answer").text_content()) < 1000


def check_lost(page: Page, process, address: str, ckpt: str) -> None:
    page.get_by_role("button", name="Transcribe.", exact=True).click()
    expect(newest(page).locator(".answer")).to_contain_text("bird", timeout=60000)
    process.kill()
    expect(page.locator("#error")).to_contain_text("connection was lost")
    ask(page, "Transcribe.", done="cannot be reached")
    expect(page.locator("#error")).to_contain_text("Start python sample.py --serve again")
    give(page, "short.wav", SAMPLE.read_bytes())
    expect(page.locator("#error")).to_contain_text("cannot be reached")
    process.wait()
    with serving(ckpt, address.strip("/").rpartition(":")[2]):
        assert "Vogel" in ask(page, "Translate to German.")
        expect(page.locator("#error")).to_have_text("")


def check_microphones(playwright, chromium: str, address: str) -> None:
    """What the page says where there is no microphone, or none for it."""
    for flags, sentence in (
        ([FAKE], "may not use the microphone"),
        ([ALLOW], "No microphone was found"),
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("button", name="Record", exact=True).click()
        expect(page.locator("#error")).to_contain_text(sentence)
        expect(page.get_by_role("button", name="Record", exact=True)).to_be_focused()
        browser.close()


def take_pictures(page: Page, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(100)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, (wide, width)
            page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)


def open_page(browser, address: str, errors: list, addresses: list) -> Page:
    page = browser.new_page(permissions=["microphone"])
    expected = re.compile("status of 4(04|13|15)|ERR_CONNECTION|ERR_INCOMPLETE|ERR_EMPTY|reset")
    watch = lambda text: expected.search(text) or errors.append(text)  # noqa: E731
    page.on("console", lambda message: watch(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(address)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--pictures", type=Path, help="saves pictures of the page in this folder")
    args = parser.parse_args()
    args.ckpt = str(Path(args.ckpt).resolve())
    sample, _ = soundfile.read(SAMPLE)
    errors, addresses = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(args.ckpt) as (process, address),
        sync_playwright() as playwright,
    ):
        spoken = Path(folder) / "spoken.wav"
        pause = np.zeros(RATE // 2)
        spoken.write_bytes(wav_bytes(np.concatenate([pause, sample, np.zeros(20 * RATE)])))
        flags = [FAKE, ALLOW, f"--use-file-for-fake-audio-capture={spoken}", "--mute-audio"]
        browser = playwright.chromium.launch(executable_path=args.chromium, args=flags)
        page = open_page(browser, address, errors, addresses)
        if args.pictures:
            take_pictures(page, args.pictures, "empty")
        check_recording(page, addresses)
        if args.pictures:
            take_pictures(page, args.pictures, "asked")
        times = [timed_answer(page, 3.2) for _ in range(TURNS)]
        middle, longest = statistics.median(times), max(times)
        print(f"complete answer {middle:.2f} s (at most {longest:.2f} s) after a recording's end")
        check_files(page, sample)
        if args.pictures:
            take_pictures(page, args.pictures, "files")
        other = open_page(browser, address, errors, addresses)
        check_stopping(page, other, sample)
        if args.pictures:
            page.get_by_role("button", name="Record", exact=True).click()
            page.wait_for_timeout(3000)
            take_pictures(page, args.pictures, "recording")
            page.get_by_role("button", name="Stop recording").click()
            give(page, "bad.wav", b"no audio" * 9)
            expect(page.locator("#error")).to_contain_text("bad.wav")
            take_pictures(page, args.pictures, "error")
            give(page, "short.wav", SAMPLE.read_bytes())
            give(page, "long.wav", wav_bytes(np.tile(sample, 200)))
        check_microphones(playwright, args.chromium, address)
        check_lost(page, process, address, args.ckpt)
        if args.pictures:
            take_pictures(page, args.pictures, "lost")
        browser.close()
    assert not errors, errors
    assert all(url.startswith((address, "blob:", "data:")) for url in addresses), set(addresses)
    print("all well")


if __name__ == "__main__":
    main()
