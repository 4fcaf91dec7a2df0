"""Turn street images into a pack: the arrays of small frames that train.py reads.

    python prepare_data.py /data/msls packs/msls                 # an extracted MSLS tree, or a folder with its archives
    python prepare_data.py /data/msls packs/eu --cities paris,london,zurich --exclude night,sideways
    python prepare_data.py holiday-photos packs/photos --image-size 128 --limit 10000    # any images will do
    python prepare_data.py --demo 2880 packs/demo-64             # draws its own streets

    from prepare_data import open_pack
    pack = open_pack("packs/msls")                               # pack.train, pack.holdout: uint8 (N, H, W, 3)

A pack is a folder with train.npy and holdout.npy (plain NumPy, uint8 (N, H, W, 3)), index.csv (split, row, city,
sequence, key, source file), skipped.csv (source file, reason), preview.png (frames beside windows of them, as training
sees them) and pack.json. Sequences stand in random order, the frames of each in theirs: any slice of a pack samples all
its cities. Archives are read in place. Parts of MSLS in several SOURCEs are laid over each other, and the later file of
the same path wins. MSLS: Warburg et al. 2020, Mapillary Street-Level Sequences, github.com/mapillary/mapillary_sls
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
import time
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import ExitStack, closing
from hashlib import blake2b
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

FORMAT = 1  # of the pack; raised when its files change their meaning
SPLITS = ("train", "holdout")
FILES = ("train.npy", "holdout.npy", "index.csv", "skipped.csv", "preview.png")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no others: a .jpg may be an EPS inside, which is a program
MAX_BYTES = 64 * 2 ** 20   # of one file: what a worker takes into memory
TOO_LONG = f"more than {MAX_BYTES >> 20} MB"
MAX_PIXELS = 64 * 2 ** 20  # of one image, 8192×8192: 256 MB as RGBA
MIN_SIDE = 16              # pixels: a smaller image is an icon, no street
STOPS = (signal.SIGINT, signal.SIGTERM)
BATCH = 32                 # frames a task: some 25 ms of decoding, far more than handing it over takes

MSLS = re.compile(r"(?:^|/)((?:train_val|test)/[^/]+/(?:query|database)/.+)", re.DOTALL)
# What --exclude and --panoramas go by: a CSV of MSLS, its column, and what the column says of such a frame.
FLAGS = {"panorama": ("raw", "pano", "true"), "night": ("postprocessed", "night", "true"),
         "control_panel": ("postprocessed", "control_panel", "true"),
         "sideways": ("postprocessed", "view_direction", "sideways")}


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
    """{path in the tree: (function, *arguments)} of all images and CSVs; function(*arguments) gives the bytes.

    `sources` are folders and .zip files; skip(path, reason) hears of what can't be read. Archives in a folder are read
    in the order of their names, patches last, and before the files beside them. Paths begin as MSLS's do, and those of
    other images with the name of their source: two folders of photos both have an IMG_0001.jpg.
    """
    files = {}
    for source in map(Path, map(os.path.abspath, sources)):
        if source.is_dir():
            archives = [p for p in source.iterdir() if p.name.lower().endswith(".zip") and p.is_file()]
            archives.sort(key=lambda p: ("patch" in p.name.lower(), p.name))
            name, found = source.name, chain(*map(list_archive, archives), list_folder(source, skip))
        else:
            name, found = source.stem, list_archive(source)
        for path, read in found:
            msls = MSLS.search(f"{source}/{path}")
            path = msls[1] if msls else f"{name}/{path}"
            if isinstance(read, str):
                skip(path, read)
            elif path.lower().endswith(".zip"):
                skip(path, "archive inside a folder or an archive: not opened")
            elif path.lower().endswith((*IMAGES, ".csv")):
                if path in files:
                    skip(path, "replaced by a later file of the same path")
                files[path] = read
    return files


def list_folder(folder, skip):
    """Yield (path, (read_file, …)) of each file in a folder and below, but for archives at its top; follows links."""
    top, seen = len(os.path.join(folder, "")), set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=lambda e: skip(e.filename, describe(e))):
        about = os.stat(here)
        if (about.st_dev, about.st_ino) in seen or "pack.json" in names:  # a link back; a pack of ours is no source
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders.sort()
        for name in sorted(names):
            full = os.path.join(here, name)
            if here != str(folder) or not name.lower().endswith(".zip"):
                yield full[top:].replace(os.sep, "/"), (read_file, full)


def list_archive(archive):
    """Yield (path, (read_member, …)) of each file in a .zip, or (path, reason) where something is wrong with it."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            entries = [entry for entry in zipped.infolist() if not entry.is_dir()]
    except Exception as error:  # a damaged directory makes zipfile raise many things
        yield archive.name, f"archive can't be opened ({describe(error)})"
        return
    for entry in entries:
        path, packed, method = entry.filename, entry.compress_size, entry.compress_type
        if path.startswith("/") or ".." in path.split("/"):
            yield path, "path leads out of the archive"
        elif entry.flag_bits & 1:
            yield path, "encrypted"
        elif method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            yield path, f"unknown compression ({method})"
        elif max(entry.file_size, packed) > MAX_BYTES and not path.lower().endswith(".zip"):
            yield path, TOO_LONG
        else:
            yield path, (read_member, str(archive), entry.header_offset, packed, method, entry.CRC)


def read_file(path):
    """The bytes of a file. Raises OSError, or ValueError with the reason why it is left out."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # reading a pipe would wait for ever
        raise ValueError("not a regular file")
    if about.st_size > MAX_BYTES:
        raise ValueError(TOO_LONG)
    with open(path, "rb", buffering=0) as file:
        return file.read(about.st_size)


def read_member(archive, offset, packed, method, crc):
    """The bytes of an archive's entry, from what its directory says of it. Raises ValueError with the reason.

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
    read: tuple     # (function, *arguments): function(*arguments) gives the file's bytes, or a drawn PIL image


def stem(path):
    """The key of an image: the name of its file without the ending."""
    return os.path.splitext(path.rpartition("/")[2])[0]


def read_csv(files, path, skip):
    """{key: row} of one of MSLS's CSVs, a row a dictionary; empty if it is missing or damaged."""
    if path not in files:
        return {}
    try:
        function, *arguments = files[path]
        text = function(*arguments).decode("utf-8-sig", "surrogateescape")
        return {row["key"]: row for row in csv.DictReader(io.StringIO(text))}
    except (OSError, ValueError, KeyError, csv.Error, zlib.error) as error:
        skip(path, f"CSV can't be read ({describe(error)})")
        return {}


def find_sequences(files, cities, exclude, skip):
    """{(city, sequence): [Frame, …]} of all that the filters let through, from list_files's files.

    The city is the folder below train_val or test, or below the source, and the source for images that lie in none.
    An image without a sequence in seq_info.csv is one by itself.
    """
    folders, sequences, missing, found = defaultdict(list), defaultdict(list), Counter(), set()
    for path in files:
        if not path.endswith(".csv"):
            folders[path.rpartition("/")[0]].append(path)
    for folder, paths in sorted(folders.items()):
        city = folder.split("/")[:2][-1]
        found.add(city)
        if cities and city.lower() not in cities:
            continue
        tables = {name: read_csv(files, f"{folder.rpartition('/')[0]}/{name}.csv", skip)
                  for name in ("raw", "seq_info", "postprocessed")}
        for path in sorted(paths):
            key, row = stem(path), {}
            for name, table in tables.items():
                row.update(table.get(key, {}))
                missing[name] += key not in table
            for flag in exclude:
                _, column, value = FLAGS[flag]
                if (row.get(column) or "").lower() == value:
                    skip(path, flag)
                    break
            else:
                number = row.get("frame_number") or ""
                number = int(number[:18]) if number.isdecimal() else 0
                sequence = row.get("sequence_key") or row.get("sequence_id") or path
                sequences[city, sequence].append(Frame(number, path, files[path]))
    if unknown := cities - {city.lower() for city in found}:
        there = ", ".join(sorted(found)) or "no images"
        raise InputError(f"--cities: no {', '.join(sorted(unknown))}; there are {there}")
    if missing["seq_info"]:
        print(f"no seq_info.csv for {missing['seq_info']:,} images: each is a sequence of its own")
    for name in ("raw", "postprocessed"):
        if missing[name] and (flags := [flag for flag in exclude if FLAGS[flag][0] == name]):
            print(f"no {name}.csv for {missing[name]:,} images: not filtered ({', '.join(flags)})")
    return sequences


def chance(*words):
    """A number in [0, 1) that the words decide, the same on every machine."""
    digest = blake2b("/".join(map(str, words)).encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2 ** 48


def split_sequences(sequences, holdout, seed):
    """[(split, city, sequence, frames), …] in the pack's order. A sequence is held out of every pack or none."""
    held = {key for key in sequences if chance("holdout", *key) < holdout}
    if held and len(held) == len(sequences):
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
    return "".join(letter if letter.isprintable() else " " for letter in text)


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
    """A 64-bit int that hardly changes with noise or light: is each of 8×8 cells brighter than the one on its left?"""
    cells = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def work(frames, H, W):
    """[Frame, …] → uint8 (n, H, W, 3), [hash or reason, …]: a hash for each of the n good ones, else why it is none."""
    pixels, outcomes = [], []
    for frame in frames:
        try:
            function, *arguments = frame.read
            picture = decode(function(*arguments), H, W)
            outcomes.append(difference_hash(picture))
            pixels.append(np.asarray(picture))
        except Exception as error:  # decoders of foreign bytes raise anything; it is this one file's trouble
            outcomes.append(describe(error))
    return np.array(pixels, np.uint8).reshape(-1, H, W, 3), outcomes


def serve(connection, H, W):
    """A worker process: lists of frames come in, what work makes of them goes out, until the parent is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes there what it thinks of a file
    warnings.simplefilter("ignore")  # of odd EXIF and palettes
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # read off the header, before anything is decoded
    try:
        while True:
            connection.send(work(connection.recv(), H, W))
    except (EOFError, ConnectionError):
        pass


def decode_all(items, size, workers):
    """Yield (item, hash or reason, pixels or None) for each of an iterator of (…, Frame), in order.

    A bounded number of batches is under way, so that memory stays flat however many there are. Pipes, because the
    standard library's pools wait for ever once a worker is killed while it sends.
    """
    context, processes, free, busy, results, turn = multiprocessing.get_context("spawn"), [], [], {}, {}, 0
    batches = enumerate(iter(lambda: list(islice(items, BATCH)), []))
    resource_tracker.ensure_running()  # now, as its start unblocks signals
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # in the workers too: Ctrl-C goes to all, the parent ends them
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, *size), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            free.append(ours)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        while True:
            while free and len(results) <= workers and (batch := next(batches, None)):
                free[-1].send([frame for *_, frame in batch[1]])
                busy[free.pop()] = batch
            if not busy and not results:
                return
            for connection in wait(busy, 0 if turn in results else None):
                number, batch = busy.pop(connection)
                results[number] = batch, *connection.recv()
                free.append(connection)
            if turn in results:
                batch, pixels, outcomes = results.pop(turn)
                rows, turn = iter(pixels), turn + 1
                for item, outcome in zip(batch, outcomes):
                    yield item, outcome, None if isinstance(outcome, str) else next(rows)
    except (EOFError, ConnectionError):
        raise InputError("a worker process was killed, perhaps for want of memory: try fewer --workers") from None
    finally:
        for process in processes:
            process.kill()  # it has nothing left to do, or nothing that is wanted
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


# ---- drawn streets --------------------------------------------------------------------------------------------------

DEMO = 2880         # streets that find_pack draws when there is no data
DEMO_SEQUENCE = 12  # frames of one street, 7 m apart

# Shapes are few, large and smooth: a small GAN learns them in minutes.
CITIES = {  # RGB in hexadecimal; metres: a wall's height (least, most), a roof's, a tree's height, radius and stretch
    "Brickton": dict(walls="b8543e c46a4a a84a38", tall=(7, 10), roof=3, ground="b4aaa2", tree=None),
    "Gardenia": dict(walls="f6ecd4 e8ecec f4dcbc", tall=(4, 5), roof=3, ground="7cb850", tree=(3.8, 2.2, 1)),
    "Palmera": dict(walls="fff4e4 ffd0c4 f8e4b8", tall=(7, 10), roof=0, ground="e8d8ac", tree=(6.5, 2.5, 0.5)),
    "Portside": dict(walls="f6c040 e06850 5c98c4", tall=(8, 11), roof=4, ground="b0a8a0", tree=None),
    "Sandville": dict(walls="e8bc84 c48c5c f6deb0", tall=(4, 7), roof=0, ground="ecd098", tree=(5.5, 2.5, 0.5)),
    "Towerby": dict(walls="7890b4 8ca0b8 6880a4", tall=(18, 30), roof=0, ground="a0a4ac", tree=None),
}
HOURS = np.array([[*bytes.fromhex(hour)] for hour in (  # day, dusk, night: RGB of the sky's top, its edge, the light
    "4c94ec d8f0fc f4f0ec", "7c58a8 ffb468 b87c78", "182460 5c68ac 4c5284")]).reshape(3, 3, 3)


def demo_sequences(n, seed, image_size):
    """What split_sequences needs, for n streets to be drawn, the cities in turn."""
    sequences = defaultdict(list)
    for i in range(n):
        number, frame = divmod(i, DEMO_SEQUENCE)
        city, key = list(CITIES)[number % len(CITIES)], f"{number:05d}"
        path = f"demo/{city}/{key}/{frame:02d}"
        sequences[city, key].append(Frame(frame, path, (draw_street, path, seed, city, number, frame, image_size)))
    return sequences


def draw_street(path, seed, city, sequence, frame, image_size):
    """A PIL image of four times the pack's frame size: the view down a street from `frame` × 7 m along it."""
    rng, look = random.Random(f"{seed}/{city}/{sequence}"), CITIES[city]
    height, width = (4 * side for side in frame_size(image_size))
    middle, horizon, focal = width / 2, height * 0.54, width * 0.62
    hour, sun, street = 2 * rng.random() ** 1.5, rng.uniform(-6, 6), rng.uniform(*look["tall"])
    top, edge, light = (HOURS[int(hour)] * (1 - hour % 1) + HOURS[int(hour) + 1] * (hour % 1)).astype(int).tolist()

    def paint(colour, z, shade=1.0):
        haze, rgb = 1 - math.exp(-z / 150), bytes.fromhex(colour)
        return tuple(int(c * l * shade / 255 * (1 - haze) + e * haze) for c, l, e in zip(rgb, light, edge))

    def shape(colour, *corners):  # metres: x right of the middle, y up from the road, z ahead
        canvas.polygon([(middle + focal * x / z, horizon + focal * (1.8 - y) / z) for x, y, z in corners], colour)

    def upright(colour, x0, z0, x1, z1, low, high):
        shape(colour, (x0, low, z0), (x0, high, z0), (x1, high, z1), (x1, low, z1))

    def disc(colour, x, y, z, r, stretch=1.0):
        x, y, r = middle + focal * x / z, horizon + focal * (1.8 - y) / z, focal * r / z
        canvas.ellipse((x - r, y - stretch * r, x + r, y + stretch * r), colour)

    column = Image.linear_gradient("L").resize((1, height))
    image = ImageOps.colorize(column, top, edge, whitepoint=138).resize((width, height), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(image)
    disc("#ffeca8" if hour < 1.2 else "#ccd0e4", sun, 3 + 24 * abs(1 - hour), 60, 5)
    canvas.rectangle((0, horizon, width, height), paint(look["ground"], 8))
    for half, colour in ((4.5, "5c5e66"), (0.15, "a09e98")):  # the road, its middle line
        shape(paint(colour, 8), (-half, 0, 1), (half, 0, 1), (0, 0, 400))
    for far in range(168 - 7 * frame, 9, -12):  # a house of 12 m and a tree on either side
        for side in (-1, 1):
            wall, tall, shine = rng.choice(look["walls"].split()), street * rng.uniform(0.9, 1.1), rng.random()
            x, z, shade = 8 * side, max(1, far - 12), 1 if side * sun < 0 else 0.75
            upright(paint(wall, z, 0.85 * shade), x, z, 2 * x, z, 0, tall)
            upright(paint(wall, z, shade), x, z, x, far, 0, tall)
            shape(paint("8c4a40", z, shade), (x, tall, z), (x, tall + look["roof"], far - 6), (x, tall, far))
            glass = (255, 212, 120) if hour > 0.8 + shine else paint(wall, z, 0.75 * shade)
            for y in range(1, int(tall) - 2, 4) if z < 30 else ():
                upright(glass, x, far - 9, x, far - 3, y, y + 2.4)
            if look["tree"] and z < 50:
                high, r, stretch = look["tree"]
                upright(paint("6c5040", z), x - 2.2 * side, z, x - 1.8 * side, z, 0, high)
                disc(paint("54963e", z, shade), x - 2 * side, high, z, r, stretch)
    return image


# ---- writing the pack -----------------------------------------------------------------------------------------------

def write_header(file, n, H, W):
    """Of 128 bytes whatever n is, so that it can be written again once n is known."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(n, H, W, 3)))


def progress(items, total):
    """Yield from items, and say how far it is: in one line, renewed, on a terminal, else every ten seconds."""
    terminal, began = sys.stdout.isatty(), time.monotonic()
    said = began
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done == total or now - said > (0.2 if terminal else 10):
            said, rate = now, done / (now - began)
            line = f"{done:,} of {total:,} images  {rate:,.0f} images/s  {(total - done) / rate:,.0f} s left"
            print(f"\r{line:<78}" if terminal else line, end="" if terminal and done < total else "\n", flush=True)


def refuse_existing(out):
    if os.path.lexists(out):
        raise InputError(f"{out} is there already: name another OUT, or remove it")


def write_frames(args, folder):
    """Write a pack's frames and tables; returns {split: {city: images}} and {reason: images left out}."""
    (H, W), skipped, rows = frame_size(args.image_size), Counter(), Counter()
    counts = {split: Counter() for split in SPLITS}
    with ExitStack() as stack:
        def create(name, *how, **text):
            return stack.enter_context(open(folder / name, *how, **text))

        index, skips = (csv.writer(create(name, "w", newline="", encoding="utf-8", errors="surrogateescape"))
                        for name in ("index.csv", "skipped.csv"))  # names of files may be bytes that are no text
        files = {split: create(f"{split}.npy", "wb") for split in SPLITS}
        index.writerow(("split", "row", "city", "sequence", "key", "source file"))
        skips.writerow(("source file", "reason"))

        def skip(path, reason):
            skips.writerow((path, reason))
            skipped[reason.partition(" (")[0]] += 1

        if args.demo:
            sequences = demo_sequences(args.demo, args.seed, args.image_size)
        else:
            cities = {city.lower() for city in args.cities}
            sequences = find_sequences(list_files(args.sources, skip), cities, args.exclude, skip)
        plan = split_sequences(sequences, args.holdout, args.seed)
        del sequences
        total = sum(len(frames) for *_, frames in plan)
        most, free = min(total, args.limit or total) * H * W * 3, shutil.disk_usage(folder).free
        print(f"{total:,} images in {len(plan):,} sequences: {most / 1e9:,.2f} GB at most, {free / 1e9:,.2f} GB free",
              flush=True)

        for file in files.values():
            write_header(file, 0, H, W)
        items = ((split, city, sequence, frame) for split, city, sequence, frames in plan for frame in frames)
        kept = street = None
        with closing(decode_all(items, (H, W), args.workers)) as results:
            for (split, city, sequence, frame), outcome, pixels in progress(results, total):
                if isinstance(outcome, str):
                    skip(frame.path, outcome)
                elif args.duplicates and street == (city, sequence) and (outcome ^ kept).bit_count() <= args.duplicates:
                    skip(frame.path, "near-duplicate")
                else:
                    street, kept = (city, sequence), outcome
                    index.writerow((split, rows[split], city, sequence, stem(frame.path), frame.path))
                    files[split].write(pixels)
                    rows[split] += 1
                    counts[split][city] += 1
                    if rows.total() == args.limit:
                        break
        for split, file in files.items():
            write_header(file, rows[split], H, W)
    return {split: dict(sorted(counts[split].items())) for split in SPLITS}, dict(skipped.most_common())


def prepare(args):
    """Write the pack args.out, from args.sources or as args.demo drawn streets, and print what is in it.

    Either the whole pack is there in the end, or nothing. Raises InputError, or OSError where a disk is at fault.
    """
    refuse_existing(args.out)
    for source in args.sources:
        if not source.is_dir() and not zipfile.is_zipfile(source):
            what = "neither a folder nor a .zip archive" if source.exists() else "no such folder"
            raise InputError(f"{what}: {source}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = args.out.with_name(f"{args.out.name}.tmp-{os.urandom(4).hex()}")
    folder.mkdir()
    try:
        counts, skipped = write_frames(args, folder)
        if not counts["train"]:
            why = ", ".join(f"{reason} ({n:,})" for reason, n in list(skipped.items())[:3])
            raise InputError(f"no image to train on in {' '.join(map(str, args.sources))}: {why or 'too few, or none'}")
        draw_preview(folder, args.image_size, args.seed)
        H, W = frame_size(args.image_size)
        arguments = {name: value for name, value in vars(args).items() if name not in ("paths", "out", "workers")}
        arguments["sources"] = [str(source.resolve()) for source in args.sources]
        sizes = {name: (folder / name).stat().st_size for name in FILES}
        info = dict(format=FORMAT, image_size=args.image_size, H=H, W=W, counts=counts, files=sizes, skipped=skipped,
                    arguments=arguments)
        (folder / "pack.json").write_text(json.dumps(info, indent=1) + "\n")
        for name in (*FILES, "pack.json", "."):  # on the disk before the name says that it is
            descriptor = os.open(folder / name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        refuse_existing(args.out)  # another process may have made it meanwhile
        os.rename(folder, args.out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    print_tables(counts, skipped)
    print(f"the pack is {args.out}; train on it with: python train.py --data {args.out}")


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
            box = (left, top, left + side, top + side)
            window = frame.resize((image_size, image_size), Image.Resampling.BILINEAR, box)
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
    print("\nleft out: " + (", ".join(f"{reason} {n:,}" for reason, n in skipped.items()) or "nothing"))


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
    folder, arrays = Path(folder), {}
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    if not (folder / "pack.json").exists():
        raise InputError(f"{folder} is no pack: there is no pack.json in it (prepare_data.py makes packs)")
    try:
        info = json.loads((folder / "pack.json").read_bytes())
        image_size, H, W = info["image_size"], info["H"], info["W"]
        if info["format"] != FORMAT:
            raise ValueError(f"its format is {info['format']}, and this code reads {FORMAT}")
        if type(image_size) is not int or (H, W) != frame_size(image_size):
            raise ValueError(f"frames of {H}×{W} do not go with images of {image_size}")
        for name in FILES:
            size, said = (folder / name).stat().st_size, info["files"][name]
            if size != said:
                raise ValueError(f"{name} has {size:,} bytes, and pack.json says {said}")
        for split in SPLITS:
            array = arrays[split] = np.lib.format.open_memmap(folder / f"{split}.npy", mode="r")  # never unpickles
            shape = (sum(info["counts"][split].values()), H, W, 3)
            if array.shape != shape or array.dtype != np.uint8 or not array.flags.c_contiguous:
                raise ValueError(f"{split}.npy is another array than pack.json says")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is missing: prepare the pack again") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
        why = f"no {error} in pack.json" if isinstance(error, KeyError) else describe(error)
        raise InputError(f"{folder} is damaged, or not by prepare_data.py ({why}): prepare the pack again") from None
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
            raise InputError(f"{pack} is there already, of other images: remove it, or name the pack to train on")
        return pack
    print(f"preparing {pack} from {data or 'drawn streets'}", flush=True)
    # In a process of its own: its workers shall not import what the caller's __main__ imports, nor fork its threads.
    words = [*(sources or ["--demo", str(DEMO)]), str(pack), "--image-size", str(image_size)]
    with subprocess.Popen([sys.executable, __file__, *words], stderr=subprocess.PIPE) as process:
        try:
            complaint = process.communicate()[1].decode(errors="replace").strip()
        except BaseException:
            process.terminate()  # and wait until it has removed what it wrote
            raise
    if process.returncode == 2:
        raise InputError(complaint.removeprefix("error: "))
    if process.returncode:
        raise InputError(f"preparing {pack} ended with status {process.returncode}: {complaint}")
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


def parse_args(argv=None):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = dict(type=lambda text: re.findall("[^,]+", text), action="extend", default=[], metavar="A,B")
    add("paths", nargs="+", type=Path, metavar="SOURCE… OUT", help="folders or .zip files; last, the pack to make")
    add("--image-size", type=int, choices=(32, 64, 128, 256), default=64, help="to train on (default: 64)")
    add("--cities", **names, help="these alone, named as their folders")
    add("--holdout", type=number(float, 0, 0.9), default=0.25, help="share of sequences not trained on (default: 0.25)")
    add("--limit", type=number(int, 1, 10 ** 9), help="images in the pack at most: a fair sample of the cities")
    add("--duplicates", type=number(int, 0, 64), default=4, metavar="BITS",
        help="leave out a frame whose 64-bit hash differs by no more from the one kept before it in its sequence: "
             "4 is standing still, 0 leaves out none (default: 4)")
    add("--exclude", **names, help="leave out frames that MSLS marks so: night, control_panel, sideways")
    add("--panoramas", action="store_true", help="take panoramas too")
    add("--workers", type=number(int, 1, 1024), default=cores, help="processes that decode (default: one a core)")
    add("--seed", type=number(int, 0, 2 ** 32), default=0, help="of sequences' order and drawn streets (default: 0)")
    add("--demo", type=number(int, 1, 10 ** 7), metavar="N", help="draw N streets; there is no SOURCE then")
    args = parser.parse_intermixed_args(argv)
    *args.sources, args.out = args.paths
    if unknown := set(args.exclude) - set(FLAGS):
        raise InputError(f"argument --exclude: no {', '.join(sorted(unknown))}; there are {', '.join(FLAGS)}")
    if not args.panoramas:
        args.exclude = [*args.exclude, "panorama"]
    if args.demo and args.sources:
        raise InputError("--demo draws its own images: leave out SOURCE")
    if not args.demo and not args.sources:
        raise InputError("SOURCE and OUT are needed, as in: prepare_data.py photos packs/x, or --demo 96 packs/demo")
    return args


def stop(number, frame):
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)  # once is enough: now it cleans up
    raise KeyboardInterrupt(number)


def main(argv=None):
    """Exit status: 0, 2 for a user's mistake or a full disk, or the usual one for the signal that stopped it."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may be bytes that are no text
    for each in STOPS:
        signal.signal(each, stop)
    try:
        args = parse_args(argv)
        prepare(args)
    except InputError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:
        sys.exit(print(f"error: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr) or 2)
    except KeyboardInterrupt as stopped:
        signal.signal(stopped.args[0], signal.SIG_DFL)
        os.kill(os.getpid(), stopped.args[0])


if __name__ == "__main__":
    main()
