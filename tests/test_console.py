"""What people name their folders, classes and captions comes out as it is."""

import re
from pathlib import Path

import tiny
from rich.table import Table

import cmd_jax
from cmd_jax.performance.goodput import Clock
from cmd_jax.report.console import make_console
from cmd_jax.report.training import Metrics, StepLog
from cmd_jax.running.flight import FlightRecord

TRICKY = "runs/exp[lr=1e-2]/[bold]x[/bold] [/] :smile: {x} https://a.b/c?d=1"


def test_texts_are_printed_as_they_are_in_one_line(capsys):
    line = f"wrote {TRICKY} " + 30 * "and on "
    make_console().print(line)
    assert capsys.readouterr().out == f"{line}\n"


def test_cells_are_printed_as_they_are(capsys):
    table = Table("name", title=TRICKY)
    table.add_row(TRICKY)
    make_console(file_width=200).print(table, soft_wrap=False)
    title, _, _, _, row, _ = capsys.readouterr().out.splitlines()
    assert title.strip() == TRICKY and row.strip("│ ") == TRICKY


def test_progress_shows_what_it_is_given(tmp_path):
    metrics, console = Metrics(tmp_path, 0, writes=False), make_console(quiet=True)
    options, flight = tiny.config_of("content").train, FlightRecord(tmp_path)
    report = StepLog("content", options, 0, str, metrics, flight, console, Clock(), dict)
    report.progress.update(report.task, description=TRICKY, shown=TRICKY)
    (task,) = report.progress.tasks
    shown = [str(column.render(task)) for column in report.progress.columns]
    assert [text for text in shown if "smile" in text or "☺" in text or "😄" in text] == [TRICKY, TRICKY]


def test_there_is_one_maker_of_consoles():
    texts = {path.name: path.read_text() for path in Path(cmd_jax.__file__).parent.rglob("*.py")}
    makers = [name for name, text in texts.items() if re.search(r"\bConsole\(|Text\.from_markup|RichHandler", text)]
    assert makers == ["console.py"]
