"""Turn street images into a pack: arrays of small frames that train.py reads.

    python prepare_data.py /data/msls packs/msls        # MSLS, extracted or as .zip files
    python prepare_data.py /data/msls packs/eu --cities paris,london --exclude panorama,night
    python prepare_data.py photos packs/photos --image-size 128 --limit 10000    # any images
    python prepare_data.py --demo 2880 packs/demo-64    # streets that this script draws

A pack is a folder with train.npy and holdout.npy (the frames: uint8, N x H x W x 3), index.csv
(one row per frame), skipped.csv (the reason for each file left out), preview.png (frames beside
random windows of them, as training sees them) and pack.json. Sequences are in random order, so
any part of a pack samples all cities. No sequence is split, and no frame is in a pack twice.

MSLS: Warburg et al. 2020, Mapillary Street-Level Sequences,
https://github.com/mapillary/mapillary_sls

SPDX-License-Identifier: MIT
Copyright (c) 2026 the authors of this repository
"""
import argparse
import csv
import io
import json
import math
import os
import posixpath
import random
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import NamedTuple

if __name__ == "__main__":  # torch reads it when it is imported
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # Gaudi's plugin is not needed

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

from model import (
    IMAGE_SIZES,
    PRESETS,
    SCORED,
    InputError,
    cut_windows,
    run_script,
    say,
    to_grey_levels,
)

FORMAT = 1  # version of the pack's files
SPLITS = ("train", "holdout")

# How CSV files are opened. File names can be any bytes, which surrogateescape keeps.
TEXT = dict(newline="", encoding="utf-8", errors="surrogateescape")

# Suffixes of images, and PIL's decoders for them. PIL would run Ghostscript on an EPS file that
# is named .jpg, so the decoders are chosen here. Its JPEG decoder also reads .mpo.
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng",
          ".webp", ".gif", ".bmp", ".tif", ".tiff")
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# What to do with files that are not read here.
ADVICE = {
    "convert them to JPEG": (".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw"),
    "extract them": (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".rar", ".7z"),
}

# Files and folders that are hidden, or that tools make: thumbnails, copies, deleted files.
HIDDEN = re.compile(r"\.(?!\.?$)|(@eaDir|@Recycle|#recycle|#snapshot|\$RECYCLE\.BIN|__MACOSX)$",
                    re.IGNORECASE)

# Paths of MSLS's images and tables. The group starts at train_val or test, or at the city if
# that is missing.
MSLS = re.compile(r"(?:^|/)((?:(?:train_val|test)/)?[^/]+/(?:query|database)/"
                  r"(?:images/[^/]+|[a-z_]+\.csv))$")
TABLES = ("seq_info", "raw", "postprocessed")

# Choices of --exclude: a column of MSLS's tables, and its value (in lower case) for such an image.
FLAGS = {
    "panorama": ("pano", "true"),
    "night": ("night", "true"),
    "control_panel": ("control_panel", "true"),
    "sideways": ("view_direction", "sideways"),
}
COLUMNS = {"sequence_key", "sequence_id", "frame_number", *(column for column, _ in FLAGS.values())}

MAX_PIXELS = 300_000_000   # larger pictures are refused: a small file can claim to be huge
MANY_PIXELS = 50_000_000   # of pictures that are larger when decoded, one is decoded at a time
MAX_BYTES = 1 << 30        # larger files are refused
FEW = PRESETS["small-64"]["batch_size"]  # training frames that train.py needs at least


class File(NamedTuple):
    """A file in a folder or an archive."""
    path: str
    read: Callable = None   # read() returns its bytes; None if there is a problem
    problem: str = ""       # why it is left out


class Frame(NamedTuple):
    """An image that can become a frame of the pack."""
    city: str
    sequence: str    # key of its sequence in the city; the path if it is a sequence of its own
    number: int      # position in the sequence
    path: str        # as index.csv has it
    read: Callable   # read() returns the bytes of an image file, or a PIL image

    @property
    def sequence_id(self):
        """Identifies the sequence among all cities."""
        return self.city, self.sequence


def frame_size(image_size):
    """(H, W) in pixels of frames for training images of S×S: H = 5/4·S, W = 4/3·H, even."""
    H = image_size * 5 // 4
    W = round(H * 2 / 3) * 2
    return H, W


# ---- what is printed ----------------------------------------------------------------------------
def count(n, noun):
    """'1 image', '1,200 images'."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def size_text(n):
    """A number of bytes in MB or GB."""
    return f"{n / 1e6:,.1f} MB" if n < 1e9 else f"{n / 1e9:,.1f} GB"


def shorten(words, most=40):
    """The first words of a list that can be very long, as a list."""
    rest = len(words) - most
    return words if rest <= 0 else [*words[:most], f"and {rest:,} more"]


class progress:
    """Iterates over items and shows how far it is: on one line of a terminal, or every 10 s.

    `total` can be changed on the way. The first second shows nothing. Where a loop can end early,
    use `with progress(…) as steps:`, which ends the line.
    """

    def __init__(self, items, total, what):
        self.items = items
        self.total = total
        self.what = what
        self.began = time.monotonic()
        self.shown = self.began   # time of the last line
        self.line_is_open = False

        try:
            self.terminal = sys.stdout.isatty()
        except (AttributeError, ValueError):  # there is no stdout, or it is closed
            self.terminal = False

    def __iter__(self):
        for done, item in enumerate(self.items, 1):
            yield item
            self.show(done)
        self.end_line()

    def show(self, done):
        now = time.monotonic()
        pause = 0.2 if self.terminal else 10
        last = done == self.total and done > 1
        if now - self.began < 1 or not (last or now - self.shown > pause):
            return

        self.shown = now
        rate = done / (now - self.began)
        left = (self.total - done) / rate
        line = (f"{done:,} of {self.total:,} {self.what}  "
                f"{rate:,.0f} {self.what}/s  {left:,.0f} s left")
        if self.terminal:
            say(f"\r{line:<78}", end="")
            self.line_is_open = True
        else:
            say(line)

    def end_line(self):
        if self.line_is_open:
            say()
        self.line_is_open = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end_line()


# ---- from folders and archives to files ---------------------------------------------------------
def list_files(sources, skipped):
    """{path: read} of all images and tables in folders and archives; read() returns the bytes.

    sources: absolute paths with /. Appends (path, reason) to `skipped` for all other files.

    MSLS paths start at train_val or test, so its parts merge into one tree. Other paths start
    with the source's name: give sources different names. If files have the same path, the last is
    used. Files of MSLS's patch come last.
    """
    seen = set()
    found = []
    ignored = Counter()

    for source in sources:
        parent = source.rpartition("/")[0] + "/"
        for file in list_source(source, seen):
            msls = MSLS.search(file.path)
            path = msls[1] if msls else file.path.removeprefix(parent)
            suffix = suffix_of(path)
            if file.problem:
                skipped.append((path, file.problem))
            elif suffix in IMAGES or (msls and suffix == ".csv"):
                patches = file.path[:msls.start(1)].lower().count("patch") if msls else 0
                found.append((patches, path, file.read))
            else:
                kind = describe_suffix(suffix)
                ignored[kind] += 1
                skipped.append((path, f"ignored: {kind}"))

    if ignored:
        kinds = [f"{n:,} {kind}" for kind, n in ignored.most_common()]
        say("ignored:", ", ".join(shorten(kinds, 10)))

    found.sort(key=lambda item: item[0])  # by the number of patches
    files = {}
    for _, path, read in found:
        if path in files:
            skipped.append((path, "replaced by another file with the same path"))
        files[path] = read
    return files


def suffix_of(path):
    """'.jpg' of 'a/b.JPG', or ''."""
    return posixpath.splitext(path)[1].lower()


def stem_of(path):
    """'b' of 'a/b.jpg'."""
    return posixpath.splitext(posixpath.basename(path))[0]


def describe_suffix(suffix):
    """'.mov', '.heic (convert them to JPEG)', or 'other' if it is no usual suffix."""
    for advice, suffixes in ADVICE.items():
        if suffix in suffixes:
            return f"{suffix} ({advice})"
    return suffix if re.fullmatch(r"\.\w{1,8}", suffix) else "other"


def list_source(source, seen):
    """Yield each File in a folder or an archive, also those that are left out.

    seen: identities of the folders and archives that were listed before, which are left out.
    """
    if os.path.isdir(source):
        yield from list_folder(source, seen)
    else:
        yield from list_archive(source, seen)


def file_identity(path):
    """Equal for two names of one file or folder. Raises OSError."""
    status = os.stat(path)
    if status.st_ino:
        return status.st_dev, status.st_ino
    return os.path.realpath(path)  # a file system without numbers


def identities_above(folder):
    """The identities of all folders above a folder."""
    above = set()
    path = os.path.realpath(folder)
    while os.path.dirname(path) != path:
        path = os.path.dirname(path)
        above.add(file_identity(path))
    return above


def list_folder(folder, seen):
    """list_source for a folder. Folders that links lead to come last, under the link's name.

    Links that lead out of the folder are followed, but not to a folder above it.
    """
    above = identities_above(folder)
    folders = deque([folder])
    while folders:
        here = folders.pop()
        try:
            this = file_identity(here)
            if this in seen or this in above:
                yield File(here, problem="second name of a folder: its files are used once")
                continue
            seen.add(this)
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            yield File(here, problem=f"unreadable folder: {error.strerror}")
            continue

        result = kind_of_result({entry.name for entry in entries})
        if result and here != folder:
            yield File(here, problem=f"{result}: not a source of images")
            continue

        subfolders = []
        for entry in entries:
            path = f"{here.rstrip('/')}/{entry.name}"
            kind = kind_of_entry(entry)
            if HIDDEN.match(entry.name):
                yield File(path, problem="hidden: its name is one that tools use")
            elif kind == "folder":
                subfolders.append((entry.is_symlink(), path))
            elif kind != "file":
                yield File(path, problem="unreadable image: neither a file nor a folder")
            elif suffix_of(path) in ARCHIVES:
                yield from list_archive(path, seen)
            else:
                yield File(path, partial(read_file, path))

        for linked, path in reversed(subfolders):
            if linked:
                folders.appendleft(path)
            else:
                folders.append(path)


def kind_of_entry(entry):
    """'folder', 'file' or '' for an os.DirEntry; of what a link leads to."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else ""
    except OSError:  # links in a circle
        return ""


def kind_of_result(names):
    """'a pack' or 'a run' if a folder has these names of files, otherwise ''."""
    if "pack.json" in names:
        return "a pack"
    if {"args.json", "checkpoint.pt"} <= names:
        return "a run"
    return ""


def read_file(path):
    """The bytes of a file. Raises OSError or ValueError."""
    check_bytes(os.stat(path).st_size)
    with open(path, "rb") as file:
        return file.read()


def check_bytes(n):
    if n > MAX_BYTES:
        raise ValueError(f"larger than {size_text(MAX_BYTES)}")


def list_archive(archive, seen):
    """list_source for an archive. Its files have paths as if it were a folder without a suffix."""
    open_archive = ARCHIVES.get(suffix_of(archive), list_zip)  # a program can be a .zip archive
    try:
        this = file_identity(archive)
        if this in seen:
            yield File(archive, problem="second name of an archive: its files are used once")
            return
        seen.add(this)
        files = open_archive(archive)
    except Exception as error:  # a damaged directory makes zipfile raise almost anything
        say(f"{archive} cannot be read: its images are left out ({error})")
        yield File(archive, problem=f"unreadable archive: {error}")
        return

    say(f"{archive}: {count(len(files), 'file')}")
    folder = posixpath.splitext(archive)[0]
    for file in files:
        name = file.path.replace("\\", "/").removeprefix("./")
        problem = file.problem
        if any(map(HIDDEN.match, name.split("/"))):
            problem = "hidden: a part of its path is one that tools use"
        yield File(f"{folder}/{name}", file.read, problem)


class ZipEntry(NamedTuple):
    """Reads one entry of a .zip archive. zipfile has a lock: one thread reads at a time."""
    archive: str
    offset: int      # of the entry's header
    size: int        # compressed
    method: int
    crc: int
    encrypted: bool

    def __call__(self):
        if self.encrypted:
            raise ValueError("encrypted in its archive: extract the archive")
        check_bytes(self.size)

        with open(self.archive, "rb") as file:
            file.seek(self.offset + 26)  # lengths of two fields (a name and others) before the data
            lengths = np.frombuffer(file.read(4), "<u2")
            file.seek(int(lengths.sum()), os.SEEK_CUR)
            data = file.read(self.size)

        if self.method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MAX_BYTES)
        if zlib.crc32(data) != self.crc:
            raise ValueError("damaged in its archive, or compressed in an unknown way")
        return data


def list_zip(archive):
    """[File, …] of a .zip archive, with paths as in the archive."""
    with zipfile.ZipFile(archive) as zipped:
        entries = zipped.infolist()

    files = []
    for entry in entries:
        if entry.filename.endswith(("/", "\\")):  # a folder
            continue
        read = ZipEntry(archive, entry.header_offset, entry.compress_size, entry.compress_type,
                        entry.CRC, encrypted=bool(entry.flag_bits & 1))
        files.append(File(entry.filename, read))
    return files


class TarEntry(NamedTuple):
    """Reads one file of a .tar archive."""
    archive: str
    offset: int    # of the data
    size: int

    def __call__(self):
        check_bytes(self.size)
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def list_tar(archive):
    """[File, …] of a .tar archive, with paths as in the archive."""
    files = []
    with tarfile.open(archive, "r:") as tar:  # a compressed archive has no places to read from
        while (entry := tar.next()) is not None:
            tar.members.clear()  # they would take 1 KB each
            if entry.isdir():
                continue
            if entry.isreg() and not entry.issparse():
                read = TarEntry(archive, entry.offset_data, entry.size)
                files.append(File(entry.name, read))
            else:
                problem = "unreadable image: a link or a special file in an archive"
                files.append(File(entry.name, problem=problem))

        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise ValueError(f"damaged after {count(len(files), 'file')}")
    return files


ARCHIVES = {".zip": list_zip, ".tar": list_tar}


# ---- from files to frames in an order -----------------------------------------------------------
def read_tables(files, folder, skipped):
    """{key: {column: value}}: what MSLS's tables in a folder say about its images."""
    rows = defaultdict(dict)
    for table in TABLES:
        path = f"{folder}/{table}.csv"
        if path not in files:
            continue
        try:
            text = files[path]().decode("utf-8-sig", errors="replace")
            for row in csv.DictReader(io.StringIO(text, newline="")):
                known = {column: row[column] for column in COLUMNS if row.get(column)}
                rows[row["key"]].update(known)
        except Exception as error:  # a damaged archive, no column "key", a NUL, …
            skipped.append((path, f"unreadable table: {error!r}"))
    return rows


def group_images(files):
    """{folder: paths of its images}, sorted. MSLS folders whose images are missing are empty."""
    folders = defaultdict(list)
    for path in files:
        folder = posixpath.dirname(path)
        if suffix_of(path) != ".csv":
            folders[folder].append(path)
        elif MSLS.match(path):
            folders.setdefault(f"{folder}/images", [])
    return {folder: sorted(paths) for folder, paths in sorted(folders.items())}


def city_of(folder):
    """MSLS: the folder above query or database. Other trees: the first folder in the source."""
    parts = folder.split("/")
    if MSLS.match(f"{folder}/image"):
        return parts[-3]
    return parts[1] if len(parts) > 1 else parts[0]


def find_frames(files, cities, exclude, skipped):
    """[Frame, …] of the images that pass the filters. Raises InputError for unknown cities.

    An image that is not in seq_info.csv is a sequence of its own.
    """
    folders = group_images(files)
    found = {city_of(folder) for folder in folders}
    unknown = set(cities) - {city.lower() for city in found}
    if unknown:
        known = ", ".join(shorten(sorted(found))) or "no cities"
        raise InputError(f"--cities: no {', '.join(sorted(unknown))} among {known}")

    if cities:
        folders = {folder: paths for folder, paths in folders.items()
                   if city_of(folder).lower() in cities}
    frames = []
    listed = Counter()   # by city: images in seq_info.csv and the other tables
    missing = Counter()  # by city: those of them that have no file
    with progress(folders.items(), len(folders), "folders") as steps:
        for folder, paths in steps:
            city = city_of(folder)
            rows = read_tables(files, posixpath.dirname(folder), skipped)
            listed[city] += len(rows)

            for path in paths:
                row = rows.pop(stem_of(path), {})
                reason = excluded(row, exclude)
                if reason:
                    skipped.append((path, reason))
                else:
                    frames.append(make_frame(city, path, row, files[path]))
            missing[city] += len(rows)

    for city, n in missing.items():
        if n:
            say(f"{city}: {n:,} of {listed[city]:,} listed images are missing "
                "(is a volume missing or damaged?)")
    return frames


def excluded(row, exclude):
    """The first of the flags in `exclude` that the tables' row of an image has, or None."""
    for flag in exclude:
        column, value = FLAGS[flag]
        if row.get(column, "").lower() == value:
            return flag
    return None


def make_frame(city, path, row, read):
    """The Frame of an image. row: what MSLS's tables say about it, or {}."""
    sequence = row.get("sequence_key") or row.get("sequence_id") or path
    digits = re.match("[0-9]{0,18}", row.get("frame_number", ""))[0]  # "12.0" is 12
    return Frame(city, sequence, int(digits or 0), path, read)


def explain_sequences(frames, holdout):
    """Say what happens to images that are sequences of their own."""
    alone = [frame.path for frame in frames if frame.sequence == frame.path]
    msls = sum(1 for path in alone if MSLS.match(path))
    photographs = len(alone) - msls
    if msls:
        say(f"{count(msls, 'image')} of MSLS without metadata (add msls_metadata.zip):\n"
            "panoramas and near-duplicates are kept, similar images can be in both splits")
    if photographs and holdout:
        say(f"{holdout:.0%} of the {count(photographs, 'photograph')} are held out for scoring")


def hash_fraction(*words):
    """A hash of the words as a number in [0, 1), the same on every machine."""
    text = "/".join(map(str, words)).encode("utf-8", "surrogateescape")
    digest = blake2b(text, digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2 ** 48


def split_frames(frames, holdout, seed):
    """[(split, Frame), …] in the pack's order. A sequence is held out of every pack or of none.

    Nothing is held out if too few frames for training would be left.
    """
    sequences = {frame.sequence_id for frame in frames}
    held_out = {key for key in sequences if hash_fraction("holdout", *key) < holdout}
    training = sum(1 for frame in frames if frame.sequence_id not in held_out)
    if held_out and training < FEW:
        say("there are too few sequences to hold any out: all frames are for training")
        held_out = set()

    order = {key: hash_fraction("order", seed, *key) for key in sequences}

    def position(frame):
        return order[frame.sequence_id], frame.city, frame.sequence, frame.number, frame.path

    frames = sorted(frames, key=position)
    return [("holdout" if frame.sequence_id in held_out else "train", frame) for frame in frames]


# ---- from a file to pixels ----------------------------------------------------------------------
# EXIF's Orientation → what turns the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ONE_AT_A_TIME = Lock()  # for pictures of MANY_PIXELS


class Decoded(NamedTuple):
    """What became of an image."""
    split: str
    frame: Frame
    problem: str          # why it cannot be decoded, or ''
    pixels: np.ndarray    # uint8 (H, W, 3); None if there is a problem, like the rest
    digest: int           # 64 bits of a hash of the pixels
    dhash: int            # difference_hash


@contextmanager
def pillow_settings():
    """PIL reads pictures of up to MAX_PIXELS, and does not warn of odd EXIF data and palettes."""
    largest = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # PIL warns from here on, and refuses the double
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = largest


def decode(picture, H, W):
    """An image file's bytes, or a PIL image → RGB PIL image, W×H: upright, scaled, centre-cropped.

    Transparent parts are white. Raises almost anything for a damaged file.
    """
    if isinstance(picture, bytes):
        picture = open_picture(picture)
    if min(picture.size) < 16 or picture.mode.startswith(("I", "F")):  # PIL clips 16 bits to 8
        size = f"{picture.width}×{picture.height}"
        raise ValueError(f"not a photograph: {size} pixels of mode {picture.mode}")

    # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size. Not (W, H), because EXIF can rotate it.
    picture.draft(None, (W, W))

    large = picture.width * picture.height > MANY_PIXELS
    with ONE_AT_A_TIME if large else nullcontext():
        picture.load()
        turn = UPRIGHT.get(orientation(picture))
        if turn is not None:
            picture = picture.transpose(turn)
        if picture.mode != "RGB" or picture.has_transparency_data:
            picture = make_opaque(picture)
        # Hamming takes 2/3 of bicubic's time, and is as sharp.
        return ImageOps.fit(picture, (W, H), Image.Resampling.HAMMING)


def open_picture(data):
    """The bytes of an image file → PIL image that is not decoded yet."""
    try:
        return Image.open(io.BytesIO(data), formats=DECODERS)
    except UnidentifiedImageError:  # a web page, a pointer of Git LFS, HEIC in spite of its name
        reason = f"no known kind of image, or damaged: it starts with {data[:16]}"
        raise ValueError(reason) from None


def orientation(picture):
    """EXIF's Orientation, 1 to 8, or None."""
    try:
        return picture.getexif().get(0x0112)
    except Exception:  # odd EXIF data makes PIL raise almost anything; the picture can be intact
        return None


def make_opaque(picture):
    """A PIL image of any mode → RGB, on white where it is transparent."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    opaque = Image.new("RGB", picture.size, "white")
    opaque.paste(picture, mask=picture.getchannel("A"))
    return opaque


def difference_hash(picture):
    """A 64-bit int that changes little with noise and light.

    A bit says whether one of 8×8 cells is brighter than its left neighbour.
    """
    cells = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX))
    bits = cells[:, 1:] > cells[:, :-1]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def decode_frame(split, frame, H, W):
    """Decoded, with a problem or with pixels."""
    try:
        picture = decode(frame.read(), H, W)
    except Exception as error:  # damaged bytes make decoders raise almost anything
        reason = f"unreadable image: {type(error).__name__}: {error}"
        reason = reason.partition(" <")[0]  # this starts a memory address
        return Decoded(split, frame, reason, None, None, None)

    pixels = np.asarray(picture)
    digest = blake2b(pixels, digest_size=8).digest()
    digest = int.from_bytes(digest, "big")  # an int takes less memory than bytes
    return Decoded(split, frame, "", pixels, digest, difference_hash(picture))


def decode_all(plan, H, W, workers):
    """Yield decode_frame's results in order, from threads.

    PIL releases the GIL for 7/8 of the time.
    """
    pending = deque()
    with ThreadPoolExecutor(workers) as threads:
        try:
            for split, frame in plan:
                pending.append(threads.submit(decode_frame, split, frame, H, W))
                if len(pending) == 8 * workers:  # more would only take memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


# ---- drawn streets ------------------------------------------------------------------------------
DEMO_STREETS = 2880  # frames that find_pack draws when there is no data


class City(NamedTuple):
    """How a drawn city looks. Shapes are few, large and smooth: a small GAN learns them soon."""
    walls: tuple    # colours of houses: RGB in hexadecimal
    tall: tuple     # least and greatest height of walls, in metres
    roof: float     # height of roofs, in metres
    ground: str     # colour
    tree: tuple     # height and radius in metres, and vertical stretch; or None


CITIES = {
    "Brickton": City(("b8543e", "c46a4a", "a84a38"), (7, 10), 3, "b4aaa2", None),
    "Gardenia": City(("f6ecd4", "e8ecec", "f4dcbc"), (4, 5), 3, "7cb850", (3.8, 2.2, 1)),
    "Palmera": City(("fff4e4", "ffd0c4", "f8e4b8"), (7, 10), 0, "e8d8ac", (6.5, 2.5, 0.5)),
    "Portside": City(("f6c040", "e06850", "5c98c4"), (8, 11), 4, "b0a8a0", None),
    "Sandville": City(("e8bc84", "c48c5c", "f6deb0"), (4, 7), 0, "ecd098", (5.5, 2.5, 0.5)),
    "Towerby": City(("7890b4", "8ca0b8", "6880a4"), (18, 30), 0, "a0a4ac", None),
}
HOURS = np.array([  # RGB of the sky, the horizon and the light
    [(76, 148, 236), (216, 240, 252), (244, 240, 236)],   # 0: day
    [(124, 88, 168), (255, 180, 104), (184, 124, 120)],   # 1: dusk
    [(24, 36, 96), (92, 104, 172), (76, 82, 132)],        # 2: night
])


def demo_frames(n, seed, image_size):
    """[Frame, …]: n frames to be drawn, with the cities in turn."""
    frames = []
    for i in range(n):
        street, number = divmod(i, 4)  # four frames of a street, 7 m apart
        city = list(CITIES)[street % len(CITIES)]
        sequence = f"{street:05d}"
        path = f"demo/{city}/{sequence}/{number:02d}"
        draw = partial(draw_street, seed, city, street, number, image_size)
        frames.append(Frame(city, sequence, number, path, draw))
    return frames


class View:
    """A picture in perspective from 1.8 m above the road.

    Points are (x, y, z) in metres: x right of the middle, y above the road, z ahead.
    """

    def __init__(self, width, height, hour):
        self.middle = width / 2         # x of the picture's vanishing point, in pixels
        self.horizon = height * 0.54    # y of it
        self.focal = width * 0.62

        share = hour % 1
        colours = HOURS[int(hour)] * (1 - share) + HOURS[int(hour) + 1] * share
        sky, self.haze, self.light = colours.astype(int).tolist()

        gradient = Image.linear_gradient("L").resize((1, height))
        gradient = ImageOps.colorize(gradient, sky, self.haze, whitepoint=138)
        self.image = gradient.resize((width, height), Image.Resampling.NEAREST)
        self.canvas = ImageDraw.Draw(self.image)

    def project(self, x, y, z):
        """Point → pixel."""
        return self.middle + self.focal * x / z, self.horizon + self.focal * (1.8 - y) / z

    def paint(self, colour, z, shade=1.0):
        """RGB of a hexadecimal colour in this light and at this distance."""
        far = 1 - math.exp(-z / 150)
        channels = zip(bytes.fromhex(colour), self.light, self.haze)
        return tuple(int(own * light * shade / 255 * (1 - far) + haze * far)
                     for own, light, haze in channels)

    def shape(self, colour, *points):
        self.canvas.polygon([self.project(*point) for point in points], colour)

    def wall(self, colour, x0, z0, x1, z1, low, high):
        """An upright rectangle between two points of the ground, from a height to another."""
        self.shape(colour, (x0, low, z0), (x0, high, z0), (x1, high, z1), (x1, low, z1))

    def disc(self, colour, x, y, z, radius, stretch=1.0):
        x, y = self.project(x, y, z)
        radius = self.focal * radius / z
        tall = stretch * radius
        self.canvas.ellipse((x - radius, y - tall, x + radius, y + tall), colour)


def draw_street(seed, city, street, number, image_size):
    """A PIL image of the pack's frame size: a street, seen from `number` × 7 m along it."""
    look = CITIES[city]
    rng = random.Random(f"{seed}/{city}/{street}")
    hour = 2 * rng.random() ** 1.5  # a row of HOURS, or between two rows
    sun = rng.uniform(-6, 6)        # its x
    height = rng.uniform(*look.tall)

    H, W = frame_size(image_size)
    view = View(4 * W, 4 * H, hour)  # made smaller at the end, which smooths edges
    view.disc("#ffeca8" if hour < 1.2 else "#ccd0e4", sun, 3 + 24 * abs(1 - hour), 60, 5)
    view.canvas.rectangle((0, view.horizon, 4 * W, 4 * H), view.paint(look.ground, 8))
    view.shape(view.paint("5c5e66", 8), (-4.5, 0, 1), (4.5, 0, 1), (0, 0, 400))    # the road
    view.shape(view.paint("a09e98", 8), (-0.15, 0, 1), (0.15, 0, 1), (0, 0, 400))  # its middle line

    for far in range(168 - 7 * number, 9, -12):  # houses of 12 m, from far to near
        for side in (-1, 1):
            colour = rng.choice(look.walls)
            tall = height * rng.uniform(0.9, 1.1)
            lit = hour > 0.8 + rng.random()
            draw_house(view, look, colour, tall, lit, side, far, sunny=side * sun < 0)

    small = view.image.reduce(4)
    soft = np.asarray(small.filter(ImageFilter.GaussianBlur(0.7)))  # blur and noise of photographs
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 3, soft.shape)
    return Image.fromarray((soft + noise).round().clip(0, 255).astype(np.uint8))


def draw_house(view, look, colour, tall, lit, side, far, sunny):
    """A house and a tree before it, on the left (side -1) or right (1), that end `far` m ahead."""
    x = 8 * side
    near = max(1, far - 12)
    shade = 1 if sunny else 0.75
    front = view.paint(colour, near, shade)
    view.wall(view.paint(colour, near, 0.85 * shade), x, near, 2 * x, near, 0, tall)
    view.wall(front, x, near, x, far, 0, tall)

    roof = view.paint("8c4a40", near, shade)
    view.shape(roof, (x, tall, near), (x, tall + look.roof, far - 6), (x, tall, far))

    if near < 30:
        glass = (255, 212, 120) if lit else view.paint(colour, near, 0.75 * shade)
        for y in range(1, int(tall) - 2, 4):
            view.wall(glass, x, far - 9, x, far - 3, y, y + 2.4)

    if look.tree and near < 50:
        high, radius, stretch = look.tree
        trunk = view.paint("6c5040", near)
        view.wall(trunk, x - 2.2 * side, near, x - 1.8 * side, near, 0, high)
        leaves = view.paint("54963e", near, shade)
        view.disc(leaves, x - 2 * side, high, near, radius, stretch)


# ---- writing packs ------------------------------------------------------------------------------
class Duplicates:
    """Finds frames that a pack has already.

    bits: a frame is a near-duplicate of the last one kept in its sequence if their difference
    hashes differ in at most so many bits. 0 finds no duplicates at all.
    """

    def __init__(self, bits):
        self.bits = bits
        self.last = None       # the last Decoded that was kept
        self.digests = set()   # of all frames before

    def reason(self, decoded):
        """Why to leave out a frame, or ''."""
        if not self.bits:
            return ""
        repeated = decoded.digest in self.digests
        self.digests.add(decoded.digest)

        if self.last and self.last.frame.sequence_id == decoded.frame.sequence_id:
            differing = (self.last.dhash ^ decoded.dhash).bit_count()
            if differing <= self.bits:
                return "near-duplicate"
        if repeated:
            return "same picture as another file"
        self.last = decoded
        return ""


def write_frames(folder, plan, args, skipped):
    """Write train.npy, holdout.npy and index.csv. Returns {split: {city: number of images}}.

    plan: what split_frames returns. Appends (path, reason) to `skipped` for images left out.
    """
    H, W = frame_size(args.image_size)
    rows = Counter()                                   # frames of each split
    counts = {split: Counter() for split in SPLITS}    # frames of each city
    duplicates = Duplicates(args.duplicates)
    decoded = decode_all(plan, H, W, args.workers)
    limit = min(args.limit or len(plan), len(plan))

    with (pillow_settings(),
          open(folder / "train.npy", "wb") as train,
          open(folder / "holdout.npy", "wb") as holdout,
          open(folder / "index.csv", "w", **TEXT) as table,
          progress(decoded, limit, "images") as steps):
        index = csv.writer(table)
        index.writerow(("split", "row", "city", "sequence", "key", "source file"))
        files = {"train": train, "holdout": holdout}
        for file in files.values():
            file.seek(128)  # NumPy's header is written last, when the number of frames is known

        for image in steps:
            if rows.total() == limit:
                break
            split, frame = image.split, image.frame
            reason = image.problem or duplicates.reason(image)
            if reason:
                skipped.append((frame.path, reason))
                steps.total = min(steps.total + 1, len(plan))
                continue

            index.writerow((split, rows[split], frame.city, frame.sequence,
                            stem_of(frame.path), frame.path))
            files[split].write(image.pixels)
            rows[split] += 1
            counts[split][frame.city] += 1

        for split, file in files.items():
            file.seek(0)
            header = dict(descr="|u1", fortran_order=False, shape=(rows[split], H, W, 3))
            np.lib.format.write_array_header_1_0(file, header)
    return {split: dict(sorted(counts[split].items())) for split in SPLITS}


def draw_preview(folder, image_size, seed):
    """Write preview.png: 8 frames of train.npy, each beside six windows, as training cuts them."""
    train = np.load(folder / "train.npy", mmap_mode="r")
    rows = np.linspace(0, len(train) - 1, 8, dtype=int)
    frames = torch.from_numpy(train[rows])  # (8, H, W, 3)
    generator = torch.Generator().manual_seed(seed)
    windows = [cut_windows(frames, image_size, generator=generator) for _ in range(6)]

    columns = []
    for images in (frames.permute(0, 3, 1, 2) / 127.5 - 1, *windows):  # (8, 3, h, w) in [-1, 1]
        below = frames.shape[1] + 8 - images.shape[2]
        columns.append(F.pad(images, (0, 8, 0, below), value=1))  # a white margin

    sheet = torch.cat(columns, dim=3)               # (8, 3, h, width of all columns)
    sheet = to_grey_levels(sheet).permute(0, 2, 3, 1).flatten(0, 1)   # (8 h, width, 3)
    Image.fromarray(sheet.numpy()).save(folder / "preview.png")


def check_source(source):
    """Raise InputError unless `source` is a folder of images or an archive."""
    if not os.path.exists(source):
        raise InputError(f"there is no {source}: name the folder with the images")
    if os.path.isdir(source):
        result = kind_of_result(set(os.listdir(source)))
        if result:
            raise InputError(f"{source} is {result}: name the folder with the images")
        return

    # A device or a pipe is no file, and reading it would not end.
    is_archive = os.path.isfile(source) and (
        suffix_of(source) in ARCHIVES or zipfile.is_zipfile(source))
    if not is_archive:
        raise InputError(f"{source} is not a folder, a .zip or a .tar archive: "
                         "name the folder with the images")


def check_space(plan, limit, image_size, parent):
    """Say what a pack takes at most. Raises InputError if the disk of `parent` is too small."""
    H, W = frame_size(image_size)
    each = H * W * 3 + 300  # bytes; 300 for rows of the tables
    needed = each * min(len(plan), limit or len(plan))
    free = shutil.disk_usage(parent).free
    say(f"{count(len(plan), 'image')}: the pack takes at most {size_text(needed)}, "
        f"and {size_text(free)} are free")

    if needed > free:
        cure = "free some space, or name an OUT on another disk"
        if free > each:
            cure += f", or use --limit {free // each}"
        raise InputError(f"the pack needs {size_text(needed)}, and {size_text(free)} are free "
                         f"in {parent}: {cure}")


def existing_parent(out):
    """The nearest folder above `out` that exists. Raises InputError if a file is in the way."""
    for folder in out.absolute().parents:
        if folder.is_dir():
            return folder
        if os.path.lexists(folder):
            raise InputError(f"{folder} is not a folder, or a link to a missing one: "
                             "choose another OUT")


@contextmanager
def temporary_folder(out):
    """A folder beside `out` that becomes `out` by renaming it. Otherwise it is deleted."""
    parent = existing_parent(out)
    try:
        temporary = tempfile.TemporaryDirectory(prefix=f"{out.name}.tmp-", dir=parent)
    except OSError as error:
        raise InputError(f"{parent} cannot be written to ({error.strerror}): "
                         "choose another OUT") from error
    try:
        with temporary:
            folder = Path(temporary.name, "pack")
            folder.mkdir()
            yield folder
    except (KeyboardInterrupt, SystemExit):
        if not out.exists():
            say("stopped: nothing is kept")
        raise
    except OSError as error:
        error.filename = error.filename or str(out)  # writing to a full disk names no file
        raise


def prepare(args):
    """Write the pack args.out: it is complete, or it does not exist. Raises InputError or OSError.

    args: what parse_args returns.
    """
    if os.path.lexists(args.out):
        if (args.out / "pack.json").exists():
            raise InputError(f"{args.out} exists already: choose another OUT, or delete it")
        raise InputError(f"{args.out} exists, and is not a pack. OUT comes last, as in: "
                         "prepare_data.py photos packs/photos")
    existing_parent(args.out)
    for source in args.sources:
        check_source(source)

    with temporary_folder(args.out) as folder:
        skipped = []
        if args.demo:
            frames = demo_frames(args.demo, args.seed, args.image_size)
        else:
            files = list_files(args.sources, skipped)
            frames = find_frames(files, args.cities, args.exclude, skipped)
            explain_sequences(frames, args.holdout)
        plan = split_frames(frames, args.holdout, args.seed)
        check_space(plan, args.limit, args.image_size, existing_parent(args.out))

        counts = write_frames(folder, plan, args, skipped)
        if not counts["train"]:
            raise InputError(f"no images to train on: {explain_emptiness(args.sources, skipped)}")
        write_tables(folder, args, counts, skipped)
        draw_preview(folder, args.image_size, args.seed)

        args.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(args.out)
        except OSError as error:
            if not args.out.exists():
                raise
            raise InputError(f"{args.out} exists already: another program made it") from error
    summarize(counts, skipped, args.holdout)


def write_tables(folder, args, counts, skipped):
    """Write skipped.csv and pack.json."""
    with open(folder / "skipped.csv", "w", **TEXT) as file:
        csv.writer(file).writerows([("source file", "reason"), *skipped])

    H, W = frame_size(args.image_size)
    arguments = {name: value for name, value in vars(args).items()
                 if name not in ("out", "workers")}
    info = dict(format=FORMAT, image_size=args.image_size, H=H, W=W, counts=counts,
                skipped=count_reasons(skipped), arguments=arguments)
    (folder / "pack.json").write_text(json.dumps(info, indent=1) + "\n")


def count_reasons(skipped):
    """{kind of reason: number of files}, the most frequent first."""
    kinds = Counter(reason.partition(":")[0] for _, reason in skipped)
    return dict(kinds.most_common())


def list_reasons(skipped):
    """'4 panorama, 14 near-duplicate', or 'nothing'."""
    return ", ".join(f"{n:,} {kind}" for kind, n in count_reasons(skipped).items()) or "nothing"


def explain_emptiness(sources, skipped):
    """Why there are no frames: what was left out, and one file of the most frequent kind."""
    if not skipped:
        return f"{', '.join(sources)} has no images. Name a folder of .jpg or .png files"
    kind = next(iter(count_reasons(skipped)))
    path, reason = next(file for file in skipped if file[1].partition(":")[0] == kind)
    return f"left out: {list_reasons(skipped)}. For example {path}: {reason}"


def summarize(counts, skipped, share_to_hold_out):
    """Say what is in a pack, and what it is too small for."""
    for split, cities in counts.items():
        say(f"{split}: {count(sum(cities.values()), 'image')}")
        if len(cities) > 1:
            for line in shorten([f"{n:12,} {city}" for city, n in cities.items()]):
                say(line)
    details = " (skipped.csv has the reasons)" if skipped else ""
    say(f"left out: {list_reasons(skipped)}{details}")

    train, holdout = (sum(counts[split].values()) for split in SPLITS)
    if share_to_hold_out and min(train, holdout) < SCORED:
        say(f"this pack gets no scores: they need {SCORED} held-out frames and {SCORED} others.\n"
            "prepare_data.py --holdout 0 keeps all frames for training")


# ---- reading packs ------------------------------------------------------------------------------
class Pack(NamedTuple):
    folder: Path
    image_size: int      # S, the side of the training images
    train: np.ndarray    # memory-mapped uint8 (N, *frame_size(S), 3), read-only
    holdout: np.ndarray  # likewise; N can be 0
    info: dict           # pack.json

    @property
    def identity(self):
        """A hash of index.csv in hexadecimal, or '' if a pack made by hand has none."""
        index = self.folder / "index.csv"
        if not index.exists():
            return ""
        digest = blake2b(digest_size=16)
        with open(index, "rb") as file:
            for block in iter(partial(file.read, 1 << 20), b""):
                digest.update(block)
        return digest.hexdigest()


def open_pack(folder):
    """The Pack in a folder. Raises InputError if there is none, or if it is damaged."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "pack.json").read_bytes())
        size = frame_size(info["image_size"])
        shapes = [(sum(info["counts"][split].values()), *size, 3) for split in SPLITS]
        arrays = [np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS]
        if info["format"] != FORMAT or shapes != [array.shape for array in arrays]:
            raise ValueError("its arrays are not what its pack.json says")
    except Exception as error:  # damaged files raise almost anything
        raise InputError(f"{folder} is not a pack or is damaged ({error}): "
                         "prepare_data.py makes packs") from error
    return Pack(folder, info["image_size"], *arrays, info)


def find_pack(data, image_size, out="packs"):
    """The Path of a pack of `data`: a pack, a folder or archive with images, or None.

    Images are prepared once, as `out`/<name>-<image_size>. None means drawn streets.
    Raises InputError.
    """
    if data is None:
        sources = []
        name = "demo"
        what = "drawn streets"
    else:
        folder = Path(data)
        if (folder / "pack.json").exists():
            return folder
        if not folder.exists():
            command = f"python prepare_data.py SOURCE {shlex.quote(str(data))}"
            raise InputError(f"there is no {data}: name a folder of photographs or a pack, "
                             f"or make a pack with {command}")
        if folder.is_dir() and kind_of_result(set(os.listdir(folder))) == "a run":
            raise InputError(f"{data} is a run: --data wants photographs or a pack")
        sources = [folder.resolve().as_posix()]
        name = stem_of(sources[0]) if folder.is_file() else posixpath.basename(sources[0])
        what = data

    pack = Path(out, f"{name}-{image_size}")
    if not pack.exists():
        say(f"preparing {pack} from {what}")
        words = sources or ["--demo", str(DEMO_STREETS)]
        prepare(parse_args([*words, str(pack), "--image-size", str(image_size)]))
        return pack

    if open_pack(pack).info.get("arguments", {}).get("sources") != sources:
        raise InputError(f"{pack} was not made from {what}: delete it, "
                         f"or train on it with --data {pack}")
    made = time.localtime((pack / "pack.json").stat().st_mtime)
    say(f"using {pack}, made on {time.strftime('%Y-%m-%d %H:%M', made)}. "
        f"To make a new one, delete it: rm -r {shlex.quote(str(pack))}")
    new = count_new_images(pack, sources)
    if new:
        say(f"{what} has {count(new, 'new image')} since then")
    return pack


def count_new_images(pack, sources):
    """How many images in the sources are neither in a pack nor in its skipped.csv."""
    known = set()
    for name in ("index.csv", "skipped.csv"):
        try:
            with open(pack / name, **TEXT) as file:
                known.update(row["source file"] for row in csv.DictReader(file))
        except (OSError, KeyError, csv.Error) as error:
            raise InputError(f"{pack / name} is damaged ({error!r}): "
                             f"delete {pack} to make it anew") from error
    files = list_files(sources, skipped=[])
    return sum(1 for path in files if suffix_of(path) in IMAGES and path not in known)


# ---- the command line ---------------------------------------------------------------------------
def source_path(text):
    """An argparse type: an absolute path with /, as all paths inside the program."""
    return os.path.abspath(expand(text)).replace(os.sep, "/")


def pack_path(text):
    """An argparse type: a Path."""
    return Path(expand(text))


def expand(text):
    """A path with ~ replaced by the home folder. Raises ArgumentTypeError if it is empty."""
    if not text:
        raise argparse.ArgumentTypeError("a path is empty")
    return os.path.expanduser(text)


def name_list(text):
    """An argparse type: 'A,b' → ['a', 'b']."""
    return re.findall("[^,]+", text.lower())


def parse_args(argv=None):
    """The options. Exits with status 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="*", type=source_path, metavar="SOURCE",
        help="folder, .zip or .tar archive with images")
    add("out", type=pack_path, metavar="OUT", help="folder of the new pack")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64,
        help="side of a training image in pixels (default: 64)")
    add("--cities", type=name_list, metavar="A,B", default=[],
        help="use only the cities with these folder names (default: all)")
    add("--exclude", type=name_list, metavar="A,B", default=["panorama"],
        help=f'leave out images that MSLS marks as {", ".join(FLAGS)}; "" leaves out none '
             "(default: panorama)")
    add("--holdout", type=float, default=0.25, metavar="P",
        help="share of sequences to hold out for scoring (default: 0.25)")
    add("--limit", type=int, metavar="N",
        help="stop after N images; sequences are in random order (default: all)")
    add("--duplicates", type=int, default=4, metavar="BITS",
        help="leave out an image if its 64-bit hash is within BITS bits of the last one kept in "
             "its sequence, or if its frame is in the pack already; 0 keeps all (default: 4)")
    add("--seed", type=int, default=0, metavar="N",
        help="seed of the order and of drawn streets (default: 0)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N",
        help="threads (default: one per core)")
    add("--demo", type=int, metavar="N",
        help="draw N frames of streets, without SOURCE (default: off)")
    args = parser.parse_intermixed_args(argv)

    ranges = {
        "holdout": (0, 0.9),
        "limit": (1, 1e9),
        "duplicates": (0, 64),
        "seed": (0, 1e9),
        "workers": (1, 1000),
        "demo": (1, 1e7),
    }
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name} {value}: choose from {least} to {most:g}")
    if not set(args.exclude) <= set(FLAGS):
        parser.error(f"--exclude {','.join(args.exclude)}: choose from {', '.join(FLAGS)}")
    if (args.demo is None) == (not args.sources):
        parser.error("give SOURCE and OUT, as in: prepare_data.py photos packs/photos, "
                     "or --demo 96 packs/demo")
    return args


def advise(pack):
    """What to do with a Pack: a command that trains on it."""
    n = len(pack.train)
    command = f"python train.py --data {shlex.quote(str(pack.folder))}"
    if n < 2:
        return f"the pack is {pack.folder}; training needs more images"
    if n < FEW:
        command += f" --batch-size {n}"
    return f"the pack is {pack.folder}; train on it with: {command}"


def main(argv=None):
    args = parse_args(argv)
    prepare(args)
    say(advise(open_pack(args.out)))


if __name__ == "__main__":
    run_script(main)
