"""Turn street images into a pack: the arrays of small frames that train.py reads.

    python prepare_data.py /data/msls packs/msls                 # MSLS, extracted or as a folder with its archives
    python prepare_data.py /data/msls packs/eu --cities paris,london,zurich --exclude night,sideways
    python prepare_data.py holiday-photos packs/photos --image-size 128 --limit 10000    # any images will do
    python prepare_data.py --demo 2880 packs/demo-64             # draws its own streets

    from prepare_data import open_pack
    pack = open_pack("packs/msls")                               # pack.train, pack.holdout: uint8 (N, H, W, 3)

A pack is a folder with train.npy and holdout.npy, index.csv (split, row, city, sequence, key, source file),
skipped.csv (source file, reason), preview.png (frames beside windows of them, as training sees them) and pack.json.
Sequences stand in random order, the frames of each in theirs: any slice of a pack samples all its cities. For another
kind of source write a function like demo_sequences, call it in prepare, and let prepare's check pass it.
MSLS: Warburg et al. 2020, Mapillary Street-Level Sequences, github.com/mapillary/mapillary_sls
"""
import argparse
import csv
import io
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from model import InputError, Parser, cut_windows, number, run

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

FORMAT = 1  # of the pack; raised when its files change their meaning
SPLITS = ("train", "holdout")
FILES = ("train.npy", "holdout.npy", "index.csv", "skipped.csv", "preview.png")
TEXT = dict(newline="", encoding="utf-8", errors="surrogateescape")  # of tables: names of files may be no text
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # a .jpg may be an EPS inside, which is a program
MOST = 64 * 2 ** 20  # bytes of a file and pixels of an image: what a thread takes into memory

# Images and tables of MSLS: from train_val or test on, or from the city on where it lies alone.
MSLS = re.compile(r"(?:^|/)((?:(?:train_val|test)/)?[^/]+/(?:query|database)/(?:images/[^/]+|[a-z_]+\.csv))$")
# What --exclude goes by: a column of its tables, and what stands there for such a frame.
FLAGS = {"panorama": ("pano", "true"), "night": ("night", "true"), "control_panel": ("control_panel", "true"),
         "sideways": ("view_direction", "sideways")}
COLUMNS = {"sequence_key", "sequence_id", "frame_number", *(column for column, _ in FLAGS.values())}


def frame_size(image_size):
    """(H, W) in pixels of the frames kept for training images of S×S: 5/4·S and 4/3·H, to the nearest even number."""
    H = image_size * 5 // 4
    return H, round(H * 2 / 3) * 2


# ---- what is there: paths in the tree, each with what reads it ----------------------------------------------------

def list_files(sources, skip):
    """{path in the tree: (function, *arguments)} of all images and tables; function(*arguments) gives the bytes.

    `sources` are folders and .zip files; skip((path, reason)) hears of what can't be read. Paths begin as MSLS's do,
    so that its parts are laid over each other, and those of other images with the name of their source. Of files with
    the same path the last wins, and a patch, which has "patch" in the name of its folder or archive, over others.
    """
    found, files = [], {}
    for source in map(os.path.abspath, sources):
        top = len(os.path.join(os.path.dirname(source), ""))
        for full, read in list_folder(source, skip) if os.path.isdir(source) else list_archive(source, skip):
            full = full.replace(os.sep, "/")
            if full.lower().endswith((*IMAGES, ".csv")):
                msls = MSLS.search(full)
                patch = bool(msls) and "patch" in full[:msls.start(1)].lower()
                found.append((patch, msls[1] if msls else full[top:], read))
    for _, path, read in sorted(found, key=lambda file: file[0]):
        if path in files:
            skip((path, "replaced by another file of the same path"))
        files[path] = read
    return files


def list_folder(folder, skip):
    """Yield (path, (read_file, …)) of each file in a folder and below, and what list_archive does of its archives."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=lambda e: skip((e.filename, describe(e)))):
        folders.sort()
        if (place := os.path.realpath(here)) in seen or "pack.json" in names:  # a link back; a pack is no source
            folders.clear()
            continue
        seen.add(place)
        if len(names) >= 1000:
            print(f"{here}: {len(names):,} files", flush=True)
        for name in sorted(names):
            full = os.path.join(here, name)
            if name.lower().endswith(".zip"):
                yield from list_archive(full, skip)
            else:
                yield full, (read_file, full)


def list_archive(archive, skip):
    """Yield (path, (read_member, …)) of each file in a .zip, as if it lay in a folder of the archive's name."""
    print(archive, end=": ", flush=True)
    try:
        with zipfile.ZipFile(archive) as zipped:
            entries = zipped.infolist()
    except Exception as error:  # a damaged directory makes zipfile raise many things
        print(f"can't be read, all that is in it is left out ({describe(error)})", flush=True)
        skip((os.path.basename(archive), f"archive can't be read ({describe(error)})"))
        return
    print(f"{len(entries):,} files", flush=True)
    for entry in entries:
        read = (read_member, archive, entry.header_offset, entry.compress_size, entry.compress_type, entry.CRC)
        yield f"{os.path.splitext(archive)[0]}/{entry.filename}", read


def read_file(path):
    """The bytes of a file. Raises OSError, or ValueError for a pipe, which would keep it waiting, and for a giant."""
    if not os.path.isfile(path) or os.path.getsize(path) > MOST:
        raise ValueError(f"not a file of {MOST >> 20} MB at most")
    return Path(path).read_bytes()


def read_member(archive, offset, packed, method, crc):
    """The bytes of an archive's entry, from what its directory says of it. Raises ValueError for damage and giants.

    Without zipfile, which has one thread read at a time, and through a buffer: 1 MiB on some network disks.
    """
    if packed > MOST:
        raise ValueError(f"more than {MOST >> 20} MB")
    with open(archive, "rb", buffering=0) as file:
        file.seek(offset + 26)
        file.seek(int(np.frombuffer(file.read(4), "<u2").sum()), os.SEEK_CUR)  # past the name and an extra field
        data = file.read(packed)
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MOST)  # of a bomb no more, with a wrong checksum
    if zlib.crc32(data) != crc:
        raise ValueError("damaged in the archive (checksum)")
    return data


# ---- which frames, in which order ---------------------------------------------------------------------------------

class Frame(NamedTuple):
    number: int     # in its sequence
    path: str       # in the tree, or any name for index.csv; number and path together are one frame's alone
    read: tuple     # (function, *arguments): called in a thread, it gives the file's bytes or a PIL image


def read_tables(files, folder, skip):
    """{key: {column: value}}: what MSLS's tables in a folder say of its images."""
    rows = defaultdict(dict)
    for path in (f"{folder}/{table}.csv" for table in ("seq_info", "raw", "postprocessed")):
        if path in files:
            read, *arguments = files[path]
            try:
                table = csv.reader(io.TextIOWrapper(io.BytesIO(read(*arguments)), "utf-8-sig", "replace", newline=""))
                head = next(table, [])
                key, columns = head.index("key"), [(name, head.index(name)) for name in COLUMNS.intersection(head)]
                for row in filter(None, table):
                    rows[row[key]].update([(name, sys.intern(row[column])) for name, column in columns])
            except (OSError, ValueError, IndexError, csv.Error, zlib.error) as error:
                skip((path, f"table can't be read ({describe(error)})"))
    return rows


def find_sequences(files, cities, exclude, skip):
    """{(city, sequence): [Frame, …]} of all that the filters let through, from list_files's files.

    The city is the folder above query or database, or in other trees the one below the source. An image without a
    sequence in seq_info.csv is one by itself. Prints what is missing, and what follows from it.
    """
    folders, sequences, found = defaultdict(list), defaultdict(list), set()
    listed, missing, untold = Counter(), Counter(), Counter()
    for path in files:
        if not path.lower().endswith(".csv"):
            folders[os.path.dirname(path)].append(path)
        elif MSLS.match(path):
            folders.setdefault(f"{os.path.dirname(path)}/images", [])  # perhaps none of them is there
    for folder, paths in progress(sorted(folders.items()), len(folders), "folders"):
        home = os.path.dirname(folder)
        parts = folder.split("/")
        city = parts[-3] if MSLS.match(f"{folder}/x") else parts[min(1, len(parts) - 1)]
        if paths:
            found.add(city)
        if cities and city.lower() not in cities:
            continue
        rows = read_tables(files, home, skip)
        listed[city] += len(rows)
        for path in sorted(paths):
            row = rows.pop(os.path.splitext(os.path.basename(path))[0], {})
            untold.update(flag for flag in exclude if FLAGS[flag][0] not in row)
            marks = [flag for flag in exclude if row.get(FLAGS[flag][0], "").lower() == FLAGS[flag][1]]
            if marks:
                skip((path, marks[0]))
                continue
            sequence = row.get("sequence_key") or row.get("sequence_id")
            untold["sequence"] += not sequence
            place = int(re.match("[0-9]{0,18}", row.get("frame_number", ""))[0] or 0)  # of "12.0", 12
            sequences[city, sequence or path].append(Frame(place, path, files[path]))
        missing[city] += len(rows)
    if unknown := set(cities) - {city.lower() for city in found}:
        raise InputError(f"--cities: no {', '.join(sorted(unknown))}; there are {', '.join(sorted(found)) or 'none'}")
    for city in +missing:
        print(f"{city}: {missing[city]:,} of {listed[city]:,} images listed are not there (a volume missing?)")
    if n := untold.pop("sequence", 0):
        print(f"no seq_info.csv tells the sequences of {n:,} images: near-duplicates stay, and neighbours can be in "
              f"both splits{' (add msls_metadata.zip)' * any(map(MSLS.match, files))}")
    for flag, n in untold.items():
        print(f"no table tells of {n:,} images whether they are {flag}: they stay")
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


# ---- from a file to a frame ---------------------------------------------------------------------------------------

def describe(error):
    """An exception as a reason for skipped.csv, the same in every run (PIL would print an address)."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def decode(picture, H, W):
    """The bytes of an image file, or a PIL image → RGB PIL image of W×H pixels that the original covers, its middle.

    JPEGs are decoded at 1/2, 1/4 or 1/8 where that is enough. Upright as EXIF says; 16 bits become 8; transparent is
    white. Raises whatever PIL raises.
    """
    if isinstance(picture, bytes):
        picture = Image.open(io.BytesIO(picture), formats=DECODERS)
    if min(picture.size) < 16:
        raise ValueError("a side of less than 16 pixels")  # an icon, no street
    picture.draft(None, (W, W))  # not (W, H): EXIF may turn it
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):  # PIL would clip them to 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return ImageOps.fit(picture.convert("RGB"), (W, H), Image.Resampling.HAMMING)  # sharp as bicubic in 2/3 the time


def difference_hash(picture):
    """A 64-bit int that hardly changes with noise or light: is each of 8×8 cells brighter than its left neighbour?"""
    cells = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def decode_frame(item, H, W):
    """(…, Frame) → (item, hash, uint8 (H, W, 3)), or (item, reason, None) for what is no image."""
    function, *arguments = item[-1].read
    try:
        picture = decode(function(*arguments), H, W)
        return item, difference_hash(picture), np.asarray(picture)
    except Exception as error:  # decoders of foreign bytes raise anything; it is this one file's trouble
        return item, describe(error), None


def decode_all(items, H, W, workers):
    """Yield what decode_frame gives for each of an iterator, in order.

    In threads, which decode on several cores: PIL lets go of Python's lock for seven eighths of the time. A bounded
    number of images is under way, so that memory stays flat however many there are.
    """
    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF and palettes
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = MOST  # read off the header, before anything is decoded
    threads = ThreadPoolExecutor(workers)
    under_way = deque(threads.submit(decode_frame, item, H, W) for item in islice(items, 16 * workers))
    while under_way:
        yield under_way.popleft().result()
        under_way.extend(threads.submit(decode_frame, item, H, W) for item in islice(items, 1))


# ---- drawn streets --------------------------------------------------------------------------------------------------

DEMO_STREETS = 2880  # that find_pack draws when there is no data
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
    """{(city, sequence): [Frame, …]}, as split_sequences takes it: n views to be drawn, the cities in turn."""
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


# ---- writing the pack ---------------------------------------------------------------------------------------------

def progress(items, total, what):
    """Yield from items, and say how far it is: in one line, renewed, on a terminal, else every ten seconds."""
    terminal, began, said = sys.stdout.isatty(), time.monotonic(), time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done == total or now - said > (0.2 if terminal else 10):
            said, rate = now, done / (now - began)
            line = f"{done:,} of {total:,} {what}  {rate:,.0f} {what}/s  {(total - done) / rate:,.0f} s left"
            print(f"\r{line:<78}" if terminal else line, end="" if terminal and done < total else "\n", flush=True)


def write_frames(folder, plan, total, args, skip):
    """Write train.npy, holdout.npy and index.csv from split_sequences's plan; returns {split: {city: images}}."""
    (H, W), rows, counts = frame_size(args.image_size), Counter(), {split: Counter() for split in SPLITS}
    items = ((split, city, sequence, frame) for split, city, sequence, frames in plan for frame in frames)
    results, kept, street = decode_all(items, H, W, args.workers), None, None
    with open(folder / "train.npy", "wb") as train, open(folder / "holdout.npy", "wb") as holdout, \
            open(folder / "index.csv", "w", **TEXT) as index:
        files, index = dict(train=train, holdout=holdout), csv.writer(index)
        index.writerow(("split", "row", "city", "sequence", "key", "source file"))
        for file in files.values():
            file.seek(128)  # the length of NumPy's header, which is written once the number of frames is known
        for (split, city, sequence, frame), outcome, pixels in progress(results, total, "images"):
            if pixels is None:
                skip((frame.path, outcome))
            elif args.duplicates and street == (city, sequence) and (outcome ^ kept).bit_count() <= args.duplicates:
                skip((frame.path, "near-duplicate"))
            else:
                street, kept = (city, sequence), outcome
                key = os.path.splitext(os.path.basename(frame.path))[0]
                index.writerow((split, rows[split], city, sequence, key, frame.path))
                files[split].write(pixels)
                rows[split] += 1
                counts[split][city] += 1
                if rows.total() == args.limit:
                    break
        for split, file in files.items():
            file.seek(0)
            header = dict(descr="|u1", fortran_order=False, shape=(rows[split], H, W, 3))
            np.lib.format.write_array_header_1_0(file, header)
    return {split: dict(sorted(counts[split].items())) for split in SPLITS}


def draw_preview(folder, image_size, seed):
    """preview.png: sixteen frames of train.npy, and beside each four windows of it as training cuts them."""
    frames, gap = np.load(folder / "train.npy", mmap_mode="r"), image_size // 8
    frames = torch.from_numpy(frames[np.linspace(0, len(frames) - 1, 16, dtype=int)])
    torch.manual_seed(seed)
    columns = [frames.permute(0, 3, 1, 2) / 127.5 - 1, *(cut_windows(frames, image_size) for _ in range(4))]
    columns = [F.pad(images, (gap, 0, gap, frames.shape[1] - images.shape[2]), value=1) for images in columns]
    rows = torch.cat(columns, dim=3).unflatten(0, (8, 2))  # 8 of them, 2 frames with their windows each, 3 × h × w
    sheet = ((rows + 1) * 127.5).byte().permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(sheet.numpy()).save(folder / "preview.png")


def prepare(args):
    """Write the pack args.out, from args.sources or as args.demo drawn streets, and print what is in it.

    Either the whole pack is there in the end, or nothing. Raises InputError, or OSError where a disk is at fault.
    """
    if os.path.lexists(args.out):
        raise InputError(f"{args.out} is there already: name another OUT, or remove it")
    for source in args.sources:
        if not source.is_dir() and not zipfile.is_zipfile(source):
            what = "neither a folder nor a .zip archive" if source.exists() else "no such folder or archive"
            raise InputError(f"{what}: {source}")
    arguments = {name: value for name, value in vars(args).items() if name not in ("paths", "out", "workers")}
    arguments["sources"] = [str(source.resolve()) for source in args.sources]
    arguments["contents"] = list_contents(arguments["sources"])  # before they are read: a download may be going on
    skipped = []
    if args.demo:
        sequences = demo_sequences(args.demo, args.seed, args.image_size)
    else:
        files = list_files(args.sources, skipped.append)
        sequences = find_sequences(files, args.cities, args.exclude, skipped.append)
    plan = split_sequences(sequences, args.holdout, args.seed)
    total = sum(len(frames) for *_, frames in plan)

    H, W = frame_size(args.image_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    each, free = H * W * 3 + 300, shutil.disk_usage(args.out.parent).free  # bytes; 300 in the tables
    needs = each * min(total, args.limit or total)
    print(f"{total:,} images: {needs / 1e9:,.2f} GB at most, {free / 1e9:,.2f} GB free", flush=True)
    if needs > free and (args.limit or 0) < total:  # how many near-duplicates there are, nobody knows yet
        raise InputError(f"{needs / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB free: prepare_data.py --limit "
                         f"{free // each} fits, --limit {total} takes the chance that near-duplicates save enough")

    with tempfile.TemporaryDirectory(prefix=f"{args.out.name}.tmp-", dir=args.out.parent) as temporary:
        folder = Path(temporary, "pack")
        folder.mkdir()
        counts = write_frames(folder, plan, total, args, skipped.append)
        reasons = dict(Counter(reason.partition(" (")[0] for _, reason in skipped).most_common())
        if not counts["train"]:
            raise InputError(f"no image to train on in {' '.join(map(str, args.sources))}: "
                             f"{', '.join(list(reasons)[:3]) or 'too few are there, or none'}")
        with open(folder / "skipped.csv", "w", **TEXT) as file:
            csv.writer(file).writerows([("source file", "reason"), *skipped])
        draw_preview(folder, args.image_size, args.seed)
        info = dict(format=FORMAT, image_size=args.image_size, H=H, W=W, counts=counts, skipped=reasons,
                    arguments=arguments, files={name: (folder / name).stat().st_size for name in FILES})
        (folder / "pack.json").write_text(json.dumps(info, indent=1) + "\n")
        os.rename(folder, args.out)
    print_tables(counts, reasons)
    print(f"the pack is {args.out}; train on it with: python train.py --data {args.out}")


def print_tables(counts, reasons):
    """Images per city with their share, for each split, and what was left out."""
    for split, cities in counts.items():
        total = sum(cities.values())
        print(f"\n{split:<20}   share     images")
        for city, n in (*cities.items(), ("total", total)):
            print(f"{city:<20}  {n / max(total, 1):6.1%}  {n:9,}")
    print("\nleft out: " + (", ".join(f"{reason} {n:,}" for reason, n in reasons.items()) or "nothing"))


# ---- reading a pack -----------------------------------------------------------------------------------------------

class Pack(NamedTuple):
    folder: Path
    image_size: int      # S, of the training images
    train: np.ndarray    # memory-mapped uint8 (N, *frame_size(S), 3), read-only
    holdout: np.ndarray  # likewise; N may be 0
    info: dict           # pack.json


def open_pack(folder):
    """The Pack in a folder. Raises InputError if it is none, or not what its pack.json says."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    try:
        info = json.loads((folder / "pack.json").read_bytes())
        arrays = [np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS]
        shapes = [(sum(info["counts"][split].values()), *frame_size(info["image_size"]), 3) for split in SPLITS]
        sizes = {name: (folder / name).stat().st_size for name in FILES}
        if (info["format"], info["files"], shapes) != (FORMAT, sizes, [array.shape for array in arrays]):
            raise ValueError("its files are not what its pack.json says")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder} is no pack, or damaged ({describe(error)}): prepare_data.py makes packs") from None
    return Pack(folder, info["image_size"], *arrays, info)


def list_contents(sources):
    """{path: bytes or seconds}: the sizes of archives in sources, and when MSLS's folders of images last changed.

    By which find_pack sees that they are not what they were, and need not list 1.6 million files on a network disk.
    """
    depths = ("*.zip", "*/*.zip", "*/images", "*/*/images", "*/*/*/images")
    paths = [path for source in map(Path, sources) for depth in depths for path in (source, *source.glob(depth))]
    return {str(path): path.stat().st_size if path.is_file() else int(path.stat().st_mtime)
            for path in paths if path.is_file() or path.name == "images"}


def find_pack(data, image_size, out="packs"):
    """The Path of a pack of `data`, which is prepared first, once, as <out>/<its name>-<image_size>, if it is none.

    `data`: a pack, what SOURCE may be on the command line, or None for drawn streets. Raises InputError.
    """
    if data is not None and Path(data, "pack.json").exists():
        return Path(data)
    sources = [] if data is None else [str(Path(data).resolve())]
    pack = Path(out, f"{Path(sources[0]).name.removesuffix('.zip') if sources else 'demo'}-{image_size}")
    if pack.exists():
        made, contents = open_pack(pack).info["arguments"], list_contents(sources)
        if (made["sources"], made.get("contents", contents)) != (sources, contents):
            raise InputError(f"{pack} is there already, but not of what {data} holds now: remove it, and it will be "
                             f"made again, or train on it as it is, with --data {pack}")
        return pack
    print(f"preparing {pack} from {data or 'drawn streets'}", flush=True)
    prepare(parse_args([*(sources or ["--demo", str(DEMO_STREETS)]), str(pack), "--image-size", str(image_size)]))
    return pack


# ---- the command line ---------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = dict(type=lambda text: re.findall("[^,]+", text.lower()), action="extend", default=[], metavar="A,B")
    add("paths", nargs="+", type=Path, metavar="SOURCE… OUT", help="folders or .zip files; last, the pack to make")
    add("--image-size", type=int, choices=(32, 64, 128, 256), default=64, help="to train on (default: 64)")
    add("--cities", **names, help="these alone, named as their folders")
    add("--holdout", type=number(float, 0, 0.9), default=0.25, help="share of sequences not trained on (0.25)")
    add("--limit", type=number(int, 1, 10 ** 9), help="images in the pack at most: a fair sample of the cities")
    add("--duplicates", type=number(int, 0, 64), default=4, metavar="BITS",
        help="leave out a frame whose 64-bit hash differs by no more from the one kept before it in its sequence: "
             "4 is standing still, 0 leaves out none (default: 4)")
    add("--exclude", **names, help="leave out frames that MSLS marks so: night, control_panel, sideways")
    add("--panoramas", action="store_true", help="take panoramas too")
    add("--workers", type=number(int, 1, 1024), default=os.cpu_count(), help="threads (default: one a core)")
    add("--seed", type=number(int, 0, 2 ** 32), default=0, help="of sequences' order and drawn streets (default: 0)")
    add("--demo", type=number(int, 1, 10 ** 7), metavar="N", help="draw N streets; there is no SOURCE then")
    args = parser.parse_intermixed_args(argv)
    *args.sources, args.out = args.paths
    if unknown := set(args.exclude) - set(FLAGS):
        raise InputError(f"argument --exclude: no {', '.join(sorted(unknown))}; there are {', '.join(FLAGS)}")
    if not args.panoramas:
        args.exclude = [*args.exclude, "panorama"]
    if bool(args.demo) == bool(args.sources):
        raise InputError("give SOURCE and OUT, as in: prepare_data.py photos packs/x, or --demo 96 packs/demo")
    return args


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # names of folders may be bytes that are no text
    prepare(parse_args())


if __name__ == "__main__":
    run(main)
