"""Several targets, what continuous integration reads, journals, ranks, and two targets side by side."""

import json
import os
import subprocess
import sys
from decimal import Decimal
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

import gramlip as gl
from gramlip import Bound
from gramlip.cli import main
from gramlip.cli.audit import diff, junit, ratio, sarif
from gramlip.reports import checkpoint
from gramlip.reports.checkpoint import Weights
from gramlip.reports.formats import read
from gramlip.reports.report import LayerRow, LeftOut, Report


def state():
    torch.manual_seed(0)
    layers = {f"fc{i}.weight": torch.randn(20 + 5 * i, 30) for i in range(6)}
    alike = {f"same{i}.weight": torch.randn(8, 8) for i in range(3)}
    return layers | alike | {"conv.weight": torch.randn(3, 3, 3, 3), "conv.bias": torch.ones(3)}


@pytest.fixture
def model(tmp_path):
    save_file(state(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def refused(capsys, *argv):
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def rows(report):
    found = report if isinstance(report, dict) else report.to_dict()
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found["layers"]]


# ---- several targets -----------------------------------------------------------------------------------------------------


def test_several_targets(model, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    save_file({"w": 3 * torch.eye(2)}, other)
    assert main(["audit", str(model), str(other), "--fail-above", "2", "--json", "-"]) == 1
    out, err = capsys.readouterr()
    assert [report["target"] for report in json.loads(out)["reports"]] == [str(model), str(other)]
    assert "w (upper 3" in err
    for _ in range(2):  # its own file it writes again
        assert main(["audit", str(model), str(other), "--json", str(tmp_path / "r.json")]) == 0
    text = capsys.readouterr().out
    assert text.index(str(model)) < text.index("fc0.weight") < text.index(str(other))
    assert "missing.pt does not exist" in refused(capsys, "audit", model, tmp_path / "missing.pt")
    assert "--html was given with 2 targets" in refused(capsys, "audit", model, other, "--html", tmp_path / "p.html")


# ---- JUnit and SARIF -----------------------------------------------------------------------------------------------------

REPORT = Report(
    "w & co.safetensors",
    (
        LayerRow("a<b>\x1b", "Dense", (2, 2), None, Bound(1.0, 1.5, "a matrix"), 0.25),
        LayerRow("c", "Dense", (2, 2), None, Bound(1.0, 3.0, "a matrix")),
        LayerRow("relu", "relu", (), None, Bound(0.0, 5.0, "an activation")),
    ),
    (LeftOut("q", (2, 2), "quantised", True), LeftOut("bias", (2,), "a bias")),
)


def test_junit_has_a_case_for_each_layer_and_weight():
    suite = ElementTree.fromstring(junit([REPORT], Decimal("2")))[0]
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("w & co.safetensors", "3", "2")
    found = {case.get("name"): case for case in suite}
    assert list(found) == ["a<b>\\x1b", "c", "q"]
    assert found["a<b>\\x1b"].find("failure") is None
    assert found["a<b>\\x1b"].get("time") == "0.250"
    assert found["c"].find("failure").get("message") == "upper 3 above 2"
    assert found["q"].find("failure").get("message") == "upper inf above 2"
    assert [suite.get("failures") for suite in ElementTree.fromstring(junit([REPORT, REPORT], None))] == ["0", "0"]


def test_sarif_has_a_result_for_each_layer_and_weight():
    log = json.loads(sarif([REPORT], Decimal("2")))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    known = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert {result["ruleId"] for result in run["results"]} <= known
    assert [(result["kind"], result["level"]) for result in run["results"]] == [("pass", "none"), ("fail", "error"), ("fail", "error")]
    assert {result["kind"] for result in json.loads(sarif([REPORT], None))["runs"][0]["results"]} == {"informational"}
    place = run["results"][1]["locations"][0]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "w & co.safetensors"
    assert place["logicalLocations"][0]["fullyQualifiedName"] == "c"


@pytest.mark.parametrize("option", ["--junit", "--sarif"])
def test_they_are_written_and_written_again(model, tmp_path, capsys, option):
    for _ in range(2):
        assert main(["audit", str(model), option, str(tmp_path / "out"), "--fail-above", "1e3"]) == 0
    assert main(["audit", str(model), option, "-"]) == 0
    capsys.readouterr()
    assert "was not written by" in refused(capsys, "audit", model, option, model)


# ---- diff ----------------------------------------------------------------------------------------------------------------


def test_the_ratio_holds_the_quotient_of_any_two_norms_inside():
    for a, b in ((Bound(1.0, 2.0, ""), Bound(3.0, 4.0, "")), (Bound(0.0, 2.0, ""), Bound(1.0, 4.0, "")), (Bound(0.1, 0.3, ""),) * 2):
        low, high = ratio(a, b)
        for x in (a.lower, a.upper):
            for y in (b.lower, b.upper):
                assert x == 0.0 or Decimal(low) * Decimal(x) <= Decimal(y) <= Decimal(high) * Decimal(x)
    zero = Bound(0.0, 0.0, "")
    assert ratio(zero, zero) == (1.0, 1.0)
    assert ratio(zero, Bound(1.0, 1.0, "")) == (0.0, float("inf"))
    assert ratio(Bound(1.0, 1.0, ""), zero)[0] == 0.0


def test_diff_of_two_files(model, tmp_path, capsys):
    later = state()
    later["fc0.weight"] = 2 * later["fc0.weight"]
    later["new.weight"] = torch.eye(3)
    del later["fc1.weight"]
    save_file(later, tmp_path / "later.safetensors")
    assert main(["diff", str(model), str(tmp_path / "later.safetensors"), "--rtol", "1e-4", "--json", str(tmp_path / "d.json")]) == 0
    text = capsys.readouterr().out
    assert "only in A: fc1.weight" in text
    assert "only in B: new.weight" in text
    found = json.loads((tmp_path / "d.json").read_text())
    assert (found["only_in_a"], found["only_in_b"]) == (["fc1.weight"], ["new.weight"])
    low, high = {row["name"]: row["ratio"] for row in found["layers"]}["fc0.weight"]
    assert 1.999 < low <= 2.0 <= high < 2.001
    for _ in range(2):
        assert main(["diff", str(model), str(model), "--json", str(tmp_path / "d.json")]) == 0
    assert main(["diff", str(model), str(model), "--json", "-"]) == 0
    capsys.readouterr()
    assert "does not exist" in refused(capsys, "diff", model, tmp_path / "missing.pt")


def test_diff_of_two_models_has_the_network():
    a = gl.audit(torch.nn.Linear(3, 2), (3,))
    assert diff(a, a)["layers"][-1]["name"] == "network"


# ---- journals ------------------------------------------------------------------------------------------------------------


def audited(path, journal, **options):
    return Weights("x", read(path)).audit(journal=journal, **options)


def test_a_journal_cut_anywhere_ends_in_the_same_report(model, tmp_path):
    journal = tmp_path / "journal"
    whole = audited(model, journal)
    assert rows(whole) == rows(audited(model, None))
    data = journal.read_bytes()
    assert data.count(b"\n") == 1 + 8  # three of one shape are bounded together
    header = data.index(b"\n") + 1
    for cut in (*range(header, len(data), 397), len(data) - 1, len(data)):
        journal.write_bytes(data[:cut])
        assert rows(audited(model, journal)) == rows(whole)
        assert journal.read_bytes()[: data.rindex(b"\n", 0, max(cut, header)) + 1] == data[: data.rindex(b"\n", 0, max(cut, header)) + 1]
        assert [json.loads(line) for line in journal.read_text().splitlines()]


def test_what_is_done_is_not_done_again(model, tmp_path, monkeypatch):
    whole = audited(model, tmp_path / "journal")
    monkeypatch.setattr(checkpoint, "certify_all", None)
    assert audited(model, tmp_path / "journal").to_dict() == whole.to_dict()


def test_a_process_that_is_killed_goes_on(model, tmp_path):
    script = (
        "import os, signal, sys; from gramlip.cli import main; from gramlip.reports import checkpoint\n"
        "add, count = checkpoint.Journal.add, []\n"
        "def killed(*args):\n    add(*args); count.append(1)\n    len(count) == 3 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.Journal.add = killed\nmain(sys.argv[1:])\n"
    )
    line = ["audit", str(model), "--resume", str(tmp_path / "j"), "--json", str(tmp_path / "r.json")]
    assert subprocess.run([sys.executable, "-c", script, *line], check=False).returncode == -9
    assert len((tmp_path / "j").read_text().splitlines()) == 1 + 3
    assert not (tmp_path / "r.json").exists()
    assert main(line) == 0
    assert rows(json.loads((tmp_path / "r.json").read_text())) == rows(audited(model, None))


@pytest.mark.parametrize("change", ["value", "value of the same time", "touched", "name", "rtol"])
def test_a_changed_checkpoint_is_refused(model, tmp_path, change):
    audited(model, tmp_path / "j")
    before, values = model.stat(), state()
    if change.startswith("value"):
        values["fc3.weight"][1, 1] += 1e-3
    if change == "name":
        values["fc9.weight"] = values.pop("fc3.weight")
    save_file(values, model)
    if change not in ("value", "touched"):
        os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(model, ns=(0, 10**18))
    expected = (
        "fc3.weight has changed" if change == "value of the same time" else f"{change if change == 'rtol' else '(files|tensors)'}.* changed"
    )
    with pytest.raises(gl.InputError, match=expected):
        audited(model, tmp_path / "j", rtol=1e-3 if change == "rtol" else 1e-2)


def test_a_journal_is_one_of_weights_in_one_file(model, tmp_path, capsys):
    assert "expected a file, and one TARGET" in refused(capsys, "audit", model, model, "--resume", tmp_path / "j")
    target = ("gramlip.demo:demo", "--input", "3,32,32")
    assert "expected a file, and one TARGET that holds weights alone" in refused(capsys, "audit", *target, "--resume", tmp_path / "j")
    assert "was not written by --resume" in refused(capsys, "audit", model, "--resume", model)
    assert main(["audit", str(model), "--resume", str(tmp_path / "j")]) == 0
    (tmp_path / "j").write_text((tmp_path / "j").read_text()[:-20] + "\n")
    capsys.readouterr()
    assert "is damaged" in refused(capsys, "audit", model, "--resume", tmp_path / "j")


# ---- ranks ---------------------------------------------------------------------------------------------------------------


def ranks(count, *line, program=("-m", "gramlip")):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *program, *map(str, line)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_share_the_layers_and_print_the_report_of_one(model, tmp_path, count):
    found = ranks(count, "audit", model, "--resume", tmp_path / "j", "--json", tmp_path / "r.json")
    assert found.returncode == 0, found.stderr
    assert rows(json.loads((tmp_path / "r.json").read_text())) == rows(audited(model, None))
    assert found.stdout.count("fc5.weight") == 1
    journals = [tmp_path / "j", *(tmp_path / f"j.{i}" for i in range(1, count))]
    done = [{row["name"] for line in file.read_text().splitlines()[1:] for row in json.loads(line)} for file in journals]
    assert all(done)
    assert sum(map(len, done)) == len(set().union(*done)) == 10
    report = audited(model, tmp_path / "j")  # one process goes on with what several did
    assert rows(report) == rows(audited(model, None))


FAILING = """
import os
from gramlip.cli import run
from gramlip.errors import InputError
from gramlip.reports.checkpoint import Weights
rows, count = Weights.rows, []
def failing(self, names, rtol):
    count.append(1)
    if os.environ["RANK"] == "1" and len(count) == 3:
        raise InputError("the disk of this rank is gone; expected it to stay")
    return rows(self, names, rtol)
Weights.rows = failing
run()
"""


def test_the_failure_of_one_rank_is_one_line_on_all_and_keeps_what_was_proved(model, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    found = ranks(2, "audit", model, "--resume", tmp_path / "j", program=(str(tmp_path / "failing.py"),))
    assert found.returncode != 0
    assert found.stderr.count("gramlip: error: the disk of this rank is gone; expected it to stay") == 2
    assert "reports/checkpoint.py" not in found.stderr  # no traceback but that of torchrun
    assert found.stdout == ""
    assert len((tmp_path / "j.1").read_text().splitlines()) == 1 + 2
    assert (tmp_path / "j").read_text().count("\n") > 2
    found = ranks(2, "audit", model, "--resume", tmp_path / "j", "--json", tmp_path / "r.json")
    assert found.returncode == 0, found.stderr
    assert rows(json.loads((tmp_path / "r.json").read_text())) == rows(audited(model, None))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """One matrix that is dearer than all others together, wide, with an odd number of columns."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("large") / "m.safetensors"
    save_file({"big.weight": torch.randn(260, 16401, generator=generator), "small.weight": torch.randn(30, 20, generator=generator)}, path)
    return path


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_share_the_rows_of_the_largest_matrix(large, tmp_path, count):
    found = ranks(count, "audit", large, "--resume", tmp_path / "j", "--json", tmp_path / "r.json")
    assert found.returncode == 0, found.stderr
    several, alone = rows(json.loads((tmp_path / "r.json").read_text())), rows(audited(large, None))
    assert [row["name"] for row in several] == [row["name"] for row in alone]
    assert several[1] == alone[1]
    big, whole = several[0], alone[0]
    assert f"Gram matrices of {count} ranks, added" in big["because"]
    truth = float(torch.linalg.eigvalsh((w := load_file(large)["big.weight"].double()) @ w.T)[-1].sqrt())
    for row in (big, whole):
        assert row["lower"] <= truth * (1 + 1e-12)
        assert row["upper"] >= truth * (1 - 1e-12)
        assert row["upper"] <= 1.01 * row["lower"]
    assert rows(audited(large, tmp_path / "j")) == several  # one process goes on with it


BAD_ROWS = """
import os
from gramlip.cli import run
from gramlip.errors import InputError
from gramlip.reports.readers import Entry
part = Entry.part
def failing(self, axis, start, stop):
    if os.environ["RANK"] == "1":
        raise InputError("the disk of this rank is gone; expected it to stay")
    return part(self, axis, start, stop)
Entry.part = failing
run()
"""


def test_a_rank_that_cannot_read_its_rows_is_one_line_on_all(large, tmp_path):
    (tmp_path / "failing.py").write_text(BAD_ROWS)
    found = ranks(2, "audit", large, program=(str(tmp_path / "failing.py"),))
    assert found.returncode != 0
    assert found.stderr.count("the disk of this rank is gone; expected it to stay") == 2
    assert found.stdout == ""


def test_not_a_number_in_the_rows_of_one_rank_is_one_line_on_all(tmp_path):
    weight = torch.ones(260, 16401)
    weight[-1, -1] = torch.nan
    save_file({"big.weight": weight}, tmp_path / "m.safetensors")
    found = ranks(2, "audit", tmp_path / "m.safetensors")
    assert found.returncode != 0
    assert found.stderr.count("big.weight holds NaN or infinite values") == 2


# ---- a limit of time -----------------------------------------------------------------------------------------------------


def test_what_is_not_begun_in_time_is_named_and_done_the_next_time(model, tmp_path, capsys):
    line = ["audit", str(model), "--time-limit", "1e-9", "--json", str(tmp_path / "r.json")]
    assert main([*line, "--resume", str(tmp_path / "j")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["layers"]  # what begins a run is finished
    late = [row for row in report["left_out"] if "not begun within 1e-09 seconds" in row["reason"]]
    assert late
    assert all(row["is_weight"] and "type the same line again" in row["reason"] for row in late)
    assert len(late) + len(report["layers"]) == 10
    assert main([*line, "--resume", str(tmp_path / "j"), "--fail-above", "1e6"]) == 1  # nothing is known of what is left
    assert len(json.loads((tmp_path / "r.json").read_text())["layers"]) > len(report["layers"])
    assert main(line) == 0
    assert "type --resume JOURNAL" in (tmp_path / "r.json").read_text()
    whole = audited(model, tmp_path / "j")
    assert rows(whole) == rows(audited(model, None))
    capsys.readouterr()
