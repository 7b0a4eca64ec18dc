from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facespec.codec import MAX_TEXT, build, check_types, parse_json, short
from facespec.errors import RetinaFaceError, SpecError


@dataclass(frozen=True)
class Lens:
    focal_mm: float = 50.0
    apertures: tuple[float, ...] = (1.8, 22)


@dataclass(frozen=True)
class Camera:
    name: str = "box"
    shots: int = 0
    flash: bool = False
    owner: str | None = None
    size_hw: tuple[int, int] = (24, 36)
    lens: Lens = field(default_factory=Lens)
    films: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def _plain(camera: Camera) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(camera)))
    return plain


cameras = st.builds(
    Camera,
    shots=st.integers(-(1 << 61), 1 << 61),
    owner=st.none() | st.text(max_size=9),
    size_hw=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    lens=st.builds(Lens, st.floats(-1e29, 1e29), st.lists(st.integers(0, 9) | st.floats(0, 1)).map(tuple)),
    films=st.dictionaries(st.text(max_size=9), st.tuples(st.integers(0, 9), st.text(max_size=9))),
    notes=st.dictionaries(st.text(max_size=9), st.lists(st.none() | st.booleans())),
)


@given(cameras)
def test_what_is_written_is_read(camera: Camera) -> None:
    assert build(Camera, _plain(camera)) == camera
    check_types(camera)


def test_numbers_stay_as_they_were_written() -> None:
    text = '{"focal_mm": 50, "apertures": [2, 2.0]}'
    assert json.dumps(asdict(build(Lens, json.loads(text)))) == text
    by_hand = build(Lens, {"focal_mm": "1e-3", "apertures": [2, "4"]}, by_hand=True)
    assert json.dumps(asdict(by_hand)) == '{"focal_mm": 0.001, "apertures": [2.0, 4.0]}'


def test_fields_that_are_unknown_or_missing() -> None:
    with pytest.raises(SpecError, match=r"^missing fields \['apertures'\]$"):
        build(Lens, {"focal_mm": 1})
    with pytest.raises(SpecError, match=r"^unknown fields \['focal_mn'\]: did you mean focal_mm\?$"):
        build(Lens, {"focal_mn": 1})
    assert build(Camera, {"lens": {"focal_mm": 7}}, by_hand=True) == Camera(lens=Lens(7.0))
    with pytest.raises(SpecError, match=r"^unknown fields \['zoom'\]$"):
        build(Lens, {"zoom": 1}, by_hand=True)
    with pytest.raises(SpecError, match=r"^a\.lens: missing fields \['focal_mm'\]$"):
        build(Camera, {**_plain(Camera()), "lens": {"apertures": []}}, "a")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("name", 7, "name is 7: expected a text"),
        ("name", None, "name is None: expected a text"),
        ("name", "x" * MAX_TEXT, "name is too long"),
        ("shots", 1.0, "shots is 1.0: expected a whole number"),
        ("shots", True, "shots is True: expected a whole number"),
        ("shots", 1 << 62, "shots is too large"),
        ("flash", 1, "flash is 1: expected true or false"),
        ("owner", 1, "owner is 1: expected a text"),
        ("size_hw", [1], r"size_hw is \[1\]: expected 2 values"),
        ("size_hw", [1, 2, 3], r"size_hw is \[1, 2, 3\]: expected 2 values"),
        ("size_hw", [1, "2"], "size_hw is '2': expected a whole number"),
        ("size_hw", "12", "size_hw is '12': expected a list"),
        ("lens", None, "lens is missing or not an object"),
        ("lens", {"focal_mm": "5", "apertures": []}, r"lens\.focal_mm is '5': expected a number"),
        ("lens", {"focal_mm": True, "apertures": []}, r"lens\.focal_mm is True: expected a number"),
        ("lens", {"focal_mm": float("nan"), "apertures": []}, r"lens\.focal_mm is nan: expected a finite number"),
        ("lens", {"focal_mm": 10**400, "apertures": []}, r"lens\.focal_mm is 10+\.\.\.0+: expected a finite number"),
        ("lens", {"focal_mm": 1, "apertures": [1e30]}, r"lens\.apertures is 1e\+30: expected a finite number"),
        ("films", [], r"films is \[\]: expected an object"),
        ("films", {"a": [1, 2]}, r"films\['a'\] is 2: expected a text"),
    ],
)
def test_values_of_another_type_are_named(name: str, value: object, words: str) -> None:
    with pytest.raises(SpecError, match=f"^{words}"):
        build(Camera, {**_plain(Camera()), name: value})
    if name != "lens":
        with pytest.raises(SpecError, match=f"^{words}"):
            check_types(Camera(**{name: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", b"\xff\xfe", "[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_text_that_holds_no_object(text: str | bytes) -> None:
    with pytest.raises(SpecError, match=r"^camera: not (JSON: |a JSON object$)"):
        parse_json(text, "camera")


deep = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.just("lens"), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*_plain(Camera()), "zoom"]), deep), st.booleans())
def test_whatever_data_holds_it_is_read_or_refused_in_one_short_line(data: dict[str, Any], by_hand: bool) -> None:
    message = ""
    try:
        check_types(build(Camera, data, by_hand=by_hand))
    except RetinaFaceError as error:
        message = str(error)
    assert len(message) < 300


def test_values_in_messages_are_short() -> None:
    wide: Any = "x"
    for _ in range(9):
        wide = [wide] * 9
    assert len(short(wide)) == 200
    assert short([1, "a"]) == "[1, 'a']"


def test_an_integer_too_long_to_write_is_named_all_the_same() -> None:
    """Python refuses to write more than 4,300 digits; hexadecimal text is read to any length."""
    assert short(1 << 20_000) == "int too long to write"
    with pytest.raises(SpecError, match="shots is too large"):
        build(Camera, {"shots": 1 << 20_000}, by_hand=True)
    with pytest.raises(SpecError, match="name is int too long to write: expected a text"):
        build(Camera, {"name": 1 << 20_000}, by_hand=True)
    with pytest.raises(SpecError, match="not JSON"):
        parse_json("[" + "9" * 5000 + "]", "camera")
