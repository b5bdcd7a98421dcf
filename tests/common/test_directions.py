"""Runs are named UP or UP/DOWN."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditherps.codecs import codec_names, parse
from ditherps.errors import OptionError
from ditherps.job import directions, job_options

SPECS = ("none", "bf16", "dqsg:levels=1.5,bucket=512", "scaled:inner=(dqsg:levels=3)", "rotated:inner=(none)")


@pytest.mark.parametrize(
    ("text", "up", "down"),
    [
        ("dqsg", "dqsg", ""),
        ("dqsg/none", "dqsg", "none"),
        ("none/dqsg:levels=3", "none", "dqsg:levels=3"),
        ("dqsg:coder=rans,resolution=3/dqsg", "dqsg:coder=rans,resolution=3", "dqsg"),
        ("scaled:inner=(dqsg:levels=3)/scaled:inner=(dqsg)", "scaled:inner=(dqsg:levels=3)", "scaled:inner=(dqsg)"),
        ("ndqsg", "ndqsg", ""),
        ("ndqsg/dqsg", "ndqsg", "dqsg"),
    ],
)
def test_the_slash_parts_them(text: str, up: str, down: str) -> None:
    assert directions(text) == (up, down)


@pytest.mark.parametrize("text", ["", "/", "dqsg/", "/none", "dqsg//none", "dqsg/none/none"])
def test_another_form_is_refused_and_the_form_is_told(text: str) -> None:
    with pytest.raises(OptionError) as raised:
        directions(text)
    assert (raised.value.option, raised.value.value) == ("codec", text)
    assert raised.value.allowed == "UP or UP/DOWN, each NAME or NAME:option=value,..., such as dqsg/none"


@pytest.mark.parametrize(
    ("text", "option", "allowed"),
    [
        ("nope/dqsg", "codec", "none, bf16, dqsg"),
        ("dqsg/nope", "codec", "none, bf16, dqsg"),
        ("dqsg:levels=0.3/none", "levels", "0.5, 1, 1.5"),
        ("none/dqsg:levels=0.3", "levels", "0.5, 1, 1.5"),
        ("dqsg/ndqsg", "downlink.codec", "without side information"),
        # A slash inside parentheses is the value's: there is no run whose inner codec goes both ways.
        ("scaled:inner=(dqsg/none)", "codec", "none, bf16, dqsg"),
        ("scaled:inner=(dqsg/none", "codec", "none, bf16, dqsg"),
        ("dqsg)/none", "codec", "none, bf16, dqsg"),
    ],
)
def test_both_codecs_are_checked(text: str, option: str, allowed: str) -> None:
    with pytest.raises(OptionError) as raised:
        directions(text)
    assert option in raised.value.option
    assert allowed in raised.value.allowed


@pytest.mark.parametrize("up", SPECS)
@pytest.mark.parametrize("down", ["", *SPECS])
def test_any_two_come_apart_and_say_what_the_job_says(up: str, down: str) -> None:
    text = f"{up}/{down}" if down else up
    assert directions(text) == (up, down)
    options = job_options(text)
    assert options["codec"] == parse(up).name
    assert parse(up) == type(parse(up))(**options["codec_options"])
    assert options.get("downlink") == ({"codec": down} if down else None)


def test_what_a_job_says() -> None:
    expected: dict[str, Any] = {"codec": "dqsg", "codec_options": {"levels": 1.5}, "downlink": {"codec": "none"}}
    assert job_options("dqsg:levels=1.5/none") == expected
    assert job_options("dqsg") == {"codec": "dqsg", "codec_options": {}}


@given(st.text("dqsgnone/:=,()", max_size=24))
def test_a_text_is_taken_apart_without_loss_or_refused(text: str) -> None:
    try:
        up, down = directions(text)
    except OptionError:
        return
    assert text == (f"{up}/{down}" if down else up)
    assert parse(up).name in codec_names()
