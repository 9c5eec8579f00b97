"""Opens a report of 2,000 synthetic items in headless Chromium and uses it.

    apt-get install chromium fonts-noto-cjk && pip install playwright numpy soundfile
    python tests/report.py [--chromium PATH] [--screenshot FILE.png] [--dark]

Checks tables, filters, marked differences, that a clip plays, that no text of the data runs as a script, that nothing
is fetched and that the console stays empty; prints sizes and times. Not part of the test suite: it needs a browser.
"""

import argparse
import base64
import io
import json
import tempfile
from pathlib import Path

import numpy
import soundfile
from playwright.sync_api import sync_playwright

TEMPLATE = Path(__file__).resolve().parent.parent / "prepare" / "report.html"
WORDS = {"en": "the red bird sleeps behind house every morning and Anna travels to Venice by train".split(),
         "de": "der rote Vogel schläft hinter dem Haus jeden Morgen und Anna fährt nach Venedig".split(),
         "it": "l'uccello rosso dorme dietro la casa ogni mattina e Anna va a Venezia in treno".split(),
         "zh": list("红色的鸟每天早上在房子后面睡觉安娜坐火车去威尼斯")}
HOSTILE = ["<script>hacked = 1</script>", "</script><script>hacked = 2</script>", "<!--<script>", "{{data}} $& \\u003c",
           "<img src=x onerror='hacked = 3'>", "a \u202egnirts\u202c b", "nul \0 bell \7 \u2028 \u200b", "e\u0301 😀",
           "", " ", "long" * 500, "again " * 3000]
KNOWN = {0: ("The red bird sleeps.", "the bird slept", "u:The del:red del:sleeps. u:the ins:slept"),
         3: ("红色的鸟在睡觉。", "红的狗在睡觉", "del:色 del:鸟 u:。 ins:狗")}
NEXT_FRAME = "await new Promise(done => requestAnimationFrame(() => setTimeout(done)));"


def items(count, clips):
    """Three tasks in four languages; every third item is right, every tenth hypothesis hostile; worst first."""
    rng, rows = numpy.random.default_rng(0), []
    for n in range(count):
        task, language = [("asr", "en"), ("st", "de"), ("st", "it"), ("st", "zh"), ("sqa", "it")][n % 5]
        said, join = rng.choice(WORDS[language], rng.integers(6, 20)), "" if language == "zh" else " "
        heard, hostile = [word for word in said if n % 3 == 0 or rng.random() > 0.1], HOSTILE[n // 10 % len(HOSTILE)]
        reference, hypothesis, _ = KNOWN.get(n, (join.join(said), hostile if n % 10 == 9 else join.join(heard), ""))
        rows.append(dict(id=str(n), audio=f"audio/test-000.tar/{n:04d}.ogg", clip=str(n) if n < clips else "__proto__",
                         start=2.5, seconds=3.0, task=task, source_language="en", target_language=language,
                         instruction=hostile if n % 10 == 8 else "Listen and answer.", reference=reference,
                         hypothesis=hypothesis, speaker=HOSTILE[0] if n == 2 else f"s{n % 24}", corpus="demo",
                         scores={"error": (reference != hypothesis) * (1 - n / count)}, margin=-3.2 if n % 2 else None))
    return sorted(rows, key=lambda row: -row["scores"]["error"])


def report(rows, clips):
    """The page, with a tone of three seconds for each clip."""
    audio, seconds = {}, numpy.arange(48000) / 16000
    for k in range(clips):
        file, wave = io.BytesIO(), 0.1 * numpy.sin(2 * numpy.pi * (200 + 2 * k) * seconds)
        soundfile.write(file, wave, 16000, format="OGG", subtype="OPUS")
        audio[str(k)] = "data:audio/ogg;base64," + base64.b64encode(file.getvalue()).decode()
    scores = {"en": {"WER": [0.036, 0.03, 0.041], "F1": [None] * 3}, "it": {"chrF2": [81.24, 79, 83.1]}}
    data = dict(title="demo/test.jsonl, out/ift.pt", facts={"rows": str(len(rows))}, items=rows, audio=audio,
                summary=[dict(task="asr" if to == "en" else "st", language=to, group=group, items=9, scores=scores[to])
                         for group in ("speaker flite-rms", "all") for to in scores], signatures={"BLEU it": "nrefs:1"})
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def check(page, rows):
    lines, articles, matching = page.locator("#summary tr").all_inner_texts(), page.locator("article"), rows
    assert lines[1] == "en\tall\t9\t3.6 (3.0–4.1)\t–" and lines[4] == "it\tall\t9\t81.2 (79.0–83.1)", lines
    for n, (_, _, marks) in KNOWN.items():
        item = articles.nth([row["id"] for row in rows].index(str(n))).locator("del, ins, u")
        assert item.evaluate_all("all => all.map(e => e.localName + ':' + e.textContent).join(' ')") == marks
    for control, value, right in [("task", "st", lambda row: row["task"] == "st"),
                                  ("wrong", True, lambda row: row["scores"]["error"] > 0),
                                  ("language", "de", lambda row: row["target_language"] == "de"),
                                  ("text", "VOGEL", lambda row: "Vogel" in row["reference"] + row["hypothesis"]),
                                  ("speaker", "s4", lambda row: row["speaker"] == "s4")]:
        took = page.evaluate("""async ([id, value]) => {
            const start = performance.now(), control = document.getElementById(id);
            control[value === true ? "checked" : "value"] = value;
            control.dispatchEvent(new Event("input", {bubbles: true}));
            """ + NEXT_FRAME + "return performance.now() - start; }", [control, value])
        matching = list(filter(right, matching))
        assert page.locator("#count").inner_text().startswith(f"{len(matching)} of {len(rows)} items"), control
        assert articles.count() == min(len(matching), 100)
        print(f"filtered by {control} too: {len(matching)} items, {took:.0f} ms")
    page.reload()
    player = page.locator("audio").first
    player.press("Space")
    page.wait_for_function("audio => audio.readyState >= 3 && audio.currentTime > 0.3", arg=player.element_handle())
    while page.locator("#more").is_visible():
        page.locator("#more").press("Enter")
    assert articles.count() == len(rows) and "audio left out" in articles.last.text_content()
    assert page.evaluate("typeof hacked === 'undefined' && document.querySelectorAll('script, img').length === 2")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--screenshot", help="saves a picture of the report")
    parser.add_argument("--dark", action="store_true")
    args, rows, errors, requests = parser.parse_args(), items(2000, 300), [], []
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        file = Path(directory) / "report.html"
        file.write_text(report(rows, 300), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--mute-audio"])
        page = browser.new_page(viewport=dict(width=1200, height=2000), color_scheme="dark" if args.dark else "light")
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(error))
        page.on("request", lambda request: requests.append(request.url[:20]))
        page.goto(file.as_uri())
        ready = page.evaluate("async () => {" + NEXT_FRAME + "return performance.now(); }")
        print(f"{file.stat().st_size / 1e6:.1f} MB, first items on screen {ready:.0f} ms after the start of loading")
        page.screenshot(path=args.screenshot)
        check(page, rows)
    assert not errors and all(url.startswith(("file:", "data:audio/")) for url in requests), (errors, set(requests))
    print("all well")


if __name__ == "__main__":
    main()
