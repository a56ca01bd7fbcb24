import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

import gramlip as gl
from gramlip import targets
from gramlip.cli import audit, lab, main, parser
from gramlip.reports import output

RUN = [sys.executable, "-c", "import sys; from gramlip.cli import main; sys.exit(main())"]


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def refused(capsys, *argv):
    """The one line that is printed when the input cannot be used."""
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gramlip: error: ")
    assert err.count("\n") == 1
    return err


def test_the_table_names_every_layer_and_what_is_left_out(model, capsys):
    assert main(["audit", str(model)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "0.weight" in out
    assert "3.weight" in out
    assert "3 x running statistics of a normalisation" in out
    assert main(["audit", str(model), "--verbose"]) == 0
    assert "running statistics of a normalisation: 1.num_batches_tracked, 1.running_mean, 1.running_var" in capsys.readouterr().out


def test_json_on_standard_output_is_json_alone_and_true(model, capsys):
    assert main(["audit", str(model), "--json", "-", "--rtol", "1e-4"]) == 0
    out, _ = capsys.readouterr()
    data = json.loads(out)
    assert data["schema"] == 1
    assert data["network"] is None
    rows = {row["name"]: row for row in data["layers"]}
    assert set(rows) == {"0.weight", "3.weight"}
    assert set(rows["3.weight"]) == {"name", "op", "weight_shape", "input_size", "lower", "upper", "because", "seconds"}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    truth = float(torch.linalg.svdvals(net[3].weight.detach().double())[0])
    assert rows["3.weight"]["lower"] <= truth <= rows["3.weight"]["upper"] <= (1 + 1e-4) * rows["3.weight"]["lower"]


def test_json_to_a_file_beside_the_table(model, folder, capsys):
    assert main(["audit", str(model), "--json", str(folder / "r.json")]) == 0
    assert "3.weight" in capsys.readouterr().out
    assert len(json.loads((folder / "r.json").read_text())["layers"]) == 2
    assert [p.name for p in folder.iterdir()] == ["r.json"]


def test_fail_above(model, capsys):
    assert main(["audit", str(model), "--fail-above", "1e6"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["audit", str(model), "--fail-above", "1e-3"]) == 1
    out, err = capsys.readouterr()
    assert out
    assert err.startswith("gramlip: above 0.001: 0.weight (upper ")
    assert "3.weight (upper " in err


def test_fail_above_fails_where_a_weight_has_no_bound(tmp_path, capsys):
    save_file({"a": torch.eye(2), "six": torch.ones(1, 1, 1, 1, 1, 1)}, tmp_path / "x.safetensors")
    assert main(["audit", str(tmp_path / "x.safetensors"), "--fail-above", "5"]) == 1
    assert capsys.readouterr().err == "gramlip: above 5: six (upper inf)\n"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "text", "", "1e-400", "1e308"])
def test_wrong_rtol(model, capsys, value):
    assert "expected a positive number such as 1e-2" in refused(capsys, "audit", model, f"--rtol={value}")


@pytest.mark.parametrize("value", ["0,3", "-3", "3,,4", "text", "", "3.5", "99999999999", "²"])
def test_wrong_input(model, capsys, value):
    assert "expected positive sizes joined by commas" in refused(capsys, "audit", model, f"--input={value}")


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "text", ""])
def test_wrong_limit(model, capsys, value):
    assert "expected a number of at least 0" in refused(capsys, "audit", model, f"--fail-above={value}")


@pytest.mark.parametrize("value", ["nan", "-inf", "1e400", "text", ""])
def test_wrong_effort(model, capsys, value):
    assert "expected a finite number" in refused(capsys, "audit", model, f"--effort={value}")


@pytest.mark.parametrize("value", ["tpu", "cpu:9", "cuda:99", ""])
def test_wrong_device(capsys, value):
    assert f"{value!r} was given; expected cpu" in refused(capsys, "bench", f"--device={value}")


def test_an_input_shape_says_nothing_about_weights_alone(model, capsys):
    assert "holds weights alone" in refused(capsys, "audit", model, "--input", "3,32,32")


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["audit"], ["audit", "a", "--nonsense"]])
def test_wrong_usage_is_one_line(capsys, argv):
    assert "--help" in refused(capsys, *argv)


def test_what_a_command_does_not_know_points_to_its_own_help(model, capsys):
    for given in ("--nonsense", "--rto=1e-2"):  # options are written in full
        assert f"unrecognized arguments: {given}: type gramlip audit --help" in refused(capsys, "audit", model, given)


def test_a_value_may_begin_with_a_minus(model, capsys):
    assert "holds weights alone" in refused(capsys, "audit", model, "--domain", "-1,2")


def test_help_and_version(capsys):
    for argv, expected in ((["--help"], "audit"), (["audit", "--help"], "--fail-above"), (["--version"], f"gramlip {gl.__version__}\n")):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
        assert expected in capsys.readouterr().out


def test_the_package_runs_as_a_module():
    found = subprocess.run([sys.executable, "-m", "gramlip", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"gramlip {gl.__version__}\n"


def test_every_command_module_adds_a_command(capsys):
    names = [*audit.COMMANDS, *lab.COMMANDS]
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert names
    assert all(name in text for name in names)


def test_unusable_targets(tmp_path, capsys):
    assert "does not exist" in refused(capsys, "audit", tmp_path / "missing.pt")
    assert "an empty TARGET was given" in refused(capsys, "audit", "")
    assert "does not exist" in refused(capsys, "audit", "missing\nfile\x1b[31m")
    assert "is a folder" in refused(capsys, "audit", tmp_path)
    assert "unknown kind" in refused(capsys, "audit", "gopher:x")
    (tmp_path / "x.pt").write_bytes(b"")
    assert "is empty" in refused(capsys, "audit", tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_bytes(save({"w": torch.ones(9, 9)})[:-9])
    assert "cannot be read as safetensors" in refused(capsys, "audit", tmp_path / "x.safetensors")
    save_file({"fc.weight": torch.full((2, 2), float("nan"))}, tmp_path / "x.safetensors")
    assert "x.safetensors: fc.weight holds NaN" in refused(capsys, "audit", tmp_path / "x.safetensors")
    save_file({"fc.weight": torch.ones(2, 0)}, tmp_path / "x.safetensors")
    assert "fc.weight has shape (2, 0)" in refused(capsys, "audit", tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["", "missing/r.json", ".", "/dev/null"])
def test_unusable_output_is_refused_before_the_work(folder, capsys, monkeypatch, name):
    monkeypatch.chdir(folder)
    assert "--json" in refused(capsys, "audit", "missing.pt", f"--json={name}")


INDEX = {"metadata": {}, "weight_map": {"w": "shard.safetensors"}}
REPORT = '{\n  "schema": 1,\n  "target": "old"\n}\n'


@pytest.mark.parametrize(
    "name", ["model.safetensors", "./out/../model.safetensors", "link", "shard.safetensors", "index.json", "usermod.py"]
)
@pytest.mark.parametrize(("command", "option"), [("audit", "--json"), ("audit", "--html"), ("compare", "--json"), ("bench", "--json")])
def test_no_output_takes_the_place_of_what_is_read(model, folder, capsys, monkeypatch, command, option, name):
    monkeypatch.chdir(model.parent)
    (model.parent / "link").symlink_to(model)
    save_file({"w": torch.eye(2)}, "shard.safetensors")
    (model.parent / "index.json").write_text(json.dumps(INDEX, indent=2))
    (model.parent / "usermod.py").write_text("import gramlip\n")
    before = {file.name: file.read_bytes() for file in model.parent.iterdir() if file.is_file()}
    target = [] if command == "bench" else ["index.json"]
    assert f"{option} {name} exists and was not written by {option}; expected a new name" in refused(capsys, command, *target, option, name)
    assert {file.name: file.read_bytes() for file in model.parent.iterdir() if file.is_file()} == before


def test_what_a_command_wrote_it_writes_again(model, folder, capsys):
    page, report, plot = folder / "p.html", folder / "r.json", folder / "p"
    report.touch()  # an empty file has nothing to lose
    for _ in range(2):
        assert main(["audit", str(model), "--html", str(page), "--json", str(report)]) == 0
        for kind in ("png", "pdf", "svg"):
            assert main(["compare", str(model), "--methods", "frobenius", "--trials", "1", "--plot", f"{plot}.{kind}"]) == 0
    assert main(["compare", str(model), "--methods", "frobenius", "--trials", "1", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["rows"]


@pytest.mark.parametrize(("command", "options"), [("audit", ("--json", "--html")), ("compare", ("--json", "--plot"))])
def test_two_outputs_are_two_files(model, folder, capsys, command, options):
    both = [part for option in options for part in (option, folder / "x.png")]
    assert f"{' and '.join(options)} name the same file" in refused(capsys, command, model, *both)
    assert list(folder.iterdir()) == []


def test_a_folder_without_permission_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr(output.os, "access", lambda path, mode: False)  # the superuser, who may run this, can write everywhere
    assert "cannot be written" in refused(capsys, "audit", "missing.pt", "--json", folder / "r.json")


@pytest.mark.parametrize("name", ["demo", "demo-regularised"])
def test_a_demo_is_read_from_the_package(tmp_path, capsys, monkeypatch, name):
    (tmp_path / "data").mkdir()
    save_file({"fc.weight": torch.eye(2)}, tmp_path / "data" / f"{name}.safetensors")
    monkeypatch.setattr(targets.resources, "files", lambda package: {"gramlip": tmp_path}[package])
    assert main(["audit", name, "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["target"], [row["name"] for row in data["layers"]]) == (name, ["fc.weight"])
    save_file({"other.weight": torch.eye(2)}, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert main(["audit", name]) == 0
    assert f"the file of that name is not read: type ./{name} for it" in capsys.readouterr().err
    assert main(["audit", f"./{name}", "--json", "-"]) == 0
    assert "other.weight" in capsys.readouterr().out


@pytest.mark.parametrize(("failure", "code"), [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)])
def test_an_interrupted_write_leaves_the_old_file_whole(model, folder, capsys, monkeypatch, failure, code):
    (folder / "r.json").write_text(REPORT)

    def fail(descriptor):
        raise failure

    monkeypatch.setattr(output.os, "fsync", fail)
    assert main(["audit", str(model), "--json", str(folder / "r.json")]) == code
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("r.json", REPORT)]
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_is_written_through_a_link_with_the_usual_permissions(model, folder, capsys):
    (folder / "real").mkdir()
    (folder / "r.json").symlink_to(folder / "real" / "r.json")
    assert main(["audit", str(model), "--json", str(folder / "r.json")]) == 0
    assert (folder / "r.json").is_symlink()
    assert (folder / "real" / "r.json").stat().st_mode & 0o600 == 0o600
    assert json.loads((folder / "r.json").read_text())["schema"] == 1


def test_ctrl_c_is_one_line_and_130(tmp_path):
    (tmp_path / "slow.py").write_text("def make():\n    print('ready', flush=True)\n    __import__('time').sleep(600)\n")
    line = [*RUN, "audit", "slow:make", "--input", "4"]
    line[2] = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {line[2]}"  # jobs in the background ignore it
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            assert process.stderr.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", "gramlip: interrupted\n")


@pytest.mark.parametrize("start", ["script", "-m"])
def test_ctrl_c_while_torch_is_imported_is_one_line_and_130(start, tmp_path):
    (tmp_path / "torch").mkdir()  # stands before torch, and takes longer
    (tmp_path / "torch" / "__init__.py").write_text("print('importing', flush=True)\n__import__('time').sleep(600)\n")
    (tmp_path / "gramlip").write_text("import sys\nfrom gramlip.cli import main\nsys.exit(main())\n")
    path = os.pathsep.join([str(tmp_path), str(Path(gl.__file__).parent.parent)])
    run = [sys.executable, *(["-m", "gramlip"] if start == "-m" else [str(tmp_path / "gramlip")]), "--help"]
    with subprocess.Popen(
        run,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    ) as process:
        try:
            assert process.stdout.readline() == "importing\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", "gramlip: interrupted\n")


def test_a_program_that_uses_the_library_keeps_its_ctrl_c():
    shown = "import gramlip, signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    line = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {shown}"
    assert subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_reader_that_has_gone_away_is_no_error(model):
    process = subprocess.Popen([*RUN, "audit", str(model)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
    process.stderr.close()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_only_on_a_terminal(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(output.watched(["a", "b"])) == ["a", "b"]
    out, err = capsys.readouterr()
    assert out == ""
    assert ("b 0/2" in err) == terminal


def test_the_audit_of_the_demo_fits_a_screen_in_the_order_of_the_model(capsys):
    assert main(["audit", "demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 24
    rows = [line.split()[0] for line in lines[3:11]]
    assert rows[0] == "stem.conv.weight"
    assert rows[-1] == "head.weight"


def test_the_layers_of_a_file_stand_in_the_order_of_their_numbers(tmp_path, capsys):
    save_file({f"layers.{i}.weight": torch.eye(2) for i in range(12)}, tmp_path / "x.safetensors")
    assert main(["audit", str(tmp_path / "x.safetensors"), "--json", "-"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["layers"]] == [f"layers.{i}.weight" for i in range(12)]


def subparsers():
    return next(action.choices for action in parser()._actions if isinstance(action.choices, dict))


@pytest.mark.parametrize("name", sorted(subparsers()))
def test_every_command_has_examples_that_it_understands(name):
    typed = [line.split()[1:] for line in (subparsers()[name].epilog or "").splitlines() if line.startswith("  gramlip ")]
    assert typed
    for words in typed:
        assert parser().parse_args(words).run
