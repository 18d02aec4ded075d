"""Runs a tutorial as a reader would: its Python in one namespace, its commands in the same folder."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from robustav.cli import main as cli

PAGES = Path(__file__).parents[1] / "docs" / "tutorials"
LONGEST = 80  # lines


class Tutorial:
    """A page. Python that begins with `# NAME.py` is also that file; lines that begin with `robustav` are run."""

    def __init__(self, name, folder, monkeypatch, capsys):
        self.text = (PAGES / name).read_text(encoding="utf-8")
        self.name, self.folder, self.capsys = name, folder, capsys
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setattr(sys, "argv", [])
        self.monkeypatch = monkeypatch

    def run(self):
        """The namespace, what Python printed, and what each command printed."""
        names, printed, shown = {}, "", {}
        for language, block in re.findall(r"^```(python|console)\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL):
            if language == "python":
                if file := re.match(r"# (\w+\.py)\n", block):
                    (self.folder / file[1]).write_text(block, encoding="utf-8")
                self.capsys.readouterr()
                exec(compile(block, self.name, "exec"), names)
                printed += self.capsys.readouterr().out
            else:
                lines = block.replace("\\\n", " ").splitlines()
                shown |= {line: self.command(line) for line in lines if line.startswith("robustav ")}
        return names, printed, shown

    def command(self, line):
        self.monkeypatch.setattr(sys, "argv", shlex.split(line))
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = self.capsys.readouterr()
        assert not ended.value.code, f"{line}\n{captured.err}"
        return captured.out

    def check_page(self):
        """Short enough, and every link leads somewhere."""
        assert len(self.text.splitlines()) <= LONGEST
        prose = re.sub(r"^```.*?^```", "", self.text, flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            assert (PAGES / target).is_file(), target


def rows(table):
    """The first words of a report's lines: what was attacked with, and on what."""
    return [tuple(line.split()[:2]) for line in table.splitlines() if line.strip()]
