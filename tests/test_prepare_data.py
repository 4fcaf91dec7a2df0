"""Images of every kind become the right frame or a line in skipped.csv. A pack is complete or does not exist."""
import csv
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
import pytest
import torch
from helpers import Fork, command, ending, run
from PIL import Image, ImageCms, ImageEnhance

import prepare_data
from model import InputError
from prepare_data import find_pack, open_pack

PACK = ("train.npy", "holdout.npy", "index.csv", "preview.png")
H, W = 40, 54  # of frames for --image-size 32


# ---- pictures, trees and archives that the tests write --------------------------------------------------------------

def street(seed, size=(160, 120)):
    """A picture unlike any of another seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def encode(image, kind="JPEG", **options):
    image.save(data := io.BytesIO(), kind, **options)
    return data.getvalue()


def streets(n, first=0, name="{}.jpg"):
    return {name.format(i): encode(street(first + i)) for i in range(n)}


def write_tree(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def prepare(*words):
    """Prepare a pack of frames of 40×54 in this process. OUT is the last word; options come before sources."""
    prepare_data.main(["--image-size", "32", "--workers", "2", *map(str, words)])
    folder = Path(words[-1])
    index = rows(folder / "index.csv")
    pack = open_pack(folder)
    return SimpleNamespace(
        folder=folder, pack=pack, index=index,
        split={row["source file"]: row["split"] for row in index},
        frames={row["source file"]: getattr(pack, row["split"])[int(row["row"])].astype(int) for row in index},
        skipped={row["source file"]: row["reason"] for row in rows(folder / "skipped.csv")})


def contents(folder, names=PACK):
    return {name: (folder / name).read_bytes() for name in names}


def is_frame_of(frame, picture):
    """Is it the whole picture (of 4:3), made smaller?"""
    small = np.asarray(picture.convert("RGB").resize((W, H), Image.Resampling.BOX), int)
    return abs(frame - small).mean() < 8


@pytest.fixture(scope="module")
def msls():
    """{path: bytes} of a small MSLS tree: two cities, eight sequences of five images each, with metadata."""
    heads = {"raw": "key,lon,lat,ca,captured_at,pano", "seq_info": "key,sequence_key,frame_number",
             "postprocessed": "key,easting,northing,unique_cluster,night,control_panel,view_direction"}
    files = {}
    for c, city in enumerate(("paris", "zurich")):
        home, tables = f"train_val/{city}/query", {name: [f",{head}"] for name, head in heads.items()}
        for i in range(40):
            sequence, n, key = i // 5, i % 5, f"{city}{i:02d}"
            files[f"{home}/images/{key}.jpg"] = encode(street(1000 * c + i))
            tables["raw"].append(f"{i},{key},2.3,48.8,0,1540000000,{sequence == 0 and n == 0}")
            tables["seq_info"].append(f"{i},{key},seq{c}{sequence},{14 - n}")
            direction = "Sideways" if n == 3 else "Forward"
            tables["postprocessed"].append(f"{i},{key},0,0,0,{n == 1},{n == 2},{direction}")
        for name, lines in tables.items():
            files[f"{home}/{name}.csv"] = "\n".join(lines).encode()
    return files


@pytest.fixture(scope="module")
def tree(msls, tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("msls"), msls)


@pytest.fixture(scope="module")
def packed(tree, tmp_path_factory):
    return prepare(tree, tmp_path_factory.mktemp("packs") / "msls")


# ---- MSLS -----------------------------------------------------------------------------------------------------------

def test_each_row_of_the_index_is_a_row_of_the_arrays_and_shows_its_source_file(packed, msls):
    assert len(packed.index) == 78, "80 images, and two are panoramas"
    for split in ("train", "holdout"):
        numbers = [int(row["row"]) for row in packed.index if row["split"] == split]
        assert numbers == list(range(len(getattr(packed.pack, split)))) and numbers
    for path, frame in packed.frames.items():
        assert is_frame_of(frame, Image.open(io.BytesIO(msls[path]))), path
    row = next(row for row in packed.index if row["key"] == "paris07")
    assert (row["city"], row["sequence"]) == ("paris", "seq01")
    assert row["source file"] == "train_val/paris/query/images/paris07.jpg"


def test_a_sequence_of_msls_is_in_one_split_in_the_order_of_its_frame_numbers(packed):
    for sequence, members in itertools.groupby(packed.index, lambda row: row["sequence"]):
        members = list(members)
        assert len(members) == (4 if sequence in ("seq00", "seq10") else 5), "a sequence is in one place"
        assert len({row["split"] for row in members}) == 1
        keys = [row["key"] for row in members]
        assert keys == sorted(keys, reverse=True), "these tables number the frames backwards"


def test_msls_as_zip_archives_gives_the_same_pack_as_extracted_and_its_patch_replaces_images(packed, msls, tmp_path):
    images = [name for name in msls if name.endswith(".jpg")]
    tables = {name: msls[name] for name in msls if name not in images}
    broken = encode(street(9999))
    first = {name: msls[name] for name in images[:30]} | {images[3]: broken, images[4]: b"damaged"}
    zips = tmp_path / "zips"
    write_zip(zips / "msls_images_vol_1.zip", first)
    write_zip(zips / "more" / "msls_images_vol_2.zip", {name: msls[name] for name in images[30:]}, zipfile.ZIP_STORED)
    write_zip(zips / "msls_metadata.zip", {name.replace("/", "\\"): data for name, data in tables.items()})
    patch = {images[3]: msls[images[3]], images[4]: msls[images[4]]}
    write_zip(zips / "a_msls_patch_v1.1.zip", patch)
    from_zips = prepare("--workers", 5, zips, tmp_path / "from zips")
    assert contents(from_zips.folder) == contents(packed.folder)
    assert {images[3], images[4]} < set(from_zips.skipped) and "patch" in from_zips.skipped[images[3]]

    home = write_tree(tmp_path / "home", msls | first)
    beside = prepare(write_tree(tmp_path / "msls_patch_v1.1", patch), home, tmp_path / "beside")
    assert contents(beside.folder) == contents(packed.folder)


def test_exclude_replaces_the_default_that_leaves_out_panoramas(packed, tree, tmp_path):
    assert packed.skipped == {f"train_val/{city}/query/images/{city}00.jpg": "panorama" for city in ("paris", "zurich")}
    few = prepare("--exclude", "night,control_panel,sideways", tree, tmp_path / "few")
    assert {row["key"][-2:] for row in few.index} == {f"{i:02d}" for i in range(40) if i % 5 in (0, 4)}
    assert list(few.skipped.values()).count("sideways") == 16 and "panorama" not in few.skipped.values()
    assert len(prepare("--exclude", "", tree, tmp_path / "all").index) == 80


def test_cities_are_chosen_in_any_spelling_and_unknown_ones_are_named(tree, tmp_path):
    paris = prepare("--cities", "PARIS", tree, tmp_path / "paris")
    assert {row["city"] for row in paris.index} == {"paris"} and len(paris.index) == 39
    home = write_tree(tmp_path / "in", streets(3, name=normalize("NFD", "Zürich") + "/{}.jpg") | streets(3, 9, "Bern/{}.jpg"))
    assert len(prepare("--cities", normalize("NFC", "zürich"), home, tmp_path / "out").index) == 3
    with pytest.raises(InputError, match="atlantis among bern"):
        prepare("--cities", "bern,atlantis", home, tmp_path / "no")


def test_msls_without_metadata_is_used_and_the_missing_metadata_are_named(msls, tmp_path, capsys):
    images = {name: data for name, data in msls.items() if name.endswith(".jpg")}
    done = prepare("--limit", 50, write_tree(tmp_path / "in", images), tmp_path / "out")
    assert re.search("^images of MSLS .*msls_metadata.zip", capsys.readouterr().out, re.M)
    assert len(done.index) == 50 and {row["city"] for row in done.index} == {"paris", "zurich"}


def test_a_damaged_table_costs_its_metadata_and_nothing_else(msls, tmp_path):
    tables = [b"", b"\0\0\0", b"key\n", b",lat,lon\n0,1,2\n", "key,sequence_key\na,b\n".encode("utf-16"),
              b'key,sequence_key\n"' + b"x" * 200_000, b",key,sequence_key,frame_number\n0,paris00,s," + b"9" * 5000]
    files = {}
    for i, table in enumerate(tables):
        city = {name.replace("paris", f"paris{i}"): data for name, data in msls.items() if "paris/query/images" in name}
        files |= dict(list(city.items())[:4]) | {f"train_val/paris{i}/query/seq_info.csv": table}
    done = prepare("--duplicates", 0, write_tree(tmp_path / "in", files), tmp_path / "out")
    assert len(done.index) == 4 * len(tables)
    assert set(done.skipped) <= {name for name in files if name.endswith("csv")}


def test_a_byte_order_mark_and_numbers_with_a_point_are_read_as_meant(packed, msls, tmp_path):
    files = dict(msls)
    for name in msls:
        if name.endswith("seq_info.csv"):
            text = re.sub("^[0-9]*,", "", msls[name].decode(), flags=re.M)  # key is the first column
            files[name] = ("\ufeff" + text.replace(",13\n", ",13.0\r\n")).encode()
    done = prepare(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert contents(done.folder) == contents(packed.folder)


@pytest.mark.parametrize("source", ["links", "links/paris"])
def test_one_city_as_the_source_is_that_city_with_its_sequences(source, msls, tmp_path):
    city = {name.removeprefix("train_val/paris/"): data for name, data in msls.items() if "paris" in name}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "paris").symlink_to(write_tree(tmp_path / "elsewhere", city))
    done = prepare(tmp_path / source, tmp_path / "out")
    assert {row["city"] for row in done.index} == {"paris"} and len(done.index) == 39
    assert {row["sequence"] for row in done.index} == {f"seq0{i}" for i in range(8)}


# ---- splits and order -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """400 photographs in 20 folders."""
    rng = np.random.default_rng(7)
    files = {}
    for i in range(400):
        picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((54, 40))
        files[f"trip{i // 20}/{i}.png"] = encode(picture, "PNG")
    return write_tree(tmp_path_factory.mktemp("albums") / "album", files)


def held_out(done):
    return {path.partition("/")[2] for path, split in done.split.items() if split == "holdout"}


def test_a_quarter_of_the_photographs_is_held_out_by_a_hash_of_the_path_in_the_source(album, tmp_path):
    done = prepare(album, tmp_path / "out")
    assert len(done.index) == 400 and 75 <= len(held_out(done)) <= 125, "100 are expected, give or take three sigma"

    def share(path):
        return int.from_bytes(blake2b(f"holdout/{path}".encode(), digest_size=6).digest(), "big") / 2 ** 48

    names = [path.relative_to(album).as_posix() for path in album.glob("*/*")]
    assert held_out(done) == {name for name in names if share(name) < 0.25}
    half = prepare("--holdout", 0.5, "--seed", 3, album, tmp_path / "half")
    assert held_out(half) == {name for name in names if share(name) < 0.5}, "the seed changes no split"
    assert not held_out(prepare("--holdout", 0, album, tmp_path / "none"))


def test_renaming_moving_or_zipping_the_folder_changes_no_split(album, tmp_path):
    first = held_out(prepare("--limit", 200, album, tmp_path / "first"))
    renamed = shutil.copytree(album, tmp_path / "other" / "name.2")
    zipped = write_zip(tmp_path / "more.zip", {str(path.relative_to(album)): path.read_bytes()
                                               for path in album.glob("*/*")})
    for i, source in enumerate((renamed, zipped)):
        assert held_out(prepare("--limit", 200, source, tmp_path / str(i))) == first and first


def test_group_by_folder_keeps_each_folder_in_one_split(album, tmp_path):
    done = prepare("--group-by", "folder", album, tmp_path / "out")
    folders = {(path.split("/")[1], split) for path, split in done.split.items()}
    assert len(folders) == 20 and {split for _, split in folders} == {"train", "holdout"}
    together = [folder for folder, _ in itertools.groupby(done.index, lambda row: row["source file"].split("/")[1])]
    assert len(together) == 20, "and in one place"

    drives = [write_tree(tmp_path / f"drive{i}", streets(8, 10 * i)) for i in range(9)]
    splits = prepare("--group-by", "folder", *drives, tmp_path / "drives").split
    assert len({(path.split("/")[0], split) for path, split in splits.items()}) == 9 and len(set(splits.values())) == 2


def test_a_limit_takes_the_first_frames_of_a_random_order_that_the_seed_chooses(album, tmp_path):
    everything = [row["key"] for row in prepare("--holdout", 0, album, tmp_path / "all").index]
    few = prepare("--holdout", 0, "--limit", 100, album, tmp_path / "few")
    assert [row["key"] for row in few.index] == everything[:100] and len({row["city"] for row in few.index}) > 15
    other = prepare("--holdout", 0, "--seed", 1, album, tmp_path / "other")
    assert [row["key"] for row in other.index] != everything
    assert sorted(row["key"] for row in other.index) == sorted(everything)


def test_nothing_is_held_out_if_fewer_than_16_frames_would_be_left_to_train_on(tmp_path):
    for n, some in ((18, False), (40, True)):
        done = prepare(write_tree(tmp_path / f"in{n}", streets(n)), tmp_path / f"out{n}")
        assert bool(held_out(done)) == some and len(done.index) == n


# ---- no photograph twice --------------------------------------------------------------------------------------------

def test_copies_of_a_photograph_are_left_out_whatever_they_are_called(tmp_path):
    """Other qualities, sizes and light, as phones and photo programs make them."""
    photos = {f"{i}.jpg": street(i) for i in range(90)}
    tree = {name: encode(photo, quality=92) for name, photo in photos.items()}
    for name, photo in photos.items():
        tree[f"old/copy of {name}"] = encode(photo, quality=75)
        tree[f"small/{name}"] = encode(photo.resize((80, 60), Image.Resampling.BICUBIC), quality=80)
        tree[f"edited/{name}"] = encode(ImageEnhance.Brightness(photo).enhance(1.1))
    home = write_tree(tmp_path / "in", tree)
    write_zip(home / "backup.zip", {name: tree[name] for name in photos})
    done = prepare(home, tmp_path / "out")
    numbers = [re.search(r"(\d+)\.jpg", path)[1] for path in done.split]
    assert sorted(numbers, key=int) == [str(i) for i in range(90)] and 0 < len(held_out(done)) < 60
    assert len(done.skipped) == 4 * 90 and {reason.split(":")[0] for reason in done.skipped.values()} == {"near-duplicate"}
    again = prepare("--workers", 1, home, tmp_path / "again")
    assert contents(again.folder) == contents(done.folder), "which of them is kept is no accident"
    assert len(prepare("--duplicates", 0, home, tmp_path / "all").index) == 5 * 90


def slopes(flipped=0, brighter=0, step=13):
    """A picture whose 9×8 cells rise or fall by 3 grey levels from left to right, and differ from others in few."""
    signs = np.random.default_rng(0).choice([-1, 1], (8, 8))
    signs.flat[np.arange(flipped) * step] *= -1
    cells = np.concatenate([np.zeros((8, 1), int), signs], axis=1).cumsum(axis=1) * 3 + 100 + brighter
    grey = cells.astype(np.uint8).repeat(5, axis=0).repeat(6, axis=1)  # (40, 54)
    return encode(Image.fromarray(grey).convert("RGB"), "PNG")


@pytest.mark.parametrize("other, words, kept", [
    (slopes(4), (), 1), (slopes(5), (), 2), (slopes(8, step=5), (), 2), (slopes(5), ("--duplicates", 5), 1), (slopes(1), ("--duplicates", 1), 1),
    (slopes(2), ("--duplicates", 1), 2), (slopes(0, 20), (), 1), (slopes(0, 30), (), 2), (slopes(), ("--duplicates", 0), 2)])
def test_photographs_are_near_duplicates_within_4_bits_of_64_and_25_grey_levels(other, words, kept, tmp_path):
    home = write_tree(tmp_path / "in", {"a.png": slopes(), "b/c.png": other})
    assert len(prepare(*words, home, tmp_path / "out").index) == kept


def test_in_a_sequence_of_msls_a_frame_is_compared_with_the_frame_before_alone(msls, tmp_path):
    home = "train_val/paris/query/images"
    copy = encode(ImageEnhance.Brightness(street(24)).enhance(1.05))
    changes = {f"{home}/paris22.jpg": copy, f"{home}/paris23.jpg": copy, f"{home}/paris30.jpg": copy}
    done = prepare(write_tree(tmp_path / "in", msls | changes), tmp_path / "out")
    assert {path[-6:-4] for path, why in done.skipped.items() if why.startswith("near-dup")} == {"22", "23"}


# ---- sources --------------------------------------------------------------------------------------------------------

def test_sources_with_equal_paths_inside_are_all_used(tmp_path):
    card1 = write_tree(tmp_path / "card1" / "DCIM", streets(4))
    card2 = write_tree(tmp_path / "card2" / "DCIM", streets(4, 10))
    write_zip(tmp_path / "card1" / "DCIM.zip", streets(4, 20))
    one, two = (write_tree(tmp_path / name, streets(4, first, "oxford/database/images/{}.jpg"))
                for name, first in (("one", 30), ("two", 40)))
    done = prepare(card1, card2, tmp_path / "card1" / "DCIM.zip", one, two, tmp_path / "out")
    assert len(done.index) == len(done.split) == 20, "each has a label of its own"
    both = prepare(tmp_path / "card1", tmp_path / "both")
    assert both.pack.info["counts"]["train"] == {"DCIM": 8}, "the first folder or archive in a source is the city"
    assert {row["key"] for row in done.index} == set("0123") and not done.skipped


HIDDEN = [".ipynb_checkpoints", ".Trash-1000/files", "trip/@eaDir/0.jpg", "__MACOSX", "#recycle", "$RECYCLE.BIN/S-1-5",
          ".thumbnails", "trip/@EADIR", "#snapshot", "@Recycle"]


def test_folders_that_are_hidden_or_made_by_tools_are_left_out(tmp_path):
    photos = streets(8, name="trip/{}.jpg") | streets(2, 8, "a.b/@home/{}.jpg")
    copies = {f"{folder}/a.jpg": encode(street(99 + i)) for i, folder in enumerate(HIDDEN)}
    everything = photos | copies | {"trip/._0.jpg": b"Apple's double"}
    for source in (write_tree(tmp_path / "in", everything), write_zip(tmp_path / "in.zip", everything)):
        done = prepare(source, tmp_path / f"{source.name}-out")
        assert {path.partition("/")[2] for path in done.split} == set(photos)
        assert len(done.skipped) == 11 and {why.split(":")[0] for why in done.skipped.values()} == {"hidden"}


def test_a_folder_is_used_once_whatever_links_lead_to_it(tmp_path):
    write_tree(tmp_path, streets(3, 90, "not mine/{}.jpg"))
    home = write_tree(tmp_path / "in", streets(20, name="photos/trip/{}.jpg") | streets(20, 20, "photos/other/{}.jpg"))
    away = write_tree(tmp_path / "away", streets(2, 50))
    for link, target in {"photos/self": ".", "photos/up": "..", "photos/also up": "..", "photos/home": "../..",
                         "a second name": "photos", "photos/third": "../photos/trip", "photos/trip/round": "../other",
                         "photos/other/and round": "../trip", "away": away, "nowhere": "missing", "loop": "loop"}.items():
        (home / link).symlink_to(target, target_is_directory=True)
    done = prepare("--duplicates", 0, home, home / "photos", home, tmp_path / "out")
    assert len(done.index) == 42 and not any("not mine" in path for path in done.split)


def test_packs_and_runs_are_no_sources_of_photographs(tmp_path):
    home = write_tree(tmp_path / "in", streets(4) | streets(3, 50, "runs/b/samples/{}.png") | {"runs/b/checkpoint.pt": b""})
    prepare(home, home / "packs" / "a")
    assert len(prepare(home, tmp_path / "out").index) == 4
    for source in ("packs/a", "runs/b"):
        with pytest.raises(InputError, match=f"no images to train on in .*{source}"):
            prepare(home / source, tmp_path / "no")


def test_files_that_are_not_read_are_counted_with_one_example_and_advice(tmp_path, capsys):
    other = ["1.heic", "2.HEIC", "3.dng", "clip.mov", "README", "all.tar.gz", "b.tgz", "old.7z", "two\nlines.x\ny"]
    grey = encode(Image.new("I;16", (90, 90)), "PNG")
    bad = {"16.png": grey, "lfs.jpg": b"version https://git-lfs", "cut.jpg": encode(street(0))[:600], "tiny.gif":
           encode(Image.new("L", (1, 1)), "GIF"), "damaged.zip": b"PK\3\4"}
    home = write_tree(tmp_path / "in", streets(20) | dict.fromkeys(other, b"?") | bad)
    write_zip(home / "outer.zip", {"inner.zip": b"PK"} | streets(20, 20))
    done = prepare(home, tmp_path / "out")
    assert len(done.index) == 40
    assert set(done.skipped) == {f"in/{name}" for name in (*other, *bad)} | {"in/outer/inner.zip"}
    text = capsys.readouterr().out
    for words in (r" 3 .*convert to JPEG.* in/1.heic", r" 5 .*extract it", r" 1 16 bits: convert to 8.*mogrify.* in/16.png",
                  r" 3 not an image", r" 3 unreadable image"):
        assert re.search(words, text), (words, text)
    assert "images left out: 15" in text
    assert done.pack.info["skipped"]["unreadable image"] == 3


def test_entries_of_any_zip_archive_become_frames_or_reasons(tmp_path):
    path = tmp_path / "in" / "a.zip"
    odd = {"../out.jpg": encode(street(20)), "/abs.jpg": encode(street(21)), "ü/ñ.jpg": encode(street(22))}
    write_zip(path, streets(8, name="Bath/{}.jpg") | odd | {"Bath/": b"", "empty.jpg": b""})
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two entries with one name
        archive.writestr("bzip2.jpg", encode(street(23)), zipfile.ZIP_BZIP2)
        archive.writestr("lzma.jpg", encode(street(24)), zipfile.ZIP_LZMA)
        with archive.open("zip64.jpg", "w", force_zip64=True) as entry:
            entry.write(encode(street(25)))
        archive.writestr("Bath/0.jpg", encode(street(26)))
        for name, first in (("encrypted.jpg", 27), ("method.jpg", 28)):
            archive.writestr(name, encode(street(first)), zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.find(b"Bath/7.jpg") + 200] ^= 255
    for mark, flags, method, length in ((b"PK\3\4", 6, 8, 30), (b"PK\1\2", 8, 10, 46)):
        for found in re.finditer(re.escape(mark), bytes(data)):
            name = data[found.start() + length:]
            data[found.start() + flags] |= name.startswith(b"encrypted")
            if name.startswith(b"method"):
                data[found.start() + method] = 9
    path.write_bytes(b"a program that unpacks itself" + data)
    done = prepare(tmp_path / "in", tmp_path / "out")
    assert len(done.index) == 14
    assert {name: done.skipped.pop(f"in/a/{name}.jpg") for name in ("Bath/7", "empty")}
    for name, why in done.skipped.items():
        cause = name.removeprefix("in/a/").removesuffix(".jpg")
        assert cause in why.lower() and "xtract the archive" in why
    assert len(done.skipped) == 2 and {path.name for path in tmp_path.iterdir()} == {"in", "out"}, "nothing is extracted"


# ---- pictures -------------------------------------------------------------------------------------------------------

COLOURS = ((230, 30, 30), (30, 200, 30), (30, 30, 220), (240, 220, 40))  # left to right, top to bottom


def quarters(width, height):
    picture = Image.new("RGB", (width, height))
    for i, colour in enumerate(COLOURS):
        x, y = i % 2 * width // 2, i // 2 * height // 2
        picture.paste(colour, (x, y, x + width // 2, y + height // 2))
    return picture


def has_quarters(frame):
    corners = frame[:15, :20], frame[:15, -20:], frame[-15:, :20], frame[-15:, -20:]
    return all(abs(part - colour).max() < 12 for part, colour in zip(corners, COLOURS))


def test_a_frame_is_the_upright_middle_of_its_picture_in_rgb_and_not_mirrored(tmp_path):
    """Four colours in four quarters show channels, turns and mirroring; white margins show the crop."""
    wide, tall = Image.new("RGB", (500, 300), "white"), Image.new("RGB", (240, 500), "white")
    wide.paste(quarters(406, 300), (47, 0))
    tall.paste(quarters(240, 178), (0, 161))
    files = {"wide.png": encode(wide, "PNG"), "tall.png": encode(tall, "PNG"), "cmyk.jpg":
             encode(quarters(400, 300).convert("CMYK")), "large.jpg": encode(quarters(4000, 3000)), "small.png":
             encode(quarters(32, 24).resize((32, 24)), "PNG"), "palette.gif": encode(quarters(200, 150), "GIF")}
    turned = [None, *(Image.Transpose(i) for i in (0, 3, 1, 5, 2, 6, 4))]  # what undoes each of EXIF's orientations
    for orientation, turn in enumerate(turned, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture = quarters(400, 300) if turn is None else quarters(400, 300).transpose(turn)
        files[f"exif{orientation}.jpg"] = encode(picture, exif=exif)
    done = prepare("--duplicates", 0, write_tree(tmp_path / "in", files), tmp_path / "out")
    assert len(done.index) == 14
    for path, frame in done.frames.items():
        assert frame.shape == (H, W, 3) and has_quarters(frame), path


def test_transparent_parts_are_white(tmp_path):
    """The left half is transparent, and hides magenta. The right half is opaque and green."""
    hidden = Image.new("RGBA", (120, 90), (255, 0, 255, 0))
    hidden.paste((0, 200, 0, 255), (60, 0, 120, 90))
    palette = Image.new("P", (120, 90), 0)
    palette.putpalette([255, 0, 255, 0, 200, 0])
    palette.paste(1, (60, 0, 120, 90))
    colour = Image.new("RGB", (120, 90), (255, 0, 255))
    colour.paste((0, 200, 0), (60, 0, 120, 90))
    pictures = {"rgba.png": encode(hidden, "PNG"), "rgba.webp": encode(hidden, "WEBP", lossless=True, exact=True),
                "palette.gif": encode(palette, "GIF", transparency=0), "key.png": encode(colour, "PNG", transparency=(255, 0, 255))}
    done = prepare("--duplicates", 0, write_tree(tmp_path / "in", pictures), tmp_path / "out")
    for path, frame in done.frames.items():
        assert (frame[:, :24] > 250).all() and abs(frame[:, 30:] - (0, 200, 0)).max() < 5, path
    assert len(done.frames) == 4


def test_colours_follow_the_pictures_profile(tmp_path):
    """A profile that has the primaries of red and green in each other's places."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    table = srgb[:500].replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ") + srgb[500:]
    red = Image.new("RGB", (120, 90), (200, 30, 60))
    pictures = {"same.png": encode(red, "PNG", icc_profile=srgb), "swapped.png": encode(red, "PNG", icc_profile=table),
                "damaged.png": encode(red, "PNG", icc_profile=b"?" * 200), "none.png": encode(red, "PNG")}
    done = prepare("--duplicates", 0, write_tree(tmp_path / "in", pictures), tmp_path / "out")
    for path, frame in done.frames.items():
        assert abs(frame - ((30, 200, 60) if "swapped" in path else (200, 30, 60))).max() < 4, path
    assert len(done.frames) == 4


def test_odd_exif_data_do_not_lose_a_photograph(tmp_path):
    upside_down = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"\x12\1\3\0\1\0\0\0\3\0\0\0"  # two entries: Orientation is 3, and:
    text_as_number = b"\x1a\1\2\0\3\0\0\00072\0\0" + bytes(4)
    picture = quarters(160, 120).rotate(180)
    pictures = {"text.jpg": encode(picture, exif=upside_down + text_as_number),
                "rubbish.jpg": encode(quarters(160, 120), exif=b"Exif\0\0rubbish"),
                "cut.jpg": encode(quarters(160, 120), exif=upside_down[:20])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and nobody is told about it
        done = prepare("--duplicates", 0, write_tree(tmp_path / "in", pictures), tmp_path / "out")
    assert len(done.frames) == 3 and all(map(has_quarters, done.frames.values()))


def test_photographs_of_180_megapixels_are_read_and_larger_ones_are_refused(tmp_path):
    """The first is decoded at an eighth of its size. The second claims to be huge."""
    large = encode(Image.linear_gradient("L").resize((15_000, 12_000), Image.Resampling.NEAREST), quality=10)
    huge = encode(Image.new("1", (20_000, 16_000)), "PNG")
    done = prepare(write_tree(tmp_path / "in", {"large.jpg": large, "huge.png": huge}), tmp_path / "out")
    assert set(done.frames) == {"in/large.jpg"} and "exceeds limit" in done.skipped["in/huge.png"]


# ---- drawn streets --------------------------------------------------------------------------------------------------

def test_drawn_streets_are_the_same_for_a_seed_and_four_frames_are_a_street(tmp_path):
    a, b, c = (prepare("--demo", 97, "--workers", workers, "--seed", seed, tmp_path / str(i))
               for i, (workers, seed) in enumerate(((1, 0), (2, 0), (2, 1))))
    assert contents(a.folder) == contents(b.folder)
    assert not np.array_equal(a.pack.train[:8], c.pack.train[:8]) and len(a.index) + len(a.skipped) == 97
    assert {len(list(street)) for _, street in itertools.groupby(a.index, lambda row: row["sequence"])} <= {1, 3, 4}
    assert {row["city"] for row in a.index} == {"Brickton", "Gardenia", "Palmera", "Portside", "Sandville", "Towerby"}
    first, other = (prepare("--demo", 1, "--seed", seed, tmp_path / f"first-{seed}").pack.train[0].astype(int)
                    for seed in (0, 1))
    assert abs(first - other).mean() > 6, "another seed draws other streets"
    parts = [part.mean(axis=(0, 1)).round() for part in (first[:8], first[16:24, :12], first[-8:, 20:-20])]
    assert abs(np.array(parts) - SKY_WALL_ROAD).max() < 3, parts


SKY_WALL_ROAD = [(121, 104, 140), (121, 57, 42), (95, 84, 86)]  # mean colours of a street that an earlier version drew


# ---- the pack -------------------------------------------------------------------------------------------------------

def test_pack_json_has_sizes_counts_and_options_and_the_arrays_are_plain_numpy(tree, packed, tmp_path):
    done = prepare("--image-size", 64, "--cities", "paris", "--limit", 30, "--group-by", "folder", tree, tmp_path / "out")
    info = json.loads((done.folder / "pack.json").read_text())
    assert (info["image_size"], info["H"], info["W"], info["format"]) == (64, 80, 106, 1)
    assert sum(info["counts"][split].get("paris", 0) for split in ("train", "holdout")) == 30
    options = info["arguments"]
    assert (options["sources"], options["limit"], options["group_by"]) == ([str(tree)], 30, "folder")
    arrays = [np.load(done.folder / f"{split}.npy") for split in ("train", "holdout")]
    assert {(array.dtype.str, array.shape[1:], array.flags.c_contiguous) for array in arrays} == {("|u1", (80, 106, 3), True)}
    assert prepare("--image-size", 128, "--limit", 1, tree, tmp_path / "large").pack.train.shape == (1, 160, 214, 3)


def test_preview_shows_frames_beside_windows_of_them(packed):
    sheet = np.asarray(Image.open(packed.folder / "preview.png"))
    assert np.array_equal(sheet[:H, :W], packed.pack.train[0])
    assert np.array_equal(sheet[7 * (H + 8):][:H, :W], packed.pack.train[-1])
    windows = [sheet[:32, W + 8 + 40 * i:][:, :32].astype(int) for i in range(6)]
    assert len({window.tobytes() for window in windows}) == 6 and sheet.shape == (8 * (H + 8), W + 8 + 6 * 40, 3)
    mean = packed.pack.train[0].mean()
    assert all(abs(window.mean() - mean) < 25 and window.std() > 20 for window in windows)


def test_the_output_has_counts_of_cities_and_ends_with_the_preview_and_a_command_to_train(tree, packed, tmp_path, capsys):
    prepare(tree, tmp_path / "my pack")
    text = capsys.readouterr().out
    for split, cities in packed.pack.info["counts"].items():
        assert f"images in {split}: {sum(cities.values())}\n" in text
        assert all(re.search(rf"^ +{n} {city}$", text, re.M) for city, n in cities.items())
    last = text.splitlines()[-1]
    assert f"{tmp_path}/my pack/preview.png" in last and f"python train.py --data '{tmp_path}/my pack'" in last


# ---- what goes wrong ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, message", [
    (["no/such/folder", "OUT"], "no/such/folder"), (["EMPTY", "packs/OUT"], "EMPTY"), (["BROKEN", "OUT"], "BROKEN"),
    (["a.tar", "OUT"], "a.tar .*extract"), (["/dev/zero", "OUT"], "zero"), (["BROKEN", "a.tar"], "a.tar exists"),
    (["--demo", "9", "a.tar/OUT"], "a.tar .*choose another OUT"), (["packs/new", "BROKEN"], "BROKEN exists .*OUT.*last")])
def test_a_mistake_is_one_line_and_leaves_no_pack(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path, {"EMPTY/.x": b"", "BROKEN/a.jpg": b"hello", "a.tar": b"?"})
    with pytest.raises(InputError, match=message) as error:
        prepare_data.main(words)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.rglob("*")} <= {"EMPTY", ".x", "BROKEN", "a.jpg", "a.tar", "packs"}


@pytest.mark.parametrize("words", ["out", "--demo 5 in out", "--limit 0 in out", "--workers 0 in out", "--holdout 1.5 in out",
                                   "--holdout nan in out", "--duplicates 65 in out", "--seed -1 in out", "--demo 0 out",
                                   "--limit x in out", "--exclude nigth in out", "--image-size 48 in out", "--group-by x in out"])
def test_an_option_out_of_range_is_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main(words.split())
    assert words.split()[0].removesuffix("out") in capsys.readouterr().err.splitlines()[-1]


def test_a_pack_that_does_not_fit_on_the_disk_is_refused_with_a_limit_that_fits(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(InputError, match="choose another OUT") as error:
        prepare(tree, tmp_path / "packs" / "out")
    limit = int(re.search(r"--limit (\d+)", str(error.value))[1])
    assert 10 < limit <= 100_000 / (H * W * 3) and not list((tmp_path / "packs").iterdir())
    assert len(prepare("--limit", limit, tree, tmp_path / "fits").index) == limit


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files is the full disk."""
    first = "resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))"
    done = run("prepare_data.py", "--demo", 200, "--image-size", 32, tmp_path / "packs" / "out", status=2, first=first)
    assert "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "packs").iterdir())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_it_soon_and_leaves_nothing(signum, tmp_path):
    with ending(Fork(command("prepare_data.py", "--demo", 100_000, tmp_path / "packs" / "out"))) as process:
        while not list(tmp_path.glob("packs/*/pack/train.npy")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signum)
        _, stderr = process.communicate()
    assert process.returncode in (128 + signum, -signum) and "Traceback" not in stderr
    assert not list((tmp_path / "packs").iterdir())


def test_of_two_programs_that_write_one_pack_the_second_is_refused_and_find_pack_uses_the_first(tmp_path, monkeypatch):
    def meanwhile(*args):
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        prepare_data.main(["--image-size", "32", "photos", "packs/photos-32"])
        return check_space(*args)

    check_space = prepare_data.check_space
    write_tree(tmp_path / "photos", streets(6))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "check_space", meanwhile)
    assert find_pack("photos", 32) == Path("packs/photos-32")
    shutil.rmtree("packs")
    monkeypatch.setattr(prepare_data, "check_space", meanwhile)
    with pytest.raises(InputError, match="packs"):
        prepare_data.main(["--image-size", "32", "photos", "packs/photos-32"])
    assert os.listdir("packs") == ["photos-32"] and len(open_pack("packs/photos-32").train) == 6


def test_a_folder_that_cannot_be_written_to_is_named_with_a_command_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path, streets(3, name="photos/{}.jpg") | {"packs": b"a file in the way"})
    with pytest.raises(InputError, match="packs cannot be written to .* choose another OUT.*prepare_data.py .*--data"):
        find_pack("photos", 32)


def test_file_names_of_any_bytes_are_used_and_escape_sequences_do_not_reach_the_terminal(tmp_path):
    home = write_tree(tmp_path / "×\udcff фото", streets(3) | {"\x1b]0;pwned\7 \udcfe.jpg": b"?", "мир.jpg": encode(street(9))})
    first = "sys.stdout.reconfigure(encoding='ascii')"
    done = run("prepare_data.py", "--image-size", 32, home, tmp_path / "× out", first=first)
    assert "\x1b" not in done.stdout and "\7" not in done.stdout and "pwned" in done.stdout
    assert {row["key"] for row in rows(tmp_path / "× out" / "index.csv")} == {"0", "1", "2", "мир"}


def test_main_called_from_a_notebook_leaves_no_trace(tmp_path):
    def state():
        handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
        return (handlers, list(warnings.filters), Image.MAX_IMAGE_PIXELS, sys.stdout, sys.excepthook, dict(os.environ),
                torch.get_rng_state().tolist(), random.getstate(), os.getcwd())

    home = write_tree(tmp_path / "in", streets(4) | {"broken.jpg": b"?"})
    before = state()
    prepare(home, tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        prepare(home, tmp_path / "out")
    assert state() == before


# ---- reading packs --------------------------------------------------------------------------------------------------

def change_info(pack, **changes):
    info = json.loads((pack / "pack.json").read_text())
    (pack / "pack.json").write_text(json.dumps(info | changes))


@pytest.mark.parametrize("damage", [
    lambda pack: (pack / "holdout.npy").unlink(),
    lambda pack: os.truncate(pack / "train.npy", (pack / "train.npy").stat().st_size - 1),
    lambda pack: os.truncate(pack / "train.npy", 0),
    lambda pack: shutil.copy(pack / "holdout.npy", pack / "train.npy"),
    lambda pack: np.save(pack / "train.npy", np.array([print], object), allow_pickle=True),
    lambda pack: [np.save(file, np.load(file).astype(np.float32)) for file in pack.glob("*.npy")],
    lambda pack: (pack / "pack.json").unlink(),
    lambda pack: os.truncate(pack / "pack.json", 40),
    lambda pack: change_info(pack, format=99),
    lambda pack: change_info(pack, image_size=64),
    lambda pack: change_info(pack, counts=3)])
def test_a_damaged_pack_is_refused_in_one_line(damage, packed, tmp_path):
    pack = shutil.copytree(packed.folder, tmp_path / "pack")
    assert len(open_pack(pack).train) == len(packed.pack.train)
    damage(pack)
    with pytest.raises(InputError, match="pack") as error:
        open_pack(pack)
    assert "\n" not in str(error.value)


def test_the_identity_of_a_pack_is_a_hash_of_its_index(packed):
    index = (packed.folder / "index.csv").read_bytes()
    assert open_pack(packed.folder).identity == blake2b(index, digest_size=16).hexdigest()


def test_find_pack_prepares_photographs_once_and_says_which_pack_it_uses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "a" / "photos", streets(6))
    write_zip(tmp_path / "trip.zip", streets(6))
    pack = find_pack("a/photos", 32)
    assert pack == Path("packs/photos-32") and open_pack(pack).image_size == 32
    assert "packs/photos-32/preview.png" in capsys.readouterr().out
    assert find_pack(Path("trip.zip"), 32) == Path("packs/trip-32") and find_pack(pack, 64) == pack
    capsys.readouterr()
    monkeypatch.setattr(prepare_data, "list_folder", None)  # it does not list the photographs again
    assert find_pack(tmp_path / "a" / "photos", 32) == pack
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime((pack / "pack.json").stat().st_mtime))
    text = capsys.readouterr().out
    assert f"packs/photos-32, made on {made}" in text and "rm -r packs/photos-32" in text


def test_find_pack_draws_streets_without_data_and_refuses_other_photographs_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path, streets(6, name="a/photos/{}.jpg") | streets(6, 9, "b/photos/{}.jpg") | {"run/checkpoint.pt": b""})
    monkeypatch.setattr(prepare_data, "DEMO_STREETS", 12)
    drawn = find_pack(None, 32)
    assert drawn == Path("packs/demo-32") == find_pack(None, 32) and open_pack(drawn).info["arguments"]["demo"] == 12
    find_pack("a/photos", 32)
    for data, message in (("b/photos", "packs/photos-32 .*--data packs/photos-32"), ("missing", "missing"), ("run", "run")):
        with pytest.raises(InputError, match=message):
            find_pack(data, 32)
