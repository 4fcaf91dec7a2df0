"""Turn street images into a pack: arrays of small frames that train.py reads.

    python prepare_data.py /data/msls packs/msls        # MSLS, extracted or as .zip files
    python prepare_data.py /data/msls packs/eu --cities paris,london --exclude panorama,night
    python prepare_data.py photos packs/photos --image-size 128 --limit 10000    # any images
    python prepare_data.py drives packs/drives --group-by folder    # a folder is one drive
    python prepare_data.py --demo 2880 packs/demo-64    # streets that this script draws

A pack is a folder with train.npy and holdout.npy (the frames: uint8, N x H x W x 3), index.csv
(one row per frame), skipped.csv (the reason for each file left out), preview.png (frames beside
random windows of them, as training sees them) and pack.json. Groups are in random order, so any
part of a pack samples all cities. A group is a sequence of MSLS, a photograph, or a folder of
them. Each group is either in train.npy or in holdout.npy.

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
import time
import warnings
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from itertools import chain, groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unicodedata import normalize

if __name__ == "__main__":  # torch reads it when it is imported
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # Gaudi's plugin is not needed

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageFilter, ImageOps

from model import (
    IMAGE_SIZES,
    PRESETS,
    InputError,
    cut_windows,
    file_path,
    run_script,
    say,
    to_grey_levels,
    warn,
)

FORMAT = 1  # version of the pack's files
SPLITS = ("train", "holdout")
FEW = PRESETS["small-64"]["batch_size"]  # training frames that train.py needs at least

# How CSV files are opened. File names can be any bytes, which surrogateescape keeps.
TEXT = dict(newline="", encoding="utf-8", errors="surrogateescape")

# Suffixes of images, and PIL's decoders for them. PIL would run Ghostscript on an EPS file that
# is named .jpg, so the decoders are chosen here. Its JPEG decoder also reads .mpo.
IMAGES = ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .bmp .tif .tiff".split()
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# What to do with other files: {suffix: advice}.
ADVICE = {
    **dict.fromkeys(".heic .heif .avif .jxl .dng .cr2 .nef .arw".split(), "HEIC or RAW: convert "
                                                                          "to JPEG"),
    **dict.fromkeys(".zip .tar .gz .tgz .bz2 .xz .rar .7z".split(), "archive: extract it"),
}

# Files and folders that are hidden, or that tools make: thumbnails, copies, deleted files.
HIDDEN = re.compile(r"\.(?!\.?$)|(@eaDir|@Recycle|#recycle|#snapshot|\$RECYCLE\.BIN|__MACOSX)$",
                    re.IGNORECASE)

# A folder with one of these files is a pack or a run of this project. Its images are not used.
RESULTS = {"pack.json", "checkpoint.pt"}

# Paths of MSLS's images and tables. Group 1 starts at train_val or test, or at the city if that is
# missing; group 2 is the city.
MSLS = re.compile(r"(?:^|/)((?:(?:train_val|test)/)?([^/]+)/(?:query|database)/"
                  r"(?:images/[^/]+|[a-z_]+\.csv))$")
TABLES = ("seq_info", "raw", "postprocessed")

# Choices of --exclude: a column of MSLS's tables, and its value for such an image.
FLAGS = {
    "panorama": ("pano", "True"),
    "night": ("night", "True"),
    "control_panel": ("control_panel", "True"),
    "sideways": ("view_direction", "Sideways"),
}


class Frame(NamedTuple):
    """An image that can become a frame of the pack."""
    group: str           # images of one group are in one split
    path: str            # a label for people, as index.csv and skipped.csv have it
    read: Callable       # read() returns the bytes of an image file, or a PIL image
    city: str
    sequence: str = ""   # key of its sequence in the city; a photograph has none
    number: int = 0      # position in the sequence


def frame_size(image_size):
    """(H, W) in pixels of frames for training images of S×S: H = 5/4·S, W = 4/3·H, even."""
    H = image_size * 5 // 4
    W = round(H * 2 / 3) * 2
    return H, W


def prepare(args):
    """Write the pack args.out: it is complete, or it does not exist. Raises InputError.

    args: what parse_args returns.
    """
    out = args.out
    if os.path.lexists(out):
        raise InputError(f"{out} exists already: choose another OUT, which comes last, as in: "
                         "prepare_data.py photos packs/photos")
    for source in args.sources:
        check_source(source)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{out.name}.tmp-", dir=out.parent) as temporary:
            folder = Path(temporary, "pack")  # the temporary folder itself is private
            folder.mkdir()
            write_pack(folder, args)
            folder.rename(out)
    except OSError as error:
        raise InputError(f"{out.parent} cannot be written to ({error.strerror}): choose another "
                         f"OUT, as in: prepare_data.py SOURCE ELSEWHERE/{out.name}, and train "
                         f"with: --data ELSEWHERE/{out.name}") from error


def write_pack(folder, args):
    """Write all files of a pack into an empty folder. Raises InputError or OSError."""
    skipped = []  # (path, reason) of each file that is left out
    if args.demo:
        frames = demo_frames(args.demo, args.seed, args.image_size)
    else:
        frames = find_frames(args, skipped)
    plan = split_frames(frames, args.holdout, args.seed)
    total = min(len(plan), args.limit or len(plan))  # frames of the pack, at most
    check_space(total, args.image_size, args.out.parent)

    counts = write_frames(folder, plan, total, args, skipped)
    for split in SPLITS:
        say_counts(f"in {split}", counts[split], {})
    kinds, examples = count_reasons(skipped)
    say_counts("left out", kinds, examples)
    if not counts["train"]:
        raise InputError(f"no images to train on in {', '.join(args.sources)}: "
                         "name a folder of .jpg or .png files")
    write_tables(folder, args, counts, kinds, skipped)
    draw_preview(folder, args.image_size, args.seed)


def check_space(n, image_size, parent):
    """Raise InputError if a pack of n frames can be larger than the free space of a disk."""
    H, W = frame_size(image_size)
    each = H * W * 3 + 300  # bytes; 300 for rows of the tables
    free = shutil.disk_usage(parent).free
    if n * each > free:
        raise InputError(f"the pack needs {n * each / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are "
                         f"free in {parent}: choose another OUT, or --limit {free // each}")


# ---- what is printed ----------------------------------------------------------------------------
def count_reasons(skipped):
    """(Counter of kinds of reasons, {kind: 'reason, such as path' of the first file}).

    The kind is what stands before the colon.
    """
    kinds = Counter()
    examples = {}
    for path, reason in skipped:
        kind = reason.partition(":")[0]
        kinds[kind] += 1
        examples.setdefault(kind, f"{reason}, such as {path}")
    return kinds, examples


def say_counts(title, counts, words):
    """Print a Counter. words: {key: what to print instead of it}."""
    say(f"images {title}: {counts.total():,}")
    for name, n in counts.most_common(40):
        say(f"{n:12,} {words.get(name, name)}")


def progress(items, total, what):
    """Yield the items, and say every ten seconds how far it is, in at most 80 columns."""
    began = time.monotonic()
    shown = began
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown > 10:
            shown = now
            rate = done / (now - began)
            say(f"{done:,} of {total:,} {what}  {rate:,.0f} {what}/s  "
                f"{(total - done) / rate:,.0f} s left")


# ---- from folders and archives to files ---------------------------------------------------------
def check_source(source):
    """Raise InputError unless `source` is a folder of images or a .zip archive."""
    archive = os.path.isfile(source) and zipfile.is_zipfile(source)
    if not archive and not os.path.isdir(source):
        raise InputError(f"{source} is neither a folder nor an intact .zip archive: name the "
                         "folder with the images, or extract the archive. If a run's pack has "
                         "moved, name it with --data")


def list_folder(source, seen):
    """Yield (path in the source, read) of each file in a folder and in its .zip archives.

    read() returns the bytes. Links are followed, but not to a folder above the source.
    seen: real paths of the folders that were listed before, which are left out.
    """
    above = set(map(str, Path(source).resolve().parents))
    for here, folders, names in os.walk(source, onerror=warn, followlinks=True):
        real = os.path.realpath(here)
        if real in seen or real in above or RESULTS & set(names):
            folders.clear()
            continue
        seen.add(real)

        hidden = list(filter(HIDDEN.match, folders))
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(names + hidden):  # list_images says why it leaves out the hidden ones
            file = os.path.join(here, name)
            path = file[len(source):].replace(os.sep, "/").lstrip("/")
            if suffix_of(name) == ".zip":
                yield from list_zip(file, path)
            else:
                yield path, Path(file).read_bytes


def list_zip(archive, path=""):
    """list_folder for an archive. path: of the archive in its source."""
    try:
        zipped = zipfile.ZipFile(archive)
    except Exception:  # a damaged directory makes zipfile raise almost anything
        yield path, None  # list_images leaves it out, as it is no image
        return

    folder = posixpath.splitext(path)[0]  # as if it were extracted
    for entry in zipped.infolist():
        name = entry.filename.replace("\\", "/").lstrip("/")  # PowerShell writes backslashes
        if not name.endswith("/"):
            yield posixpath.join(folder, name), partial(read_entry, zipped, entry)


def read_entry(zipped, entry):
    """The bytes of a file in an archive. Raises InputError, and whatever damaged bytes cause."""
    try:
        return zipped.read(entry)
    except (RuntimeError, zipfile.BadZipFile) as error:  # encrypted, Deflate64, in several parts
        raise InputError(f"unreadable in its archive: {error}. Extract the archive") from error


# ---- from files to frames -----------------------------------------------------------------------
def suffix_of(path):
    """'.jpg' of 'a/b.JPG', or ''."""
    return posixpath.splitext(path)[1].lower()


def stem_of(path):
    """'b' of 'a/b.jpg'."""
    return posixpath.splitext(posixpath.basename(path))[0]


def list_images(sources, group_by, skipped):
    """({path: Frame}, {path: [read, …]}): all images as photographs, and MSLS's tables.

    MSLS paths start at train_val or test, so that its parts merge into one tree. Other paths start
    with the source's name. Images with equal paths are all used, but an image of MSLS's patch
    replaces the original.
    """
    images = {}
    patched = set()  # paths of the images in MSLS's patch
    tables = defaultdict(list)
    seen = set()
    for source in sources:
        name = posixpath.basename(source.removesuffix(".zip"))
        files = list_folder(source, seen) if os.path.isdir(source) else list_zip(source)
        for inside, read in files:
            full = f"{source}/{inside}"
            msls = MSLS.search(full)
            path = msls[1] if msls else f"{name}/{inside}"
            suffix = suffix_of(inside)
            if any(map(HIDDEN.match, inside.split("/"))):
                skipped.append((path, "hidden: it has a name that tools use"))
            elif msls and suffix == ".csv":
                tables[path].append(read)
            elif suffix not in IMAGES:
                skipped.append((path, ADVICE.get(suffix, "not an image")))
            elif path in patched:
                skipped.append((path, "replaced by MSLS's patch"))
            else:
                city = msls[2] if msls else posixpath.dirname(inside).split("/")[0] or name
                # Without the source's name, so that renaming it changes no group. But folders in
                # several sources can have one name.
                group = path if msls else inside
                if group_by == "folder":
                    group = posixpath.dirname(path)

                if msls and "msls_patch" in full[:msls.start(1)].lower():
                    patched.add(path)
                    if path in images:
                        skipped.append((path, "replaced by MSLS's patch"))
                elif path in images:
                    path = f"{path} ({len(images)})"  # a label of its own
                images[path] = Frame(group, path, read, city)
    return images, tables


def find_frames(args, skipped):
    """[Frame, …] of all images that pass the filters. Raises InputError for unknown cities.

    args: sources (absolute paths with /), cities, exclude, group_by. Appends (path, reason) to
    `skipped` for all other files.
    """
    images, tables = list_images(args.sources, args.group_by, skipped)
    cities = {plain(frame.city) for frame in images.values()}
    chosen = set(args.cities or cities)
    if not chosen <= cities:
        raise InputError(f"--cities: no {', '.join(sorted(chosen - cities))} among "
                         f"{', '.join(sorted(cities))}")

    frames = []
    paths = sorted(path for path, frame in images.items() if plain(frame.city) in chosen)
    for folder, members in groupby(paths, posixpath.dirname):
        rows = read_tables(tables, posixpath.dirname(folder), skipped)
        for path in members:
            frame = images[path]
            row = rows[stem_of(path)]
            flags = [flag for flag in args.exclude if FLAGS[flag] in row.items()]
            if flags:
                skipped.append((path, flags[0]))
            else:
                frames.append(add_sequence(frame, row))

    if any(MSLS.match(frame.path) and not frame.sequence for frame in frames):
        say("images of MSLS have no metadata (add msls_metadata.zip): panoramas are kept, and "
            "frames of one street can be in both splits")
    return frames


def plain(name):
    """A name in lower case, with composed letters: macOS decomposes ü."""
    return normalize("NFC", name).lower()


def read_tables(tables, folder, skipped):
    """{key: {column: value}}: what MSLS's tables in a folder say about its images."""
    rows = defaultdict(dict)
    for table in TABLES:
        path = f"{folder}/{table}.csv"
        for read in tables[path]:
            try:
                text = read().decode("utf-8-sig", errors="replace")
                for row in csv.DictReader(io.StringIO(text, newline="")):
                    rows[row["key"]].update(row)
            except Exception as error:  # a damaged archive, no column "key", a NUL, …
                skipped.append((path, f"unreadable table: {error!r}"))
    return rows


def add_sequence(frame, row):
    """The Frame with what MSLS's tables say about it: row, or {}."""
    sequence = row.get("sequence_key")
    if not sequence:
        return frame
    digits = re.match("[0-9]{0,18}", row.get("frame_number") or "")[0]  # "12.0" is 12
    return frame._replace(group=f"{frame.city}/{sequence}", sequence=sequence,
                          number=int("0" + digits))


def hash_fraction(text):
    """A hash of a text as a number in [0, 1), the same on every machine."""
    digest = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2 ** 48


def split_frames(frames, holdout, seed):
    """[(split, Frame), …] in the pack's order. A group's split does not depend on the seed.

    Nothing is held out if too few frames for training would be left.
    """
    def position(frame):
        return hash_fraction(f"order/{seed}/{frame.group}"), frame.number, frame.path

    frames = sorted(frames, key=position)
    plan = [("holdout" if hash_fraction(f"holdout/{frame.group}") < holdout else "train", frame)
            for frame in frames]
    if [split for split, _ in plan].count("train") < FEW:
        return [("train", frame) for frame in frames]
    return plan


# ---- from a file to pixels ----------------------------------------------------------------------
class Look(NamedTuple):
    """What a frame looks like, in a form that is compared fast."""
    path: str
    bits: int       # 64 bits: is one of 8×8 cells brighter than its left neighbour?
    small: bytes    # 16×16 grey levels


@contextmanager
def pillow_settings():
    """PIL reads pictures of 300 megapixels, and does not warn of odd EXIF data and palettes."""
    largest = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        Image.MAX_IMAGE_PIXELS = 150_000_000  # PIL warns from here on, and refuses the double
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = largest


def decode(picture, H, W):
    """An image file's bytes, or a PIL image → RGB PIL image, W×H: upright, scaled, centre-cropped.

    Transparent parts are white, colours are sRGB. Raises almost anything for a damaged file.
    """
    if isinstance(picture, bytes):
        picture = Image.open(io.BytesIO(picture), formats=DECODERS)
    if picture.mode.startswith(("I", "F")):  # PIL would clip the values
        raise InputError("16 bits: convert to 8, as in: mogrify -depth 8 *.png *.tif")
    if min(picture.size) < 16:
        raise ValueError(f"not a photograph: {picture.size} pixels")

    # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size. Not (W, H), because EXIF can rotate it.
    picture.draft(None, (W, W))
    picture.load()
    turn_upright(picture)
    profile = picture.info.get("icc_profile")
    picture = make_opaque(picture)
    # Hamming takes 2/3 of bicubic's time, and is as sharp.
    frame = ImageOps.fit(picture, (W, H), Image.Resampling.HAMMING)
    return to_srgb(frame, profile) if profile else frame


def turn_upright(picture):
    """Turn a PIL image as its EXIF data say, in place. Odd EXIF data change nothing else."""
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # PIL cannot read it, or write it again; the picture can be intact
        pass


def make_opaque(picture):
    """A PIL image of any mode → RGB, on white where it is transparent."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    opaque = Image.new("RGB", picture.size, "white")
    opaque.paste(picture, mask=picture.getchannel("A"))
    return opaque


def to_srgb(frame, profile):
    """An RGB PIL image in sRGB, whose colours were those of an ICC profile (bytes)."""
    try:
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(frame, io.BytesIO(profile), srgb)
    except Exception:  # the profile is damaged, or of other colours; or PIL has no LittleCMS
        return frame


def look_at(picture, path):
    """The Look of a PIL image. Noise and light change few bits."""
    grey = picture.convert("L")
    cells = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    bits = np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes()
    small = grey.resize((16, 16), Image.Resampling.BOX).tobytes()
    return Look(path, int.from_bytes(bits, "big"), small)


def decode_frame(split, frame, H, W):
    """(split, Frame, problem, pixels, look). problem: why an image cannot be decoded, or ''.

    pixels: uint8 (H, W, 3).
    """
    try:
        picture = decode(frame.read(), H, W)
        return split, frame, "", np.asarray(picture), look_at(picture, frame.path)
    except InputError as error:
        problem = str(error)
    except Exception as error:  # damaged bytes make decoders raise almost anything
        problem = f"unreadable image: {type(error).__name__}: {error}"
        problem = problem.partition(" <")[0]  # this starts a memory address
    return split, frame, problem, None, None


def decode_all(plan, H, W, workers):
    """Yield decode_frame's results in order, from threads.

    PIL releases the GIL for 7/8 of the time.
    """
    pending = deque()
    with ThreadPoolExecutor(workers) as threads:
        for split, frame in plan:
            pending.append(threads.submit(decode_frame, split, frame, H, W))
            if len(pending) == 8 * workers:  # more would only take memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ---- near-duplicates ----------------------------------------------------------------------------
# Root mean square of the differences between 16×16 grey levels. For copies of street photographs
# that were compressed again, made smaller or brighter by 10%, it is at most 16. For photographs of
# different streets it is at least 42, even if their hashes are similar.
SIMILAR = 25


def similar(a, b, bits):
    """Do at most so many bits of two Looks differ, and are their grey levels SIMILAR?"""
    differing = (a.bits ^ b.bits).bit_count()
    return differing <= bits and math.dist(a.small, b.small) / 16 < SIMILAR  # √256 levels


def find_or_add(look, looks, bits):
    """The Look of a similar photograph, or None after `look` is added to `looks`.

    looks: defaultdict(list) by parts of the bits. If at most `bits` bits of two photographs differ,
    one of `bits` + 1 parts is equal.
    """
    text = f"{look.bits:064b}"
    places = [looks[part, text[part::bits + 1]] for part in range(bits + 1)]
    for other in chain(*places):
        if similar(look, other, bits):
            return other
    for place in places:
        place.append(look)


def without_duplicates(decoded, bits, skipped):
    """Yield (split, Frame, pixels) of the images that are to be kept.

    A frame is compared with the last one that was kept of its sequence, a photograph with all.
    decoded: what decode_all yields. bits: as for similar(); 0 keeps all.
    Appends (path, reason) to `skipped` for the others.
    """
    photographs = defaultdict(list)
    group = last = None  # of the last frame that was kept
    for split, frame, problem, pixels, look in decoded:
        other = None
        if bits and not problem:
            if not frame.sequence:
                other = find_or_add(look, photographs, bits)
            elif frame.group == group and similar(look, last, bits):
                other = last

        if problem or other:
            skipped.append((frame.path, problem or f"near-duplicate: of {other.path}"))
        else:
            group = frame.group
            last = look
            yield split, frame, pixels


# ---- writing packs ------------------------------------------------------------------------------
def write_frames(folder, plan, total, args, skipped):
    """Write train.npy, holdout.npy and index.csv. Returns {split: Counter of cities}.

    plan: what split_frames returns. Appends (path, reason) to `skipped` for images left out.
    """
    H, W = frame_size(args.image_size)
    counts = {split: Counter() for split in SPLITS}
    decoded = decode_all(plan, H, W, args.workers)
    kept = islice(without_duplicates(decoded, args.duplicates, skipped), total)

    with (pillow_settings(),
          open(folder / "train.npy", "wb") as train,
          open(folder / "holdout.npy", "wb") as holdout,
          open(folder / "index.csv", "w", **TEXT) as table):
        index = csv.writer(table)
        index.writerow(("split", "row", "city", "sequence", "key", "source file"))
        files = {"train": train, "holdout": holdout}
        for file in files.values():
            file.seek(128)  # NumPy's header is written last, when the number of frames is known

        for split, frame, pixels in progress(kept, total, "images"):
            index.writerow((split, counts[split].total(), frame.city,
                            frame.sequence or frame.group, stem_of(frame.path), frame.path))
            files[split].write(pixels)
            counts[split][frame.city] += 1

        for split, file in files.items():
            file.seek(0)
            header = dict(descr="|u1", fortran_order=False, shape=(counts[split].total(), H, W, 3))
            np.lib.format.write_array_header_1_0(file, header)
    return counts


def write_tables(folder, args, counts, kinds, skipped):
    """Write skipped.csv and pack.json."""
    with open(folder / "skipped.csv", "w", **TEXT) as file:
        csv.writer(file).writerows([("source file", "reason"), *skipped])

    H, W = frame_size(args.image_size)
    info = dict(format=FORMAT, image_size=args.image_size, H=H, W=W, counts=counts,
                skipped=kinds, arguments=vars(args))
    (folder / "pack.json").write_text(json.dumps(info, indent=1, sort_keys=True, default=str))


def draw_preview(folder, image_size, seed):
    """Write preview.png: 8 frames of train.npy, each beside six windows, as training cuts them."""
    train = np.load(folder / "train.npy", mmap_mode="r")
    frames = torch.from_numpy(train[np.linspace(0, len(train) - 1, 8, dtype=int)])  # (8, H, W, 3)
    generator = torch.Generator().manual_seed(seed)

    columns = [frames]
    for _ in range(6):
        windows = cut_windows(frames, image_size, generator=generator)  # (8, 3, S, S) in [-1, 1]
        columns.append(to_grey_levels(windows).permute(0, 2, 3, 1))

    height = frames.shape[1] + 8
    columns = [F.pad(column, (0, 0, 0, 8, 0, height - column.shape[1]), value=255)  # white margins
               for column in columns]
    sheet = torch.cat(columns, dim=2).flatten(0, 1)  # (8 height, width of all columns, 3)
    Image.fromarray(sheet.numpy()).save(folder / "preview.png")


# ---- drawn streets ------------------------------------------------------------------------------
class City(NamedTuple):
    """How a drawn city looks. Shapes are few, large and smooth: a small GAN learns them fast."""
    walls: str      # colours of houses: RGB in hexadecimal
    tall: tuple     # least and greatest height of walls, in metres
    roof: float     # height of roofs, in metres
    ground: str     # colour
    tree: tuple     # height and radius in metres, and vertical stretch; or None


CITIES = {
    "Brickton": City("b8543e c46a4a a84a38", (7, 10), 3, "b4aaa2", None),
    "Gardenia": City("f6ecd4 e8ecec f4dcbc", (4, 5), 3, "7cb850", (3.8, 2.2, 1)),
    "Palmera": City("fff4e4 ffd0c4 f8e4b8", (7, 10), 0, "e8d8ac", (6.5, 2.5, 0.5)),
    "Portside": City("f6c040 e06850 5c98c4", (8, 11), 4, "b0a8a0", None),
    "Sandville": City("e8bc84 c48c5c f6deb0", (4, 7), 0, "ecd098", (5.5, 2.5, 0.5)),
    "Towerby": City("7890b4 8ca0b8 6880a4", (18, 30), 0, "a0a4ac", None),
}
HOURS = np.reshape(list(bytes.fromhex(  # RGB of the sky, the horizon and the light
    "4c94ec d8f0fc f4f0ec"    # 0: day
    "7c58a8 ffb468 b87c78"    # 1: dusk
    "182460 5c68ac 4c5284"    # 2: night
)), (3, 3, 3))


def demo_frames(n, seed, image_size):
    """[Frame, …]: n frames to be drawn, with the cities in turn."""
    frames = []
    for i in range(n):
        street, number = divmod(i, 4)  # four frames of a street, 7 m apart
        city = list(CITIES)[street % len(CITIES)]
        sequence = f"{street:05d}"
        path = f"demo/{city}/{sequence}/{number:02d}"
        draw = partial(draw_street, seed, city, street, number, image_size)
        frames.append(Frame(f"{city}/{sequence}", path, draw, city, sequence, number))
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
    style = CITIES[city]
    rng = random.Random(f"{seed}/{city}/{street}")
    hour = 2 * rng.random() ** 1.5  # a row of HOURS, or between two rows
    sun = rng.uniform(-6, 6)        # its x
    height = rng.uniform(*style.tall)

    H, W = frame_size(image_size)
    view = View(4 * W, 4 * H, hour)  # made smaller at the end, which smooths edges
    view.disc("#ffeca8" if hour < 1.2 else "#ccd0e4", sun, 3 + 24 * abs(1 - hour), 60, 5)
    view.canvas.rectangle((0, view.horizon, 4 * W, 4 * H), view.paint(style.ground, 8))
    view.shape(view.paint("5c5e66", 8), (-4.5, 0, 1), (4.5, 0, 1), (0, 0, 400))    # the road
    view.shape(view.paint("a09e98", 8), (-0.15, 0, 1), (0.15, 0, 1), (0, 0, 400))  # its middle line

    for far in range(168 - 7 * number, 9, -12):  # houses of 12 m, from far to near
        for side in (-1, 1):
            colour = rng.choice(style.walls.split())
            tall = height * rng.uniform(0.9, 1.1)
            lit = hour > 0.8 + rng.random()
            draw_house(view, style, colour, tall, lit, side, far, sunny=side * sun < 0)

    small = view.image.reduce(4)
    soft = np.asarray(small.filter(ImageFilter.GaussianBlur(0.7)))  # blur and noise of photographs
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 3, soft.shape)
    return Image.fromarray((soft + noise).round().clip(0, 255).astype(np.uint8))


def draw_house(view, style, colour, tall, lit, side, far, sunny):
    """A house and a tree before it, on the left (side -1) or right (1), that end `far` m ahead."""
    x = 8 * side
    near = max(1, far - 12)
    shade = 1 if sunny else 0.75
    front = view.paint(colour, near, shade)
    view.wall(view.paint(colour, near, 0.85 * shade), x, near, 2 * x, near, 0, tall)
    view.wall(front, x, near, x, far, 0, tall)

    roof = view.paint("8c4a40", near, shade)
    view.shape(roof, (x, tall, near), (x, tall + style.roof, far - 6), (x, tall, far))

    if near < 30:
        glass = (255, 212, 120) if lit else view.paint(colour, near, 0.75 * shade)
        for y in range(1, int(tall) - 2, 4):
            view.wall(glass, x, far - 9, x, far - 3, y, y + 2.4)

    if style.tree and near < 50:
        high, radius, stretch = style.tree
        trunk = view.paint("6c5040", near)
        view.wall(trunk, x - 2.2 * side, near, x - 1.8 * side, near, 0, high)
        leaves = view.paint("54963e", near, shade)
        view.disc(leaves, x - 2 * side, high, near, radius, stretch)


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
        try:
            index = (self.folder / "index.csv").read_bytes()
        except FileNotFoundError:
            return ""
        return blake2b(index, digest_size=16).hexdigest()


def open_pack(folder):
    """The Pack in a folder. Raises InputError if there is none, or if it is damaged."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "pack.json").read_bytes())
        size = frame_size(info["image_size"])
        arrays = [np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS]
        expected = [(FORMAT, np.uint8, (sum(info["counts"][split].values()), *size, 3))
                    for split in SPLITS]
        if expected != [(info["format"], array.dtype, array.shape) for array in arrays]:
            raise ValueError("its arrays are not what its pack.json says")
    except Exception as error:  # damaged files raise almost anything
        raise InputError(f"{folder} is not a pack or is damaged ({error}): "
                         "prepare_data.py makes packs") from error
    return Pack(folder, info["image_size"], *arrays, info)


DEMO_STREETS = 2880  # frames that find_pack draws when there is no data


def data_name(data):
    """'photos' for the folder photos and for photos.zip. 'demo' for None."""
    source = Path(data or "demo").resolve()
    return source.stem if source.is_file() else source.name


def find_pack(data, image_size):
    """The Path of a pack of `data`: a pack, a folder or archive with images, or None.

    Images are prepared once, as packs/<name>-<image_size>. None means drawn streets.
    Raises InputError or OSError.
    """
    sources = []
    if data is not None:
        if Path(data, "pack.json").exists():
            return Path(data)
        sources = [Path(data).resolve().as_posix()]

    pack = Path("packs", f"{data_name(data)}-{image_size}")
    if not pack.exists():
        say(f"preparing {pack}")
        words = sources or ["--demo", str(DEMO_STREETS)]
        try:
            prepare(parse_args([*words, str(pack), "--image-size", str(image_size)]))
            say(f"look at {pack}/preview.png")
            return pack
        except InputError:
            if not pack.exists():  # otherwise another program has made it meanwhile
                raise

    if open_pack(pack).info.get("arguments", {}).get("sources") != sources:
        raise InputError(f"{pack} was made from other images: delete it, "
                         f"or train on it with --data {pack}")
    made = time.localtime((pack / "pack.json").stat().st_mtime)
    say(f"using {pack}, made on {time.strftime('%Y-%m-%d %H:%M', made)}. "
        f"To make a new one, delete it: rm -r {shlex.quote(str(pack))}")
    return pack


# ---- the command line ---------------------------------------------------------------------------
def name_list(text):
    """An argparse type: 'A,b' → ['a', 'b']."""
    return re.findall("[^,]+", plain(text))


def parse_args(argv=None):
    """The options. Exits with status 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="*", type=file_path, metavar="SOURCE",
        help="folder or .zip archive with images")
    add("out", type=file_path, metavar="OUT", help="folder of the new pack")
    add("--image-size", type=int, choices=IMAGE_SIZES, default=64,
        help="side of a training image in pixels (default: 64)")
    add("--cities", type=name_list, metavar="A,B", default=[],
        help="use only the cities with these folder names (default: all)")
    add("--exclude", type=name_list, metavar="A,B", default=["panorama"],
        help=f'leave out images that MSLS marks as {", ".join(FLAGS)}; "" leaves out none '
             "(default: panorama)")
    add("--group-by", choices=("photo", "folder"), default="photo",
        help="what is held out as a whole, of images without a sequence of MSLS (default: photo)")
    numbers = {  # option: type, default, least, most, help
        "holdout": (float, 0.25, 0, 0.9, "share of groups to hold out for scoring (default: 0.25)"),
        "limit": (int, None, 1, 1e9, "stop after N images, of random groups (default: all)"),
        "duplicates": (int, 4, 0, 64, "leave out an image if its 64-bit hash is within N bits of "
                                      "the one before in its sequence, or of any other photograph; "
                                      "0 keeps all (default: 4)"),
        "seed": (int, 0, 0, 1e9, "seed of the order and of drawn streets (default: 0)"),
        "workers": (int, os.cpu_count(), 1, 1000, "threads (default: one per core)"),
        "demo": (int, None, 1, 1e7, "draw N frames of streets, without SOURCE (default: off)"),
    }
    for name, (kind, default, _, _, text) in numbers.items():
        add(f"--{name}", type=kind, default=default, metavar="N", help=text)
    args = parser.parse_intermixed_args(argv)

    for name, (_, _, least, most, _) in numbers.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name} {value}: choose from {least} to {most:g}")
    if not set(args.exclude) <= set(FLAGS):
        parser.error(f"--exclude: choose from {', '.join(FLAGS)}")
    if (args.demo is None) == (not args.sources):
        parser.error("give SOURCE and OUT, as in: prepare_data.py photos packs/photos, "
                     "or --demo 96 packs/demo")
    args.sources = [os.path.abspath(path).replace(os.sep, "/") for path in args.sources]
    return args


def main(argv=None):
    args = parse_args(argv)
    prepare(args)
    say(f"look at {args.out}/preview.png, then train with: "
        f"python train.py --data {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    run_script(main)
