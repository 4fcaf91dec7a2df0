"""Images of every kind become the right frame or a line in skipped.csv. A pack is complete or does not exist."""
import csv
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import zipfile

import numpy as np
import pytest
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
    line = next(line for line in text.splitlines() if "no sequence" in line)
    assert line.startswith("80 images") and "both splits" in line and "msls_metadata.zip" in line
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
    assert "paris: 40 of 40 listed images are missing" in text and "zurich: " not in text.split(" GB")[0]
    assert reasons(tmp_path / "out")["msls_images_vol_1.zip"].startswith("unreadable archive")
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
    run(*PREPARE, write_tree(tmp_path / "in", pictures), tmp_path / "out", "--holdout", 0)
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
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + signum and stderr == "", (process.returncode, stderr)
    assert list(tmp_path.iterdir()) == []


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
        done = run(script, *words, tmp_path / f"{n}.zip", tmp_path / str(n))
        peaks.append(1024 * int(done.stdout.split()[-1]))
    size = (tmp_path / "1000" / "train.npy").stat().st_size
    assert size == 128 + 1000 * 160 * 214 * 3 and peaks[1] - peaks[0] < size / 2, peaks


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
    assert f"using {name}, made on {time.strftime('%Y-')}" in text and "Delete it to make a new one" in text
    assert [path.name for path in (tmp_path / "packs").iterdir()] == [f"{tree.name}-32"]


def test_a_pack_of_other_images_with_the_same_name_is_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent in "ab":
        write_tree(tmp_path / parent / "photos", streets(6))
    pack = prepare_data.find_pack("a/photos", 32)
    assert prepare_data.find_pack("a/photos", 32) == prepare_data.find_pack(pack, 32) == pack
    with pytest.raises(InputError, match="packs/photos-32"):
        prepare_data.find_pack("b/photos", 32)


@pytest.mark.parametrize("data", ["blank", "missing"])
def test_data_without_pictures_leaves_no_packs_folder(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank").mkdir()
    with pytest.raises(InputError, match="name (a|the) folder"):
        prepare_data.find_pack(data, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["blank"]
