"""fastgrpo bench: what it measures, refuses, and writes down."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgrpo.bench import command, measure, operation, origin, report, turns, verdicts
from fastgrpo.bench.operation import OPERATIONS, Case, Implementation, label
from fastgrpo.bench.registry import REGISTRY
from fastgrpo.cli import main
from fastgrpo.logps import linear_logps, selective_logps

ROOT = Path(__file__).parents[1]
TINY = Case("linear", 8, 4, 300, 64, "fp32")
FIELDS = set(
    "op impl backend shape dtype mode ms_p50 ms_p20 ms_p80 peak_mb rel_err ok bytes flops roof_share device versions "
    "commit date command".split()
)


def rows_of(case, among=REGISTRY):
    return {label(row): row for row in turns.measure_case(case, among, quick=True, seconds=0.01)}


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_implementation_is_right_or_says_why_not(op, dtype, monkeypatch):
    monkeypatch.setattr(turns, "peak", lambda *_: 1.0)
    case = Case(op, 8, 8, 4096 if op == "step" else 300, 128 if op == "step" else 64, dtype)
    rows = rows_of(case, [each for each in REGISTRY if each.backend != "triton"])  # whose interpreter is slow
    timed = {name for name, row in rows.items() if row["ms_p50"] is not None}
    assert {"fastgrpo (cpu)", "eager"} <= timed or op in ("advantages", "loss", "step")
    for name, row in rows.items():
        assert (row["ms_p50"] is None) == (row["reason"] is not None), name
        assert row["ok"] is (None if row["reason"] is None and row["impl"] in ("copy", "GEMMs alone") else
                             row["reason"] is None), name  # fmt: skip
        if row["impl"] == "fastgrpo" and row["rel_err"] is not None and dtype == "fp32":
            assert row["rel_err"] < (3e-5 if op in ("sure", "flat") else 1e-5), name  # whose weights nearly cancel
    assert not [row for row in rows.values() if row["reason"] and "wrong" in row["reason"]]


def test_a_wrong_implementation_is_reported_and_not_timed(monkeypatch, capsys):
    right = next(each for each in REGISTRY if each.op == "linear" and each.name == "eager")

    def without_the_clip(inputs):
        results = right.step(inputs)
        return results | {"d_weight": results["d_weight"] * 1.01}

    def a_row_of_nans(inputs):
        results = right.step(inputs)
        results["d_hidden"][0, 0] = torch.nan
        return results

    def of_another_shape(inputs):
        return {"d_weight": right.step(inputs)["d_weight"][1:]}

    def that_fails(inputs):
        raise ZeroDivisionError("no such kernel")

    def that_computes_nothing(inputs):
        return {}

    wrong = [without_the_clip, a_row_of_nans, of_another_shape, that_fails, that_computes_nothing]
    calls = []

    def counted(step):
        return lambda inputs: calls.append(step.__name__) or step(inputs)

    added = [Implementation("linear", step.__name__, counted(step)) for step in wrong]
    monkeypatch.setattr(turns, "peak", lambda *_: 1.0)
    rows = rows_of(TINY, [right, *added])
    assert rows["eager"]["ok"] and rows["eager"]["ms_p50"] > 0
    assert calls == [step.__name__ for step in wrong]  # once each: to be checked
    for step in wrong:
        row = rows[step.__name__]
        assert row["ok"] is False and row["ms_p50"] is row["ms_p20"] is row["ms_p80"] is row["peak_mb"] is None
    assert re.match(r"wrong: relative error 0.0\d+, allowed 0.0001", rows["without_the_clip"]["reason"])
    assert "nan" in rows["a_row_of_nans"]["reason"] and "inf" in rows["of_another_shape"]["reason"]
    assert rows["that_fails"]["reason"] == "ZeroDivisionError: no such kernel"
    assert "results none, expected some of loss" in rows["that_computes_nothing"]["reason"]
    command.print_table(list(rows.values()))
    assert "without_the_clip" in capsys.readouterr().out


def test_what_fails_later_is_reported_too(monkeypatch):
    """In a timed call, and before any: the others, and the other cases, are still measured."""
    right = next(each for each in REGISTRY if each.op == "linear" and each.name == "eager")
    calls = []

    def fails_the_second_time(inputs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return right.step(inputs)

    monkeypatch.setattr(turns, "peak", lambda *_: 1.0)
    rows = rows_of(TINY, [right, Implementation("linear", "later", fails_the_second_time)])
    assert rows["eager"]["ok"] and rows["eager"]["calls"] >= 2
    assert rows["later"]["ok"] is False and rows["later"]["reason"] == "out of memory"
    assert rows["later"]["ms_p50"] is None
    monkeypatch.setattr(OPERATIONS["linear"], "inputs", lambda case: 1 / 0)
    (row,) = rows_of(TINY, [right]).values()
    assert row["ok"] is False and row["reason"] == "no inputs: ZeroDivisionError: division by zero"


def test_ours_are_measured_before_what_takes_long(monkeypatch):
    """Each checked right before its first turn, and with a row as soon as it is over: a stopped run keeps those."""
    events = []

    def side(name, **options):
        def step(inputs):
            events.append(name)
            return {}

        return Implementation("linear", name, step, **options)

    def check(each, inputs, row):
        events.append(f"check {each.name}")

    monkeypatch.setattr(turns, "check", check)
    monkeypatch.setattr(turns, "peak", lambda *_: 1.0)
    sides = [side("compiled", compiles=True), side("peer"), side("fastgrpo"), side("floor", is_floor=True)]
    for row in turns.measure_case(TINY, sides, seconds=0.001):
        events.append(f"row {row['impl']}")
        assert row["ms_p50"] > 0 and row["peak_mb"] == 1.0
    order = [event for event, before in zip(events, [None, *events], strict=False) if event != before]
    assert order == [
        *(e for name in ("floor", "fastgrpo", "peer", "compiled") for e in (f"check {name}", name, f"row {name}")),
        *(e for name in ("floor", "fastgrpo", "peer", "compiled") for e in (name, f"row {name}")),
    ]


def test_a_gpu_waits_while_the_host_enqueues(monkeypatch):
    """For every side; else the host's time would stand between the two events."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("synchronize")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append(cycles))
    measure.gpu_cycles.cache_clear()
    assert measure.gpu_cycles() == (1 << 23) / 2.0  # a millisecond's, by the device's own clock
    measure.gpu_cycles.cache_clear()
    clock = measure.Stopwatch(SimpleNamespace(x=torch.ones(1)), 0.001)
    clock._on_gpu, clock._flushed, clock._cycles = True, torch.ones(1), 4321
    events.clear()
    times = []
    for name in ("ours", "theirs"):
        clock.turn(lambda _: events.append("prepare"), lambda _, name=name: events.append(name), times)
    one_call = ["prepare", 4321, "record", "ours", "record", "synchronize"]
    assert events[:6] == one_call and events[-6:] == [*one_call[:3], "theirs", *one_call[4:]]
    assert set(times) == {2.0} and len(events) == 6 * (len(times) + 2)


def test_packages_that_are_missing_are_listed(monkeypatch):
    monkeypatch.setattr(operation.importlib.util, "find_spec", lambda name: None)
    assert "trl is not installed" in operation.needs("trl")(TINY)


def test_old_logps_keep_away_from_the_clip_edges():
    case = dataclasses.replace(TINY, op="loss", B=64, T=64)
    inputs = case.operation.inputs(case)
    ratio = (selective_logps(inputs.logits, inputs.ids) - inputs.old).exp()
    edges = torch.stack([(ratio - edge).abs().min() for edge in (0.8, 1.2)])
    assert edges.min() > 0.045
    assert ((ratio < 0.8) | (ratio > 1.2)).float().mean() > 0.01  # and some are clipped


SMALL = "bench --op logps --shape B=8,T=4,V=300 --dtype bf16 --seconds 0.01 --impl fastgrpo --impl eager --backend cpu"


@pytest.mark.parametrize("op, low, high", [("flat", 4, 9), ("sure", 0.1, 2)])
def test_policies_are_as_sure_as_they_are_called(op, low, high):
    case = Case(op, 4, 16, 8192, 512)
    inputs = OPERATIONS[op].inputs(case)
    _, entropies = linear_logps(inputs.hidden, inputs.weight, inputs.ids, return_entropy=True)
    assert low < entropies.mean() < high


def test_the_command_writes_rows(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    assert main([*SMALL.split(), "--device", "cpu", "--no-plot", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(FIELDS <= row.keys() for row in rows)
    assert {row["impl"] for row in rows} == {"fastgrpo", "eager", "copy"}
    measured = next(row for row in rows if row["backend"] == "cpu")
    assert measured["ok"] and measured["shape"] == {"B": 8, "T": 4, "V": 300} and measured["bytes"] == 8 * 4 * 300 * 2
    assert 0 < measured["ms_p20"] <= measured["ms_p50"] <= measured["ms_p80"] and measured["peak_mb"] >= 0
    printed = capsys.readouterr().out
    assert "targets:" in printed and "of GPUs" in printed and "s in all" in printed
    assert ".png" not in printed


def test_the_command_ends_with_a_table_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(turns, "peak", lambda *_: 1.0)
    assert main([*SMALL.split(), "--device", "cpu", "--op", "linear", "--shape", "B=8,T=4,V=300,H=16"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    *_, table, end = printed.split("\n\n")
    head, *lines = table.splitlines()
    assert head.split()[-6:] == ["fastgrpo", "eager", "compile", "trl", "liger", "floor"]
    assert [line.split(",")[0].strip() for line in lines] == ["logps", "linear", "linear"]
    assert all(re.search(r"bf16 +[\d.]+ ms +[\d.]+x +- +- +- +[\d.]+x$", line) for line in lines)
    assert re.fullmatch(r"fastgrpo-bench.png shows the times\n\d+ s in all\n", end)
    assert (tmp_path / "fastgrpo-bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_a_full_disk_takes_one_line(capfd):
    assert main([*SMALL.split(), "--device", "cpu", "--no-plot", "--json", "/dev/full"]) == 2
    assert capfd.readouterr().err == "fastgrpo bench: error: No space left on device\n"


def test_without_matplotlib_a_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgrpo._extras._is_installed", lambda package: package != "matplotlib")
    assert main([*SMALL.split(), "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "matplotlib" in line]
    assert lines == [
        "nothing drawn: the plot of the times needs matplotlib, not installed here: pip install 'fastgrpo[bench]'"
    ]
    assert not list(tmp_path.iterdir())
    assert main([*SMALL.split(), "--device", "cpu", "--plot", "x.png"]) == 2
    assert "fastgrpo bench --plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--plot", "x.png"]])
def test_a_picture_that_cannot_be_written(given, tmp_path, capsys, monkeypatch):
    """After the measurements: they are shown, and only who asked for the picture gets an error."""

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command.summary, "draw", fails)
    assert main([*SMALL.split(), "--device", "cpu", *given]) == (2 if given else 0)
    captured = capsys.readouterr()
    assert "in all" in captured.out
    expected = (
        "--plot: x.png cannot be written: No space left" if given else "nothing drawn: fastgrpo-bench.png cannot"
    )
    assert expected in (captured.err if given else captured.out)


@pytest.mark.parametrize("ms", [1.234e-3, 0.0456, 1.0, 999.6, 12_345.6])
def test_tables_fit_100_columns(ms, capsys):
    """Whatever the times, for everyone who is measured, at the largest sizes."""
    rows = []
    for inactive, softcap in ((0.0, None), (0.5, 30.0)):
        case = Case("linear", 1024, 4096, 256_000, 16_384, inactive=inactive, softcap=softcap)
        for each in {str(each): each for each in REGISTRY}.values():
            median = ms * (1, 5, 37, 137)[len(rows) % 4]
            rows.append(row_of(each.name, median, ms_p20=0.95 * median, ms_p80=1.05 * median, case=str(case),
                               on="cuda", backend=each.backend, mode=each.mode, roof_share=42.5, peak_mb=123_456,
                               inactive=inactive))  # fmt: skip
        rows.append(row_of("trl", None, reason="a reason " * 30, case=str(case)))
        command.print_table([row for row in rows if row["case"] == str(case)])
    print(command.summary.table(rows))
    print(verdicts.table(rows))
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if len(line) > 100 or line != line.rstrip()], lines
    assert sum("x " in line for line in lines) > 20


def test_the_picture_of_a_sweep_has_its_sizes_as_axis(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "plot", lambda rows, path: drawn.append(path))
    sweep = [row_of("fastgrpo", 1.0 * T, case=f"{T}", shape=dict(B=1, T=T, V=1000, H=10)) for T in (16, 32, 64)]
    command.summary.draw(sweep, tmp_path / "sweep.svg")
    assert drawn == [tmp_path / "sweep.svg"]
    command.summary.draw([*sweep[:1], row_of("GEMMs alone", 2.0), row_of("trl", None)], tmp_path / "bars.svg")
    assert len(drawn) == 1 and "GEMMs alone" in (tmp_path / "bars.svg").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "B=8,T=0"], "--shape: shape: expected B=8,T=64,V=151936,H=896 or some of them"),
        (["--shape", "N=8"], "expected B=8"),
        (["--impl", "nobody"], "--impl: expected some of .*trl.*got nobody"),
        (["--op", "step", "--dtype", "fp16"], "no case fits"),
        (["--inactive", "1.5"], "--inactive: expected a share"),
        (["--report", "nowhere"], "--report: "),
        (["--dtype", "fp16"], "no case fits"),
        (["--full", "--shape", "B=8"], "expected one of --quick, --full"),
        (["--plot", "rows.svg", "--no-plot"], "expected one of --plot and --no-plot"),
        (["--json", "nowhere/rows.jsonl"], "--json: no such folder"),
        (["--plot", "rows.xyz"], "--plot: expected a file that ends in .svg or .png"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def row_of(impl, ms, **others):
    row = dict(op="linear", impl=impl, backend="cpu", mode="", dtype="bf16", inactive=0.0, softcap=None, on="cpu",
               device="a CPU", case="a case", ms_p50=ms, rel_err=1e-3, roof_share=None, peak_mb=None,
               shape=dict(B=8, T=64, V=1000, H=10))  # fmt: skip
    return row | others


def test_targets_are_met_missed_or_not_measured():
    rows = [row_of("fastgrpo", 10.0), row_of("trl", 80.0), row_of("GEMMs alone", 5.0, rel_err=None)]
    found = {what: verdict for what, numbers, verdict in verdicts.verdicts(rows) if "(a case)" in numbers}
    assert found == {
        "from hidden states: our time over the GEMMs'": "missed",
        "from hidden states: TRL's time over ours": "met",
    }
    everything = {verdict for *_, verdict in verdicts.verdicts(rows)}
    assert everything == {"met", "missed", "not measured"}


@pytest.mark.parametrize("device, most", [("NVIDIA H100 80GB HBM3", 1.10), ("NVIDIA H200", 1.15), ("another", 1.15)])
def test_a_target_may_depend_on_the_device(device, most):
    for times, verdict in ((most - 0.01, "met"), (most + 0.01, "missed")):
        more = dict(op="loss", mode="in place", on="cuda", device=device)
        rows = [row_of("fastgrpo", times, **more), row_of("copy", 1.0, **more | dict(mode=""))]
        found = {what: rest for what, *rest in verdicts.verdicts(rows)}
        what = "GPU, one pass in place: our time over a copy's"
        assert found[what] == [f"{times:.3g}, at most {most:g} (a case)", verdict]


def test_a_recorded_command_has_no_folders(monkeypatch):
    words = "peers --out /tmp/a.b --cuda cluster=8 --scratch /tmp/c.d --json rows.jsonl --rehearse".split()
    monkeypatch.setattr("sys.argv", ["gpu.py", *words])
    assert origin.facts("cpu", "gpu.py")["command"] == "gpu.py peers --cuda cluster=8 --rehearse"


@pytest.mark.parametrize("last, verdict", [(100.0, "met"), (140.0, "missed")])
def test_memory_has_to_be_flat(last, verdict):
    def grown(tokens, extra):
        gradients = (tokens + 1000) * 10 * 2 / 2**20
        return row_of("fastgrpo", tokens * 1.0, case=f"{tokens}", shape=dict(B=1, T=tokens, V=1000, H=10),
                      peak_mb=extra + gradients)  # fmt: skip

    assert verdicts.growth_verdict([grown(100, 100.0), grown(400, 101.0), grown(1600, last)])[0][2] == verdict
    assert verdicts.growth_verdict([grown(100, 100.0), grown(400, 101.0)])[0][2] == "not measured"


def test_the_report_shows_who_failed_at_a_size():
    more = dict(ok=True, reason=None, model=None, device="a CPU", versions={}, date="", commit="c", command="fastgrpo")
    rows = [
        row_of("fastgrpo", 10.0, **more), row_of("eager", 20.0, **more),
        row_of("fastgrpo", 11.0, case="large", shape=dict(B=8, T=99, V=1000, H=10), **more),
        row_of("eager", None, case="large", shape=dict(B=8, T=99, V=1000, H=10), **more | {"reason": "out of memory"}),
        row_of("liger", None, **more | {"reason": "not installed"}),
    ]  # fmt: skip
    text = report.section(rows)
    assert re.search(r"792 tokens.*\| eager \| out of memory \|", text, re.DOTALL)
    assert "Not measured on this machine: liger: not installed." in text


def test_the_readme_holds_what_was_recorded(tmp_path):
    """Reporting once more changes neither the README nor docs/benchmarks.md."""
    pages = ["README.md", "docs/benchmarks.md"]
    texts = {name: (ROOT / name).read_text() for name in pages}
    (tmp_path / "docs").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    results = tmp_path / "benchmarks" / "results"
    for file in (ROOT / "benchmarks" / "results").glob("*/*.jsonl"):
        copied = results / file.parent.name / file.name
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(file.read_text())
    for _ in range(2):
        report.write_report(results, tmp_path / "README.md")
        assert {name: (tmp_path / name).read_text() for name in pages} == texts
    page = ROOT / "docs" / "benchmarks.md"
    assert all((page.parent / path).is_file() for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", texts[pages[1]]))


def recorded(**others):
    more = dict(ok=True, reason=None, model=None, device="a CPU", versions={}, date="", commit="c" * 40)
    return row_of("fastgrpo", 10.0, **more, command="fastgrpo bench") | others


def test_rows_of_uncommitted_files_are_left_out(tmp_path):
    """Before or after a good row of the same measurement; other operations' and rehearsed ones are not looked at."""
    changed, unknown = dict(commit="d" * 40 + "+changes"), dict(commit=None)
    rows = [
        recorded(), recorded(ms_p50=1.0, **changed),
        recorded(case="b", ms_p50=2.0, **changed), recorded(case="b", ms_p50=20.0),
        recorded(case="c", ms_p50=3.0, **changed), recorded(case="d", ms_p50=4.0, **unknown),
        recorded(case="e", op="one_pass", ms_p50=5.0), recorded(case="f", ms_p50=6.0, rehearsed=True),
    ]  # fmt: skip
    device = tmp_path / "results" / "a-cpu"
    device.mkdir(parents=True)
    (device / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, left_out = report.load(device)
    assert [row["ms_p50"] for row in good] == [10.0, 20.0]
    assert [row["ms_p50"] for row in left_out] == [3.0, 4.0]
    text = report.section(good, left_out)
    assert "2 measurements of `fastgrpo bench`" in text and "d" * 12 not in text
    (device / "rows.jsonl").write_text(json.dumps(recorded(**changed)) + "\n")
    with pytest.raises(ValueError, match="expected folders with .jsonl files of a committed tree"):
        report.write_report(tmp_path / "results", tmp_path / "README.md")


def test_a_page_without_its_marks_is_named_and_nothing_is_written(tmp_path):
    device, readme = tmp_path / "results" / "a-cpu", tmp_path / "README.md"
    device.mkdir(parents=True)
    (device / "rows.jsonl").write_text(json.dumps(recorded()) + "\n")
    marked = f"# A page\n\n{report.START}\n\n{report.END}\n"
    readme.write_text(marked)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text("# No marks\n")
    with pytest.raises(ValueError, match="expected .*benchmarks.md to have the lines"):
        report.write_report(tmp_path / "results", readme)
    assert readme.read_text() == marked


def test_the_short_table_has_the_size_that_most_were_measured_at():
    large = dict(case="large", shape=dict(B=8, T=99, V=1000, H=10))
    rows = [recorded(), recorded(ms_p50=30.0, backend="torch"), recorded(**large), recorded(impl="trl", ms_p50=50.0)]
    rows += [recorded(impl="liger", ms_p50=60.0, mode="not compiled")]
    rows += [recorded(ms_p50=7.0, command="fastgrpo bench --growth", case="growing")]
    text = report.short_table([rows])
    cells = ["from hidden states, bf16", "512 tokens, V = 1,000, H = 10", *("10 ms · 1e-03", "–", "50 ms · 1e-03")]
    assert f"| {' | '.join(cells)} | 60 ms" in text
    assert "Liger (not compiled) |" in text and "792" not in text and "| 7 ms" not in text
    other = recorded(impl="liger", ms_p50=55.0, dtype="fp32", case="in fp32", mode="compiled")
    text = report.short_table([[*rows, other]])  # modes that differ stand with their times
    assert "| Liger |" in text and "60 ms · 1e-03 (not compiled) |" in text and "55 ms · 1e-03 (compiled) |" in text
    assert "Not measured yet: any GPU" in text
    assert "GPU" not in report.short_table([rows, [recorded(on="cuda", device="a card")]])


AN_OPERATION = """
from fastgrpo.bench.inputs import Random
from fastgrpo.bench.operation import Case, Inputs, Operation, Target
from fastgrpo.bench.sides import add_copy
from fastgrpo.bench.targets import ratio

twice = Operation(
    "twice", title="twice the logits", place=9, page=9, short="twice",
    inputs=lambda case: Inputs(case=case, logits=Random(case).normal(case.B, case.T, case.V)),
    truth=lambda inputs: {"doubled": 2 * inputs.logits.double()},
    bytes=lambda case: 2 * case.B * case.T * case.V * 4,
    quick=(Case("twice", 2, 3, 50, dtype="fp32"),),
    targets=(Target("twice: eager's time over ours", "fp32", ratio("eager"), 1e-9),),
)
twice.add("fastgrpo")(lambda inputs: {"doubled": inputs.logits + inputs.logits})
twice.add("eager")(lambda inputs: {"doubled": 2 * inputs.logits})
twice.add("liger")(lambda inputs: {"doubled": 3 * inputs.logits})
add_copy(twice)
"""
WITH_IT = """
import sys
from fastgrpo.bench import ops

ops.__path__.append(sys.argv.pop(1))
from fastgrpo.bench import turns
from fastgrpo.cli import main

turns.peak = lambda *_: 1.0
sys.exit(main(sys.argv[1:]))
"""


def test_an_operation_is_one_file(tmp_path):
    """Its cases, sides, floor and target are measured, checked, printed and reported; nothing else has its name."""
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "twice.py").write_text(AN_OPERATION)
    device, readme = tmp_path / "results" / "a-cpu", tmp_path / "README.md"
    device.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for page in (readme, tmp_path / "docs" / "benchmarks.md"):
        page.write_text(f"# A page\n\n{report.START}\n\n{report.END}\n")

    def bench(*options):
        words = [sys.executable, "-c", WITH_IT, str(tmp_path / "ops"), "bench", *options]
        environment = {**os.environ, "FASTGRPO_COMMIT": "c" * 40}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    done = bench("--op", "twice", "--seconds", "0.01", "--no-plot", "--json", str(device / "rows.jsonl"))
    assert done.returncode == 0, done.stderr
    found = {row["impl"]: row for row in map(json.loads, (device / "rows.jsonl").read_text().splitlines())}
    assert list(found) == ["copy", "fastgrpo", "eager", "liger"]
    assert found["eager"]["ok"] and found["eager"]["roof_share"] > 0 and found["eager"]["bytes"] == 2400
    assert found["liger"]["ok"] is False and "wrong: relative error 0.5" in found["liger"]["reason"]
    assert "met          twice: eager's time over ours: " in done.stdout
    done = bench("--report", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    assert "Twice the logits, 6 tokens, V = 50:" in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| twice, fp32 | 6 tokens, V = 50 |" in readme.read_text()
