"""Public corpora as they lie on disk to manifests: python -m prepare.corpora NAME SOURCE OUT.jsonl

Without a name it lists the corpora with their licences. A further corpus is an entry in CORPORA and
a function of its directory and the options of the command line that mean something to it, which
yields rows. A row is a manifest's example (see data.Manifest) whose audio is a Path, and has also
`where`, the file and line it comes from. It has a duration only where it is a part of a recording,
and `stated`, units and how many a second has, where the corpus says how long the recording is. What
a row does not say is task asr, language en, target_language as source_language, style written,
corpus and licence. Where it cannot be used, dropped[reason] gets its `where` instead. The readers
of people's own data are in prepare/forms.py.
"""

import argparse
import inspect
import json
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from data import tar_members, text_hash, write_text
from model import UserError, one_line_errors, steady_output, visible
from prepare import corpus_formats as formats
from prepare.corpus_formats import UNREADABLE, find, language_code, read_lines, read_pairs, select
from prepare.forms import chat, folder, kaldi, parquet
from prepare.mcif import TASKS, read_tasks


def folder_code(path: Path) -> str:
    """The code of the language by whose name the folder of a file is called."""
    return language_code(path.resolve().parent.name)


def librispeech(source, dropped, split=("train",)):
    files = find(source, "*/*/*/*.trans.txt", "LibriSpeech/*/*/*/*.trans.txt")
    for path in select(files, split, lambda path: path.parts[-4], "split"):
        for where, name, text in read_pairs(path):
            audio, speaker = path.parent / f"{name}.flac", name.split("-")[0]
            yield dict(where=where, audio=audio, text=text, style="bare", speaker=speaker)


def mls(source, dropped, split=("train",), language=None):
    def language_of(path):  # of mls_german/train/transcripts.txt, or of mls_german_opus
        name = path.resolve().parts[-3].removeprefix("mls_").removesuffix("_opus")
        return codes.get(name, name)

    names = "english german dutch french spanish italian portuguese polish".split()
    codes = dict(zip(names, "en de nl fr es it pt pl".split(), strict=True))
    files = find(source, "mls_*/*/transcripts.txt", "*/transcripts.txt")
    files = select(files, language, language_of, "language")
    for path in select(files, split, lambda path: path.parent.name, "split"):
        fields = dict(style="bare", source_language=language_of(path))
        suffix = "opus" if path.resolve().parts[-3].endswith("_opus") else "flac"
        segments = formats.read_map(path.with_name("segments.txt"))
        for where, name, text in read_pairs(path):
            speaker, _, book = name.rpartition("_")[0].partition("_")
            audio = path.parent / "audio" / speaker / book / f"{name}.{suffix}"
            _, part = formats.parse_segment(segments.get(name, ""))
            row = dict(fields, where=where, audio=audio, text=text, speaker=speaker)
            yield row | {"stated": (part and part["duration"], 1)}


def clip_lengths(path: Path) -> dict[str, str]:
    """{clip: milliseconds}, which newer releases of Common Voice state beside a table."""
    return formats.read_column(path.with_name("clip_durations.tsv"), "clip", "duration[ms]")


def commonvoice(source, dropped, split=("train",), language=None):
    files = select(find(source, "*/*.tsv", "*.tsv"), language, folder_code, "language")
    for path in select(files, split, lambda path: path.stem, "split"):
        lengths = clip_lengths(path)
        for where, record in formats.read_table(path, ["path", "sentence"], dropped):
            name = record["path"].removesuffix(".mp3") + ".mp3"  # which the first releases lack
            fields = dict(audio=path.with_name("clips") / name, text=record["sentence"])
            fields["stated"] = lengths.get(name), 1000
            fields["source_language"] = language_code(record.get("locale", "")) or folder_code(path)
            yield dict(fields, where=where, speaker=record.get("client_id"))


def covost2(source, dropped, split=("train",), language=None, common_voice=None):
    def pair_of(path):  # of covost_v2.en_zh-CN.tsv
        return "-".join(map(language_code, path.name.split(".")[1].split("_")))

    files = find(source, "covost_v2.*_*.tsv", "*/covost_v2.*_*.tsv")
    files = [path for path in files if path.name.count(".") == 2]  # not those the script makes
    splits = select(["train", "dev", "test"], split, str, "split")
    for path in select(files, language, pair_of, "translation"):
        spoken, written = pair_of(path).split("-")
        folder = path.name.split(".")[1].split("_")[0]
        voices = find(common_voice or path.parent, "validated.tsv", f"{folder}/validated.tsv")
        speakers = formats.read_column(voices[0], "path", "client_id")
        lengths = clip_lengths(voices[0])
        fields = dict(task="st", source_language=spoken, target_language=written)
        columns = ["path", "translation", "split"]
        for where, record in formats.read_table(path, columns, dropped, escapechar="\\"):
            name, text, split_name = map(record.get, columns)
            if split_name.removesuffix("_covost") not in splits:
                continue
            if re.fullmatch(r"\W*REMOVE\W*", text):
                dropped["translation marked REMOVE"].append(where)
            elif name in speakers:
                audio = voices[0].with_name("clips") / name
                row = dict(fields, where=where, audio=audio, text=text, speaker=speakers[name])
                yield row | {"stated": (lengths.get(name), 1000)}
            else:
                dropped["not in this release of Common Voice"].append(where)


def fleurs(source, dropped, out, split=("train",), language=None):
    columns = "id file raw_transcription transcription characters num_samples gender".split()
    folders = {folder_code(path): path.parent for path in find(source, "data/*/*.tsv", "*/*.tsv")}
    for pair in language or sorted(folders):
        select(folders, pair.split("-"), str, "language")
        spoken, _, written = pair.partition("-")
        fields = dict(source_language=spoken, target_language=written or spoken)
        fields["task"] = "st" if written else "asr"
        files = formats.list_paths(folders[spoken], "*.tsv")
        for path in select(files, split, lambda path: path.stem, "split"):
            clips = path.parent / "audio" / path.stem
            archive = clips.with_suffix(".tar.gz")
            if archive.exists() and not clips.exists():
                unpacked = out.parent / "fleurs-audio" / path.parent.name / path.stem
                clips = formats.unpack([archive], unpacked)
            # The same id is the same sentence in every language.
            other = folders[written or spoken] / path.name
            texts = formats.read_column(other, "id", "raw_transcription", columns=columns)
            for where, record in formats.read_table(path, [], dropped, columns):
                if record["id"] in texts:
                    audio, text = clips / record["file"], texts[record["id"]]
                    stated = record["num_samples"], 16000
                    yield dict(fields, where=where, audio=audio, text=text, stated=stated)
                else:
                    dropped[f"no sentence of this id in {written}"].append(where)


def voxpopuli(source, dropped, out, split=("train",), language=None):
    patterns = [f"{place}asr_*.tsv" for place in ("transcribed_data/*/", "data/*/", "*/", "")]
    files = find(source, *patterns)
    files = select(files, language, lambda path: path.resolve().parent.name, "language")
    for path in select(files, split, lambda path: path.stem.removeprefix("asr_"), "split"):
        # The official script leaves clips in folders of years, the Hub has them in archives.
        name, part = path.resolve().parent.name, path.stem.removeprefix("asr_")
        archives = formats.list_paths(path.parent / part, "*.tar.gz")
        unpacked = out.parent / "voxpopuli-audio" / name / part
        clips = formats.unpack(archives, unpacked) if archives else path.parent
        columns = ["id", "raw_text", "normalized_text", "speaker_id"]
        for where, record in formats.read_table(path, columns, dropped):
            id, raw, normalised, speaker = map(record.get, columns)
            if record.get("is_gold_transcript", "True").lower() == "false":
                dropped["not a gold transcript"].append(where)
                continue
            audio = clips / (f"{id}.wav" if archives else f"{id[:4]}/{id}.ogg")
            fields = dict(speaker=speaker.replace("None", ""), source_language=folder_code(path))
            fields["style"] = "written" if raw.strip() else "bare"  # as in half of some languages
            yield dict(fields, where=where, audio=audio, text=raw.strip() or normalised)


def peoples_speech(source, dropped, split=("train",)):
    files = find(source, "*/*.json", "*.json")
    files = [path for path in files if not re.search(r"_\d{6}$", path.stem)]  # samples of others
    # Train has four subsets, each of which can be asked for by itself, too.
    parts = [path.stem for path in files if path.resolve().parent.name in split]
    for path in select(files, parts or split, lambda path: path.stem, "split or subset"):
        tars = {}
        for tar in formats.list_paths(path.with_suffix(""), "*.tar"):
            with one_line_errors(tar, formats.DAMAGED):
                tars |= dict.fromkeys(tar_members(str(tar)), tar)
        licence = "CC-BY-SA-4.0" if path.stem.endswith("_sa") else "CC-BY-4.0"
        for where, line in read_lines(path):
            try:
                item = json.loads(line)
                terms = spdx(str(item.get("license") or item.get("licenseurl") or licence))
                fields = dict(style="bare", speaker=str(item.get("identifier", "")), licence=terms)
                data = item["training_data"]
                clips = zip(data["name"], data["label"], data["duration_ms"], strict=True)
                for name, text, milliseconds in clips:
                    name = name.removeprefix("./")
                    audio = tars.get(name, path.with_suffix("")) / name
                    if 3 < 1000 * len(text) / milliseconds < 30:
                        stated = milliseconds, 1000
                        yield dict(fields, where=where, audio=audio, text=text, stated=stated)
                    else:  # it was aligned to a text that is not what is said
                        dropped["text too long or too short for its audio"].append(where)
            except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
                dropped[UNREADABLE].append(where)


def spdx(licence: str) -> str:
    """The SPDX identifier of a Creative Commons licence by its address or its name."""
    match = re.search(r"(by[a-z-]*|zero)[/ -](\d\.\d)", licence.lower())
    name = f"CC-{match[1].upper()}-{match[2]}" if match else licence
    return name.replace("CC-ZERO", "CC0")


def squad_questions(path: Path) -> Iterator[tuple[str, str, str, str, str]]:
    """(title, article_paragraph, id, question, first answer) of a file in SQuAD's format."""
    with one_line_errors(path, "expected SQuAD's format; get the file again"):
        for i, article in enumerate(json.loads(path.read_bytes())["data"]):
            for j, paragraph in enumerate(article["paragraphs"]):
                for item in paragraph["qas"]:
                    answers = [answer["text"] for answer in item["answers"]] or [""]
                    yield article["title"], f"{i}_{j}", item["id"], item["question"], answers[0]


def spoken_squad(source, dropped, out, split=("train",), squad=None):
    # Its own answers are lower-case spans of recogniser output; those of SQuAD are as printed.
    printed = squad_questions(squad) if squad else []
    printed = {id: answer for _, _, id, _, answer in printed}
    for name in select(["train", "dev", "test"], split, str, "split"):
        part, folder = ("test", "dev_wav") if name == "test" else ("train", "train_wav")
        path = find(source, f"spoken_{part}-v1.1.json")[0]
        passages = defaultdict(dict)
        for pattern in (f"{folder}/*.wav", f"*/{folder}/*.wav"):
            for file in formats.list_paths(source, pattern):
                paragraph, _, number = file.stem.rpartition("_")
                passages[paragraph][number] = file
        for title, paragraph, id, question, answer in squad_questions(path):
            # A tenth of the articles of train is dev, so that no passage is in both.
            held_out = zlib.crc32(title.encode()) % 10 == 0
            if part == "train" and held_out != (name == "dev"):
                continue
            where = f"{path} question {id}"
            sentences = passages[paragraph]
            files = [sentences.get(str(i)) for i in range(max(1, len(sentences)))]
            passage = out.parent / "spoken-squad-audio" / f"{part}-{paragraph}.flac"
            if None in files:
                name = f"{folder}/{paragraph}_{files.index(None)}.wav"
                dropped[formats.MISSING].append(f"{where} ({name})")
            elif squad and id not in printed:
                dropped["question that is not in SQuAD's file"].append(where)
            elif not (passage.exists() or formats.join(files, passage)):
                dropped["sentences that cannot be decoded or joined"].append(where)
            else:
                fields = dict(task="sqa", question=question, text=printed.get(id, answer))
                yield dict(fields, where=where, audio=passage, speaker="google-tts")


def mcif(source, dropped, out, split=("long",), language=None):
    entries, texts = [], set()
    for track, target, where, reference, samples in mcif_references(source):
        task = TASKS.get(reference.get("task"))
        lines = reference.findtext("reference", "").split("\n")
        fields = dict(task=task, text=" ".join(lines), target_language=target, test_only=True)
        if task == "sqa":
            instruction = samples[0].findtext("instruction", "") if samples else ""
            fields["question"] = re.split("[:：]", instruction, maxsplit=1)[-1]
            lines = [fields["question"]]
        texts.update(lines, reference.findtext("metadata/transcript", "").split("\n"))
        entries.append((track, target, where, fields, samples))

    # No text of any track and language may get into training, whichever rows are asked for.
    hashes = sorted({text_hash(text) for text in texts if text.strip()})
    write_text(out.with_suffix(".fingerprints"), "".join(f"{line}\n" for line in hashes))

    entries = select(entries, split, lambda entry: entry[0], "track")
    entries = select(entries, language, lambda entry: entry[1], "language")
    for track, _, where, fields, samples in entries:
        if fields["task"] is None:
            dropped["not transcription, translation or a question"].append(where)
        elif len(samples) != 1:
            dropped["not one recording with one text: take --split long"].append(where)
        else:
            name = samples[0].findtext("audio_path", "").strip()
            yield dict(fields, where=where, audio=source / f"{track.upper()}_AUDIOS" / name)


def mcif_references(source: Path) -> Iterator[tuple]:
    """(track, language, where it stands, reference, its samples) of each one, as XML elements."""
    for path in find(source, "*.ref.xml*"):
        name = ".".join(path.name.split(".ref.xml")[0].split(".")[-2:])  # long.de
        with one_line_errors(path, "copy it and its source file again"):
            tasks = read_tasks(find(source, f"*.{name}.src*.xml*")[0])
            samples = {(*key, id): sample for key, pairs in tasks for id, sample in pairs}
            for key, references in read_tasks(path):
                for ids, reference in references:
                    asked = [samples.get((*key, id)) for id in ids.split(",")]
                    where = f"{path} {reference.get('iid')}"
                    yield *key, where, reference, [] if None in asked else asked


def ljspeech(source, dropped):
    path = find(source, "metadata.csv")[0]
    for where, line in read_lines(path):
        name, *texts = line.split("|")
        if len(texts) == 2:
            audio = path.with_name("wavs") / f"{name}.wav"
            yield dict(where=where, audio=audio, text=texts[0], speaker="lj")
        else:
            dropped[UNREADABLE].append(where)


# name: (licence, SPDX, of a row that does not say another; address; reader)
HUB, GITHUB = "https://huggingface.co/datasets", "https://github.com"
CORPORA = {
    "librispeech": ("CC-BY-4.0", "https://www.openslr.org/12", librispeech),
    "mls": ("CC-BY-4.0", "https://www.openslr.org/94", mls),
    "commonvoice": ("CC0-1.0", "https://commonvoice.mozilla.org", commonvoice),
    "covost2": ("CC0-1.0", f"{GITHUB}/facebookresearch/covost", covost2),
    "fleurs": ("CC-BY-4.0", f"{HUB}/google/fleurs", fleurs),
    "voxpopuli": ("CC0-1.0", f"{GITHUB}/facebookresearch/voxpopuli", voxpopuli),
    "peoples-speech": ("CC-BY-4.0", f"{HUB}/MLCommons/peoples_speech_v1.0", peoples_speech),
    "spoken-squad": ("CC-BY-SA-4.0", f"{GITHUB}/Chia-Hsuan-Lee/Spoken-SQuAD", spoken_squad),
    "mcif": ("CC-BY-4.0", f"{HUB}/FBK-MT/MCIF, for testing only", mcif),
    "ljspeech": ("LicenseRef-PublicDomain", "https://keithito.com/LJ-Speech-Dataset", ljspeech),
    "kaldi": ("unknown", "https://kaldi-asr.org/doc/data_prep.html", kaldi),
    "folder": ("unknown", "your recordings, each beside a text: x/1.wav, x/1.txt", folder),
    "parquet": ("unknown", f"{HUB} in parquet, columns audio and text", parquet),
    "chat": ("unknown", "your JSON Lines of messages, with audio and text", chat),
}


def main(argv: list[str] | None = None) -> None:
    steady_output()
    parser = argparse.ArgumentParser(description="Public corpora, and your data, to manifests")
    parser.add_argument("name", nargs="?", choices=CORPORA, help="without it, all are listed")
    parser.add_argument("source", nargs="?", type=Path, help="the corpus's directory, unpacked")
    parser.add_argument("out", nargs="?", type=Path, help="the manifest to write")
    parser.add_argument("--split", nargs="+", help="default: train, with train-clean-100 and so on")
    parser.add_argument("--language", nargs="+", help="de, of translations en-de, of chats en de")
    parser.add_argument("--shards", type=Path, help="a directory for tars with copies of the audio")
    parser.add_argument("--common-voice", type=Path, help="for covost2; default: SOURCE")
    parser.add_argument("--squad", type=Path, help="for spoken-squad: SQuAD's own JSON file")
    parser.add_argument("--licence", help="SPDX, of your data; default: unknown, which is refused")
    args = parser.parse_args(argv)
    if args.name is None:
        for name, (licence, address, _) in CORPORA.items():
            print(f"{name:16}{licence:24}{address}")
        return
    if args.out is None:
        parser.error("expected NAME SOURCE OUT.jsonl")

    # A reader takes the options that it has a parameter for.
    licence, _, read = CORPORA[args.name]
    options = {name: value for name, value in vars(args).items() if value is not None}
    taken = inspect.signature(read).parameters
    for name in options.keys() - taken.keys() - {"name", "source", "out", "shards"}:
        parser.error(f"{args.name} takes no --{name.replace('_', '-')}")
    options = {name: value for name, value in options.items() if name in taken}
    dropped = defaultdict(list)
    try:
        terms = dict(corpus=args.name, licence=licence)
        formats.convert(read(dropped=dropped, **options), dropped, terms, args)
    except (UserError, OSError) as error:
        sys.exit(f"corpora: {args.name}: {visible(error)}; no manifest was written")
    except KeyboardInterrupt:
        parser.exit(130, "corpora: stopped, no manifest was written; run the same command again\n")
    if dropped[formats.MISSING]:
        sys.exit(f"corpora: {args.name}: recordings are missing; get the rest and run this again")


if __name__ == "__main__":
    main()
