"""README's commands have options that exist, and its first commands and Python lines run."""
import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST
from helpers import ROOT, run
from PIL import Image

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = ["\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?m)(?:^    .*\n)+", TEXT)]
INLINE = [" ".join(words.split()) for words in re.findall(r"`(python [^`]+|torchrun [^`]+)`", TEXT)]


def commands(lines):
    """[[word, …], …] of lines of shell: those that start one of our scripts, torchrun or tensorboard."""
    found = []
    for line in lines:
        for part in re.split(r" && |; | \| ", line.replace("until ", "")):
            if not re.match(r"(\w+=\S+ )*(python|torchrun|tensorboard) ", part):
                continue
            words = shlex.split(part, comments=True)
            while "=" in words[0]:
                words.pop(0)
            if words[:1] == ["python"] and not words[1].endswith(".py"):
                words = []  # python -m pytest, python -m venv
            found += [words] * bool(words)
    return found


IN_BLOCKS = commands("\n".join(BLOCKS).replace("\\\n", " ").splitlines())


class Parsed(Exception):
    pass


def parse(script, words, monkeypatch):
    """Let a script's own parser read the words, and stop there. Raises SystemExit if it refuses them."""
    def stop_after(usual):
        def parse(*args, **options):
            parsed = usual(*args, **options)
            if sys._getframe(1).f_globals["__name__"] != "argparse":
                raise Parsed
            return parsed
        return parse

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises((Parsed, SystemExit)) as end:
        importlib.import_module(Path(script).stem).main()
    assert not (isinstance(end.value, SystemExit) and end.value.code)  # --help has status 0


@pytest.mark.parametrize("words", IN_BLOCKS + commands(INLINE), ids=" ".join)
def test_a_command_of_the_readme_has_options_that_exist(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    program, *words = words
    if program == "tensorboard":
        from tensorboard.plugins.core.core_plugin import CorePluginLoader

        parser = argparse.ArgumentParser()
        CorePluginLoader().define_flags(parser)
        parser.parse_args(words)
        return
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words)
        words = [args.training_script, *args.training_script_args]
    assert (ROOT / words[0]).exists()
    parse(words[0], words[1:], monkeypatch)


def test_the_readme_has_commands():
    assert len(IN_BLOCKS) >= 15


def test_the_first_commands_of_the_readme_run_in_their_order(demo):
    """The demo has run the first one, with fewer streets and a fast clock."""
    (first, *more), rest = IN_BLOCKS[0][1:], IN_BLOCKS[1:4]
    assert (first, more) == ("train.py", [])
    for _, script, *words in rest:
        run(script, *words, cwd=demo, first=FAST)
        for i, word in enumerate(words):
            assert word != "--out" or (demo / words[i + 1]).exists()


def test_the_python_lines_of_the_readme_run(demo, monkeypatch):
    monkeypatch.chdir(demo)
    code = "\n".join(block for block in BLOCKS if re.search("^(from|import) ", block, re.M))
    for name in re.findall(r'"([\w./-]+\.(?:jpe?g|png))"', code):
        if not Path(name).exists():  # the reader's own photograph
            Image.fromarray(np.full((80, 106, 3), 99, np.uint8)).save(name)
    names = {}
    exec(code, names)
    assert "from model import" in code and names["G"](names["z"]).shape[1] == 3
