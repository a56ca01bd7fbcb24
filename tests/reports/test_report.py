import json
import math
from decimal import Decimal

import pytest

import gramlip as gl
from gramlip.reports.report import LayerRow, LeftOut, Report, aligned, printable

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
    assert "[1.23456, 1.23457]" in text


def test_every_row_and_every_name_left_out_is_in_the_text():
    report = Report("x", tuple(row(f"l{i}") for i in range(3)), (LeftOut("b", (3,), "a bias"), LeftOut("q", (3, 3), "quantised", True)))
    lines = str(report).splitlines()
    assert all(any(line.startswith(f"l{i} ") for line in lines) for i in range(3))
    assert lines.index("weights without a bound") < lines.index("left out")
    assert "  a bias: b" in lines
    assert "  quantised: q" in lines


def test_a_shared_reason_is_said_once_and_a_single_one_in_its_row():
    lines = str(Report("x", (row("a", because="same; one"), row("b", because="same; two"), row("c", because="same")))).splitlines()
    assert "[1] same" in lines
    assert any(line.endswith("[1] one") for line in lines)
    assert sum("same" in line for line in lines) == 1


def test_columns_are_aligned():
    table = aligned([("a", "bb"), ("ccc", "d")], right=(1,))
    assert table == "a    bb\nccc   d"


def test_names_cannot_drive_the_terminal():
    report = Report("x\x1b[2J", (row("a\n\x1b[31mb"),), (LeftOut("c\rd", (1,), "one axis"),))
    assert "\x1b" not in str(report)
    assert "\r" not in str(report)
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
