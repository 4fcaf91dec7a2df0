"""Images of every kind become the right frame or a line in skipped.csv. A pack is complete or does not exist."""
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tarfile
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, Fork, command, new_process, run
from PIL import Image

sys.path.insert(0, str(ROOT))

import prepare_data
from prepare_data import InputError, open_pack

PREPARE = ["prepare_data.py", "--image-size", 32, "--workers", 2]  # frames of 40×54
PACK = ("train.npy", "holdout.npy", "index.csv", "skipped.csv", "preview.png")


def street(seed, size=(160, 120)):
    """A picture unlike any of another seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def encode(image, kind="JPEG", **kwargs):
    image.save(data := io.BytesIO(), kind, **kwargs)
    return data.getvalue()


def streets(n, first=0, name="{}.jpg"):
    return {name.format(i): encode(street(first + i)) for i in range(n)}


def write_tree(folder, files):
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


def write_tar(path, files, links=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for name in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, links[name]
            archive.addfile(entry)
    return path


def rows(path):
    with open(path, **prepare_data.TEXT) as file:
        return list(csv.DictReader(file))


def reasons(pack):
    return {row["source file"]: row["reason"] for row in rows(pack / "skipped.csv")}


def contents(pack, names=PACK):
    return {name: (pack / name).read_bytes() for name in names}


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
            tables["seq_info"].append(f"{i},{key},seq{c}{sequence},{4 - n}")
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
    """(pack, stdout) of the tree as it is."""
    out = tmp_path_factory.mktemp("packs") / "msls"
    return out, run(*PREPARE, tree, out).stdout


# ---- MSLS -----------------------------------------------------------------------------------------------------------

def test_the_tree_and_its_archives_give_the_same_pack_with_any_number_of_workers(packed, msls, tmp_path):
    images = [name for name in msls if name.endswith(".jpg")]
    broken = images[3]
    zips = tmp_path / "zips"
    first = {name: msls[name] for name in images[:30]}
    write_zip(zips / "msls_images_vol_1.zip", first | {broken: b"damaged"})
    write_zip(zips / "more" / "msls_images_vol_2.zip", {name: msls[name] for name in images[30:]}, zipfile.ZIP_STORED)
    write_zip(zips / "msls_metadata.zip", {name: msls[name] for name in msls if name not in images})
    write_zip(zips / "msls_patch_v1.1.zip", {broken: msls[broken]})
    run("prepare_data.py", "--image-size", 32, "--workers", 5, zips, tmp_path / "pack")
    a, b = contents(packed[0]), contents(tmp_path / "pack")
    assert [name for name in a if a[name] != b[name]] == ["skipped.csv"]
    assert reasons(tmp_path / "pack")[broken].startswith("replaced"), "the patch is used"


def test_a_pack_is_right_and_no_sequence_is_in_both_splits(packed, msls):
    pack, text = packed
    index = rows(pack / "index.csv")
    sequences = {split: {row["sequence"] for row in index if row["split"] == split} for split in ("train", "holdout")}
    assert sequences["train"] and sequences["holdout"] and not sequences["train"] & sequences["holdout"]
    opened = open_pack(pack)
    for split, frames in (("train", opened.train), ("holdout", opened.holdout)):
        numbers = [int(row["row"]) for row in index if row["split"] == split]
        assert numbers == list(range(len(frames))), "a row of the index is a row of the array"
        assert f"{split}: {len(frames)} images\n" in text
        assert sum(opened.info["counts"][split].values()) == len(frames)
    keys = [row["key"] for row in index if row["sequence"] == "seq11"]
    assert keys == [f"zurich{i:02d}" for i in (9, 8, 7, 6, 5)], "frames are in the order of their numbers"
    assert Image.open(pack / "preview.png").size[0] > 200
    source = next(row["source file"] for row in index if row["split"] == "train")
    picture = Image.open(io.BytesIO(msls[source])).resize((54, 40), Image.Resampling.BOX)
    assert abs(opened.train[0].astype(int) - np.asarray(picture, int)).mean() < 6, "a frame is a whole picture"


def test_exclude_and_cities_choose_images_and_panoramas_are_left_out_by_default(packed, tree, tmp_path):
    panorama = "train_val/paris/query/images/paris00.jpg"
    assert reasons(packed[0])[panorama] == "panorama"
    flags = "night,control_panel,sideways"
    run(*PREPARE, tree, tmp_path / "few", "--exclude", flags, "--cities", "Paris", "--duplicates", 0)
    keys = {row["key"] for row in rows(tmp_path / "few" / "index.csv")}
    assert keys == {f"paris{i:02d}" for i in range(40) if i % 5 in (0, 4)}
    assert set(reasons(tmp_path / "few").values()) == {"night", "control_panel", "sideways"}
    run(*PREPARE, tree, tmp_path / "all", "--exclude", "")
    assert panorama in {row["source file"] for row in rows(tmp_path / "all" / "index.csv")}
    assert "zurich" in run(*PREPARE, tree, tmp_path / "no", "--cities", "atlantis", status=2).stderr
    assert "sideways" in run(*PREPARE, tree, tmp_path / "no", "--exclude", "nigth", status=2).stderr


def test_images_without_metadata_are_counted_and_a_limit_samples_all_cities(msls, tmp_path):
    images = {name: data for name, data in msls.items() if name.endswith(".jpg")}
    text = run(*PREPARE, write_tree(tmp_path / "in", images), tmp_path / "out", "--limit", 50).stdout
    assert "80 images of MSLS without metadata (add msls_metadata.zip)" in text and "both splits" in text
    index = rows(tmp_path / "out" / "index.csv")
    assert len(index) == len({row["sequence"] for row in index}) == 50
    assert {row["city"] for row in index} == {"paris", "zurich"}


@pytest.mark.parametrize("table", [
    None, b"", b"\0\0\0", b"key\n", b",lat,lon\n0,1,2\n", "key,sequence_key\na,b\n".encode("utf-16"),
    b'key,sequence_key\n"' + b"x" * 200_000, b",key,sequence_key,frame_number\n0,paris00,s," + b"9" * 5000])
def test_a_damaged_table_does_not_end_the_preparation(table, msls):
    path, skipped = "train_val/paris/query/seq_info.csv", []
    files = {name: lambda data=data: data for name, data in msls.items()}
    del files[path]
    if table is not None:
        files[path] = lambda: table
    frames = prepare_data.find_frames(files, ["paris"], ["panorama"], skipped)
    assert len(frames) == 39, "all images but the panorama"
    assert {name for name, reason in skipped if reason != "panorama"} <= {path}


def test_a_byte_order_mark_and_odd_frame_numbers_are_read_as_meant(packed, msls, tmp_path):
    files = dict(msls)
    for name in msls:
        if name.endswith("seq_info.csv"):
            text = "\ufeff" + msls[name].decode().replace(",0\n", ",\n").replace(",3\n", ",3.0\r\n")
            files[name] = text.encode()
    run(*PREPARE, write_tree(tmp_path / "in", files), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packed[0])


def test_near_duplicates_are_left_out(msls, tmp_path):
    home = "train_val/paris/query/images"
    brighter = encode(Image.open(io.BytesIO(msls[f"{home}/paris24.jpg"])).point(lambda v: min(255, v + 3)))
    copies = {f"{home}/paris22.jpg": brighter, f"{home}/paris23.jpg": brighter}
    folder = write_tree(tmp_path / "in", msls | copies)
    run(*PREPARE, folder, tmp_path / "out")
    assert {path for path, reason in reasons(tmp_path / "out").items() if reason == "near-duplicate"} == set(copies)


def test_a_cut_volume_is_named_and_its_images_are_counted_as_missing(msls, tmp_path):
    parts = {"msls_images_vol_1": r"paris.*jpg$", "msls_images_vol_2": r"zurich.*jpg$", "msls_metadata": r"csv$"}
    for part, pattern in parts.items():
        write_zip(tmp_path / "in" / f"{part}.zip", {name: msls[name] for name in msls if re.search(pattern, name)})
    volume = tmp_path / "in" / "msls_images_vol_1.zip"
    os.truncate(volume, volume.stat().st_size - 100)
    text = run(*PREPARE, tmp_path / "in", tmp_path / "out").stdout
    assert f"{volume} cannot be read" in text and "msls_metadata.zip: 6 files" in text
    assert "paris: 40 of 40 listed images are missing" in text and "zurich: " not in text.split(" at most")[0]
    assert reasons(tmp_path / "out")["in/msls_images_vol_1.zip"].startswith("unreadable archive")
    assert {row["city"] for row in rows(tmp_path / "out" / "index.csv")} == {"zurich"}


def test_a_patch_beside_the_tree_replaces_what_it_corrects(packed, msls, tmp_path):
    broken = next(name for name in msls if name.endswith(".jpg"))
    home = write_tree(tmp_path / "in", msls | {broken: b"damaged"})
    patch = write_zip(tmp_path / "msls_patch_v1.1.zip", {broken: msls[broken]})
    run(*PREPARE, patch, home, tmp_path / "out")
    assert contents(tmp_path / "out", ["train.npy"]) == contents(packed[0], ["train.npy"])


@pytest.mark.parametrize("source", ["links", "links/paris"])
def test_a_city_alone_is_one_city_with_no_sequence_in_both_splits(source, msls, tmp_path):
    city = {name.removeprefix("train_val/paris/"): data for name, data in msls.items() if "paris" in name}
    city |= {name.replace("query", "database"): data for name, data in city.items()}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "paris").symlink_to(write_tree(tmp_path / "elsewhere", city))
    run(*PREPARE, tmp_path / source, tmp_path / "out", "--duplicates", 0)
    index = rows(tmp_path / "out" / "index.csv")
    assert {row["city"] for row in index} == {"paris"} and len(index) == 78, "all but the panorama, twice"
    split = {(row["sequence"], row["split"]) for row in index}
    assert len(split) == len({sequence for sequence, _ in split}) == 8


def test_a_pack_that_does_not_fit_is_refused_with_a_limit_that_fits(tree, tmp_path):
    script = changed(tmp_path, "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10 ** 6, 0, 10 ** 5)")
    done = run(script, *PREPARE[1:], tree, tmp_path / "packs" / "out", status=2)
    limit = int(re.search(r"--limit (\d+)", done.stderr)[1])
    assert "images/s" not in done.stdout and not (tmp_path / "packs").exists() and 10 < limit < 16
    run(script, *PREPARE[1:], tree, tmp_path / "more", "--limit", limit + 1, status=2)
    run(script, *PREPARE[1:], tree, tmp_path / "fits", "--limit", limit)
    assert len(rows(tmp_path / "fits" / "index.csv")) == limit


# ---- any picture, any archive ---------------------------------------------------------------------------------------

def test_every_kind_of_picture_becomes_the_right_frame(tmp_path):
    """Red above and blue below, in every form that a picture takes."""
    image = Image.new("RGB", (120, 90), (220, 30, 30))
    image.paste((30, 30, 220), (0, 45, 120, 90))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90° to the right
    pictures = {
        "plain.jpg": encode(image), "cmyk.jpg": encode(image.convert("CMYK")), "-dash.jpg": encode(image),
        "progressive.jpeg": encode(image, progressive=True), "UPPER.PNG": encode(image, "PNG"),
        "rotated.jpg": encode(image.transpose(Image.Transpose.ROTATE_90), exif=exif),
        "palette.png": encode(image.convert("P"), "PNG"), "alpha.png": encode(image.convert("RGBA"), "PNG"),
        "name with spaces, ünïcödé.webp": encode(image, "WEBP"), "scan.tiff": encode(image, "TIFF"),
        "moving.gif": encode(image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size)]),
        "portrait/tall.bmp": encode(image.resize((90, 300)), "BMP"), "really a png.jpg": encode(image, "PNG"),
        "bytes \udcff\udcfe.jpg": encode(image), "two\r\nlines, a \"quote\".jpg": encode(image),
    }
    pictures |= {"phone.jpe": encode(image), "phone.JFIF": encode(image)}
    for suffix, kind in (("mpo", "MPO"), ("apng", "PNG"), ("gif", "GIF")):
        pictures[f"phone.{suffix}"] = encode(image, kind, save_all=True, append_images=[image.rotate(180)])
    words = "--holdout", 0, "--duplicates", 0
    run(*PREPARE, write_tree(tmp_path / "in", pictures), tmp_path / "out", *words)
    index = rows(tmp_path / "out" / "index.csv")
    assert {row["source file"] for row in index} == {f"in/{name}" for name in pictures}
    assert reasons(tmp_path / "out") == {}
    for row, frame in zip(index, open_pack(tmp_path / "out").train.astype(int)):
        above, below = frame[4:14, 5:-5], frame[26:36, 5:-5]
        assert abs(above - (220, 30, 30)).mean() < 25 and abs(below - (30, 30, 220)).mean() < 25, row["source file"]


def test_a_grey_picture_keeps_its_light(tmp_path):
    ramp = Image.linear_gradient("L").rotate(90)
    write_tree(tmp_path / "in", {"grey.jpg": encode(ramp), "grey.png": encode(ramp, "PNG")})
    run(*PREPARE, tmp_path / "in", tmp_path / "out", "--holdout", 0)
    for line in open_pack(tmp_path / "out").train.mean((1, 3)):
        assert line[0] < 20 and line[-1] > 235 and (np.diff(line) > 0).all()


def test_a_file_that_is_no_picture_is_listed_with_the_reason(tmp_path):
    good = encode(street(1))
    bad = {"empty.jpg": b"", "text.jpg": b"hello", "cut.jpg": good[:len(good) // 2], "cut header.jpg": good[:50],
           "dot.png": encode(Image.new("RGB", (1, 1)), "PNG"), "huge.png": encode(Image.new("1", (20_000,) * 2), "PNG"),
           "deep.png": encode(Image.new("I;16", (90, 90)), "PNG"),
           "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n"}
    folder = write_tree(tmp_path / "in", bad | streets(8, name="good{}.jpg"))
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    done = run(*PREPARE, folder, tmp_path / "out")
    assert "Warning" not in done.stderr and "left out: 9 unreadable image" in done.stdout
    why = reasons(tmp_path / "out")
    assert set(why) == {f"in/{name}" for name in (*bad, "dangling.jpg")}
    assert "truncated" in why["in/cut.jpg"] and "0x" not in "".join(why.values()), "reasons are the same in every run"
    assert len(rows(tmp_path / "out" / "index.csv")) == 8


def test_folders_and_archives_of_photos_are_cities_and_keep_all_images(tmp_path):
    write_tree(tmp_path / "spring", streets(3) | streets(3, 10, "sea/deep/{}.jpg"))
    write_tree(tmp_path / "autumn", streets(3, 20))
    write_zip(tmp_path / "autumn" / "day1.zip", streets(3, 30))
    write_zip(tmp_path / "autumn" / "day2.zip", streets(3, 40))
    run(*PREPARE, tmp_path / "spring", "--holdout", 0, tmp_path / "autumn", "--limit", 99, tmp_path / "out")
    index = rows(tmp_path / "out" / "index.csv")
    assert {row["city"] for row in index} == {"spring", "sea", "autumn", "day1", "day2"}
    assert len(index) == len(open_pack(tmp_path / "out").train) == 15 and reasons(tmp_path / "out") == {}


class Pipe(io.BytesIO):
    """A file that cannot seek: zipfile writes the length of an entry after its data."""

    def tell(self):
        raise OSError

    seek = tell


@pytest.mark.parametrize("file", [io.BytesIO, Pipe])
def test_entries_of_any_archive_become_frames_or_reasons(file, tmp_path):
    good, file = streets(8, name="Bath/{}.jpg"), file()
    odd = {"../out.jpg": encode(street(20)), "/abs.jpg": encode(street(21)), "ü/ñ.jpg": encode(street(22))}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (good | odd | {"empty.jpg": b""}).items():
            archive.writestr(name, data)
        archive.writestr("bzip2.jpg", encode(street(23)), zipfile.ZIP_BZIP2)
        with archive.open("zip64.jpg", "w", force_zip64=True) as entry:
            entry.write(encode(street(24)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("Bath/0.jpg", good["Bath/1.jpg"])
    data = bytearray(file.getvalue())
    data[data.find(b"Bath/7.jpg") + 200] ^= 255
    write_tree(tmp_path, {"in/a.zip": b"a program that unpacks itself" + data})
    run(*PREPARE, tmp_path / "in", tmp_path / "out", "--duplicates", 0)
    why = reasons(tmp_path / "out")
    assert set(why) == {f"in/a/{name}" for name in ("Bath/0.jpg", "Bath/7.jpg", "empty.jpg", "bzip2.jpg")}
    assert "replaced" in why["in/a/Bath/0.jpg"] and len(rows(tmp_path / "out" / "index.csv")) == 11
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}, "nothing is extracted"


def test_a_tar_archive_is_read_like_a_folder(packed, msls, tmp_path):
    images = streets(8, name="./photos/Bath/{}.jpg") | {"/abs.jpg": encode(street(20)), "../up.jpg": encode(street(21))}
    write_tar(tmp_path / "in" / "photos.tar", images, links={"photos/link.jpg": "Bath/0.jpg"})
    (tmp_path / "in" / "cut.tar").write_bytes((tmp_path / "in" / "photos.tar").read_bytes()[:5000])
    text = run(*PREPARE, tmp_path / "in", tmp_path / "out").stdout
    assert len(rows(tmp_path / "out" / "index.csv")) == 10 and "cut.tar cannot be read" in text
    why = reasons(tmp_path / "out")
    assert set(why) == {"in/photos/photos/link.jpg", "in/cut.tar"} and "link" in why["in/photos/photos/link.jpg"]
    data = bytearray((tmp_path / "in" / "photos.tar").read_bytes())
    data[data.find(b"./photos/Bath/5.jpg") + 150] ^= 1  # in a header's checksum
    (tmp_path / "damaged.tar").write_bytes(data)
    stderr = run(*PREPARE, tmp_path / "damaged.tar", tmp_path / "no", status=2).stderr
    assert "damaged.tar: unreadable archive: damaged after 5 files" in stderr, "tarfile takes this for the end"
    write_tar(tmp_path / "msls.tar", {f"./{name}": data for name, data in msls.items()})
    run(*PREPARE, tmp_path / "msls.tar", tmp_path / "msls")
    assert contents(tmp_path / "msls") == contents(packed[0])


# ---- no frame twice -------------------------------------------------------------------------------------------------

def frames_in(pack, split):
    return {frame.tobytes() for frame in getattr(open_pack(pack), split)}


def check_no_frame_twice(pack, n):
    """The pack has n frames, all different, some of them held out."""
    train, holdout = frames_in(pack, "train"), frames_in(pack, "holdout")
    assert holdout and not train & holdout
    assert len(train) + len(holdout) == len(rows(pack / "index.csv")) == n


LINKS = {
    "to itself": {"photos/self": "."},
    "to its parent, twice": {"photos/up": "..", "photos/also up": ".."},
    "out of the source": {"photos/home": "../..", "photos/trip/also": ".."},
    "a second name": {"a second name": "photos", "photos/third": "../photos/trip"},
    "names in a circle": {"photos/trip/round": "../other", "photos/other/and round": "../trip"},
}


@pytest.mark.parametrize("links", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("words", [[], ["--duplicates", 0]], ids=["as usual", "with duplicates"])
def test_a_folder_is_used_once_whatever_links_lead_to_it(links, words, tmp_path):
    write_tree(tmp_path, streets(3, 90, "not mine/{}.jpg"))
    home = write_tree(tmp_path / "in", streets(20, name="photos/trip/{}.jpg") | streets(20, 20, "photos/other/{}.jpg"))
    for link, target in links.items():
        (home / link).symlink_to(target, target_is_directory=True)
    run(*PREPARE, home, tmp_path / "out", *words)
    check_no_frame_twice(tmp_path / "out", 40)
    assert "second name of a folder" in "".join(reasons(tmp_path / "out").values())
    assert {row["source file"].split("/")[1] for row in rows(tmp_path / "out" / "index.csv")} == {"photos"}


def test_a_linked_split_of_msls_is_used_once(msls, tmp_path):
    """VPR-datasets-downloader links test to val."""
    home = write_tree(tmp_path / "in", {f"images/val/{n}.jpg": data for n, data in enumerate(msls.values())
                                        if data[:2] == b"\xff\xd8"})
    (home / "images" / "test").symlink_to("val")
    run(*PREPARE, home, tmp_path / "out", "--duplicates", 0)
    check_no_frame_twice(tmp_path / "out", 80)


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", ".Trash-1000/files", "trip/@eaDir/0.jpg", "__MACOSX",
                                    "#recycle", "$RECYCLE.BIN/S-1-5", ".thumbnails", "trip/@EADIR"])
@pytest.mark.parametrize("source", ["folder", "zip", "tar"])
def test_copies_that_tools_make_are_left_out(folder, source, tmp_path):
    """Thumbnails are not the same pictures, byte for byte."""
    photos = streets(40, name="trip/{}.jpg")
    copies = {f"{folder}/{i}-copy.jpg": encode(street(i), quality=50) for i in range(40)}
    everything = photos | copies | {"trip/._0.jpg": b"Apple's double"}
    if source == "folder":
        home = write_tree(tmp_path / "in", everything)
    else:
        home = tmp_path / f"in.{source}"
        {"zip": write_zip, "tar": write_tar}[source](home, everything)
    run(*PREPARE, home, tmp_path / "out")
    check_no_frame_twice(tmp_path / "out", 40)
    why = set(reasons(tmp_path / "out").values())
    assert len(why) == 1 and why.pop().startswith("hidden")


def test_the_same_pictures_in_another_folder_or_archive_are_left_out(tmp_path):
    photos = streets(40, name="{}.jpg")
    write_tree(tmp_path / "in" / "a", photos)
    write_tree(tmp_path / "in" / "copy of a", {f"copy of {name}": data for name, data in photos.items()})
    write_zip(tmp_path / "in" / "backup.zip", photos)
    (tmp_path / "in" / "again.zip").symlink_to("backup.zip")
    texts = [run("prepare_data.py", "--image-size", 32, "--workers", n, tmp_path / "in", tmp_path / f"out{n}").stdout
             for n in (1, 3)]
    check_no_frame_twice(tmp_path / "out1", 40)
    assert "80 same picture as another file" in texts[0]
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3"), "which of them is kept is no accident"
    assert reasons(tmp_path / "out1")["in/backup.zip"].startswith("second name of an archive")


def test_sources_that_contain_each_other_are_used_once(tmp_path):
    home = write_tree(tmp_path / "in", streets(40, name="sub/{}.jpg"))
    run(*PREPARE, home, home / "sub", home, tmp_path / "out", "--duplicates", 0)
    check_no_frame_twice(tmp_path / "out", 40)


def test_a_folder_that_has_packs_and_runs_gives_its_photographs_alone(tmp_path):
    home = write_tree(tmp_path / "in", streets(40))
    run(*PREPARE, home, home / "packs" / "a")
    write_tree(home / "runs" / "b", {"args.json": b"{}", "checkpoint.pt": b""} | streets(3, 99, "samples/{}.png"))
    run(*PREPARE, home, tmp_path / "out")
    check_no_frame_twice(tmp_path / "out", 40)
    assert reasons(tmp_path / "out") == {"in/packs/a": "a pack: not a source of images",
                                         "in/runs/b": "a run: not a source of images"}
    for source, what in ((home / "packs" / "a", "a pack"), (home / "runs" / "b", "a run")):
        assert f"{source} is {what}" in run(*PREPARE, source, tmp_path / "no", status=2).stderr


# ---- paths ----------------------------------------------------------------------------------------------------------

WINDOWS = r"""
import builtins, ntpath, os

def posix(path):
    return path.replace("\\", "/").removeprefix("C:") if isinstance(path, str) else path

def emulate(name):
    original = getattr(os, name)
    setattr(os, name, lambda path, *args, **kwargs: original(posix(path), *args, **kwargs))

for name in ("stat", "lstat", "scandir", "listdir"):
    emulate(name)
original_open = open
builtins.open = lambda path, *args, **kwargs: original_open(posix(path), *args, **kwargs)

class Path:
    def __getattr__(self, name):
        return getattr(ntpath, name)

    def abspath(self, path):
        return ntpath.normpath("C:" + os.getcwd() + "/" + path if path[0] not in "/" else "C:" + path)

    def isdir(self, path):
        import stat
        try:
            return stat.S_ISDIR(os.stat(path).st_mode)
        except OSError:
            return False

    def exists(self, path):
        try:
            os.stat(path)
            return True
        except OSError:
            return False

class Windows:
    path, sep = Path(), "\\"

    def __getattr__(self, name):
        return getattr(os, name)

prepare_data.os = Windows()
"""


def test_a_tree_on_windows_gives_the_same_pack(packed, tree, tmp_path):
    script = changed(tmp_path, WINDOWS)
    run(script, *PREPARE[1:], tree, tmp_path / "out", "--cities", "paris,zurich")
    assert contents(tmp_path / "out") == contents(packed[0])


def test_backslashes_in_a_zip_are_separators(packed, msls, tmp_path):
    """PowerShell 5 writes them. Some programs add entries for folders."""
    entries = {name.replace("/", "\\"): data for name, data in msls.items()}
    write_zip(tmp_path / "in" / "msls.zip", {"train_val\\": b"", **entries})
    run(*PREPARE, tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packed[0])


# ---- nothing is ignored in silence ----------------------------------------------------------------------------------

def test_files_that_are_not_read_are_counted_by_suffix_and_listed(tmp_path):
    other = ["1.heic", "2.HEIC", "3.avif", "clip.mov", "README", "inner.zip", "all.tar.gz", "old.7z", "odd.a b c",
             "Thumbs.db", "two\nlines.x\ny", "raw.csv"]
    home = write_tree(tmp_path / "in", streets(20) | {name: b"?" for name in other if name != "inner.zip"})
    write_zip(home / "outer.zip", {"inner.zip": b"PK"} | streets(20, 20))
    text = run(*PREPARE, home, tmp_path / "out").stdout
    line = next(line for line in text.splitlines() if line.startswith("ignored: "))
    assert line.startswith("ignored: ") and "3 other" in line
    for kind in ("2 .heic (convert them to JPEG)", "1 .avif (convert them to JPEG)", "1 .mov", "1 .zip (extract them)",
                 "1 .gz (extract them)", "1 .7z (extract them)", "1 .db", "1 .csv"):
        assert kind in line
    why = reasons(tmp_path / "out")
    assert set(why) == {f"in/{name}" for name in other if name != "inner.zip"} | {"in/outer/inner.zip"}
    assert why["in/2.HEIC"] == "ignored: .heic (convert them to JPEG)" and "ignored" in text.split("left out: ")[1]


@pytest.mark.parametrize("files, message", [
    ({"a.png": encode(Image.new("I;16", (90, 90)), "PNG")}, "in/a.png: unreadable image: ValueError: not a photograph: "
                                                          "90×90 pixels of mode I;16"),
    ({"a.jpg": b"version https://git-lfs.github.com/spec/v1"}, "it starts with b'version https://'"),
    ({"a.jpg": b"<!DOCTYPE html>", "b.jpg": encode(street(0))[:600]}, "in/"),
    ({"a.heic": b"?"}, "in/a.heic: ignored: .heic (convert them to JPEG)"),
    ({".a/b.jpg": encode(street(0))}, "in/.a: hidden"),
    ({"clip.mov": b"?"}, "no images to train on: left out: 1 ignored. For example in/clip.mov: ignored: .mov"),
    ({}, "in has no images. Name a folder of .jpg or .png files")])
def test_if_nothing_can_be_used_the_error_has_one_reason_in_full(files, message, tmp_path):
    (tmp_path / "in").mkdir()
    write_tree(tmp_path / "in", files)
    stderr = run(*PREPARE, tmp_path / "in", tmp_path / "out", status=2).stderr
    assert message in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1


def test_an_encrypted_archive_says_so(tmp_path):
    data = bytearray(write_zip(tmp_path / "in.zip", streets(3)).read_bytes())
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for entry in re.finditer(re.escape(mark), bytes(data)):
            data[entry.start() + flags] |= 1
    (tmp_path / "in.zip").write_bytes(data)
    stderr = run(*PREPARE, tmp_path / "in.zip", tmp_path / "out", status=2).stderr
    assert "left out: 3 unreadable image. For example in/" in stderr and "encrypted in its archive" in stderr


def test_special_files_are_not_opened(tmp_path):
    """Opening a named pipe waits for a writer."""
    home = write_tree(tmp_path / "in", streets(20))
    os.mkfifo(home / "pipe.jpg")
    os.mkfifo(home / "pipe.zip")
    (home / "device.png").symlink_to("/dev/zero")
    (home / "nowhere").symlink_to("missing")
    (home / "round").symlink_to("round")
    run(*PREPARE, home, tmp_path / "out", timeout=60)
    why = reasons(tmp_path / "out")
    assert set(why) == {f"in/{name}" for name in ("pipe.jpg", "pipe.zip", "device.png", "nowhere", "round")}
    assert set(why.values()) == {"unreadable image: neither a file nor a folder"}


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_transparency_is_white(tmp_path):
    """The left half is transparent, and hides magenta. The right half is opaque and green."""
    hidden = Image.new("RGBA", (120, 90), (255, 0, 255, 0))
    hidden.paste((0, 200, 0, 255), (60, 0, 120, 90))
    grey = Image.new("LA", (120, 90), (0, 0))
    grey.paste((120, 255), (60, 0, 120, 90))
    palette = Image.new("P", (120, 90), 0)
    palette.putpalette([255, 0, 255, 0, 200, 0])
    palette.paste(1, (60, 0, 120, 90))
    colour = Image.new("RGB", (120, 90), (255, 0, 255))
    colour.paste((0, 200, 0), (60, 0, 120, 90))
    pictures = {
        "rgba.png": encode(hidden, "PNG"), "rgba.webp": encode(hidden, "WEBP", lossless=True, exact=True),
        "rgba.tif": encode(hidden, "TIFF"), "grey.png": encode(grey, "PNG"),
        "palette.gif": encode(palette, "GIF", transparency=0), "palette.png": encode(palette, "PNG", transparency=0),
        "key.png": encode(colour, "PNG", transparency=(255, 0, 255)),
    }
    run(*PREPARE, write_tree(tmp_path / "in", pictures), tmp_path / "out", "--holdout", 0, "--duplicates", 0)
    for row, frame in zip(rows(tmp_path / "out" / "index.csv"), open_pack(tmp_path / "out").train):
        right = (120, 120, 120) if "grey" in row["source file"] else (0, 200, 0)
        assert (frame[:, :24] > 250).all(), row["source file"]
        assert abs(frame[:, 30:].astype(int) - right).max() < 5, row["source file"]
    assert reasons(tmp_path / "out") == {}


def test_odd_exif_data_does_not_make_a_photograph_unreadable(tmp_path):
    """A rational of (-1, 0), and a text instead of a number, which PIL cannot write again. Then plain rubbish."""
    def exif(*entries, text=b""):
        """A TIFF directory: Orientation 6, and other entries."""
        entries = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), *entries]
        return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + text

    rational = struct.pack("<HHII", 0x011A, 10, 1, 38)  # its value is 38 bytes from the directory's start
    photo = street(0, (120, 160)).transpose(Image.Transpose.ROTATE_90)
    pictures = {
        "rational.jpg": encode(photo, exif=exif(rational, text=struct.pack("<ii", -1, 0))),
        "text.jpg": encode(photo, exif=exif(struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0\0"))),
        "rubbish.jpg": encode(street(1, (120, 160)), exif=b"Exif\0\0rubbish"),
        "cut.jpg": encode(street(2, (120, 160)), exif=exif()[:24]),
    }
    run(*PREPARE, write_tree(tmp_path / "in", pictures), tmp_path / "out", "--holdout", 0, "--duplicates", 0)
    assert reasons(tmp_path / "out") == {}
    frames = {row["key"]: frame for row, frame in zip(rows(tmp_path / "out" / "index.csv"),
                                                      open_pack(tmp_path / "out").train.astype(int))}
    upright = np.asarray(prepare_data.ImageOps.fit(street(0, (120, 160)), (54, 40)), int)
    for name in ("rational", "text"):
        assert abs(frames[name] - upright).mean() < 12, f"{name} is upright"


def test_photographs_of_200_megapixels_are_read_and_larger_ones_are_refused(tmp_path):
    """The first is decoded at an eighth of its size. The second claims to be huge."""
    large = encode(Image.linear_gradient("L").resize((17_000, 12_000), Image.Resampling.NEAREST), quality=10)
    huge = encode(Image.new("1", (20_000, 16_000)), "PNG")
    write_tree(tmp_path / "in", streets(20) | {"large.jpg": large, "huge.png": huge})
    run(*PREPARE, tmp_path / "in", tmp_path / "out", "--holdout", 0)
    assert "large" in {row["key"] for row in rows(tmp_path / "out" / "index.csv")}
    assert "exceeds limit of 300000000 pixels" in reasons(tmp_path / "out")["in/huge.png"]


# ---- drawn streets --------------------------------------------------------------------------------------------------

def test_drawn_streets_are_the_same_for_a_seed(tmp_path):
    packs = [tmp_path / name for name in ("a", "b", "c")]
    for pack, words, popen in zip(packs, ("--workers 1", "--workers 2", "--seed 1"), (Fork, new_process, Fork)):
        run("prepare_data.py", "--demo", 96, "--image-size", 32, *words.split(), pack, popen=popen)
    a, b, c = (contents(pack, [*PACK, "pack.json"]) for pack in packs)
    assert a == b and a["train.npy"] != c["train.npy"]
    pack = open_pack(packs[0])
    assert len(pack.info["counts"]["train"]) >= 4 and pack.train.std() > 30
    assert len({frame.tobytes() for frame in pack.train}) == len(pack.train)


# ---- words that fit the data ----------------------------------------------------------------------------------------

def test_photographs_are_told_what_concerns_photographs(tmp_path):
    text = run(*PREPARE, write_tree(tmp_path / "in", streets(302)), tmp_path / "out").stdout
    assert "25% of the 302 photographs are held out for scoring" in text
    for word in ("msls", "metadata", "sequence", "panorama", "no score"):
        assert word not in text.lower()


@pytest.mark.parametrize("n, training, advice", [(1, "1 image\n", None), (5, "5 images\n", " --batch-size 5"),
                                                 (60, "", "")])
def test_few_photographs_are_told_what_will_be_missing(n, training, advice, tmp_path):
    text = run(*PREPARE, write_tree(tmp_path / "in", streets(n)), tmp_path / "my pack").stdout
    assert "this pack gets no scores: they need 50 held-out frames and 50 others" in text
    assert ("too few sequences to hold any out" in text) == (n < 20) and f"train: {training}" in text
    command = f"python train.py --data '{tmp_path / 'my pack'}'{advice}"
    assert "training needs more images" in text if n == 1 else text.endswith(f"train on it with: {command}\n")


def test_who_holds_nothing_out_is_not_told_to(tmp_path):
    text = run(*PREPARE, write_tree(tmp_path / "in", streets(60)), tmp_path / "out", "--holdout", 0).stdout
    assert "train: 60 images" in text and "no scores" not in text


def test_the_advice_is_a_command_that_trains(tmp_path):
    text = run(*PREPARE, write_tree(tmp_path / "in", streets(6)), tmp_path / "out").stdout
    words = text.rpartition("python train.py ")[2].split()
    run("train.py", *TINY, "--epochs", 1, "--device", "cpu", *words, cwd=tmp_path)


def test_where_training_prepares_there_is_no_advice_to_train(tree, tmp_path):
    words = "--device", "cpu", "--data", tree, "--epochs", 1
    text = run("train.py", *TINY, *words, cwd=tmp_path).stdout
    assert "train: " in text and "train on it with" not in text and "train.py --data" not in text


def test_new_photographs_in_a_folder_that_has_a_pack_are_noticed(tmp_path):
    home = write_tree(tmp_path / "photos", streets(40) | {"broken.jpg": b"?", "notes.txt": b"?"})
    words = "train.py", *TINY, "--device", "cpu", "--data", "photos", "--epochs", 1
    run(*words, "--out", "a", cwd=tmp_path)
    assert "new image" not in run(*words, "--out", "b", cwd=tmp_path).stdout
    write_tree(home, streets(2, 50, "trip/{}.jpg") | {"more.txt": b"?"})
    os.utime(home / "trip" / "0.jpg", (0, 0))
    assert "photos has 2 new images since then" in run(*words, "--out", "c", cwd=tmp_path).stdout


TERMINAL = """
import time
sys.stdout.isatty = lambda: True
decode_frame = prepare_data.decode_frame
def slow(*args):
    time.sleep(0.02)
    return decode_frame(*args)
prepare_data.decode_frame = slow
"""


def test_progress_counts_what_a_limit_leaves_to_do_and_ends_its_line(tmp_path):
    home = write_tree(tmp_path / "in", streets(200) | streets(200, name="copy/{}.jpg"))
    done = run(changed(tmp_path, TERMINAL), *PREPARE[1:], home, tmp_path / "out", "--limit", 120)
    shown = [line for line in done.stdout.splitlines() if "images/s" in line]
    steps = [re.fullmatch(r"(\d+) of (\d+) images  \d+ images/s  \d+ s left *", line) for line in shown]
    assert all(steps) and len(steps) > 3 and all(len(line) < 80 for line in shown)
    counts = [(int(step[1]), int(step[2])) for step in steps]
    assert all(done <= total for done, total in counts) and counts[-1][0] == counts[-1][1] < 200
    assert counts[0][1] < 160, "120, and what has been left out"


def test_short_work_shows_no_progress(packed):
    assert "/s" not in packed[1]


def test_sizes_are_in_megabytes_where_gigabytes_would_be_none(packed):
    assert re.search(r"^78 images: the pack takes at most 0.5 MB, and [\d,.]+ [MG]B are free$", packed[1], re.M)


def test_a_disk_without_any_space_is_told_without_a_limit_of_0(tree, tmp_path):
    script = changed(tmp_path, "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10 ** 6, 0, 10 ** 2)")
    stderr = run(script, *PREPARE[1:], tree, tmp_path / "out", status=2).stderr
    assert "free some space, or name an OUT on another disk" in stderr and "--limit" not in stderr
    assert "0.00" not in stderr and str(tmp_path) in stderr


def test_a_folder_that_cannot_be_written_to_is_named_before_the_work(tree, tmp_path):
    script = changed(tmp_path, """
import errno
def refuse(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system")
prepare_data.tempfile.TemporaryDirectory = refuse""")
    done = run(script, *PREPARE[1:], tree, tmp_path / "out", status=2)
    assert f"{tmp_path} cannot be written to (Read-only file system): choose another OUT" in done.stderr
    assert done.stdout == ""


# ---- any output stream ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stream", [
    "sys.stdout.reconfigure(encoding='cp437')", "sys.stdout.reconfigure(encoding='cp1251')",
    "sys.stdout.reconfigure(encoding='ascii')", "sys.stdout = None", "sys.stdout.close()", "os.close(1)",
    "import io; sys.stdout = io.StringIO()"])
def test_output_that_is_lost_never_ends_the_work(stream, tmp_path):
    home = write_tree(tmp_path / "×\udcff фото", streets(20) | {"broken \udcfe.jpg": b"?", "мир.jpg": b"?"})
    script = changed(tmp_path, f"import os\n{stream}\nprepare_data.main(sys.argv[1:])\nos._exit(0)")
    run(script, *PREPARE[1:], home, tmp_path / "× out")
    assert len(rows(tmp_path / "× out" / "index.csv")) == 20


def test_a_folder_whose_name_is_not_utf_8_is_trained_on(tmp_path):
    home = write_tree(tmp_path / "bytes \udcff\udcfe", streets(20))
    run("train.py", *TINY, "--device", "cpu", "--data", home, "--epochs", 1, cwd=tmp_path)


def test_main_called_from_a_notebook_leaves_no_trace(tmp_path, capsys):
    def state():
        handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
        return (handlers, list(warnings.filters), Image.MAX_IMAGE_PIXELS, sys.stdout, sys.excepthook, dict(os.environ),
                torch.get_rng_state().tolist(), random.getstate(), os.getcwd())

    home = write_tree(tmp_path / "in", streets(20) | {"broken.jpg": b"?"})
    before = state()
    prepare_data.main(["--image-size", "32", str(home), str(tmp_path / "out")])
    assert state() == before and "train on it with" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists already"):
        prepare_data.main([str(home), str(tmp_path / "out")])
    assert state() == before


# ---- what goes wrong ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [
    ["no/such/folder", "OUT"], ["EMPTY", "packs/OUT"], ["BROKEN", "packs/OUT"], ["OUT"], ["--demo", 5, "EMPTY", "OUT"],
    ["FILE", "OUT"], ["--demo", 9, "FILE/OUT"], ["--demo", 9, "--image-size", 48, "OUT"], ["--demo", 9, "EMPTY"]])
def test_a_mistake_is_one_line_and_leaves_nothing(words, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("hello")
    write_tree(tmp_path / "BROKEN", {"a.jpg": b"hello"})
    before = set(tmp_path.rglob("*"))
    run("prepare_data.py", *words, cwd=tmp_path, status=2)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", ["--limit 0", "--workers 0", "--workers -1", "--holdout 1.5", "--holdout nan",
                                   "--duplicates 65", "--seed -1", "--demo 0", "--limit x"])
def test_a_number_out_of_range_is_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare_data.parse_args(["in", "out", *words.split()])
    assert words.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_photographs_are_never_advised_to_be_deleted(tmp_path):
    write_tree(tmp_path / "photos", streets(3))
    refused = run("prepare_data.py", "packs/new", "photos", cwd=tmp_path, status=2).stderr
    assert "OUT comes last" in refused and "delete" not in refused


def test_a_link_to_a_missing_disk_is_found_before_any_work(tmp_path):
    write_tree(tmp_path / "photos", streets(3))
    (tmp_path / "packs").symlink_to(tmp_path / "unmounted")
    done = run("prepare_data.py", "photos", "packs/new", cwd=tmp_path, status=2)
    assert "packs is not a folder, or a link to a missing one" in done.stderr and done.stdout == ""


def test_a_table_that_another_program_has_saved_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "photos", streets(20))
    pack = prepare_data.find_pack("photos", 32)
    (pack / "index.csv").write_text("split;row;source file\ntrain;0;a.jpg\n")
    with pytest.raises(InputError, match="index.csv is damaged .*: delete packs/photos-32 to make it anew"):
        prepare_data.find_pack("photos", 32)


def changed(folder, lines):
    """A script: prepare_data.py, changed by `lines` before its main() runs."""
    script = folder / "changed.py"
    script.write_text(f"import resource, shutil, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport prepare_data\n{lines}\n"
                      "prepare_data.run_script(prepare_data.main)\n")
    return script


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files is the full disk."""
    script = changed(tmp_path, "resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))")
    done = run(script, "--demo", 400, "--image-size", 32, tmp_path / "packs" / "out", status=2)
    assert done.stderr.startswith("error: ") and "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [script]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_soon_and_leaves_nothing(signum, tmp_path):
    words = command("prepare_data.py", "--demo", 100_000, tmp_path / "packs" / "out")
    process = Fork(words)
    process.stdout.readline()  # it has begun
    time.sleep(1)
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + signum and stderr == "", (process.returncode, stderr)
    assert stdout.endswith("stopped: nothing is kept\n") and list(tmp_path.iterdir()) == []


def test_impatient_signals_do_not_interrupt_the_cleaning(tmp_path):
    """Ctrl-C is pressed twice, and some launchers send SIGTERM twice."""
    process = Fork(command("prepare_data.py", "--demo", 100_000, tmp_path / "packs" / "out"))
    process.stdout.readline()  # it has begun
    time.sleep(1)
    for _ in range(500):
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT and stderr == "", (process.returncode, stderr)
    assert stdout.endswith("stopped: nothing is kept\n") and list(tmp_path.iterdir()) == []


def test_a_signal_ends_the_progress_line_first(tmp_path):
    words = command(changed(tmp_path, TERMINAL), "--demo", 1000, "--image-size", 32, tmp_path / "out")
    process = Fork(words)
    process.stdout.readline()  # it has begun
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=20)
    line, last = stdout.splitlines()[-2:]
    assert " of 1,000 images" in line and last == "stopped: nothing is kept"


def test_a_signal_that_interrupts_a_lock_is_still_a_signal(tmp_path):
    """Between releasing and taking a lock, Python's threading turns the interruption into a RuntimeError."""
    script = changed(tmp_path, """
import os
def interrupted():
    try:
        os.kill(os.getpid(), 2)
    finally:
        raise RuntimeError("cannot release un-acquired lock")
prepare_data.main = interrupted""")
    assert run(script, status=128 + 2).stderr == ""


def test_of_two_runs_into_the_same_folder_the_second_is_refused(tmp_path):
    words = command("prepare_data.py", "--demo", 48, "--image-size", 32, tmp_path / "out")
    processes = [Fork([*words, "--seed", str(seed)]) for seed in (1, 2)]
    stderr = "".join(process.communicate(timeout=60)[1] for process in processes)
    assert sorted(process.returncode for process in processes) == [0, 2]
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(open_pack(tmp_path / "out").train)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    script = changed(tmp_path, "import atexit\natexit.register(lambda: print('peak', "
                               "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))")
    photo, peaks = encode(street(0, (320, 240))), []
    words = "--workers", 2, "--image-size", 128, "--holdout", 0
    for n in (100, 1000):
        write_zip(tmp_path / f"{n}.zip", {f"{i}.jpg": photo for i in range(n)})
        done = run(script, *words, "--duplicates", 0, tmp_path / f"{n}.zip", tmp_path / str(n))
        peaks.append(1024 * int(done.stdout.split()[-1]))
    size = (tmp_path / "1000" / "train.npy").stat().st_size
    assert size == 128 + 1000 * 160 * 214 * 3 and peaks[1] - peaks[0] < size / 2, peaks


def test_the_identity_of_a_pack_is_a_hash_of_its_index(packed, tmp_path):
    pack = shutil.copytree(packed[0], tmp_path / "pack")
    identity = open_pack(pack).identity
    assert re.fullmatch("[0-9a-f]{16,}", identity) and identity == open_pack(packed[0]).identity
    with open(pack / "index.csv", "a") as file:
        file.write("x")
    assert open_pack(pack).identity != identity
    (pack / "index.csv").unlink()
    assert open_pack(pack).identity == ""


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
    lambda pack: (pack / "pack.json").unlink(),
    lambda pack: os.truncate(pack / "pack.json", 40),
    lambda pack: change_info(pack, format=99),
    lambda pack: change_info(pack, image_size=64),
    lambda pack: change_info(pack, counts=3),
])
def test_a_damaged_pack_is_refused_in_one_line(damage, packed, tmp_path):
    pack = shutil.copytree(packed[0], tmp_path / "pack")
    damage(pack)
    with pytest.raises(InputError, match="pack") as error:
        open_pack(pack)
    assert "\n" not in str(error.value)


def test_a_pack_of_the_previous_version_opens(packed, tmp_path):
    pack = shutil.copytree(packed[0], tmp_path / "pack")
    change_info(pack, files={name: (pack / name).stat().st_size for name in PACK}, arguments={"panoramas": False})
    assert len(open_pack(pack).train) == len(open_pack(packed[0]).train)


def test_training_on_raw_images_prepares_them_once_and_says_which_pack_it_uses(tree, tmp_path):
    words = ["train.py", *TINY, "--device", "cpu", "--data", tree, "--epochs", 1]
    name = f"packs/{tree.name}-32"
    assert f"preparing {name}" in run(*words, "--out", "a", cwd=tmp_path).stdout
    text = run(*words, "--out", "b", cwd=tmp_path).stdout
    assert f"using {name}, made on {time.strftime('%Y-')}" in text and "To make a new one, delete it: rm -r" in text
    assert [path.name for path in (tmp_path / "packs").iterdir()] == [f"{tree.name}-32"]


def test_a_pack_of_other_images_with_the_same_name_is_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent in "ab":
        write_tree(tmp_path / parent / "photos", streets(6))
    pack = prepare_data.find_pack("a/photos", 32)
    assert prepare_data.find_pack("a/photos", 32) == prepare_data.find_pack(pack, 32) == pack
    with pytest.raises(InputError, match="packs/photos-32"):
        prepare_data.find_pack("b/photos", 32)


@pytest.mark.parametrize("data, message", [
    ("blank", "blank has no images. Name a folder"),
    ("packs/msls", "or make a pack with python prepare_data.py SOURCE packs/msls"),
    ("run", "run is a run: --data wants photographs or a pack"),
    ("run/args.json", "args.json is not a folder, a .zip or a .tar archive"),
    ("/dev/zero", "zero is not a folder, a .zip or a .tar archive")])  # reading it would not end
def test_data_without_pictures_leaves_no_packs_folder(data, message, tmp_path):
    (tmp_path / "blank").mkdir()
    samples = streets(3, name="samples/{}.png")
    write_tree(tmp_path / "run", {"args.json": b"{}", "checkpoint.pt": b"", **samples})
    done = run("train.py", *TINY, "--device", "cpu", "--data", data, cwd=tmp_path, status=2)
    assert message in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"blank", "run"}
