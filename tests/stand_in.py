"""A stand-in for MSLS by size: N tiny JPEGs in six archives, and all tables. Then what packing it takes.

    python tests/stand_in.py /tmp/msls --n 1600000                   # 1.3 GB, some minutes
    python tests/stand_in.py /tmp/msls --measure /tmp/pack           # runs prepare_data.py, prints a Markdown table
"""
import argparse
import io
import os
import random
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from helpers import command
from PIL import Image

VOLUMES, CITIES = 6, 30
TABLES = {"raw": "key,lon,lat,ca,captured_at,pano", "seq_info": "key,sequence_key,frame_number",
          "postprocessed": "key,easting,northing,unique_cluster,night,control_panel,view_direction"}


def jpeg(rng):
    """The bytes of a picture unlike the others, 700 or so."""
    image = Image.frombytes("RGB", (8, 6), rng.randbytes(144)).resize((96, 72))
    image.save(data := io.BytesIO(), "JPEG", quality=50)
    return data.getvalue()


def vary(picture, rng):
    """Another picture, quickly: the lowest frequencies of a JPEG get other weights in its first quantisation table."""
    table = picture.index(b"\xff\xdb") + 5
    weights = bytes(rng.randrange(4, 28) for _ in range(4))
    return picture[:table] + weights + picture[table + 4:]


def make(folder, n):
    """Write msls_images_vol_1.zip … vol_6.zip and msls_metadata.zip: n images of 30 cities, 40 frames per sequence."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    pictures = [jpeg(rng) for _ in range(256)]
    volumes = [zipfile.ZipFile(folder / f"msls_images_vol_{i + 1}.zip", "w") for i in range(VOLUMES)]
    with zipfile.ZipFile(folder / "msls_metadata.zip", "w", zipfile.ZIP_DEFLATED) as metadata:
        for city in range(CITIES):
            for part in range(2):
                home = f"train_val/city{city:02d}/{('query', 'database')[part]}"
                lines = {name: [f",{head}"] for name, head in TABLES.items()}
                for i in range(city * 2 + part, n, 2 * CITIES):
                    key, row = f"{rng.getrandbits(128):022x}"[:22], len(lines["raw"]) - 1
                    lines["raw"].append(f"{row},{key},37.617298,55.755826,271.31,{1400000000000 + i},{i % 97 == 0}")
                    lines["seq_info"].append(f"{row},{key},{city:02d}{part}{row // 40:019d},{row % 40}")
                    lines["postprocessed"].append(f"{row},{key},412345.67,6178901.23,{row},{i % 9 == 0},False,Forward")
                    entry = zipfile.ZipInfo(f"{home}/images/{key}.jpg")
                    volumes[i * VOLUMES // n].writestr(entry, vary(pictures[rng.randrange(256)], rng))
                for name, text in lines.items():
                    metadata.writestr(f"{home}/{name}.csv", "\n".join(text))
    for volume in volumes:
        volume.close()


def measure(folder, out):
    """Run prepare_data.py on a folder; print a Markdown table of its times and its memory."""
    words = command("prepare_data.py", "--image-size", 32, folder, out)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    began, laps, peak, tick = time.monotonic(), [], 0, os.sysconf("SC_CLK_TCK")
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        images = re.match(r"([\d,]+) of [\d,]+ images ", line)
        if images or " at most " in line:
            home = Path("/proc", str(process.pid))
            peak = int(re.search(r"VmHWM:\s+(\d+)", (home / "status").read_text())[1])
            cpu = sum(map(int, (home / "stat").read_text().rpartition(")")[2].split()[11:13])) / tick
            laps.append((time.monotonic() - began, cpu, int(images[1].replace(",", "")) if images else 0))
    assert process.wait() == 0
    (first, first_cpu, _), (last, cpu, n) = laps[0], laps[-1]
    print(f"| {n:,} images | time | of one core |\n|---|---|---|\n"
          f"| until the first frame | {first:.0f} s | {first_cpu:.0f} s |\n"
          f"| each image | {(last - first) / n * 1e6:.0f} µs | {(cpu - first_cpu) / n * 1e6:.0f} µs |\n"
          f"| memory, at most | {peak / 1e6:.2f} GB | |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=1_600_000, help="images (default: 1600000)")
    parser.add_argument("--measure", type=Path, metavar="OUT", help="pack what is in the folder")
    args = parser.parse_args()
    measure(args.folder, args.measure) if args.measure else make(args.folder, args.n)
