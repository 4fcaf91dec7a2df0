"""Whatever lies on the disk becomes a right frame or a line in skipped.csv, and a pack is whole or is not there."""
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, TINY, command, run
from PIL import Image, ImageDraw

sys.path.insert(0, str(ROOT))

import prepare_data
from prepare_data import InputError, open_pack

PREPARE = ["prepare_data.py", "--image-size", 32, "--workers", 2]  # frames of 40×54


def street(seed, size=(160, 120)):
    """A picture unlike any of another seed."""
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.choices(range(256), k=3)))
    for _ in range(30):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        ImageDraw.Draw(image).rectangle((x, y, x + rng.randrange(60), y + rng.randrange(60)), tuple(rng.choices(range(256), k=3)))
    return image


def encode(image, kind="JPEG", **kwargs):
    image.save(data := io.BytesIO(), kind, **kwargs)
    return data.getvalue()


def interlaced(image):
    """A PNG in Adam7's seven passes, which PIL reads but does not write."""
    pixels, data = np.asarray(image), b""
    for y, x, dy, dx in ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)):
        data += b"".join(b"\0" + line.tobytes() for line in pixels[y::dy, x::dx])
    chunks = {b"IHDR": struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 1), b"IDAT": zlib.compress(data), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                                          for kind, body in chunks.items())


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def reasons(pack):
    return {row["source file"]: row["reason"] for row in rows(pack / "skipped.csv")}


def everything(pack):
    return {name: (pack / name).read_bytes() for name in prepare_data.FILES}


@pytest.fixture(scope="module")
def msls():
    """{path: bytes} of a made-up MSLS tree: two cities, eight sequences of five frames, with metadata."""
    files = {}
    for c, city in enumerate(("paris", "zurich")):
        home, tables = f"train_val/{city}/query", {"raw": [], "seq_info": [], "postprocessed": []}
        for i in range(40):
            sequence, number, key = i // 5, i % 5, f"{city}{i:02d}"
            files[f"{home}/images/{key}.jpg"] = encode(street(1000 * c + i))
            tables["raw"].append((key, 2.3, 48.8, 0, 1540000000, sequence == 0 and number == 0))
            tables["seq_info"].append((key, f"seq{c}{sequence}", 4 - number))
            tables["postprocessed"].append((key, 0, 0, 0, number == 1, number == 2, "Sideways" if number == 3 else "Forward"))
        heads = {"raw": "key,lon,lat,ca,captured_at,pano", "seq_info": "key,sequence_key,frame_number",
                 "postprocessed": "key,easting,northing,unique_cluster,night,control_panel,view_direction"}
        for name, table in tables.items():
            lines = [f",{heads[name]}", *(f"{n},{','.join(map(str, row))}" for n, row in enumerate(table))]
            files[f"{home}/{name}.csv"] = "\n".join(lines).encode()
    return files


def write_tree(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(scope="module")
def tree(msls, tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("msls"), msls)


@pytest.fixture(scope="module")
def packed(tree, tmp_path_factory):
    """(pack, stdout) of the tree as it is."""
    out = tmp_path_factory.mktemp("packs") / "msls"
    return out, run(*PREPARE, tree, out).stdout


# ---- MSLS -----------------------------------------------------------------------------------------------------------

def test_the_tree_and_its_archives_give_the_same_pack_whatever_the_workers(packed, msls, tmp_path):
    images = [name for name in msls if name.endswith(".jpg")]
    broken = {images[3]: b"damaged"}
    write_zip(tmp_path / "zips" / "msls_images_vol_1.zip", {name: msls[name] for name in images[:30]} | broken)
    write_zip(tmp_path / "zips" / "msls_images_vol_2.zip", {name: msls[name] for name in images[30:]})
    write_zip(tmp_path / "zips" / "msls_metadata.zip", {name: msls[name] for name in msls if name not in images})
    write_zip(tmp_path / "zips" / "msls_patch_v1.1.zip", {name: msls[name] for name in broken})
    run("prepare_data.py", "--image-size", 32, "--workers", 5, tmp_path / "zips", tmp_path / "pack")
    a, b = everything(packed[0]), everything(tmp_path / "pack")
    assert [name for name in a if a[name] != b[name]] == ["skipped.csv"]
    assert reasons(tmp_path / "pack")[images[3]].startswith("replaced"), "the patch wins, and it says so"


def test_no_sequence_is_in_both_splits_and_the_tables_total_is_the_sum(packed):
    pack, text = packed
    index = rows(pack / "index.csv")
    sequences = {split: {row["sequence"] for row in index if row["split"] == split} for split in ("train", "holdout")}
    assert sequences["train"] and sequences["holdout"] and not sequences["train"] & sequences["holdout"]
    opened = open_pack(pack)
    for split, frames in (("train", opened.train), ("holdout", opened.holdout)):
        counts = [int(row["row"]) for row in index if row["split"] == split]
        assert counts == list(range(len(frames))), "a row of the index is a row of the array"
        table = text.split(f"\n{split} ")[1].split("\n\n")[0].splitlines()[1:]
        *cities, total = [int(line.split()[-1].replace(",", "")) for line in table]
        assert sum(cities) == total == len(frames)
    assert [row["key"] for row in index if row["sequence"] == "seq11"] == [f"zurich{i:02d}" for i in (9, 8, 7, 6, 5)], \
        "frames stand in the order of their numbers"
    assert Image.open(pack / "preview.png").size[0] > 200


def test_a_frame_is_the_middle_of_its_picture(packed, msls):
    row = next(row for row in rows(packed[0] / "index.csv") if row["split"] == "train")
    frame = open_pack(packed[0]).train[0].astype(int)
    picture = Image.open(io.BytesIO(msls[row["source file"]])).resize((54, 40), Image.Resampling.BOX)
    assert frame.shape == (40, 54, 3) and abs(frame - np.asarray(picture, int)).mean() < 6


def test_filters_leave_out_what_the_metadata_say(packed, tree, tmp_path):
    assert reasons(packed[0])["train_val/paris/query/images/paris00.jpg"] == "panorama"
    run(*PREPARE, tree, tmp_path / "all", "--panoramas", "--exclude", "night,control_panel", "--exclude", "sideways", "--cities", "Paris")
    keys = {row["key"] for row in rows(tmp_path / "all" / "index.csv")}
    assert keys == {f"paris{i:02d}" for i in range(40) if i % 5 in (0, 4)}
    assert "zurich" in run(*PREPARE, tree, tmp_path / "no", "--cities", "atlantis", status=2).stderr
    assert "sideways" in run(*PREPARE, tree, tmp_path / "no", "--exclude", "nigth", status=2).stderr


def test_missing_metadata_are_said_with_what_follows_and_what_to_add(msls, tmp_path):
    images = {name: data for name, data in msls.items() if name.endswith(".jpg")}
    text = run(*PREPARE, write_tree(tmp_path / "in", images), tmp_path / "out", "--exclude", "night", "--limit", 50).stdout
    said = next(line for line in text.splitlines() if "no seq_info.csv" in line)
    assert "80 images" in said and "both splits" in said and "near-duplicates stay" in said and "msls_metadata.zip" in said
    assert "80 images whether they are panorama: they stay" in text and "80 images whether they are night: they stay" in text
    index = rows(tmp_path / "out" / "index.csv")
    assert len(index) == 50 and len({row["sequence"] for row in index}) == 50
    assert {row["city"] for row in index} == {"paris", "zurich"}, "a limit is a sample of all"


@pytest.mark.parametrize("table", [b"", b"\0\0\0", b"key\n", b",lat,lon\n0,1,2\n", "key,sequence_key\na,b\n".encode("utf-16"),
                                   b'key,sequence_key\n"' + b"x" * 200_000, b",key,sequence_key,frame_number\n0,paris00,s," + b"9" * 5000])
def test_odd_metadata_are_said_and_no_more(table, msls):
    home, said = "train_val/paris/query", []
    files = {name: (lambda data: data, data) for name, data in msls.items()} | {f"{home}/seq_info.csv": (lambda: table,)}
    files = {name: (read[0], *read[1:]) for name, read in files.items()}
    sequences = prepare_data.find_sequences(files, {"paris"}, ["panorama"], said.append)
    assert sum(map(len, sequences.values())) == 39, "all but the panorama"
    assert {path for path, reason in said if reason != "panorama"} <= {f"{home}/seq_info.csv"}


def test_near_duplicates_go_unless_they_are_wanted(msls, tmp_path):
    files = dict(msls)
    home = "train_val/paris/query/images"
    files[f"{home}/paris22.jpg"] = files[f"{home}/paris23.jpg"] = \
        encode(Image.open(io.BytesIO(files[f"{home}/paris24.jpg"])).point(lambda v: min(255, v + 3)))
    folder = write_tree(tmp_path / "in", files)
    run(*PREPARE, folder, tmp_path / "few")
    run(*PREPARE, folder, tmp_path / "all", "--duplicates", 0)
    gone = {path for path, reason in reasons(tmp_path / "few").items() if reason == "near-duplicate"}
    assert gone == {f"{home}/paris22.jpg", f"{home}/paris23.jpg"}
    assert "near-duplicate" not in reasons(tmp_path / "all").values()


# ---- MSLS as it comes -----------------------------------------------------------------------------------------------

def volumes(folder, msls):
    """{name: path} of two volumes and the metadata, as archives in a folder."""
    parts = {"msls_images_vol_1": [name for name in msls if name.endswith(".jpg") and "zurich" not in name],
             "msls_images_vol_2": [name for name in msls if name.endswith(".jpg") and "zurich" in name],
             "msls_metadata": [name for name in msls if name.endswith(".csv")]}
    return {part: write_zip(folder / f"{part}.zip", {name: msls[name] for name in names}) for part, names in parts.items()}


def test_a_cut_volume_is_said_at_once_and_what_it_lacks_is_counted(msls, tmp_path):
    volume = volumes(tmp_path / "in", msls)["msls_images_vol_1"]
    os.truncate(volume, volume.stat().st_size - 100)
    listing, rest = run(*PREPARE, tmp_path / "in", tmp_path / "out").stdout.split(" GB at most")
    assert f"{volume}: can't be read" in listing and "msls_metadata.zip: 6 files" in listing
    assert "paris: 40 of 40 images listed are not there (a volume missing?)" in listing and "zurich:" not in listing
    assert "archive can't be read 1" in rest


def test_a_pack_is_not_used_silently_when_its_sources_have_changed(msls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = volumes(tmp_path / "in", msls)["msls_images_vol_2"].rename(tmp_path / "later")
    words = ["train.py", *TINY, "--device", "cpu", "--data", "in", "--epochs", 1]
    run(*words, "--out", "a")
    kept.rename(tmp_path / "in" / "msls_images_vol_2.zip")
    said = run(*words, "--out", "b", status=2).stderr
    assert "packs/in-32" in said and "remove it" in said and said.count("\n") == 1
    run(*words, "--out", "c", "--data", "packs/in-32")

    tree = write_tree(tmp_path / "tree", msls)
    pack = prepare_data.find_pack(tree, 32)
    assert prepare_data.find_pack(tree, 32) == pack
    images = tree / "train_val/zurich/query/images"
    (images / "new.jpg").write_bytes(encode(street(7)))
    os.utime(images, (2e9, 2e9))
    with pytest.raises(InputError, match="remove it"):
        prepare_data.find_pack(tree, 32)
    info = json.loads((pack / "pack.json").read_text())
    del info["arguments"]["contents"]  # as packs had none before
    (pack / "pack.json").write_text(json.dumps(info))
    assert prepare_data.find_pack(tree, 32) == pack


@pytest.mark.parametrize("form", ["archive beside the tree", "folders of their own", "source before"])
def test_a_patch_wins_whatever_its_form(form, packed, msls, tmp_path):
    broken = next(name for name in msls if name.endswith(".jpg"))
    home, patch = tmp_path / "in", {broken: msls[broken]}
    if form == "archive beside the tree":
        write_tree(home, msls | {broken: b"damaged"})
        write_zip(home / "msls_patch_v1.1.zip", patch)
    else:
        write_tree(home / "other" / "vol_1", msls | {broken: b"damaged"})
        write_tree(home / "msls_patch_v1.1", patch)
    sources = [home] if form != "source before" else [home / "msls_patch_v1.1", home / "other"]
    run(*PREPARE, *sources, tmp_path / "out")
    assert everything(tmp_path / "out")["train.npy"] == everything(packed[0])["train.npy"]
    assert broken not in {path for path, reason in reasons(tmp_path / "out").items() if "not an image" in reason}


@pytest.mark.parametrize("form", ["copied alone", "the city itself", "linked"])
def test_a_city_alone_is_one_city_with_no_sequence_in_both_splits(form, msls, tmp_path):
    city = {name.removeprefix("train_val/"): data for name, data in msls.items() if "paris" in name}
    city |= {name.replace("query", "database").replace("paris", "paris", 1): data for name, data in city.items()}
    source = write_tree(tmp_path / "some", city)
    if form == "linked":
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "paris").symlink_to(source / "paris")
    run(*PREPARE, {"copied alone": source, "the city itself": source / "paris", "linked": tmp_path / "links"}[form],
        tmp_path / "out", "--duplicates", 0)
    index = rows(tmp_path / "out" / "index.csv")
    assert {row["city"] for row in index} == {"paris"} and len(index) == 78, "all but the panorama, in query and in database"
    split = {(row["sequence"], row["split"]) for row in index}
    assert len(split) == len({sequence for sequence, _ in split}) == 8


def test_frame_numbers_with_a_point_are_numbers(packed, msls, tmp_path):
    files = {name: b"\n".join(line + b".0" * (n > 0) for n, line in enumerate(data.split(b"\n"))) if "seq_info" in name else data
             for name, data in msls.items()}
    run(*PREPARE, write_tree(tmp_path / "in", files), tmp_path / "out")
    assert everything(tmp_path / "out") == everything(packed[0])


def test_what_can_not_fit_is_refused_before_the_first_frame_unless_it_is_dared(tree, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(10 ** 6, 0, 10 ** 5)")
    small = dict(env={"PYTHONPATH": str(tmp_path)})
    done = run(*PREPARE, tree, tmp_path / "out", status=2, **small)
    limit = re.search(r"prepare_data.py --limit (\d+) fits", done.stderr)[1]
    assert "images/s" not in done.stdout and not (tmp_path / "out").exists() and 10 < int(limit) < 16, done.stderr
    run(*PREPARE, tree, tmp_path / "fits", "--limit", limit, **small)
    run(*PREPARE, tree, tmp_path / "more", "--limit", 30, status=2, **small)
    run(*PREPARE, tree, tmp_path / "dared", "--limit", 80, **small)


# ---- any picture ----------------------------------------------------------------------------------------------------

def test_every_kind_of_picture_becomes_a_right_frame(tmp_path):
    """Red above, blue below, in every form that a picture takes."""
    image = Image.new("RGB", (120, 90), (220, 30, 30))
    image.paste((30, 30, 220), (0, 45, 120, 90))
    turned, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° to the right
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize((120, 90)).point(lambda v: 255))
    pictures = {
        "plain.jpg": encode(image), "cmyk.jpg": encode(image.convert("CMYK")), "progressive.jpeg": encode(image, progressive=True),
        "turned.jpg": encode(turned, exif=exif), "palette.png": encode(image.convert("P"), "PNG"), "alpha.png": encode(alpha, "PNG"),
        "UPPER.PNG": encode(image, "PNG"), "name with spaces, ünïcödé.webp": encode(image, "WEBP"),
        "moving.gif": encode(image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size)]),
        "portrait/tall.bmp": encode(image.resize((90, 300)), "BMP"), "png named.jpg": encode(image, "PNG"),
        "scan.tiff": encode(image, "TIFF"), "interlaced.png": interlaced(image), "bytes \udcff\udcfe.jpg": encode(image),
        "two\r\nlines, a \"quote\".jpg": encode(image), "-dash.jpg": encode(image),
    }
    run(*PREPARE, write_tree(tmp_path / "in", pictures), tmp_path / "out", "--holdout", 0)
    index = rows(tmp_path / "out" / "index.csv")
    assert {row["source file"] for row in index} == {f"in/{name}" for name in pictures} and reasons(tmp_path / "out") == {}
    for row, frame in zip(index, open_pack(tmp_path / "out").train.astype(int)):
        above, below = frame[4:14, 5:-5], frame[26:36, 5:-5]
        assert abs(above - (220, 30, 30)).mean() < 25 and abs(below - (30, 30, 220)).mean() < 25, row["source file"]


def test_grey_and_deep_pictures_keep_their_light(tmp_path):
    ramp = np.linspace(0, 65535, 120).astype(np.uint16)[None].repeat(90, 0)
    write_tree(tmp_path / "in", {"deep.png": encode(Image.fromarray(ramp), "PNG"), "grey.jpg": encode(Image.linear_gradient("L").rotate(90))})
    run(*PREPARE, tmp_path / "in", tmp_path / "out", "--holdout", 0)
    for frame in open_pack(tmp_path / "out").train:
        line = frame.mean((0, 2))
        assert line[0] < 20 and line[-1] > 235 and abs(line[27] - 128) < 12 and (np.diff(line) > 0).all()


def test_what_is_transparent_is_white(tmp_path):
    glass = Image.new("RGBA", (120, 90), (0, 0, 0, 0))
    palette = Image.new("P", (120, 90))
    write_tree(tmp_path / "in", {"glass.png": encode(glass, "PNG"), "palette.png": encode(palette, "PNG", transparency=0)})
    run(*PREPARE, tmp_path / "in", tmp_path / "out", "--holdout", 0, "--duplicates", 0)
    assert (open_pack(tmp_path / "out").train == 255).all()


def test_what_is_no_picture_is_listed_with_the_reason_and_the_rest_goes_on(tmp_path):
    good = encode(street(1))
    huge, fax = encode(Image.new("1", (30_000, 30_000)), "PNG"), encode(street(2).convert("1"), "TIFF", compression="tiff_lzw")
    bad = {"empty.jpg": b"", "text.jpg": b"hello", "cut.jpg": good[:len(good) // 2], "dot.png": encode(Image.new("RGB", (1, 1)), "PNG"),
           "huge.png": huge, "fax.tif": fax[:60] + b"\xa5" * 40 + fax[100:200], "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n"}
    folder = write_tree(tmp_path / "in", bad | {f"good{i}.jpg": encode(street(i)) for i in range(8)})
    os.mkfifo(folder / "pipe.jpg")
    os.symlink(folder, folder / "loop")
    os.symlink(folder / "nowhere", folder / "dangling.jpg")
    out = tmp_path / "out"
    done = run(*PREPARE, folder, out, timeout=60)
    text = done.stdout
    assert "Warning" not in done.stderr, "what Python's decoders have to say is in skipped.csv"
    assert set(reasons(out)) == {f"in/{name}" for name in (*bad, "pipe.jpg", "dangling.jpg")} and all(reasons(out).values())
    assert len(rows(out / "index.csv")) == 8 and "left out: " in text
    assert "pixels" in reasons(out)["in/huge.png"]


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may read everything")
def test_a_file_without_permission_is_listed(tmp_path):
    folder = write_tree(tmp_path / "in", {f"{i}.jpg": encode(street(i)) for i in range(4)})
    (folder / "0.jpg").chmod(0)
    run(*PREPARE, folder, tmp_path / "out")
    assert "ermission" in reasons(tmp_path / "out")["in/0.jpg"]


def test_a_folder_of_folders_has_a_city_each(tmp_path):
    folder = write_tree(tmp_path / "holiday", {f"{city}/deep/er/{i}.jpg": encode(street(10 * c + i))
                                               for c, city in enumerate(("Bath", "York")) for i in range(6)} | {"loose.png": encode(street(99), "PNG")})
    run(*PREPARE, folder, tmp_path / "out")
    assert {row["city"] for row in rows(tmp_path / "out" / "index.csv")} == {"Bath", "York", "holiday"}
    assert (tmp_path / "out" / "pack.json").exists()
    again = run(*PREPARE, folder, tmp_path / "out", status=2)
    assert "already" in again.stderr, "an OUT that exists is left as it is"


def test_two_folders_of_photos_keep_the_images_of_both(tmp_path):
    for name, seed in (("spring", 0), ("autumn", 100)):
        write_tree(tmp_path / name, {f"IMG_{i}.jpg": encode(street(seed + i)) for i in range(4)} | {"sea/IMG_0.jpg": encode(street(seed + 9))})
    run(*PREPARE, tmp_path / "spring", "--holdout", 0, tmp_path / "autumn", "--limit", 99, tmp_path / "out")
    index = rows(tmp_path / "out" / "index.csv")
    assert {row["source file"] for row in index} == {f"{name}/{file}" for name in ("spring", "autumn") for file in
                                                     ("IMG_0.jpg", "IMG_1.jpg", "IMG_2.jpg", "IMG_3.jpg", "sea/IMG_0.jpg")}
    assert {row["city"] for row in index} == {"spring", "autumn", "sea"} and reasons(tmp_path / "out") == {}


# ---- any archive ----------------------------------------------------------------------------------------------------

def test_nothing_in_an_archive_breaks_out_or_in(tmp_path):
    good, path = {f"Bath/{i}.jpg": encode(street(i)) for i in range(8)}, tmp_path / "in" / "a.zip"
    write_zip(path, good | {"../out.jpg": encode(street(20)), "/abs.jpg": encode(street(21)), "bomb.jpg": bytes(65 << 20),
                           "giant.jpg": random.Random(0).randbytes(65 << 20)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("Bath/0.jpg", good["Bath/1.jpg"])
    data = bytearray(path.read_bytes())
    data[data.rfind(b"Bath/6.jpg") - 46 + 8] |= 1  # encrypted, says the directory
    data[data.find(b"Bath/7.jpg") + 200] ^= 255
    path.write_bytes(data)
    before = set(tmp_path.rglob("*"))
    run(*PREPARE, tmp_path / "in", tmp_path / "out", "--duplicates", 0)
    why = reasons(tmp_path / "out")
    assert {f"in/a/{name}" for name in ("bomb.jpg", "giant.jpg", "Bath/0.jpg", "Bath/7.jpg")} == set(why)
    assert "64 MB" in why["in/a/giant.jpg"]
    assert "damaged" in why["in/a/Bath/7.jpg"] and "replaced" in why["in/a/Bath/0.jpg"]
    assert {p for p in set(tmp_path.rglob("*")) - before if p != tmp_path / "out" and tmp_path / "out" not in p.parents} == set()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what is read by /proc")
def test_of_an_archive_no_more_is_read_than_an_image(tmp_path):
    files = {f"{i}.jpg": random.Random(i).randbytes(3000) for i in range(100)}
    read = {path: read for path, read in prepare_data.list_archive(str(write_zip(tmp_path / "a.zip", files)), print)}
    function, *arguments = read[f"{tmp_path}/a/50.jpg"]

    def count():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = count()
    assert function(*arguments) == files["50.jpg"]
    assert count() - before < 3000 + 500


def test_archives_of_photos_with_the_same_names_keep_the_images_of_both(tmp_path):
    for i in range(2):
        write_zip(tmp_path / "in" / f"day{i}.zip", {f"IMG_{k}.jpg": encode(street(10 * i + k)) for k in range(4)})
    run(*PREPARE, tmp_path / "in", tmp_path / "out", "--holdout", 0)
    assert len(open_pack(tmp_path / "out").train) == 8
    assert {row["city"] for row in rows(tmp_path / "out" / "index.csv")} == {"day0", "day1"}


# ---- drawn streets --------------------------------------------------------------------------------------------------

def test_drawn_streets_are_the_same_for_a_seed_and_in_cities_of_their_own_look(tmp_path):
    packs = [tmp_path / name for name in ("a", "b", "c")]
    for pack, words in zip(packs, (["--workers", 1], ["--workers", 2], ["--seed", 1])):
        run("prepare_data.py", "--demo", 96, "--image-size", 32, *words, pack)
    a, b, c = map(everything, packs)
    assert a == b and a["train.npy"] != c["train.npy"]
    pack = open_pack(packs[0])
    assert len(pack.info["counts"]["train"]) >= 4 and pack.train.std() > 30
    assert len({frame.tobytes() for frame in pack.train}) == len(pack.train)


# ---- what goes wrong ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [["no/such/folder", "OUT"], ["EMPTY", "OUT"], ["OUT"], ["--demo", 5, "EMPTY", "OUT"], ["FILE", "OUT"],
                                   ["--demo", 9, "FILE/OUT"], ["--demo", 9, "--image-size", 48, "OUT"]])
def test_a_mistake_is_one_line_and_leaves_nothing(words, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("hello")
    run("prepare_data.py", *words, cwd=tmp_path, status=2)
    assert {p.name for p in tmp_path.iterdir()} == {"EMPTY", "FILE"}


@pytest.mark.parametrize("option", ["--holdout", "--limit", "--duplicates", "--workers", "--seed", "--demo"])
@pytest.mark.parametrize("value", ["0", "-1", "1e30", "nan", "x"])
def test_numbers_out_of_range_are_refused(option, value):
    if (option, value) in {("--holdout", "0"), ("--duplicates", "0"), ("--seed", "0")}:
        prepare_data.parse_args(["in", "out", option, value])
    else:
        with pytest.raises(InputError, match=option):
            prepare_data.parse_args(["in", "out", option, value])


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    words = command("prepare_data.py", "--demo", 400, "--image-size", 32, tmp_path / "out")
    done = subprocess.run(["bash", "-c", 'ulimit -f 600; trap "" XFSZ; exec "$@"', "-", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_its_status_and_leaves_nothing(signum, tmp_path):
    process = subprocess.Popen(command("prepare_data.py", "--demo", 100_000, tmp_path / "out"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # it has begun
    time.sleep(1)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == -signum and stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_runs_into_the_same_folder_is_refused(tmp_path):
    runs = [subprocess.Popen(command("prepare_data.py", "--demo", 48, "--image-size", 32, "--seed", seed, tmp_path / "out"),
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for seed in (1, 2)]
    said = [process.communicate(timeout=60)[1] for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 2]
    assert "".join(said).startswith("error: ") and "".join(said).count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and len(open_pack(tmp_path / "out").train)


def test_memory_stays_flat(tmp_path):
    """Eight times the images take hardly more: less than half of what their frames are."""
    peak = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    photo, peaks = encode(street(0, (640, 480))), []
    for n in (250, 2000):
        write_zip(tmp_path / f"{n}.zip", {f"{i}.jpg": photo for i in range(n)})
        words = command("prepare_data.py", "--image-size", 128, "--workers", 2, "--holdout", 0, tmp_path / f"{n}.zip", tmp_path / str(n))
        peaks.append(int(subprocess.run([sys.executable, "-c", peak, *words], capture_output=True, text=True, check=True).stdout.split()[-1]))
    size = (tmp_path / "2000" / "train.npy").stat().st_size
    assert size == 128 + 2000 * 160 * 214 * 3 and (peaks[1] - peaks[0]) * 1024 < size / 2, peaks


def damage(pack, how):
    info = json.loads((pack / "pack.json").read_text())
    if how == "missing file":
        (pack / "holdout.npy").unlink()
    elif how == "shorter file":
        os.truncate(pack / "train.npy", (pack / "train.npy").stat().st_size - 1)
    elif how == "foreign file":
        shutil.copy(pack / "holdout.npy", pack / "train.npy")
    elif how == "pickle":
        size = (pack / "train.npy").stat().st_size
        np.save(pack / "train.npy", np.array([print], object), allow_pickle=True)
        os.truncate(pack / "train.npy", size)
    elif how == "no pack.json":
        (pack / "pack.json").unlink()
    elif how == "cut pack.json":
        os.truncate(pack / "pack.json", 40)
    else:
        info.update({"other format": {"format": 99}, "other size": {"image_size": 64}, "odd counts": {"counts": 3}}[how])
        (pack / "pack.json").write_text(json.dumps(info))


@pytest.mark.parametrize("how", ["missing file", "shorter file", "foreign file", "pickle", "no pack.json", "cut pack.json", "other format",
                                 "other size", "odd counts"])
def test_a_pack_that_is_not_what_it_says_is_refused(how, packed, tmp_path):
    pack = shutil.copytree(packed[0], tmp_path / "pack")
    damage(pack, how)
    with pytest.raises(InputError, match="pack"):
        open_pack(pack)
    if how == "shorter file":
        for words in (["train.py", *TINY, "--data", pack, "--out", tmp_path / "run"], ["sample.py", "--score", pack]):
            run(*words, "--device", "cpu", cwd=tmp_path, status=2)
        assert not (tmp_path / "run").exists()


def test_training_on_raw_images_prepares_them_once(tree, tmp_path):
    words = ["train.py", *TINY, "--device", "cpu", "--data", tree, "--epochs", 1]
    assert "preparing" in run(*words, "--out", "a", cwd=tmp_path).stdout
    assert "preparing" not in run(*words, "--out", "b", cwd=tmp_path).stdout
    assert [p.name for p in (tmp_path / "packs").iterdir()] == [f"{tree.name}-32"]
