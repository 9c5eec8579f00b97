"""Public corpora as they lie on disk to manifests: python -m prepare.corpora NAME SOURCE_DIR OUT.jsonl

Without a name it lists the corpora with their licences. A further corpus is a function that reads its layout and yields
rows, and an entry in CORPORA. A row is one of a manifest (see data.Manifest) whose audio is a Path, and has besides

    where      the file and line it comes from, for messages
    stated_s   the duration the corpus states, in seconds: compared with that of the audio's header, which the row gets
    duration   only where the row is a part of a recording, with start

What it does not say is task asr, language en, target_language as source_language, style written, and the corpus and its
licence. Bare text is lower-cased. For a row that cannot be used a reader yields drop(...), so that it is counted; with
audio, its hours are too.
"""

import argparse
import csv
import json
import os
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

from prepare.corpus_formats import (MISSING, TEXT, UNREADABLE, CorpusError, Index, Lines, convert, drop, find, join,
                                    read_json, read_lines, select, table, tar_members, unpack)
from prepare.errors import visible
from prepare.mcif import FormatError, read_references, read_source

# -----------------------------------------------------------------------------
# readers: (source directory, options of the command line) to rows


def code(name):
    """The code of a language by its name in a corpus (zh-CN, cmn_hans_cn, en_us); Cantonese, zh-HK too, is yue."""
    return {"zh-HK": "yue", "cmn_hans_cn": "zh"}.get(name) or re.split("[-_]", name)[0]


def number(text, unit=1):
    """A field as a number of seconds, of which `unit` are one; None if it is none."""
    return float(text) / unit if re.fullmatch(r"[0-9]{1,12}(\.[0-9]+)?", str(text)) else None


def librispeech(source, args):
    files = find(source, "*/*/*/*.trans.txt", "LibriSpeech/*/*/*/*.trans.txt")
    for path in select(files, args.split, lambda path: path.parts[-4], "split"):
        for where, line in read_lines(path):
            name, _, text = line.partition(" ")
            yield {"audio": path.with_name(f"{name}.flac"), "text": text, "style": "bare",
                   "speaker": name.split("-")[0], "where": where}


MLS = {"english": "en", "german": "de", "dutch": "nl", "french": "fr", "spanish": "es", "italian": "it",
       "portuguese": "pt", "polish": "pl"}


def mls(source, args):
    def language(path):  # of mls_german/train/transcripts.txt, or of mls_german_opus
        folder = path.resolve().parts[-3]
        return next((MLS[name] for name in MLS if name in folder), folder)

    files = find(source, "mls_*/*/transcripts.txt", "*/transcripts.txt")
    files = select(files, args.language, language, "language")
    for path in select(files, args.split, lambda path: path.parent.name, "split"):
        suffix = "opus" if path.resolve().parts[-3].endswith("_opus") else "flac"
        for where, line in read_lines(path):
            name, _, text = line.partition("\t")
            speaker, _, book = name.rpartition("_")[0].partition("_")
            yield {"audio": path.parent / "audio" / speaker / book / f"{name}.{suffix}", "text": text, "style": "bare",
                   "source_language": language(path), "speaker": speaker, "where": where}


def commonvoice(source, args):
    def language(clips):
        return code(clips.resolve().parent.name)

    for clips in select(find(source, "*/clips", "clips"), args.language, language, "language"):
        spoken, durations = language(clips), clips.with_name("clip_durations.tsv")
        durations = Lines(durations, "clip") if durations.exists() else {}
        files = sorted(clips.parent.glob("*.tsv"))
        for path in select(files, args.split, lambda path: path.stem, "split"):
            for where, record in table(path, ("path", "sentence")):
                name = record.get("path", "").removesuffix(".mp3") + ".mp3"  # the first releases have no suffix
                stated = (durations.get(name) or {}).get("duration[ms]")
                yield {"audio": clips / name, "text": record["sentence"], "speaker": record.get("client_id"),
                       "source_language": code(record.get("locale", "")) or spoken, "where": where,
                       "stated_s": number(stated, 1000)} if record else drop(UNREADABLE, where)


def covost2(source, args):
    def languages(path):  # of covost_v2.en_zh-CN.tsv
        return path.name.split(".")[1].split("_")

    def pair(path):
        return "-".join(map(code, languages(path)))

    files = find(source, "covost_v2.*_*.tsv", "*/covost_v2.*_*.tsv")
    files = [path for path in files if path.name.count(".") == 2]  # not what the official script makes of them
    splits = select(["train", "dev", "test"], args.split, str, "split")
    for path in select(files, args.language, pair, "translation"):
        voices = find(args.common_voice or path.parent, "validated.tsv", f"{languages(path)[0]}/validated.tsv")[0]
        clips = Lines(voices, "path")
        for where, record in table(path, ("path", "translation", "split"), escape="\\"):
            if not record:
                yield drop(UNREADABLE, where)
            elif record["split"].removesuffix("_covost") in splits:
                clip = clips.get(record["path"])
                yield {"audio": voices.parent / "clips" / record["path"], "text": record["translation"], "task": "st",
                       "source_language": code(languages(path)[0]), "target_language": code(languages(path)[1]),
                       "speaker": clip.get("client_id"), "where": where
                       } if clip else drop("not in this release of Common Voice", where)


FLEURS = ["id", "file", "raw_transcription", "transcription", "characters", "num_samples", "gender"]


def fleurs(source, args):
    folders = {code(path.parent.name): path.parent for path in find(source, "data/*/*.tsv", "*/*.tsv")}
    for languages in args.language or sorted(folders):
        spoken, _, written = languages.partition("-")
        for language in filter(None, (spoken, written)):
            select(folders, [language], str, "language")
        folder = folders[spoken]
        for path in select(sorted(folder.glob("*.tsv")), args.split, lambda path: path.stem, "split"):
            texts = {}
            if written:  # the same id is the same sentence in every language
                other = table(folders[written] / path.name, (), FLEURS)
                texts = {record["id"]: record["raw_transcription"] for _, record in other if record}
            clips, archive = folder / "audio" / path.stem, folder / "audio" / f"{path.stem}.tar.gz"
            if archive.exists() and not clips.exists():
                clips = unpack([archive], args.out.parent / "fleurs-audio" / folder.name / path.stem)
            for where, record in table(path, (), FLEURS):
                if not record:
                    yield drop(UNREADABLE, where)
                elif written and record["id"] not in texts:
                    yield drop(f"no sentence of this id in {written}", where, number(record["num_samples"], 16000) or 0)
                else:
                    yield {"audio": clips / record["file"], "task": "st" if written else "asr",
                           "text": texts.get(record["id"], record["raw_transcription"]), "source_language": spoken,
                           "target_language": written or spoken, "stated_s": number(record["num_samples"], 16000),
                           "where": where}


def voxpopuli(source, args):
    files = find(source, "transcribed_data/*/asr_*.tsv*", "data/*/asr_*.tsv*", "*/asr_*.tsv*", "asr_*.tsv*")
    folders = sorted({path.parent.resolve() for path in files})
    for folder in select(folders, args.language, lambda folder: folder.name, "language"):
        for split in select(["train", "dev", "test"], args.split, str, "split"):
            for where, record, audio in voxpopuli_clips(folder, split, args):
                raw = record.get("raw_text", "").strip()  # empty in half of some languages
                if not record:
                    yield drop(UNREADABLE, where)
                elif record.get("is_gold_transcript", "True").lower() == "false":
                    yield audio | drop("not a gold transcript", where)
                else:
                    yield audio | {"text": raw or record["normalized_text"], "style": "written" if raw else "bare",
                                   "source_language": folder.name.split("_")[0],
                                   "speaker": record["speaker_id"].replace("None", ""), "where": where}


def voxpopuli_clips(folder, split, args):
    # (where it stands, record, its audio): clips that the official script has cut, or as the Hub has them, or parts of
    # the sessions by the table from which the script cuts
    cut, archives = folder / f"asr_{split}.tsv", sorted((folder / split).glob("*.tar.gz"))
    if cut.exists():
        clips = unpack(archives, args.out.parent / "voxpopuli-audio" / folder.name / split) if archives else folder
        for where, record in table(cut, ("id", "raw_text", "normalized_text", "speaker_id")):
            name = record.get("id", "")
            yield where, record, {"audio": clips / (f"{name}.wav" if archives else f"{name[:4]}/{name}.ogg")}
        return
    path = find(folder, f"asr_{folder.name}.tsv.gz", cut.name)[0]
    need = ("session_id", "original_text", "normed_text", "speaker_id", "start_time", "end_time", "split")
    for where, record in table(path, need, delimiter="|", quoting=csv.QUOTE_MINIMAL):
        if record.get("split", split) == split:
            session, start, end = (record.get(name) for name in ("session_id", "start_time", "end_time"))
            if None in (number(start), number(end)):
                yield where, {}, {}
                continue
            audio = folder.parents[1] / "raw_audios" / "original" / session[:4] / f"{session}_original.ogg"
            yield (where, record | {"raw_text": record["original_text"], "normalized_text": record["normed_text"]},
                   {"audio": audio, "start": number(start), "duration": number(end) - number(start)})


def peoples_speech(source, args):
    files = find(source, "*/*.json", "*.json")
    files = [path for path in files if not re.search(r"_\d{6}$", path.stem)]  # samples of the large ones
    parts = [path.stem for path in files if path.resolve().parent.name in args.split]  # train has four
    for path in select(files, parts or args.split, lambda path: path.stem, "split or subset"):
        folder, licence = path.with_suffix(""), "CC-BY-SA-4.0" if path.stem.endswith("_sa") else "CC-BY-4.0"
        tars = sorted(folder.glob("*.tar"))
        tar_of = Index(tar_members(tars))
        for where, line in read_lines(path):
            try:
                item = json.loads(line)
                own = spdx(str(item.get("license") or item.get("licenseurl") or licence))
                data = item["training_data"]
                for name, text, ms in zip(data["name"], data["label"], data["duration_ms"], strict=True):
                    name, stated_s = name.removeprefix("./"), ms / 1000
                    tar = tar_of.get(name)
                    if not 3 * stated_s < len(text) < 30 * stated_s:  # aligned to a text that is not what is said
                        yield drop("text too long or too short for its audio", where, stated_s)
                    else:
                        yield {"audio": (folder if tar is None else tars[tar]) / name, "text": text, "style": "bare",
                               "speaker": str(item.get("identifier", "")), "licence": own, "stated_s": stated_s,
                               "where": where}
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                yield drop(UNREADABLE, where)


def spdx(licence):
    """The SPDX identifier of a Creative Commons licence by its address or its name."""
    if match := re.search(r"creativecommons\.org/(?:licenses/([a-z-]+)|publicdomain/zero)/(\d\.\d)", licence):
        return f"CC-{match[1].upper()}-{match[2]}" if match[1] else f"CC0-{match[2]}"
    return re.sub("[ _]", "-", licence).upper() if licence.lower().startswith("cc") else licence


def europarl_st(source, args):
    def pair(path):  # of en/de/train/segments.lst
        return "-".join(path.parts[-4:-2])

    files = find(source, "*/*/*/segments.lst", "v1.1/*/*/*/segments.lst")
    files = select(files, args.language, pair, "translation")
    for path in select(files, args.split, lambda path: path.parent.name, "split"):
        spoken, written = pair(path).split("-")
        names = [path.with_name(name) for name in ("speeches.lst", "speakers.lst")]
        speakers = dict(zip(*(name.read_text(**TEXT).splitlines() for name in names))) if names[0].exists() else {}
        translations = path.with_name(f"segments.{written}")
        with open(path, **TEXT) as segments, open(translations, **TEXT) as texts:
            for at, (segment, text) in enumerate(zip_longest(segments, texts), 1):
                where = f"{str(translations)!r} line {at}"
                if segment is None or text is None:
                    raise CorpusError(f"{where}: found an end here, but not in segments.lst or the other way round, "
                                      "expected as many lines in both; get them again")
                recording, start, end = (segment.split() + ["", "", ""])[:3]
                if None in (number(start), number(end)):
                    yield drop(UNREADABLE, where)
                    continue
                kinds = [path.parents[2] / "audios" / f"{recording}.{kind}" for kind in ("flac", "wav", "ogg", "m4a")]
                yield {"audio": next(filter(os.path.exists, kinds), kinds[-1]), "start": number(start),
                       "duration": number(end) - number(start), "text": text, "task": "st", "source_language": spoken,
                       "target_language": written, "speaker": speakers.get(recording), "where": where}


def squad_paragraphs(path):
    """(article's title, article_paragraph, [(id, question, answers)]) of each paragraph of a file in SQuAD's format."""
    try:
        for i, article in enumerate(read_json(path)["data"]):
            for j, paragraph in enumerate(article["paragraphs"]):
                yield article["title"], f"{i}_{j}", [
                    (qa["id"], qa["question"], [answer["text"] for answer in qa["answers"]]) for qa in paragraph["qas"]]
    except (KeyError, TypeError) as error:
        raise CorpusError(f"{str(path)!r}: no {error} where SQuAD's format has it; get the file again") from error


def spoken_squad(source, args):
    # its own answers are lower-case spans of recogniser output; those of SQuAD are as printed
    answers = {id: found for _, _, qas in squad_paragraphs(args.squad) for id, _, found in qas} if args.squad else None
    for split in select(["train", "dev", "test"], args.split, str, "split"):
        part, folder = ("test", "dev_wav") if split == "test" else ("train", "train_wav")
        path, folder = find(source, f"spoken_{part}-v1.1.json")[0], find(source, folder, f"*/{folder}")[0]
        sentences = {}
        for name in os.listdir(folder):
            if match := re.fullmatch(r"(\d+_\d+)_(\d+)\.wav", name):
                sentences.setdefault(match[1], []).append((int(match[2]), folder / name))
        for title, paragraph, qas in squad_paragraphs(path):
            if part == "train" and (zlib.crc32(title.encode()) % 10 == 0) != (split == "dev"):
                continue  # a tenth of the articles is dev, so that no passage is in both
            files = sorted(sentences.get(paragraph, ()))
            passage, lost = args.out.parent / "spoken-squad-audio" / f"{part}-{paragraph}.flac", None
            if not files or [at for at, _ in files] != list(range(len(files))):
                lost = MISSING
            elif qas and not join([file for _, file in files], passage):
                lost = "sentences that cannot be decoded or joined"
            for id, question, found in qas:
                where = f"{str(path)!r} question {id}"
                if lost or answers is not None and id not in answers:
                    yield drop(lost or "question that is not in SQuAD's file", where)
                else:
                    found = answers[id] if answers else found
                    yield {"audio": passage, "text": found[0] if found else "", "task": "sqa", "question": question,
                           "speaker": "google-tts", "where": where}


def librisqa(source, args):
    files = find(source, "LibriSQA-Part*/LibriSQA-Part*-*.json", "LibriSQA-Part*-*.json")
    for path in select(files, args.split, lambda path: path.stem.rpartition("-")[2], "split"):
        part = "test-clean" if path.stem.endswith("test") else "train-clean-360"
        speech = find(args.librispeech or source, part, f"LibriSpeech/{part}")[0]
        for at, item in enumerate(read_json(path), 1):
            where = f"{str(path)!r} item {at}"
            try:
                name, speaker, chapter = re.search(r"(\d+)-(\d+)-\d+", item["speech_path"]).group(0, 1, 2)
                asked, said = ("question_and_option", "answer_and_analysis") if "question" not in item else (
                    "question", "answer")
                yield {"audio": speech / speaker / chapter / f"{name}.flac", "text": item[said], "task": "sqa",
                       "question": item[asked], "speaker": speaker, "stated_s": number(item.get("duration")),
                       "where": where}
            except (KeyError, TypeError, AttributeError):
                yield drop(UNREADABLE, where)


def mcif(source, args):
    from prepare.checkpoint import write_text
    from prepare.licences import fingerprint
    found, texts = [], set()
    for path in find(source, "*.ref.xml*"):
        name = ".".join(path.name.split(".ref.xml")[0].split(".")[-2:])  # long.de
        samples = {(task.track, task.language, sample.id): sample
                   for task in read_source(find(source, f"*.{name}.src*.xml*")[0]) for sample in task.samples}
        for key, references in read_references(path).items():
            for reference in references:
                asked = [samples[(*key, id)] for id in reference.ids if (*key, id) in samples]
                question = re.split("[:：]", asked[0].instruction, maxsplit=1)[-1] if asked else ""
                texts |= {question} if reference.task == "QA" else {*reference.lines, *reference.transcript}
                found.append((key, f"{str(path)!r} {reference.iid}", reference, asked, question))
    # of all tracks and languages, so that none of these texts gets into training whichever rows are asked for
    write_text(args.out.with_suffix(".fingerprints"), "".join(f"{line}\n" for line in sorted(
        {fingerprint(text) for text in texts if text.strip()})))
    found = select(found, args.split, lambda entry: entry[0][0], "track")
    found = select(found, args.language, lambda entry: entry[0][1], "language")
    for (track, language), where, reference, asked, question in found:
        if reference.task not in ("ASR", "TRANS", "QA"):
            yield drop("not transcription, translation or a question", where)
        elif len(asked) != len(reference.ids):
            yield drop("id that is not in the source file", where)
        elif len(asked) > 1:
            yield drop("segments of a talk, of which there is only one text: take --split long", where, 0, len(asked))
        else:
            row = {"ASR": {"task": "asr"}, "TRANS": {"task": "st"}, "QA": {"task": "sqa", "question": question}}
            yield row[reference.task] | {
                "audio": source / f"{track.upper()}_AUDIOS" / asked[0].audio, "text": " ".join(reference.lines),
                "target_language": language, "where": where}


def ljspeech(source, args):
    path = find(source, "metadata.csv")[0]
    for where, record in table(path, (), ["name", "text", "words"], delimiter="|"):
        yield {"audio": path.with_name("wavs") / f"{record['name']}.wav", "text": record["text"], "speaker": "lj",
               "where": where} if record else drop(UNREADABLE, where)


def kaldi(source, args):
    def lines(name, *columns):
        return Lines(source / name, "id", ["id", *columns], None) if (source / name).exists() else None

    texts = find(source, "text")[0]
    find(source, "wav.scp")
    recordings, segments = lines("wav.scp", "file"), lines("segments", "recording", "start", "end")
    speakers = lines("utt2spk", "speaker")
    first = "".join(line.partition(" ")[2] for _, line in islice(read_lines(texts), 1000))
    style = "bare" if first in (first.lower(), first.upper()) and not re.search("[.,?!]", first) else "written"
    for where, line in read_lines(texts):
        id, _, text = line.replace("\t", " ", 1).partition(" ")
        segment = segments.get(id) if segments else {"recording": id}
        file = recordings.get(segment.get("recording")).get("file", "").strip()
        start, end = number(segment.get("start")), number(segment.get("end"))
        if not file or segments and None in (start, end):
            yield drop("no place in segments or wav.scp", where)
        elif "|" in (file[0], file[-1]):
            yield drop("wav.scp has a command, which is not run: write the audio to files", where)
        else:
            part = {"start": start, "duration": end - start} if segments else {}
            yield part | {"audio": next(filter(os.path.exists, [source / file, Path(file)]), Path(file)), "text": text,
                          "style": style, "source_language": (args.language or ["en"])[0],
                          "speaker": speakers.get(id).get("speaker") if speakers else None,
                          "corpus": source.resolve().name, "licence": args.licence or "unknown", "where": where}


# -----------------------------------------------------------------------------
# the corpora


@dataclass(frozen=True)
class Corpus:
    name: str
    licence: str  # SPDX; of a row that does not say another
    attribution: str  # what a licence that asks for it wants to be said
    url: str
    read: Callable
    options: str = "split"  # of the command line that mean something here
    split: str = "train"  # taken if none is asked for
    test_only: bool = False


CORPORA = {corpus.name: corpus for corpus in (
    Corpus("librispeech", "CC-BY-4.0", "LibriSpeech, by Vassil Panayotov, Guoguo Chen, Daniel Povey and Sanjeev "
           "Khudanpur, 2015, from LibriVox", "https://www.openslr.org/12", librispeech),
    Corpus("mls", "CC-BY-4.0", "Multilingual LibriSpeech, by Vineel Pratap, Qiantong Xu, Anuroop Sriram, Gabriel "
           "Synnaeve and Ronan Collobert, 2020, from LibriVox", "https://www.openslr.org/94", mls, "split language"),
    Corpus("commonvoice", "CC0-1.0", "Common Voice, by Mozilla and its contributors", "https://commonvoice.mozilla.org",
           commonvoice, "split language"),
    Corpus("covost2", "CC0-1.0", "CoVoST 2, by Changhan Wang, Anne Wu and Juan Pino, 2020, on Common Voice",
           "https://github.com/facebookresearch/covost", covost2, "split language common_voice"),
    Corpus("fleurs", "CC-BY-4.0", "FLEURS, by Alexis Conneau, Min Ma and others, 2022, on the sentences of FLoRes",
           "https://huggingface.co/datasets/google/fleurs", fleurs, "split language"),
    Corpus("voxpopuli", "CC0-1.0", "VoxPopuli, by Changhan Wang, Morgane Rivière and others, 2021; recordings (c) "
           "European Union, European Parliament", "https://github.com/facebookresearch/voxpopuli", voxpopuli,
           "split language"),
    Corpus("peoples-speech", "CC-BY-4.0", "The People's Speech, by Daniel Galvez, Greg Diamos and others, 2021, from "
           "archive.org", "https://huggingface.co/datasets/MLCommons/peoples_speech_v1.0", peoples_speech),
    Corpus("europarl-st", "CC-BY-NC-4.0", "Europarl-ST, by Javier Iranzo-Sánchez, Joan Albert Silvestre-Cerdà and "
           "others, 2020", "https://www.mllp.upv.es/europarl-st", europarl_st, "split language"),
    Corpus("spoken-squad", "CC-BY-SA-4.0", "Spoken-SQuAD, by Chia-Hsuan Li, Szu-Lin Wu, Chi-Liang Liu and Hung-yi Lee, "
           "2018, from SQuAD, by Pranav Rajpurkar, Jian Zhang, Konstantin Lopyrev and Percy Liang, 2016, and Wikipedia",
           "https://github.com/Chia-Hsuan-Lee/Spoken-SQuAD", spoken_squad, "split squad"),
    Corpus("librisqa", "unknown", "LibriSQA, by Zihan Zhao and others, 2023, on LibriSpeech; it states no licence",
           "https://huggingface.co/datasets/ZihanZhao/LibriSQA", librisqa, "split librispeech"),
    Corpus("mcif", "CC-BY-4.0", "MCIF, by Sara Papi and others, 2025, from talks of the ACL Anthology",
           "https://huggingface.co/datasets/FBK-MT/MCIF", mcif, "split language", "long", test_only=True),
    Corpus("ljspeech", "LicenseRef-PublicDomain", "The LJ Speech Dataset, by Keith Ito and Linda Johnson, 2017",
           "https://keithito.com/LJ-Speech-Dataset", ljspeech, ""),
    Corpus("kaldi", "unknown", "whoever made the data directory knows", "https://kaldi-asr.org/doc/data_prep.html",
           kaldi, "language licence"),
)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="of the corpus; without it, all are listed")
    parser.add_argument("source", nargs="?", type=Path, help="the directory of the corpus, unpacked")
    parser.add_argument("out", nargs="?", type=Path, help="the manifest to write")
    parser.add_argument("--split", nargs="+", help="default: train; of librispeech train is train-clean-100 and so on")
    parser.add_argument("--language", nargs="+", help="two letters, for translation en-de; default: all that are there")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="copy the audio into tars of about 1 GB there")
    parser.add_argument("--common-voice", type=Path, metavar="DIR", help="for covost2: a release of Common Voice; "
                        "default: the directory of the translations")
    parser.add_argument("--librispeech", type=Path, metavar="DIR", help="for librisqa; default: SOURCE")
    parser.add_argument("--squad", type=Path, metavar="JSON", help="for spoken-squad: SQuAD's train-v1.1.json (test: "
                        "dev-v1.1.json), whose answers are as printed")
    parser.add_argument("--licence", metavar="SPDX", help="for kaldi; default: unknown, which training refuses")
    parser.add_argument("--trust-paths", action="store_true", help="take audio from outside the corpus's directory, too, "
                        "where its tables or symbolic links lead there")
    args = parser.parse_args(argv)
    if args.name is None:
        for corpus in CORPORA.values():
            print(f"{corpus.name:16}{corpus.licence:24}{'test only  ' * corpus.test_only}{corpus.url}")
        return
    corpus = CORPORA.get(args.name)
    if corpus is None or args.out is None:
        parser.error(f"no corpus {args.name!r}; choose from {', '.join(CORPORA)}" if corpus is None else
                     "expected NAME SOURCE_DIR OUT.jsonl")
    for option in ("split", "language", "common_voice", "librispeech", "squad", "licence"):
        if getattr(args, option) is not None and option not in corpus.options.split():
            parser.error(f"{corpus.name} takes no --{option.replace('_', '-')}")
    args.split = args.split or [corpus.split]
    try:
        tally = convert(corpus, args.source, args)
    except (CorpusError, FormatError) as error:
        sys.exit(f"corpora: {corpus.name}: {error}")
    except OSError as error:
        sys.exit(f"corpora: {visible(error)}; what was converted is kept, run the same command again to go on")
    except KeyboardInterrupt:
        sys.exit("corpora: stopped; what was converted is kept, run the same command again to go on")
    print(visible("\n".join(tally.report(corpus.name)), keep="\n"))
    if not tally.kept:
        sys.exit(f"corpora: {corpus.name}: no row of {str(args.source)!r} could be used, no manifest was written")
    if MISSING in tally.dropped:
        sys.exit(f"corpora: {corpus.name}: the recordings of {tally.dropped[MISSING][0]:,} rows are missing; download "
                 "the rest and run this again")


if __name__ == "__main__":
    main()
