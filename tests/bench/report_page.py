"""Opens a report of 2,000 synthetic items in headless Chromium and uses it.

    apt-get install chromium fonts-noto-cjk && pip install playwright
    python tests/bench/report_page.py [--chromium PATH] [--screenshot FILE.png] [--dark]

Checks tables, filters, marked differences, that a clip plays, that no text of the data runs as a
script, that nothing is fetched and that the console stays empty; prints sizes and times.
"""

import argparse
import base64
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from extras.report import encode_opus, fill_template  # noqa: E402

CLIPS = 300  # of the items' audio that are in the page
WORDS = {
    "en": "the red bird sleeps behind house every morning and Anna travels to Venice by train",
    "de": "der rote Vogel schläft hinter dem Haus jeden Morgen und Anna fährt nach Venedig",
    "it": "l'uccello rosso dorme dietro la casa ogni mattina e Anna va a Venezia in treno",
    "zh": "红色的鸟每天早上在房子后面睡觉安娜坐火车去威尼斯",
}
HOSTILE = [
    "<script>hacked = 1</script>",
    "</script><script>hacked = 2</script>",
    "<!--<script>",
    "{{data}} $& \\u003c",
    "<img src=x onerror='hacked = 3'>",
    "a \u202egnirts\u202c b",
    "nul \0 bell \7 \u2028 \u200b",
    "e\u0301 😀",
    "",
    " ",
    "long" * 500,
    "again " * 3000,
]
# Item -> its reference, its hypothesis, and the marks that are to be seen.
MARKED = {
    0: (
        "The red bird sleeps.",
        "the bird slept",
        "u:The del:red del:sleeps. u:the ins:slept",
    ),
    3: ("红色的鸟在睡觉。", "红的狗在睡觉", "del:色 del:鸟 u:。 ins:狗"),
}
FILTERS: list[tuple[str, object, Callable]] = [
    ("task", "st", lambda item: item["task"] == "st"),
    ("wrong", True, lambda item: item["scores"]["error"] > 0),
    ("language", "de", lambda item: item["target_language"] == "de"),
    ("text", "VOGEL", lambda item: "Vogel" in item["reference"] + item["hypothesis"]),
    ("speaker", "s4", lambda item: item["speaker"] == "s4"),
]
NEXT_FRAME = "await new Promise(done => requestAnimationFrame(() => setTimeout(done)));"
SET_FILTER = f"""async ([id, value]) => {{
    const start = performance.now(), control = document.getElementById(id);
    control[value === true ? "checked" : "value"] = value;
    control.dispatchEvent(new Event("input", {{bubbles: true}}));
    {NEXT_FRAME}
    return performance.now() - start;
}}"""


def make_items(count: int) -> list[dict]:
    """Three tasks in four languages; every third item is right, every tenth hypothesis hostile;
    worst first."""
    random, items = np.random.default_rng(0), []
    kinds = [("asr", "en"), ("st", "de"), ("st", "it"), ("st", "zh"), ("sqa", "it")]
    for n in range(count):
        task, language = kinds[n % 5]
        space = "" if language == "zh" else " "
        sentence = list(WORDS["zh"]) if language == "zh" else WORDS[language].split()
        words = random.choice(sentence, random.integers(6, 20))
        right = [word for word in words if n % 3 == 0 or random.random() > 0.1]
        hostile = HOSTILE[n // 10 % len(HOSTILE)]
        reference, hypothesis = space.join(words), space.join(right)
        if n % 10 == 9:
            hypothesis = hostile
        if n in MARKED:
            reference, hypothesis, _ = MARKED[n]
        item = {
            "id": str(n),
            "audio": f"audio/test-000.tar/{n:04d}.ogg",
            "clip": str(n) if n < CLIPS else "__proto__",
            "start": 2.5,
            "seconds": 3.0,
            "task": task,
            "source_language": "en",
            "target_language": language,
            "instruction": hostile if n % 10 == 8 else "Listen and answer.",
            "reference": reference,
            "hypothesis": hypothesis,
            "speaker": HOSTILE[0] if n == 2 else f"s{n % 24}",
            "corpus": "demo",
            "scores": {"error": (reference != hypothesis) * (1 - n / count)},
            "margin": -3.2 if n % 2 else None,
        }
        items.append(item)
    return sorted(items, key=lambda item: -item["scores"]["error"])


def make_page(items: list[dict]) -> str:
    """The page, with a tone of three seconds for each clip."""
    audio, seconds = {}, np.arange(48000) / 16000
    for k in range(CLIPS):
        wave = 0.1 * np.sin(2 * np.pi * (200 + 2 * k) * seconds)
        audio[str(k)] = "data:audio/ogg;base64," + base64.b64encode(encode_opus(wave)).decode()
    english = {"WER": [0.036, 0.03, 0.041], "F1": [None] * 3}
    italian = {"chrF2": [81.24, 79, 83.1]}
    summary = []
    for group in ("speaker flite-rms", "all"):
        line = {"group": group, "items": 9}
        summary.append({"task": "asr", "language": "en", "scores": english, **line})
        summary.append({"task": "st", "language": "it", "scores": italian, **line})
    data = {
        "title": "demo/test.jsonl, out/ift.pt",
        "facts": {"rows": str(len(items))},
        "summary": summary,
        "signatures": {"BLEU it": "nrefs:1"},
        "items": items,
        "audio": audio,
    }
    return fill_template(data)


def check_filters(page: Page, items: list[dict]) -> None:
    """Each filter is set on top of those before it."""
    matching = items
    for control, value, fits in FILTERS:
        taken = page.evaluate(SET_FILTER, [control, value])
        matching = [item for item in matching if fits(item)]
        count = page.locator("#count").inner_text()
        assert count.startswith(f"{len(matching)} of {len(items)} items"), control
        assert page.locator("article").count() == min(len(matching), 100)
        print(f"filtered by {control} too: {len(matching)} items, {taken:.0f} ms")


def check(page: Page, items: list[dict]) -> None:
    lines, articles = page.locator("#summary tr").all_inner_texts(), page.locator("article")
    assert lines[1] == "en\tall\t9\t3.6 (3.0–4.1)\t–", lines
    assert lines[4] == "it\tall\t9\t81.2 (79.0–83.1)", lines
    ids = [item["id"] for item in items]
    for n, (_, _, marks) in MARKED.items():
        marked = articles.nth(ids.index(str(n))).locator("del, ins, u")
        shown = marked.evaluate_all("all => all.map(e => e.localName + ':' + e.textContent)")
        assert " ".join(shown) == marks
    check_filters(page, items)

    # A clip is played by the keyboard, and the button shows the rest of the items.
    page.reload()
    player = page.locator("audio").first
    player.press("Space")
    plays = "audio => audio.readyState >= 3 && audio.currentTime > 0.3"
    page.wait_for_function(plays, arg=player.element_handle())
    while page.locator("#more").is_visible():
        page.locator("#more").press("Enter")
    assert articles.count() == len(items) and "audio left out" in articles.last.text_content()
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("script, img").count() == 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--screenshot", help="saves a picture of the report")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    items, errors, addresses = make_items(2000), [], []
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        file = Path(directory) / "report.html"
        file.write_text(make_page(items), encoding="utf-8")
        options = {"executable_path": args.chromium, "args": ["--mute-audio"]}
        browser = playwright.chromium.launch(**options)
        window = {"width": 1200, "height": 2000}
        page = browser.new_page(viewport=window, color_scheme="dark" if args.dark else "light")
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(error))
        page.on("request", lambda request: addresses.append(request.url[:20]))
        page.goto(file.as_uri())
        ready = page.evaluate(f"async () => {{ {NEXT_FRAME} return performance.now(); }}")
        size = file.stat().st_size / 1e6
        print(f"{size:.1f} MB, first items shown {ready:.0f} ms after the start of loading")
        if args.screenshot:
            page.screenshot(path=args.screenshot)
        check(page, items)
    assert not errors, errors
    assert all(url.startswith(("file:", "data:audio/")) for url in addresses), set(addresses)
    print("all well")


if __name__ == "__main__":
    main()
