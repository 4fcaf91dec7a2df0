"""Turn street images into a pack: the arrays of small frames that train.py reads.

    python prepare_data.py /data/msls packs/msls                 # an extracted MSLS tree, or a folder with its archives
    python prepare_data.py /data/msls packs/eu --cities paris,london,zurich --exclude night,sideways
    python prepare_data.py holiday-photos packs/photos --image-size 128 --limit 10000    # any images will do
    python prepare_data.py --demo 2880 packs/demo-64             # draws its own streets

    from prepare_data import open_pack
    pack = open_pack("packs/msls")                               # pack.train, pack.holdout: uint8 (N, H, W, 3)

A pack is a folder with train.npy and holdout.npy (plain NumPy, uint8 (N, H, W, 3)), index.csv (split, row, city, sequence,
key, source file), skipped.csv (source file, reason), preview.png (frames beside windows of them, as training sees them)
and pack.json. Sequences stand in random order, the frames of each in theirs: any slice of a pack samples all its cities.
Archives are read in place. Several SOURCEs are laid over each other: of files with the same path the later one wins.
MSLS: Warburg et al. 2020, Mapillary Street-Level Sequences, https://github.com/mapillary/mapillary_sls.
"""
import argparse
import csv
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

FORMAT = 1  # of the pack; raised when its files change their meaning
SPLITS = ("train", "holdout")
FILES = ("train.npy", "holdout.npy", "index.csv", "skipped.csv", "preview.png")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # and no others: a .jpg may be an EPS inside, which is a program
MAX_BYTES = 64 * 2 ** 20   # of one file: what a worker takes into memory
MAX_PIXELS = 64 * 2 ** 20  # of one image, 8192×8192: 256 MB as RGBA
MIN_SIDE = 16              # pixels: a smaller image is an icon, no street
BATCH = 32                 # frames a task: some 25 ms of decoding, far more than handing it over takes


MSLS = re.compile(r"(^|/)(train_val|test)/[^/]+/(query|database)/")


class InputError(Exception):
    """A user's mistake; the scripts print it as one line, `error: …`, and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as InputError instead of the whole usage."""

    def error(self, message):
        raise InputError(message)


def frame_size(image_size):
    """(H, W) in pixels of the frames kept for training images of S×S: 5/4·S and 4/3·H, to the nearest even number."""
    H = image_size * 5 // 4
    return H, round(H * 2 / 3) * 2


# ---- what is there: paths in the tree, each with what reads it ------------------------------------------------------

def list_files(sources, skip):
    """{path in the tree: (function, *arguments)} of all images and CSVs; function(path, *arguments) gives the bytes.

    `sources` are folders and .zip files; `skip(path, reason)` hears of what can't be read. Archives of one folder are
    read in the order of their names, patches last.
    """
    files = {}

    def add(path, root, source):
        if len(sources) > 1 and not MSLS.search(path):
            path = f"{root.name}/{path}"  # two folders of photos both have an IMG_0001.jpg; parts of MSLS belong together
        if path.lower().endswith(IMAGES) or path.endswith(".csv"):
            if path in files:
                skip(path, "replaced by a later file of the same path")
            files[path] = source
        elif path.lower().endswith(".zip"):
            skip(path, "archive inside a folder or an archive: not opened")

    for source in sources:
        if source.is_file():
            list_archive(source, lambda path, *read: add(path, source.with_suffix(""), read), skip)
            continue
        archives = [p for p in source.iterdir() if p.name.lower().endswith(".zip") and p.is_file()]
        for archive in sorted(archives, key=lambda p: ("patch" in p.name.lower(), p.name)):
            list_archive(archive, lambda path, *read: add(path, source, read), skip)
        seen, read = set(), (read_file, str(source))
        for folder, folders, names in os.walk(source, followlinks=True,
                                              onerror=lambda error: skip(error.filename, describe(error))):
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in seen or "pack.json" in names:  # a link back; a pack of ours is no source
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            folders.sort()
            inside = os.path.relpath(folder, source).replace(os.sep, "/")
            for name in sorted(names):
                if inside != ".":
                    add(f"{inside}/{name}", source, read)
                elif not name.lower().endswith(".zip"):
                    add(name, source, read)
    return files


def list_archive(archive, add, skip):
    """Call add(path, read_member, …) for each file in a .zip; what is wrong with it or its entries goes to skip."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            entries = zipped.infolist()
    except Exception as error:  # a damaged directory makes zipfile raise many things
        return skip(archive.name, f"archive can't be opened ({describe(error)})")
    for entry in entries:
        if entry.is_dir():
            continue
        if entry.filename.startswith("/") or ".." in entry.filename.split("/"):
            skip(entry.filename, "path leads out of the archive")
        elif entry.flag_bits & 1:
            skip(entry.filename, "encrypted")
        elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            skip(entry.filename, f"unknown compression ({entry.compress_type})")
        elif max(entry.file_size, entry.compress_size) > MAX_BYTES and not entry.filename.lower().endswith(".zip"):
            skip(entry.filename, TOO_LONG)
        else:
            add(entry.filename, read_member, str(archive), entry.header_offset, entry.compress_size, entry.compress_type, entry.CRC)


TOO_LONG = f"more than {MAX_BYTES >> 20} MB"


def read_file(path, root):
    """The bytes of a file. Raises OSError, or ValueError with the reason why it is left out."""
    full = os.path.join(root, path)
    about = os.stat(full)
    if not stat.S_ISREG(about.st_mode):  # reading a pipe would wait for ever
        raise ValueError("not a regular file")
    if about.st_size > MAX_BYTES:
        raise ValueError(TOO_LONG)
    with open(full, "rb", buffering=0) as file:
        return file.read(about.st_size)


def read_member(path, archive, offset, packed, method, crc):
    """The bytes of an archive's entry, from what its directory says of it; raises ValueError with the reason if damaged.

    Not zipfile: that would read the whole directory, 270,000 entries of an MSLS volume, again in each worker.
    """
    with open(archive, "rb") as file:
        file.seek(offset)
        header = file.read(30)  # ends with the lengths of a name and an extra field; the data come after them
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError("archive is damaged")
        file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
        data = file.read(packed)
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MAX_BYTES + 1)  # a bomb stops here
    if len(data) > MAX_BYTES:
        raise ValueError(TOO_LONG)
    if zlib.crc32(data) != crc:
        raise ValueError("damaged in the archive (checksum)")
    return data


# ---- which frames, in which order -----------------------------------------------------------------------------------

class Frame(NamedTuple):
    number: int     # in its sequence
    path: str       # in the tree
    read: tuple     # (function, *arguments): function(path, *arguments) gives the file's bytes, or a drawn PIL image


def stem(path):
    """The key of an image: the name of its file without the ending."""
    return os.path.splitext(path.rpartition("/")[2])[0]


def read_csv(files, path, skip):
    """{key: row} of one of MSLS's CSVs, a row a dictionary; None if it is missing or damaged."""
    if path not in files:
        return None
    try:
        function, *arguments = files[path]
        text = function(path, *arguments).decode("utf-8-sig", "surrogateescape")
        return {row["key"]: row for row in csv.DictReader(io.StringIO(text))}
    except (OSError, ValueError, KeyError, csv.Error, zlib.error) as error:
        skip(path, f"CSV can't be read ({describe(error)})")


def find_sequences(files, home, cities, exclude, skip):
    """{(city, sequence): [Frame, …]} of all that the filters let through, from list_files's files.

    MSLS's folders are <city>/{query,database}/images; elsewhere a first-level folder is the city, and `home` the city of
    images that lie in none. An image without a sequence in seq_info.csv is one by itself.
    """
    folders, sequences, missing, found = defaultdict(list), defaultdict(list), Counter(), set()
    for path in files:
        if not path.endswith(".csv"):
            folders[path.rpartition("/")[0]].append(path)
    for folder, paths in sorted(folders.items()):
        parent, _, last = folder.rpartition("/")
        msls = last == "images" and parent.split("/")[-1] in ("query", "database")
        city = (["", *parent.split("/")][-2] if msls else folder.split("/")[0]) or home
        found.add(city)
        if cities and city.lower() not in cities:
            continue
        raw, info, post = (read_csv(files, f"{parent}/{name}.csv", skip) if msls else None
                           for name in ("raw", "seq_info", "postprocessed"))
        for path in sorted(paths):
            key, row = stem(path), {}
            for name, table in (("raw", raw), ("seq_info", info), ("postprocessed", post)):
                if table and key in table:
                    row.update(table[key])
                else:
                    missing[name] += 1
            flags = {"panorama": row.get("pano"), "night": row.get("night"), "control_panel": row.get("control_panel"),
                     "sideways": str(row.get("view_direction") == "Sideways")}
            reason = next((flag for flag in exclude if (flags[flag] or "").lower() in ("true", "1")), None)
            number = row.get("frame_number") or ""
            if reason:
                skip(path, reason)
            else:
                frame = Frame(int(number) if number.isdecimal() else 0, path, files[path])
                sequences[city, row.get("sequence_key") or row.get("sequence_id") or path].append(frame)
    if cities and (unknown := cities - {city.lower() for city in found}):
        raise InputError(f"--cities: no {', '.join(sorted(unknown))}; there are {', '.join(sorted(found)) or 'no images'}")
    if missing["seq_info"]:
        print(f"no seq_info.csv for {missing['seq_info']:,} images: each is a sequence of its own")
    for name, flags in (("raw", {"panorama"}), ("postprocessed", {"night", "control_panel", "sideways"})):
        if missing[name] and flags & set(exclude):
            print(f"no {name}.csv for {missing[name]:,} images: not filtered ({', '.join(f for f in exclude if f in flags)})")
    return sequences


def chance(*words):
    """A number in [0, 1) that the words decide, the same on every machine."""
    digest = blake2b("/".join(map(str, words)).encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2 ** 48


def split_sequences(sequences, holdout, seed):
    """[(split, city, sequence, frames), …] in the pack's order. A sequence is held out, or not, in every pack it is in."""
    held = {key for key in sequences if chance("holdout", *key) < holdout}
    if len(held) == len(sequences):
        print("too few sequences to hold any out: all frames are for training")
        held = set()
    order = sorted(sequences, key=lambda key: (chance("order", seed, *key), key))
    return [("holdout" if key in held else "train", *key, sorted(sequences[key])) for key in order]


# ---- from a file to a frame, in the workers -------------------------------------------------------------------------

def describe(error):
    """An exception as a reason for skipped.csv: one line, the same in every run (PIL would print an address)."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {MAX_PIXELS >> 20} million pixels"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]


def decode(picture, H, W):
    """The bytes of an image file, or a PIL image → RGB PIL image of W×H pixels that the original covers, its middle.

    JPEGs are decoded at 1/2, 1/4 or 1/8 where that is enough. Upright as EXIF says; of an animation the first frame;
    16 bits become 8; transparent is white. Raises whatever PIL raises.
    """
    if isinstance(picture, bytes):
        if not picture:
            raise ValueError("empty file")
        picture = Image.open(io.BytesIO(picture), formats=DECODERS)
    if min(picture.size) < MIN_SIDE:
        raise ValueError(f"a side of less than {MIN_SIDE} pixels")
    picture.draft(None, (W, W))  # not (W, H): EXIF may turn it
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "F":
        raise ValueError("pixels are floating-point numbers")
    if picture.mode.startswith("I"):  # PIL would clip them to 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return ImageOps.fit(picture, (W, H), Image.Resampling.HAMMING)  # bicubic's sharpness at two thirds of its time


def difference_hash(picture):
    """A 64-bit int that hardly changes with noise, light or compression: is a cell of 8×8 brighter than the one before?"""
    cells = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of us; the parent ends its workers
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    warnings.simplefilter("ignore")  # of odd EXIF and palettes
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # read off the header, before anything is decoded


def work(frames, H, W):
    """[Frame, …] → (uint8 (n, H, W, 3), [hash or reason, …]): a hash for each of the n good ones, else why it is none."""
    pixels, outcomes = [], []
    for frame in frames:
        try:
            function, *arguments = frame.read
            picture = decode(function(frame.path, *arguments), H, W)
            outcomes.append(difference_hash(picture))
            pixels.append(np.asarray(picture))
        except Exception as error:  # decoders of foreign bytes raise anything; it is this one file's trouble
            outcomes.append(describe(error))
    return np.array(pixels, np.uint8).reshape(-1, H, W, 3), outcomes


def decode_all(frames, size, workers):
    """Yield (frame, hash or reason, pixels or None) for each of an iterator of (…, Frame), in order.

    A bounded number of tasks is under way, so that memory stays flat however many frames there are.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    tasks = deque()
    try:
        while True:
            while len(tasks) < 2 * workers + 2 and (batch := list(islice(frames, BATCH))):
                tasks.append((batch, pool.submit(work, [frame for *_, frame in batch], *size)))
            if not tasks:
                return
            batch, task = tasks.popleft()
            pixels, outcomes = task.result()
            rows = iter(pixels)
            for item, outcome in zip(batch, outcomes):
                yield item, outcome, None if isinstance(outcome, str) else next(rows)
    except BrokenProcessPool:
        raise InputError("a worker process was killed, perhaps for want of memory: try fewer --workers") from None
    finally:
        for child in multiprocessing.active_children():  # they have nothing left to do, or nothing that is wanted
            child.terminate()
        pool.shutdown(cancel_futures=True)


# ---- drawn streets --------------------------------------------------------------------------------------------------

DEMO = 2880         # streets that find_pack draws when there is no data
DEMO_SEQUENCE = 12  # frames of one street, 7 m apart

# Metres and colours of each city: walls, storeys (least, most), half the road's width, a building's length, the share of
# plots without one, roofs, trees and how far apart, ground beside the pavement.
CITIES = {
    "Brickton": dict(walls=[(168, 74, 58), (186, 96, 70), (148, 62, 56)], storeys=(2, 4), road=4.5, length=(7, 11), gaps=0.05,
                     gable=(92, 84, 92), tree="round", spacing=13, ground=(140, 134, 128)),
    "Gardenia": dict(walls=[(238, 226, 200), (206, 220, 226), (232, 206, 178)], storeys=(1, 2), road=5, length=(9, 13), gaps=0.45,
                     gable=(150, 82, 60), tree="round", spacing=8, ground=(104, 158, 70)),
    "Palmera": dict(walls=[(252, 246, 236), (255, 214, 190), (186, 232, 224), (255, 234, 170)], storeys=(2, 5), road=7,
                    length=(10, 18), gaps=0.2, gable=None, tree="palm", spacing=11, ground=(214, 198, 150)),
    "Portside": dict(walls=[(240, 190, 72), (214, 92, 72), (92, 142, 176), (240, 226, 196), (122, 170, 124)], storeys=(3, 4), road=4,
                     length=(5, 7), gaps=0.0, gable=(160, 70, 50), tree=None, spacing=20, ground=(150, 140, 132)),
    "Sandville": dict(walls=[(222, 180, 130), (204, 156, 108), (236, 204, 158)], storeys=(1, 3), road=6, length=(8, 14), gaps=0.25,
                      gable=None, tree="palm", spacing=26, ground=(220, 186, 134)),
    "Towerby": dict(walls=[(112, 134, 158), (146, 158, 168), (88, 104, 128), (176, 170, 160)], storeys=(8, 22), road=7,
                    length=(14, 22), gaps=0.08, gable=None, tree="poplar", spacing=16, ground=(130, 130, 134)),
}
# Through the day: the sky's top and its edge, what the light makes of white, and how many lamps are lit.
SKIES = [((96, 120, 190), (255, 196, 160), (0.95, 0.80, 0.74), 0.3), ((52, 124, 222), (188, 220, 246), (1.05, 1.03, 1.0), 0.0),
         ((70, 136, 222), (214, 226, 232), (1.06, 1.0, 0.92), 0.0), ((128, 142, 160), (206, 212, 216), (0.84, 0.87, 0.92), 0.0),
         ((74, 74, 146), (255, 146, 78), (0.86, 0.62, 0.54), 0.5), ((8, 12, 38), (44, 50, 96), (0.24, 0.27, 0.44), 1.0)]


def demo_sequences(n, seed, image_size):
    """What split_sequences needs, for n streets to be drawn, the cities in turn."""
    sequences = defaultdict(list)
    for i in range(n):
        number, frame = divmod(i, DEMO_SEQUENCE)
        city = list(CITIES)[number % len(CITIES)]
        read = (draw_street, seed, city, number, frame, image_size)
        sequences[city, f"{number:05d}"].append(Frame(frame, f"demo/{city}/{number:05d}/{frame:02d}", read))
    return sequences


def draw_street(path, seed, city, sequence, frame, image_size):
    """A PIL image of twice the pack's frame size: the view down a street from `frame` × 7 m along it.

    Everything stands in metres (x right of the middle, y up from the road, z ahead) and is painted from far to near.
    """
    rng = random.Random(f"{seed}/{city}/{sequence}")
    style = CITIES[city]
    height, width = (2 * side for side in frame_size(image_size))
    focal, middle, horizon = 0.62 * width, width * rng.uniform(0.46, 0.54), height * rng.uniform(0.50, 0.56)
    hour = rng.random() * (len(SKIES) - 1)
    top, edge, light, lamps = ([a + (b - a) * (hour % 1) for a, b in zip(np.ravel(u), np.ravel(v))]
                               for u, v in zip(SKIES[int(hour)], SKIES[int(hour) + 1]))
    lamps, sunny_side = lamps[0], rng.choice((-1, 1))
    start = 7.0 * frame

    def at(x, y, z):
        return middle + focal * x / z, horizon + focal * (1.8 - y) / z

    def paint(colour, z=0.0, shade=1.0, lit=False):
        fog = 1 - math.exp(-z / 140)
        day = (1, 1, 1) if lit else light
        return tuple(int(min(255, c * shade * l) * (1 - fog) + e * fog) for c, l, e in zip(colour, day, edge))

    def quad(colour, *corners):
        canvas.polygon([at(*corner) for corner in corners], colour)

    def block(x0, x1, y0, y1, z, colour):
        (left, bottom), (right, upper) = at(x0, y0, z), at(x1, y1, z)
        canvas.rectangle((min(left, right), upper, max(left, right), bottom), colour)

    def disc(x, y, z, radius, colour):
        (cx, cy), r = at(x, y, z), focal * radius / z
        canvas.ellipse((cx - r, cy - r, cx + r, cy + r), colour)

    # Sky: a gradient, sun or moon, clouds or stars, and the far end of the town.
    image = Image.new("RGB", (width, height))
    sky = Image.linear_gradient("L").resize((width, int(horizon) + 1))
    image.paste(ImageOps.colorize(sky, [int(c) for c in top], [int(c) for c in edge]))
    canvas = ImageDraw.Draw(image)
    sun, r = (width * rng.uniform(0.3, 0.7), height * rng.uniform(0.08, 0.3)), height / 28
    canvas.ellipse((sun[0] - r, sun[1] - r, sun[0] + r, sun[1] + r), (250, 246, 226) if lamps < 0.6 else (226, 230, 240))
    for _ in range(24):
        x, y, big = rng.random() * width, rng.random() ** 1.5 * horizon, rng.random() < 0.5
        if lamps > 0.7:
            canvas.point((x, y), (220, 224, 240))
        elif big and y < 0.6 * horizon:
            for _ in range(3):
                r = height * rng.uniform(0.01, 0.035)
                x += 1.5 * r
                canvas.ellipse((x - 2 * r, y - r, x + 2 * r, y + r), tuple(int(0.6 * e + 0.4 * 255 * l) for e, l in zip(edge, light)))
    for i in range(-14, 15):
        block(8 * i, 8 * i + 8, 0, rng.uniform(6, 12) * (1 + style["storeys"][1] / 12), 160, paint(style["walls"][0], 160, 0.8))

    # Ground: what lies beside, pavement, kerb, road, markings.
    road, walk = style["road"], style["road"] + 3.5
    canvas.rectangle((0, horizon, width, height), paint(style["ground"], 20))
    for half, colour in ((walk, (176, 172, 166)), (road + 0.2, (214, 212, 206)), (road, (86, 88, 94))):
        quad(paint(colour, 8), (-half, 0, 400), (half, 0, 400), (half, 0, 1), (-half, 0, 1))
    for z in range(90, -1, -6):
        near, far = max(1.0, z - start % 6), z - start % 6 + 3
        if far > near:
            quad(paint((240, 238, 226), far), (-0.1, 0, far), (0.1, 0, far), (0.1, 0, near), (-0.1, 0, near))
    for side in (-1, 1):
        x = side * (road - 0.5)
        quad(paint((226, 222, 208), 8), (x - 0.06, 0, 90), (x + 0.06, 0, 90), (x + 0.06, 0, 1), (x - 0.06, 0, 1))

    # What stands along the street: (z, function), the whole street so that each frame of it sees the same.
    things, end = [], 7.0 * DEMO_SEQUENCE + 110

    def building(side, z0, z1, storeys, colour, plot):
        near, h, X = max(z0, 1.2), 3.2 * storeys + 0.8, side * walk
        shade = 1.0 if side == sunny_side else 0.78
        quad(paint(colour, near, shade * 0.86), (X, 0, near), (X + side * 9, 0, near), (X + side * 9, h, near), (X, h, near))
        quad(paint(colour, (near + z1) / 2, shade), (X, 0, near), (X, h, near), (X, h, z1), (X, 0, z1))
        if style["gable"]:
            roof = paint(style["gable"], near, shade)
            quad(roof, (X - side * 0.4, h, near), (X + side * 4, h + 3, near), (X + side * 4, h + 3, z1), (X - side * 0.4, h, z1))
            quad(paint(colour, near, shade * 0.86), (X, h, near), (X + side * 4, h + 2.8, near), (X + side * 8, h, near))
        else:
            quad(paint(colour, near, shade * 0.7), (X, h, near), (X, h + 0.5, near), (X, h + 0.5, z1), (X, h, z1))
        if near > 70:
            return
        bays = max(2, int((z1 - z0) / 2.8))
        for bay in range(bays):
            a, b = (z0 + (z1 - z0) * (bay + cut) / bays for cut in (0.22, 0.78))
            if b < 1.5:
                continue
            for storey in range(storeys):
                y, shine = 3.2 * storey + (0.9 if storey else 0.2), plot.random()
                glass = (255, 214, 128) if shine < 0.65 * lamps else (70, 88, 108) if shine < 0.8 else (150, 178, 200)
                glass = paint(glass, b, 1.0, lit=shine < 0.65 * lamps)
                quad(glass, (X, y, max(a, 1.3)), (X, y + (1.7 if storey else 2.3), max(a, 1.3)), (X, y + (1.7 if storey else 2.3), b), (X, y, b))

    def tree(x, z, grow):
        leaf, h = ((70, 134, 58) if grow > 0.4 else (104, 148, 56)), 4.5 + 2 * grow
        block(x - 0.14, x + 0.14, 0, h, z, paint((104, 80, 60), z))
        if style["tree"] == "palm":
            for k in range(7):
                angle = math.pi * (k + grow) / 6.5
                tip, bend = at(x + 2.2 * math.cos(angle), h + 1.4 * math.sin(angle) - 0.7, z), at(x + 1.1 * math.cos(angle), h + 0.5 + math.sin(angle), z)
                canvas.line((at(x, h, z), bend, tip), paint((62, 140, 66), z), max(1, int(0.35 * focal / z)))
        elif style["tree"] == "poplar":
            (cx, cy), r = at(x, h - 0.5, z), focal / z
            canvas.ellipse((cx - 0.9 * r, cy - 3 * r, cx + 0.9 * r, cy + 2.6 * r), paint((58, 112, 62), z))
        else:
            for dx, dy, r, shade in ((-0.7, -0.3, 1.4, 0.75), (0.7, 0, 1.4, 0.85), (0, 0.8, 1.5, 1.0)):
                disc(x + dx, h + dy, z, r, paint(leaf, z, shade))

    def lamp(x, z):
        side = 1 if x > 0 else -1
        block(x - 0.06, x + 0.06, 0, 6, z, paint((70, 74, 80), z))
        block(x, x - side * 1.3, 5.9, 6.05, z, paint((70, 74, 80), z))
        if lamps > 0.25:
            disc(x - side * 1.3, 5.8, z, 0.45, paint((255, 226, 150), z, lit=True))

    def car(x, z, colour, oncoming):
        quad(paint((52, 54, 60), z), (x - 1, 0, z + 3), (x + 1, 0, z + 3), (x + 1, 0, z - 0.3), (x - 1, 0, z - 0.3))  # its shadow
        for tyre in (-0.9, 0.6):
            block(x + tyre, x + tyre + 0.3, 0, 0.5, z, paint((26, 26, 30), z))
        block(x - 0.9, x + 0.9, 0.3, 1.0, z, paint(colour, z))
        quad(paint(colour, z, 0.9), (x - 0.85, 1.0, z), (x - 0.62, 1.5, z), (x + 0.62, 1.5, z), (x + 0.85, 1.0, z))
        quad(paint((72, 92, 112), z), (x - 0.7, 1.02, z), (x - 0.54, 1.42, z), (x + 0.54, 1.42, z), (x + 0.7, 1.02, z))
        shining = (255, 246, 200) if oncoming else (236, 40, 36)
        for light_x in (-0.85, 0.55):
            block(x + light_x, x + light_x + 0.3, 0.65, 0.88, z, paint(shining, z, lit=lamps > 0.25))

    def stand(z, draw, *arguments):
        z -= start
        if 1.5 < z < 110 or draw is building and -arguments[1] < z < 110:
            things.append((z, len(things), draw, arguments))

    for side in (-1, 1):
        z = -8.0
        while z < end:
            length = rng.uniform(*style["length"])
            if rng.random() >= style["gaps"]:
                stand(z, building, side, length, rng.randint(*style["storeys"]), rng.choice(style["walls"]), rng.randrange(2 ** 30))
            z += length
        for z in range(int(rng.uniform(3, 10)), int(end), style["spacing"]):
            if style["tree"]:
                stand(z, tree, side * (road + 1.4), rng.random())
        for z in range(9, int(end), 24):
            stand(z, lamp, side * (road + 0.6))
        z = rng.uniform(4, 16)
        while z < end:
            colour = rng.choice([(196, 44, 40), (44, 84, 160), (236, 236, 232), (40, 42, 48), (170, 174, 180), (226, 178, 44), (56, 120, 84)])
            stand(z, car, side * (road - 1.1), colour, side < 0)
            z += rng.uniform(7, 40)
    for z, _, draw, arguments in sorted(things, reverse=True):
        if draw is building:
            side, length, storeys, colour, plot = arguments
            building(side, z, z + length, storeys, colour, random.Random(plot))
        else:
            draw(arguments[0], z, *arguments[1:])
    return image


# ---- writing the pack -----------------------------------------------------------------------------------------------

class FrameFile:
    """A .npy file, uint8 (N, H, W, 3), written frame by frame."""

    def __init__(self, path, H, W):
        self.file, self.shape, self.n = open(path, "wb"), (H, W, 3), 0
        self.header()

    def header(self):  # of 128 bytes whatever N: NumPy leaves room for it to grow
        np.lib.format.write_array_header_1_0(self.file, dict(descr="|u1", fortran_order=False, shape=(self.n, *self.shape)))

    def append(self, pixels):
        self.file.write(pixels)
        self.n += 1

    def close(self):
        self.file.seek(0)
        self.header()
        self.file.close()


class Progress:
    """One line that says how far it is: renewed in place on a terminal, else printed every ten seconds."""

    def __init__(self, total):
        self.total, self.began, self.terminal = total, time.monotonic(), sys.stdout.isatty()
        self.said = self.began

    def show(self, done, last=False):
        now = time.monotonic()
        if not last and now - self.said < (0.2 if self.terminal else 10):
            return
        self.said, rate = now, done / max(now - self.began, 1e-9)
        left = f"{now - self.began:.0f} s in all" if last else f"{(self.total - done) / max(rate, 1e-9):,.0f} s left"
        line = f"{done:,} of {self.total:,} images  {rate:,.0f} images/s  {left}"
        print(f"\r{line:<78}" if self.terminal else line, end="" if self.terminal and not last else "\n", flush=True)


def prepare(sources, out, image_size=64, cities=(), holdout=0.25, limit=None, duplicates=4, exclude=("panorama",), workers=1,
            seed=0, demo=None):
    """Write the pack `out` from `sources` ([Path, …]) or from `demo` drawn streets, and print what is in it.

    Either the whole pack is there in the end, or nothing. Raises InputError, or OSError where a disk is at fault.
    """
    if os.path.lexists(out):
        raise InputError(f"{out} is there already: name another OUT, or remove it")
    for source in sources:
        if not source.is_dir() and not zipfile.is_zipfile(source):
            raise InputError(f"{source} is neither a folder nor a .zip archive" if source.exists() else f"no such folder: {source}")
    (H, W), counts, skipped = frame_size(image_size), {split: Counter() for split in SPLITS}, Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    work_folder = out.with_name(f"{out.name}.tmp-{os.urandom(4).hex()}")
    work_folder.mkdir()
    try:
        text = dict(mode="w", newline="", encoding="utf-8", errors="surrogateescape")  # names may be bytes that are no text
        files = {split: FrameFile(work_folder / f"{split}.npy", H, W) for split in SPLITS}
        with open(work_folder / "index.csv", **text) as index, open(work_folder / "skipped.csv", **text) as skips:
            index, skips = csv.writer(index, lineterminator="\n"), csv.writer(skips, lineterminator="\n")
            index.writerow(("split", "row", "city", "sequence", "key", "source file"))
            skips.writerow(("source file", "reason"))

            def skip(path, reason):
                skips.writerow((path, reason))
                skipped[reason.partition(" (")[0]] += 1

            if demo:
                sequences = demo_sequences(demo, seed, image_size)
            else:
                tree = list_files(sources, skip)
                sequences = find_sequences(tree, sources[0].resolve().name, {c.lower() for c in cities}, exclude, skip)
                del tree
            plan = split_sequences(sequences, holdout, seed) if sequences else []
            del sequences
            total = sum(len(frames) for *_, frames in plan)
            print(f"{total:,} images in {len(plan):,} sequences: {min(total, limit or total) * H * W * 3 / 1e9:,.2f} GB at most, "
                  f"{shutil.disk_usage(work_folder).free / 1e9:,.2f} GB free", flush=True)
            items = ((split, city, sequence, frame) for split, city, sequence, frames in plan for frame in frames)
            progress, kept, street = Progress(total), None, None
            with closing(decode_all(items, (H, W), workers)) as results:
                for done, ((split, city, sequence, frame), outcome, pixels) in enumerate(results, 1):
                    if isinstance(outcome, str):
                        skip(frame.path, outcome)
                    elif duplicates and street == (city, sequence) and (outcome ^ kept).bit_count() <= duplicates:
                        skip(frame.path, "near-duplicate")
                    else:
                        street, kept = (city, sequence), outcome
                        index.writerow((split, files[split].n, city, sequence, stem(frame.path), frame.path))
                        files[split].append(pixels)
                        counts[split][city] += 1
                    progress.show(done)
                    if limit and sum(file.n for file in files.values()) == limit:
                        break
        for file in files.values():
            file.close()
        total = sum(counts["train"].values())
        if not total:
            why = ", ".join(f"{reason} ({n:,})" for reason, n in skipped.most_common(3))
            raise InputError(f"no usable image for training in {' '.join(map(str, sources))}" + (f": {why}" if why else ""))
        progress.show(done, last=True)
        draw_preview(work_folder, image_size, seed)
        arguments = dict(sources=[str(s.resolve()) for s in sources], cities=sorted(cities), holdout=holdout, limit=limit,
                         duplicates=duplicates, exclude=sorted(exclude), seed=seed, demo=demo)
        info = dict(format=FORMAT, image_size=image_size, H=H, W=W, counts={s: dict(sorted(counts[s].items())) for s in SPLITS},
                    files={name: (work_folder / name).stat().st_size for name in FILES}, skipped=dict(sorted(skipped.items())),
                    arguments=arguments)
        (work_folder / "pack.json").write_text(json.dumps(info, indent=1) + "\n")
        for name in (*FILES, "pack.json", "."):  # on the disk before the name says that it is
            descriptor = os.open(work_folder / name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.rename(work_folder, out)
    except BaseException:
        shutil.rmtree(work_folder, ignore_errors=True)
        raise
    print_tables(counts, skipped)
    print(f"the pack is {out}; train on it with: python train.py --data {out}")


def draw_preview(folder, image_size, seed):
    """preview.png: sixteen frames of train.npy, and beside each four windows of it as training cuts them.

    A window is a square of side s, uniform from S to H, anywhere in the frame, resized to S×S.
    """
    frames, rng, gap = np.lib.format.open_memmap(folder / "train.npy", mode="r"), random.Random(seed), image_size // 16
    _, H, W, _ = frames.shape
    cell = W + 4 * (image_size + gap) + 4 * gap
    sheet = Image.new("RGB", (2 * cell + gap, 8 * (H + gap) + gap), "white")
    for i in range(min(16, len(frames))):
        frame = Image.fromarray(frames[i * len(frames) // 16 if len(frames) > 16 else i])
        x, y = gap + i % 2 * cell, gap + i // 2 * (H + gap)
        sheet.paste(frame, (x, y))
        for k in range(4):
            side = rng.uniform(image_size, H)
            left, top = rng.uniform(0, W - side), rng.uniform(0, H - side)
            window = frame.resize((image_size, image_size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
            sheet.paste(window, (x + W + gap + k * (image_size + gap), y + (H - image_size) // 2))
    sheet.save(folder / "preview.png")


def print_tables(counts, skipped):
    """Images per city with their share, for each split, and what was left out."""
    width = max(8, *(len(city) for cities in counts.values() for city in cities))
    for split, cities in counts.items():
        total = sum(cities.values())
        print(f"\n{split:<{width}}   share     images")
        for city, n in sorted(cities.items()):
            print(f"{city:<{width}}  {n / total:6.1%}  {n:9,}")
        print(f"{'total':<{width}}  {bool(total):6.1%}  {total:9,}")
    print("\nleft out: " + (", ".join(f"{reason} {n:,}" for reason, n in skipped.most_common()) or "nothing"))


# ---- reading a pack -------------------------------------------------------------------------------------------------

class Pack(NamedTuple):
    folder: Path
    image_size: int      # S, of the training images
    H: int               # of the frames kept
    W: int
    train: np.ndarray    # memory-mapped uint8 (N, H, W, 3), read-only
    holdout: np.ndarray  # likewise; N may be 0
    info: dict           # pack.json


def open_pack(folder):
    """The Pack in a folder. Raises InputError, saying what is wrong, if it is none or not what its pack.json says."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    try:
        info = json.loads((folder / "pack.json").read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder} is no pack: there is no pack.json in it (prepare_data.py makes packs)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / 'pack.json'} is damaged ({describe(error)})") from None
    try:
        if info["format"] != FORMAT:
            raise InputError(f"{folder} has format {info['format']}, and this code reads {FORMAT}: prepare it again")
        image_size, H, W = info["image_size"], info["H"], info["W"]
        if type(image_size) is not int or (H, W) != frame_size(image_size):
            raise ValueError("sizes")
        shapes = {split: (sum(info["counts"][split].values()), H, W, 3) for split in SPLITS}
        sizes = {name: info["files"][name] for name in FILES}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{folder / 'pack.json'} is damaged, or not by prepare_data.py: prepare the pack again") from None
    arrays = {}
    for name, size in sizes.items():
        path, split = folder / name, name.partition(".")[0]
        try:
            if path.stat().st_size != size:
                raise InputError(f"{path} has {path.stat().st_size:,} bytes, and pack.json says {size:,}: prepare the pack again")
            if split in SPLITS:
                arrays[split] = np.lib.format.open_memmap(path, mode="r")  # never unpickles
                if arrays[split].shape != shapes[split] or arrays[split].dtype != np.uint8 or not arrays[split].flags.c_contiguous:
                    raise ValueError("another array than pack.json says")
        except FileNotFoundError:
            raise InputError(f"{path} is missing: prepare the pack again") from None
        except (OSError, ValueError, SyntaxError, TypeError) as error:
            raise InputError(f"{path} is damaged ({describe(error)}): prepare the pack again") from None
    return Pack(folder, image_size, H, W, arrays["train"], arrays["holdout"], info)


def find_pack(data, image_size, out="packs"):
    """The Path of a pack of `data`, which is prepared first, once, as <out>/<its name>-<image_size>, if it is none.

    `data`: a pack, what SOURCE may be on the command line, or None for drawn streets. Raises InputError.
    """
    if data is not None and Path(data, "pack.json").exists():
        return Path(data)
    if data is not None and not Path(data).exists():
        raise InputError(f"no such folder: {data}")
    sources = [] if data is None else [str(Path(data).resolve())]
    pack = Path(out, f"{Path(sources[0]).stem if sources else 'demo'}-{image_size}")
    if pack.exists():
        if open_pack(pack).info.get("arguments", {}).get("sources") != sources:
            raise InputError(f"{pack} is there already, of other images: remove it, or give the pack to train on with --data")
        return pack
    print(f"preparing {pack} from {data or 'drawn streets'}", flush=True)
    # In a process of its own: its workers shall not import what the caller's __main__ imports, nor fork its threads.
    command = [sys.executable, __file__, "--image-size", str(image_size), *([] if sources else ["--demo", str(DEMO)]), "--", *sources, str(pack)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            complaint = process.communicate()[1].decode(errors="replace")
        except BaseException:
            process.terminate()  # and wait until it has removed what it wrote
            raise
    if process.returncode == 2:
        raise InputError(complaint.strip().removeprefix("error: "))
    if process.returncode:
        raise InputError(f"preparing {pack} ended with status {process.returncode}: {complaint.strip()}")
    return pack


# ---- the command line -----------------------------------------------------------------------------------------------

def number(kind, least, most):
    """An argparse type: an int or float from `least` to `most`; nan is neither."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' * (kind is int)}number from {least} to {most}")
        return value
    return parse


def words(*choices):
    """An argparse type: 'night,sideways' → ['night', 'sideways'], all of them from `choices` if there are any."""
    def parse(text):
        names = [name for name in text.split(",") if name]
        if wrong := [name for name in names if choices and name not in choices]:
            raise argparse.ArgumentTypeError(f"no {wrong[0]}; there are {', '.join(choices)}")
        return names
    return parse


def parse_args(argv=None):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="SOURCE… OUT", help="folders of images or archives, .zip files; last, the pack to make")
    add("--image-size", type=int, choices=(32, 64, 128, 256), default=64, help="of the images to train on (default: 64)")
    add("--cities", type=words(), action="extend", default=[], metavar="A,B", help="these alone, by the names of their folders")
    add("--holdout", type=number(float, 0, 0.9), default=0.25, help="share of the sequences kept from training (default: 0.25)")
    add("--limit", type=number(int, 1, 10 ** 9), help="images in the pack at most: a fair sample of the cities")
    add("--duplicates", type=number(int, 0, 64), default=4, metavar="BITS",
        help="leave out a frame whose 64-bit hash differs by no more from the one kept before it in its sequence: "
             "4 is standing still, 0 leaves out none (default: 4)")
    add("--exclude", type=words("night", "control_panel", "sideways"), action="extend", default=[], metavar="A,B",
        help="leave out frames that MSLS marks so: night, control_panel, sideways")
    add("--panoramas", action="store_true", help="take panoramas too")
    add("--workers", type=number(int, 1, 1024), default=cores, help="processes that decode (default: one a core)")
    add("--seed", type=number(int, 0, 2 ** 32), default=0, help="of the order of the sequences and of drawn streets (default: 0)")
    add("--demo", type=number(int, 1, 10 ** 7), metavar="N", help="draw N streets; there is no SOURCE then")
    args = parser.parse_args(argv)
    *args.sources, args.out = args.paths
    if args.demo and args.sources:
        raise InputError("--demo draws its own images: leave out SOURCE")
    if not args.demo and not args.sources:
        raise InputError("SOURCE and OUT are needed, as in: python prepare_data.py photos packs/photos (or --demo 2880 packs/demo)")
    return args


def stop(number, frame):
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)  # once is enough: now it cleans up
    raise KeyboardInterrupt(number)


STOPS = (signal.SIGINT, signal.SIGTERM)


def main(argv=None):
    """Exit status: 0, 2 for a user's mistake or a full disk, or the usual one for the signal that stopped it."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may be bytes that are no text
    for each in STOPS:
        signal.signal(each, stop)
    try:
        args = parse_args(argv)
        prepare(args.sources, args.out, args.image_size, args.cities, args.holdout, args.limit, args.duplicates,
                [*args.exclude, *([] if args.panoramas else ["panorama"])], args.workers, args.seed, args.demo)
    except InputError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:
        sys.exit(print(f"error: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr) or 2)
    except KeyboardInterrupt as stopped:
        signal.signal(stopped.args[0], signal.SIG_DFL)
        os.kill(os.getpid(), stopped.args[0])


if __name__ == "__main__":
    main()
