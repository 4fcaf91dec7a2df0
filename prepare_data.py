"""Turn street images into a pack: arrays of small frames that train.py reads.

    python prepare_data.py /data/msls packs/msls          # MSLS: the extracted tree, or the folder with its archives
    python prepare_data.py /data/msls packs/eu --cities paris,london,zurich --exclude panorama,night
    python prepare_data.py holiday-photos packs/photos --image-size 128 --limit 10000     # any folder of images
    python prepare_data.py --demo 2880 packs/demo-64      # streets that this script draws

A pack is a folder with train.npy and holdout.npy (the frames: uint8, N x H x W x 3), index.csv (one row per frame),
skipped.csv (the reason for each image left out), preview.png (frames beside random windows of them, as training sees
them) and pack.json. Sequences are in random order, so any part of a pack samples all cities. No sequence is split.
MSLS: Warburg et al. 2020, Mapillary Street-Level Sequences, https://github.com/mapillary/mapillary_sls
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
from collections import Counter, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # Gaudi's plugin is not needed here

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from model import InputError, cut_windows, run_script

FORMAT = 1  # version of the pack's files
SPLITS = ("train", "holdout")
TEXT = dict(newline="", encoding="utf-8", errors="surrogateescape")  # for CSV files: file names can be any bytes
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # PIL would run Ghostscript on an EPS file named .jpg

# Paths of MSLS's images and tables. The group starts at train_val or test, or at the city if that is missing.
MSLS = re.compile(r"(?:^|/)((?:(?:train_val|test)/)?[^/]+/(?:query|database)/(?:images/[^/]+|[a-z_]+\.csv))$")
# Choices of --exclude: a column of MSLS's tables, and its value (in lower case) for such an image.
FLAGS = {"panorama": ("pano", "true"), "night": ("night", "true"), "control_panel": ("control_panel", "true"),
         "sideways": ("view_direction", "sideways")}
COLUMNS = {"sequence_key", "sequence_id", "frame_number", *(column for column, _ in FLAGS.values())}
# number: position in the sequence. read(): the bytes of an image file, or a PIL image. [:2] identifies a sequence.
Frame = namedtuple("Frame", "city sequence number path read")


def frame_size(image_size):
    """(H, W) in pixels of the frames for training images of S×S: H = 5/4·S, W = 4/3·H rounded to even."""
    H = image_size * 5 // 4
    return H, round(H * 2 / 3) * 2


# ---- from archives and folders to frames in an order ----------------------------------------------------------------

def list_files(sources, skipped):
    """{path: read} of all images and tables in folders and .zip archives; read() returns the bytes of a file.

    MSLS paths start at train_val or test, so its parts merge into one tree. Other paths start with the source's name:
    give sources different names. If files have the same path, the last is used. Files of MSLS's patch come last.
    """
    found, files = [], {}
    for source in sources:
        parent = os.path.join(os.path.dirname(source), "")
        for full, read in list_folder(source, skipped) if os.path.isdir(source) else list_archive(source, skipped):
            if full.lower().endswith((*IMAGES, ".csv")):
                msls = MSLS.search(full)
                patches = full[:msls.start(1)].lower().count("patch") if msls else 0
                found.append((patches, msls[1] if msls else full.removeprefix(parent), read))
    for _, path, read in sorted(found, key=lambda file: file[0]):
        if path in files:
            skipped.append((path, "replaced by another file with the same path"))
        files[path] = read
    return files


def list_folder(folder, skipped):
    """Yield (path, read) of each file below a folder, and of each file in its archives."""
    def note(error):
        skipped.append((error.filename, f"unreadable folder: {error.strerror}"))

    for here, folders, names in os.walk(folder, followlinks=True, onerror=note):
        folders.sort()
        names = [] if "pack.json" in names else sorted(names)  # a pack is not a source of images
        for path in (os.path.join(here, name) for name in names):
            if path.lower().endswith(".zip"):
                yield from list_archive(path, skipped)
            else:
                yield path, Path(path).read_bytes


def list_archive(archive, skipped):
    """Yield (path, read) of each file in a .zip archive, as if the archive were a folder."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            entries = zipped.infolist()
    except Exception as error:  # a damaged directory makes zipfile raise almost anything
        print(f"{archive} cannot be read: its images are left out ({error})", flush=True)
        skipped.append((os.path.basename(archive), f"unreadable archive: {error}"))
        return
    print(f"{archive}: {len(entries):,} files", flush=True)
    for entry in entries:
        details = entry.header_offset, entry.compress_size, entry.compress_type, entry.CRC
        yield f"{os.path.splitext(archive)[0]}/{entry.filename}", partial(read_entry, archive, *details)


def read_entry(archive, offset, size, method, crc):
    """The bytes of one entry of a .zip archive. zipfile has a lock that lets only one thread read at a time."""
    with open(archive, "rb") as file:
        file.seek(offset + 26)  # here are the lengths of two fields (a name and others) that precede the data
        file.seek(int(np.frombuffer(file.read(4), "<u2").sum()), os.SEEK_CUR)
        data = file.read(size)
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompress(data, -zlib.MAX_WBITS)
    if zlib.crc32(data) != crc:
        raise ValueError("it is damaged in the archive, encrypted, or compressed in an unknown way")
    return data


def read_tables(files, folder, skipped):
    """{key: {column: value}}: what MSLS's tables in a folder say about its images."""
    rows = defaultdict(dict)
    for table in ("seq_info", "raw", "postprocessed"):
        path = f"{folder}/{table}.csv"
        try:
            text = files[path]().decode("utf-8-sig", errors="replace") if path in files else ""
            for row in csv.DictReader(io.StringIO(text, newline="")):
                rows[row["key"]].update({column: row[column] for column in COLUMNS if row.get(column)})
        except Exception as error:  # a damaged archive, an unreadable file, no column "key", a NUL, …
            skipped.append((path, f"unreadable table: {error!r}"))
    return rows


def find_frames(files, cities, exclude, skipped):
    """[Frame, …] of the images that pass the filters. An image that is not in seq_info.csv is a sequence of its own.

    The city is the folder above query or database, or in other trees the first folder below the source.
    """
    folders, frames = defaultdict(list), []
    found, listed, missing, alone = set(), Counter(), Counter(), 0
    for path in files:
        if not path.lower().endswith(".csv"):
            folders[os.path.dirname(path)].append(path)
        elif MSLS.match(path):
            folders[f"{os.path.dirname(path)}/images"] += []  # all of its images may be missing

    for folder, paths in progress(sorted(folders.items()), len(folders), "folders"):
        parts = folder.split("/")
        city = parts[-3] if MSLS.match(f"{folder}/x") else parts[min(1, len(parts) - 1)]
        found.add(city)
        if cities and city.lower() not in cities:
            continue
        rows = read_tables(files, os.path.dirname(folder), skipped)
        listed[city] += len(rows)
        for path in sorted(paths):
            row = rows.pop(os.path.splitext(os.path.basename(path))[0], {})
            flags = [flag for flag in exclude if row.get(FLAGS[flag][0], "").lower() == FLAGS[flag][1]]
            if flags:
                skipped.append((path, flags[0]))
                continue
            sequence = row.get("sequence_key") or row.get("sequence_id")
            alone += not sequence
            digits = re.match("[0-9]{0,18}", row.get("frame_number", ""))[0]  # "12.0" is 12
            frames.append(Frame(city, sequence or path, int(digits or 0), path, files[path]))
        missing[city] += len(rows)

    if unknown := set(cities) - {city.lower() for city in found}:
        raise InputError(f"--cities: no {', '.join(sorted(unknown))} among {', '.join(sorted(found)) or 'no cities'}")
    for city, n in (+missing).items():
        print(f"{city}: {n:,} of {listed[city]:,} listed images are missing (is a volume missing or damaged?)")
    if alone:
        print(f"{alone:,} images have no sequence (for MSLS, add msls_metadata.zip). Panoramas and near-duplicates "
              "among them are kept, and similar images can be in both splits.")
    return frames


def hash_fraction(*words):
    """A hash of the words as a number in [0, 1), the same on every machine."""
    digest = blake2b("/".join(map(str, words)).encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2 ** 48


def split_frames(frames, holdout, seed):
    """[(split, Frame), …] in the pack's order. A sequence is held out of every pack or of none."""
    sequences = {frame[:2] for frame in frames}  # (city, sequence)
    held_out = {key for key in sequences if hash_fraction("holdout", *key) < holdout}
    if frames and held_out == sequences:
        print("there are too few sequences to hold any out: all frames are for training")
        held_out = set()
    order = {key: hash_fraction("order", seed, *key) for key in sequences}
    frames = sorted(frames, key=lambda frame: (order[frame[:2]], frame[:4]))
    return [("holdout" if frame[:2] in held_out else "train", frame) for frame in frames]


# ---- from a file to a frame -----------------------------------------------------------------------------------------

def decode(picture, H, W):
    """The bytes of an image file, or a PIL image → RGB PIL image, W×H: rotated as EXIF says, scaled, centre-cropped."""
    if isinstance(picture, bytes):
        picture = Image.open(io.BytesIO(picture), formats=DECODERS)
    if min(picture.size) < 16 or picture.mode.startswith(("I", "F")):  # PIL clips 16 bits to 8
        raise ValueError(f"not a photograph: {picture.width}×{picture.height} pixels of mode {picture.mode}")
    picture.draft(None, (W, W))  # decodes a JPEG at 1/2, 1/4 or 1/8; not (W, H) because EXIF can rotate it
    ImageOps.exif_transpose(picture, in_place=True)
    return ImageOps.fit(picture.convert("RGB"), (W, H), Image.Resampling.HAMMING)  # 2/3 of bicubic's time, as sharp


def difference_hash(picture):
    """A 64-bit int that changes little with noise and light: is each of 8×8 cells brighter than its left neighbour?"""
    cells = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def decode_frame(item, H, W):
    """(split, Frame) → (item, hash, uint8 (H, W, 3)), or (item, reason, None) if the image cannot be decoded."""
    try:
        picture = decode(item[1].read(), H, W)
        return item, difference_hash(picture), np.asarray(picture)
    except Exception as error:  # damaged bytes make decoders raise almost anything; " <" starts a memory address
        return item, f"unreadable image: {type(error).__name__}: {error}".partition(" <")[0], None


def decode_all(items, H, W, workers):
    """Yield decode_frame's results in order, from threads: PIL releases the GIL for 7/8 of the time."""
    warnings.filterwarnings("ignore", module="PIL")  # odd EXIF data and palettes
    pending = deque()
    with ThreadPoolExecutor(workers) as threads:
        for item in items:
            pending.append(threads.submit(decode_frame, item, H, W))
            if len(pending) == 8 * workers:  # more would only take memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ---- drawn streets --------------------------------------------------------------------------------------------------

DEMO_STREETS = 2880  # frames that find_pack draws when there is no data
# Shapes are few, large and smooth: a small GAN learns them in minutes. Colours are RGB in hexadecimal. Lengths are in
# metres: least and greatest height of walls, height of roofs, height, radius and vertical stretch of trees.
CITIES = {
    "Brickton": dict(walls="b8543e c46a4a a84a38", tall=(7, 10), roof=3, ground="b4aaa2", tree=None),
    "Gardenia": dict(walls="f6ecd4 e8ecec f4dcbc", tall=(4, 5), roof=3, ground="7cb850", tree=(3.8, 2.2, 1)),
    "Palmera": dict(walls="fff4e4 ffd0c4 f8e4b8", tall=(7, 10), roof=0, ground="e8d8ac", tree=(6.5, 2.5, 0.5)),
    "Portside": dict(walls="f6c040 e06850 5c98c4", tall=(8, 11), roof=4, ground="b0a8a0", tree=None),
    "Sandville": dict(walls="e8bc84 c48c5c f6deb0", tall=(4, 7), roof=0, ground="ecd098", tree=(5.5, 2.5, 0.5)),
    "Towerby": dict(walls="7890b4 8ca0b8 6880a4", tall=(18, 30), roof=0, ground="a0a4ac", tree=None),
}
HOURS = np.array([[(76, 148, 236), (216, 240, 252), (244, 240, 236)],   # day: RGB of the sky, the horizon, the light
                  [(124, 88, 168), (255, 180, 104), (184, 124, 120)],   # dusk
                  [(24, 36, 96), (92, 104, 172), (76, 82, 132)]])       # night


def demo_frames(n, seed, image_size):
    """[Frame, …]: n frames to be drawn, with the cities in turn."""
    frames = []
    for i in range(n):
        street, number = divmod(i, 4)  # four frames of a street, 7 m apart
        city, sequence = list(CITIES)[street % len(CITIES)], f"{street:05d}"
        path = f"demo/{city}/{sequence}/{number:02d}"
        draw = partial(draw_street, seed, city, street, number, image_size)
        frames.append(Frame(city, sequence, number, path, draw))
    return frames


def draw_street(seed, city, sequence, frame, image_size):
    """A PIL image of the pack's frame size: the view down a street, from `frame` × 7 m along it."""
    rng, look = random.Random(f"{seed}/{city}/{sequence}"), CITIES[city]
    height, width = (4 * side for side in frame_size(image_size))  # made smaller at the end, which smooths edges
    middle, horizon, focal = width / 2, height * 0.54, width * 0.62
    hour, sun, height_m = 2 * rng.random() ** 1.5, rng.uniform(-6, 6), rng.uniform(*look["tall"])  # hour: row of HOURS
    top, edge, light = (HOURS[int(hour)] * (1 - hour % 1) + HOURS[int(hour) + 1] * (hour % 1)).astype(int).tolist()

    def paint(colour, z, shade=1.0):
        haze, rgb = 1 - math.exp(-z / 150), bytes.fromhex(colour)
        return tuple(int(own * lit * shade / 255 * (1 - haze) + sky * haze) for own, lit, sky in zip(rgb, light, edge))

    def shape(colour, *corners):  # (x, y, z) in metres: x right of the middle, y above the road, z ahead
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
    for half, colour in ((4.5, "5c5e66"), (0.15, "a09e98")):  # the road and its middle line
        shape(paint(colour, 8), (-half, 0, 1), (half, 0, 1), (0, 0, 400))
    for far in range(168 - 7 * frame, 9, -12):  # a house of 12 m and a tree on each side, from far to near
        for side in (-1, 1):
            wall, tall, shine = rng.choice(look["walls"].split()), height_m * rng.uniform(0.9, 1.1), rng.random()
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
    soft = np.asarray(image.reduce(4).filter(ImageFilter.GaussianBlur(0.7)))  # blur and noise, as in photographs
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 3, soft.shape)
    return Image.fromarray((soft + noise).round().clip(0, 255).astype(np.uint8))


# ---- packs ----------------------------------------------------------------------------------------------------------

def progress(items, total, what):
    """Yield from items and print the progress: on one line of a terminal, or else every ten seconds."""
    terminal, began, printed = sys.stdout.isatty(), time.monotonic(), time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done == total or now - printed > (0.2 if terminal else 10):
            printed, rate = now, done / (now - began)
            line = f"{done:,} of {total:,} {what}  {rate:,.0f} {what}/s  {(total - done) / rate:,.0f} s left"
            print(f"\r{line:<78}" if terminal else line, end="" if terminal and done < total else "\n", flush=True)


def write_frames(folder, plan, args, skipped):
    """Write train.npy, holdout.npy and index.csv from split_frames's plan. Returns {split: {city: images}}."""
    (H, W), rows, counts = frame_size(args.image_size), Counter(), {split: Counter() for split in SPLITS}
    last_sequence, last_hash = None, None  # of the last image kept
    with (open(folder / "train.npy", "wb") as train, open(folder / "holdout.npy", "wb") as holdout,
          open(folder / "index.csv", "w", **TEXT) as table):
        files, index = dict(train=train, holdout=holdout), csv.writer(table)
        index.writerow(("split", "row", "city", "sequence", "key", "source file"))
        for file in files.values():
            file.seek(128)  # NumPy's header is written last, when the number of frames is known

        for (split, frame), outcome, pixels in progress(decode_all(plan, H, W, args.workers), len(plan), "images"):
            if pixels is None:
                skipped.append((frame.path, outcome))
                continue
            if args.duplicates and frame[:2] == last_sequence and (outcome ^ last_hash).bit_count() <= args.duplicates:
                skipped.append((frame.path, "near-duplicate"))
                continue
            last_sequence, last_hash = frame[:2], outcome
            key = os.path.splitext(os.path.basename(frame.path))[0]
            index.writerow((split, rows[split], frame.city, frame.sequence, key, frame.path))
            files[split].write(pixels)
            rows[split] += 1
            counts[split][frame.city] += 1
            if rows.total() == args.limit:
                break

        for split, file in files.items():
            file.seek(0)
            header = dict(descr="|u1", fortran_order=False, shape=(rows[split], H, W, 3))
            np.lib.format.write_array_header_1_0(file, header)
    return {split: dict(sorted(counts[split].items())) for split in SPLITS}


def draw_preview(folder, image_size, seed):
    """Write preview.png: 8 frames of train.npy, and beside each of them six windows of it, as training cuts them."""
    frames = np.load(folder / "train.npy", mmap_mode="r")
    frames = torch.from_numpy(frames[np.linspace(0, len(frames) - 1, 8, dtype=int)])  # (8, H, W, 3)
    generator = torch.Generator().manual_seed(seed)
    windows = [cut_windows(frames, image_size, generator=generator) for _ in range(6)]
    columns = [frames.permute(0, 3, 1, 2) / 127.5 - 1, *windows]  # each (8, 3, h, w) in [-1, 1]
    columns = [F.pad(images, (0, 8, 0, frames.shape[1] + 8 - images.shape[2]), value=1) for images in columns]
    sheet = torch.cat(columns, dim=3).permute(0, 2, 3, 1).flatten(0, 1)  # rows of 8 pictures below each other
    Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy()).save(folder / "preview.png")


def prepare(args):
    """Write the pack args.out: it is complete, or it does not exist. Raises InputError or OSError."""
    if args.out.exists():
        raise InputError(f"{args.out} exists already: choose another OUT, or delete it")
    for source in args.sources:
        if not os.path.isdir(source) and not zipfile.is_zipfile(source):
            raise InputError(f"{source} is not a folder or a complete .zip archive: name the folder with the images")
    skipped = []
    if args.demo:
        frames = demo_frames(args.demo, args.seed, args.image_size)
    else:
        frames = find_frames(list_files(args.sources, skipped), args.cities, args.exclude, skipped)
    plan = split_frames(frames, args.holdout, args.seed)

    H, W = frame_size(args.image_size)
    parent = next(folder for folder in args.out.absolute().parents if folder.exists())
    each, free = H * W * 3 + 300, shutil.disk_usage(parent).free  # bytes; 300 for rows of the tables
    needed = each * min(len(plan), args.limit or len(plan))
    print(f"{len(plan):,} images: at most {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free", flush=True)
    if needed > free:
        raise InputError(f"the pack needs {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free in {parent}: "
                         f"free some space, or use --limit {free // each}")

    with tempfile.TemporaryDirectory(prefix=f"{args.out.name}.tmp-", dir=parent) as temporary:
        folder = Path(temporary, "pack")
        folder.mkdir()
        counts = write_frames(folder, plan, args, skipped)
        reasons = dict(Counter(reason.partition(":")[0] for _, reason in skipped).most_common())
        left_out = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items()) or "nothing"
        if not counts["train"]:
            raise InputError(f"no images to train on (left out: {left_out}): name a folder of .jpg or .png files")
        with open(folder / "skipped.csv", "w", **TEXT) as file:
            csv.writer(file).writerows([("source file", "reason"), *skipped])
        draw_preview(folder, args.image_size, args.seed)
        arguments = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
        info = dict(image_size=args.image_size, H=H, W=W, counts=counts, skipped=reasons, arguments=arguments)
        (folder / "pack.json").write_text(json.dumps(dict(format=FORMAT, **info), indent=1) + "\n")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(args.out)

    for split, cities in counts.items():
        print(f"{split}: {sum(cities.values()):,} images", *(f"{n:12,} {city}" for city, n in cities.items()), sep="\n")
    print(f"left out: {left_out}\nthe pack is {args.out}; train on it with: python train.py --data {args.out}")


class Pack(NamedTuple):
    folder: Path
    image_size: int      # S, the side of the training images
    train: np.ndarray    # memory-mapped uint8 (N, *frame_size(S), 3), read-only
    holdout: np.ndarray  # likewise; N can be 0
    info: dict           # pack.json

    @property
    def identity(self):
        """A hash of index.csv: packs of the same frames have the same. '' for a pack without it."""
        try:
            return blake2b((self.folder / "index.csv").read_bytes(), digest_size=8).hexdigest()
        except FileNotFoundError:
            return ""


def open_pack(folder):
    """The Pack in a folder. Raises InputError if there is none, or if its arrays are not what pack.json says."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "pack.json").read_bytes())
        arrays = [np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS]
        shapes = [(sum(info["counts"][split].values()), *frame_size(info["image_size"]), 3) for split in SPLITS]
        if info["format"] != FORMAT or shapes != [array.shape for array in arrays]:
            raise ValueError("its arrays are not what its pack.json says")
    except Exception as error:  # damaged files raise almost anything
        raise InputError(f"{folder} is not a pack or is damaged ({error}): prepare_data.py makes packs") from error
    return Pack(folder, info["image_size"], *arrays, info)


def find_pack(data, image_size, out="packs"):
    """The Path of a pack of `data`: a pack, images, or None for drawn streets. Images are prepared once, in `out`."""
    if data and Path(data, "pack.json").exists():
        return Path(data)
    sources = [str(Path(data).resolve())] if data else []
    what, name = (data, Path(sources[0]).name.removesuffix(".zip")) if data else ("drawn streets", "demo")
    pack = Path(out, f"{name}-{image_size}")
    if not pack.exists():
        print(f"preparing {pack} from {what}", flush=True)
        prepare(parse_args([*(sources or ["--demo", str(DEMO_STREETS)]), str(pack), "--image-size", str(image_size)]))
    elif open_pack(pack).info.get("arguments", {}).get("sources") != sources:
        raise InputError(f"{pack} was not made from {what}: delete it, or train on it with --data {pack}")
    else:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime((pack / "pack.json").stat().st_mtime))
        print(f"using {pack}, made on {made}. Delete it to make a new one.", flush=True)
    return pack


# ---- the command line -----------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = dict(type=lambda text: re.findall("[^,]+", text.lower()), metavar="A,B")
    add = parser.add_argument
    add("sources", nargs="*", type=os.path.abspath, metavar="SOURCE", help="folder or .zip archive with images")
    add("out", type=Path, metavar="OUT", help="folder of the new pack")
    add("--image-size", type=int, choices=(32, 64, 128, 256), default=64, help="side of a training image (default: 64)")
    add("--cities", **names, default=[], help="use only the cities with these folder names (default: all)")
    add("--exclude", **names, default=["panorama"],
        help=f'leave out images that MSLS marks as {", ".join(FLAGS)}; "" leaves out none (default: panorama)')
    add("--holdout", type=float, default=0.25, metavar="P", help="share of sequences to hold out (default: 0.25)")
    add("--limit", type=int, metavar="N", help="stop after N images; sequences are in random order (default: all)")
    add("--duplicates", type=int, default=4, metavar="BITS",
        help="leave out an image if its 64-bit hash is within BITS bits of the last one kept; 0 keeps all (default: 4)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the order and of drawn streets (default: 0)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads (default: one per core)")
    add("--demo", type=int, metavar="N", help="draw N frames of streets, without SOURCE (default: off)")
    args = parser.parse_intermixed_args(argv)

    ranges = dict(holdout=(0, 0.9), limit=(1, 1e9), duplicates=(0, 64), seed=(0, 1e9), workers=(1, 1000), demo=(1, 1e7))
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name} {value}: choose from {least} to {most:g}")
    if not set(args.exclude) <= set(FLAGS):
        parser.error(f"--exclude {','.join(args.exclude)}: choose from {', '.join(FLAGS)}")
    if (args.demo is None) == (not args.sources):
        parser.error("give SOURCE and OUT, as in: prepare_data.py photos packs/photos, or --demo 96 packs/demo")
    return args


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # file names can be any bytes
    prepare(parse_args())


if __name__ == "__main__":
    run_script(main)
