"""The outputs of a frozen encoder, computed once and kept on disk."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from data import cut, fbank, feature_length
from prepare.checkpoint import write_checkpoint
from prepare.errors import AudioError
from prepare.ranks import gather, rank, world


def encoder_states(cfg, encoder, manifests, identity):
    """Runs the frozen encoder once over the audio of the manifests, each rank over a share, into a file of the out
    directory that later runs find again if encoder, rows and audio files are the same. Returns the function (manifest,
    row) -> (F, D) states, which raises AudioError for a row that cannot be used; or None if they would not fit on the
    disk or in cache_gb."""
    clips, numbers = clips_of(manifests)
    sizes = sizes_of(cfg, clips)
    frames, size = sum(n for n, *_ in sizes), states_size(encoder, sizes)
    free = gather(shutil.disk_usage(cfg.out).free)[0]
    print(f"encoder outputs: {frames / 180000:.2f} h, {size / 1e9:.2f} GB on disk ({free / 1e9:.0f} GB free)")
    if not fits(cfg, size, free):
        print(f"they do not fit in --cache-gb {cfg.cache_gb:g} or on the disk: the encoder runs in every step")
        return None
    files = {str(manifests[m].path.parent / audio).partition(".tar/") for m, audio, *_ in clips}
    files = sorted(shard + ".tar" * bool(tar) for shard, tar, _ in files)
    stamps = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files if os.path.exists(file)]
    key = json.dumps([identity["sha256"], str(encoder.compute_dtype), cfg.batch_frames, stamps, list(clips)])
    path = Path(cfg.out) / f"encoder-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    found = stored(path)
    if not all(gather(found is not None)):
        encoded = encode_clips(cfg, encoder, manifests, clips, sizes)
        write_together(path, encoded, [f"longer than {cfg.max_seconds:g} s"] * len(clips))
        found = torch.load(path, weights_only=True, mmap=True)

    def states_of(m, i):
        states = found[numbers[m][i]]
        if isinstance(states, str):
            raise AudioError(states)
        return states  # (F, D)

    return states_of


def clips_of(manifests):
    """The clips of all rows, {(manifest, audio, start, seconds): number}, and for each manifest the numbers of its rows."""
    clips, numbers = {}, []
    for m, manifest in enumerate(manifests):
        rows = [(m, row["audio"], row["start"], manifest.seconds(row)) for row in manifest]
        numbers.append([clips.setdefault(clip, len(clips)) for clip in rows])
    return clips, numbers


def sizes_of(cfg, clips):
    """(frames, 0, clip) of the clips that are not too long, as cut takes them, the shortest first."""
    return sorted((feature_length(clip[3]), 0, clip) for clip in clips if clip[3] <= cfg.max_seconds)


def states_size(encoder, sizes):
    """Bytes of the encoder's outputs."""
    return sum(frames for frames, *_ in sizes) * encoder.config.hidden_size * encoder.compute_dtype.itemsize


def fits(cfg, size, free):
    """Whether so many bytes are kept on a disk that has so many free."""
    return size <= min(cfg.cache_gb * 1e9, 0.9 * free)


def stored(path):
    try:
        return torch.load(path, weights_only=True, mmap=True)
    except Exception:  # not there yet, or damaged
        return None


@torch.no_grad()
def encode_clips(cfg, encoder, manifests, clips, sizes):
    """The encoder's states (F, D) of this rank's share of the clips, by number, or why a clip has none."""
    found, batches = {}, cut(sizes, cfg.batch_frames, math.inf)
    for batch in tqdm(batches[rank()::world()], "encoder", unit=" batches", disable=rank() > 0):
        waves = {}
        for m, audio, start, seconds in batch:
            n = clips[m, audio, start, seconds]
            try:
                waves[n] = manifests[m].audio({"audio": audio, "start": start, "duration": seconds})
            except AudioError as error:
                found[n] = str(error)
        if waves:
            features, lengths = fbank(list(waves.values()))
            for n, states in zip(waves, encoder(features.to(cfg.device), lengths).split(lengths)):
                found[n] = states.cpu().clone()
    return found


def write_together(path, share, found):
    """Writes the list `found` with every rank's share, {place in the list: value}, filled in. Each rank's travels by a
    file of its own."""
    def part(r):
        return path.with_suffix(f".part{r}")

    if rank():
        torch.save(share, part(rank()))
    gather("written")
    if rank() == 0:
        for r in range(world()):
            for n, states in (torch.load(part(r), weights_only=True, mmap=True) if r else share).items():
                found[n] = states
        write_checkpoint(path, found)
        for file in path.parent.glob(f"{path.stem}.part*"):  # and those of a run cut off
            file.unlink()
    gather("joined")
