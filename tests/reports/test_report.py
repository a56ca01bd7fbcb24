import io
import json
import math
import re
from decimal import Decimal

import pytest
from torch import nn

import gramlip as gl
from gramlip.reports.output import Screen, aligned, printable
from gramlip.reports.report import LayerRow, LeftOut, Report, proof_name

INF = math.inf


def row(name="fc", lower=1.0, upper=1.5, because="a matrix", size=None):
    return LayerRow(name, "Dense", (2, 3), size, gl.Bound(lower, upper, because), 0.25)


def test_json_is_the_schema_and_exact():
    report = Report(
        "x", (row(lower=0.1, upper=1 / 3, size=(8, 8)),), (LeftOut("b", (3,), "a bias"),), gl.Bound(1.0, 2.5, "chain"), ("note",)
    )
    data = json.loads(report.to_json())
    assert data["schema"] == 1
    assert data["target"] == "x"
    assert data["layers"] == [
        {
            "name": "fc",
            "op": "Dense",
            "weight_shape": [2, 3],
            "input_size": [8, 8],
            "lower": 0.1,
            "upper": 1 / 3,
            "because": "a matrix",
            "seconds": 0.25,
        }
    ]
    assert data["network"] == {"lower": 1.0, "upper": 2.5, "because": "chain"}
    assert data["left_out"] == [{"name": "b", "weight_shape": [3], "reason": "a bias", "is_weight": False}]


def test_infinity_is_null_and_json_stays_standard():
    text = Report("x", (row(lower=0.0, upper=INF),)).to_json()
    data = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))
    assert data["layers"][0]["upper"] is None
    assert data["network"] is None


def test_printed_decimals_are_rounded_outward():
    lower, upper = 1.23456712, 1.23456789
    text = str(Report("x", (row(lower=lower, upper=upper),)))
    assert "[1.2345, 1.2346]" in text


LEFT_OUT = (LeftOut("b", (3,), "a bias"), LeftOut("c", (3,), "a bias"), LeftOut("q", (3, 3), "quantised", True))


def test_a_report_is_short_and_a_verbose_one_names_everything():
    report = Report("x", tuple(row(f"l{i}") for i in range(3)), LEFT_OUT)
    short, long = str(report).splitlines(), report.text(verbose=True).splitlines()
    assert all(any(line.startswith(f"l{i} ") for line in lines) for i in range(3) for lines in (short, long))
    assert "left out: 2 x a bias" in short
    assert "weights without a bound: q (quantised)" in short
    assert long.index("weights without a bound") < long.index("left out")
    assert "  a bias: b, c" in long
    assert "  quantised: q" in long


def test_a_shared_reason_is_said_once_and_a_single_one_in_its_row():
    report = Report("x", (row("a", because="same; one"), row("b", because="same; two"), row("c", because="same")))
    lines = report.text(verbose=True).split("reasons\n")[1].splitlines()
    assert "  [1] same" in lines
    assert "    [1] one" in lines
    assert sum("same" in line for line in lines) == 1


def test_a_module_that_is_called_twice_has_its_reasons_twice():
    text = Report("x", (row("a", because="one"), row("a", because="two"))).text(verbose=True)
    assert "    one" in text.splitlines()
    assert "    two" in text.splitlines()


LONG = Report(
    "x" * 30,
    tuple(row(f"model.decoder.layers.{i}.self_attention.in_proj + model.decoder.layers.{i}.norm", lower=0.0, upper=INF) for i in range(3)),
    (LeftOut("step", (), "unbounded: no constant without a domain (file.py:3)"), *LEFT_OUT),
    gl.Bound(1.0, 123456.7, "product of layers"),
    ("a note of many words " * 12,),
    tuple(f"call {i}" for i in range(9)),
)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("verbose", [False, True])
def test_no_line_is_wider_than_the_window(width, verbose):
    plain = LONG.text(Screen(width), verbose=verbose)
    assert max(map(len, plain.splitlines())) <= width or verbose  # verbose text holds names whole
    coloured = LONG.text(Screen(width, colour=True), verbose=verbose)
    assert coloured != plain
    assert re.sub(r"\x1b\[\d+m", "", coloured).replace(" \n", "\n") == plain


def test_numbers_that_people_read():
    lines = LONG.text().splitlines()
    assert any("[1, 123460]" in line and "123457x" in line for line in lines)
    assert "no rule: call 0; call 1; call 2; and 6 more" in lines
    assert any(line.startswith("no finite constant: step, unbounded: no constant") for line in lines)
    assert "model.decoder.layers.0.self_attention.in_proj + model.decoder.layers.0.norm" in LONG.text(verbose=True)


def test_every_proof_of_a_layer_has_a_short_name():
    """No reason is cut: a new way to prove a norm needs a name in the table."""
    known = re.compile(r"(every size|this size|circulant|circular|matrix) \((thm \d+|R\d+)\)|a matrix")
    layers = [nn.Linear(3, 4)]
    for mode in ("zeros", "circular", "reflect", "replicate"):
        layers += [nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode), nn.Conv1d(2, 2, 3, stride=2, padding=1, padding_mode=mode)]
    for layer in layers:
        sizes = (None,) if isinstance(layer, nn.Linear) else (None, 4, 40)
        for size in sizes:
            bound = gl.bound(layer, input_size=size)
            assert known.fullmatch(proof_name(bound.because)), bound.because


class Window(io.StringIO):
    def isatty(self):
        return True


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "72")
    assert Screen.of(Window()) == Screen(72, colour=True)
    assert Screen.of(io.StringIO()) == Screen.of(None) == Screen(None, colour=False)
    monkeypatch.setenv("COLUMNS", "9")
    assert Screen.of(Window()).width == 40
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Screen.of(Window()).colour
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert not Screen.of(Window()).colour


def test_a_notebook_shows_a_table_and_the_reasons_behind_a_click():
    html = Report("<x>", (row("<b>", because="one; <two>"),), LEFT_OUT, gl.Bound(1.0, 2.0, "chain"))._repr_html_()
    assert "&lt;x&gt;" in html
    assert "<b>" not in html.split("<table>")[1]
    assert "<li>one</li><li>&lt;two&gt;</li>" in html
    assert "<td style='text-align:left'>network</td>" in html
    assert "left out: 2 x a bias" in html
    assert "<details>" in gl.Bound(1.0, 2.0, "one; two")._repr_html_()


def test_columns_are_aligned():
    table = aligned([("a", "bb"), ("ccc", "d")], right=(1,))
    assert table == "a    bb\nccc   d"


def test_names_cannot_drive_the_terminal():
    report = Report("x\x1b[2J", (row("a\n\x1b[31mb"),), (LeftOut("c\rd", (1,), "one axis"),))
    for text in (str(report), report.text(Screen(50), verbose=True), report._repr_html_()):
        assert "\x1b" not in text
        assert "\r" not in text
    assert printable("\x1b") == "\\x1b"
    assert printable("größe λ") == "größe λ"


def test_above_names_what_is_not_proved():
    report = Report(
        "x", (row("a", upper=1.0), row("b", upper=2.0), row("c", upper=INF)), (LeftOut("w", (2, 2), "raw", True),), gl.Bound(0, 3.0, "")
    )
    assert [text.split(" (")[0] for text in report.above(1.0)] == ["b", "c", "w", "the network"]
    assert [text.split(" (")[0] for text in report.above(3.0)] == ["c", "w"]
    assert Report("x", (row(upper=1.0),)).above(1.0) == []


def test_above_compares_with_the_decimal_as_typed():
    report = Report("x", (row(lower=0.0, upper=0.1),))
    assert report.above(Decimal("0.1"))  # the float 0.1 lies above one tenth
    assert not report.above(0.1)


def test_a_report_of_weights_has_no_network():
    with pytest.raises(gl.InputError, match="holds weights alone"):
        _ = Report("x", (row(),)).upper
    network = Report("x", (row(),), network=gl.Bound(1.0, 2.0, "chain"))
    assert (network.lower, network.upper) == (1.0, 2.0)
