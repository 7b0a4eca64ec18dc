"""Checkpoints of a kilobyte that would take gigabytes, hours or the process: refused in one line, at once."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from facespec.errors import WeightsError
from trainer.checkpoint import load_model
from trainer.pickles import UnsafePickleError, check_pickle

ROOT = Path(__file__).parents[2]


def _checkpoint(pickled: bytes, storage: bytes = bytes(16), method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a checkpoint with a pickle of one's own and one storage, `data/0`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in (
            ("data.pkl", pickled),
            ("byteorder", b"little"),
            ("data/0", storage),
            ("version", b"3\n"),
        ):
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _tensor(
    count: bytes = b"K\4", offset: bytes = b"K\0", size: bytes = b"K\4\x85", stride: bytes = b"K\1\x85"
) -> bytes:
    """Return the operations that make a tensor of floats on `data/0`."""
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + count + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


START = b"\x80\x02"
ENCODE = b"c_codecs\nencode\nq\x00X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R"
HOSTILE = {
    "a text that doubles 32 times": ENCODE + b"q\x01h\x00h\x01X\x03\x00\x00\x00hex\x86R" * 32,
    "8 GB of zeros": b"c__builtin__\nbytearray\nq\x00\x8a\x05\x00\x00\x00\x00\x02\x85R",
    "nested tuples as a key": b"}K\x01" + b"\x85" * 200_000 + b"K\x01s",
    "nested lists": b"]" * 200_000 + b"a" * 199_999,
    "nested dicts": b"}K\1" * 100_000 + b"K\1" + b"s" * 100_000,
    "a tuple of two of the same, 40 times": b")" + b"q\0h\0\x86" * 40,
    "a list of two of the same, 40 times": b"]" + b"".join(b"q\0]h\0ah\0a" for _ in range(40)),
    "a key that is hashed for hours": b"}K\1" + b"q\0h\0\x86" * 18 + b"K\1s",
    "a list that contains itself": b"]q\0h\0a",
    "a list that grows after it was counted": b"]q\0]h\0a" + b"0h\0K\1a",
    "a list that is changed when it is a part": b"(]q\0]h\0ah\0K\1at",
    "a quarter of a million operations": b"](" + b"N" * 250_000 + b"e",
    "numbers with the same hash": b"](" + b"".join(
        b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little") for number in range(9, 99)
    ) + b"e",
    "calls that count a long text again and again": b"ccollections\nCounter\nq\0" + _text("x" * 1_000_000)
    + b"q\1\x85R" + b"0h\0h\1\x85R" * 70,
    "a storage of 8 GB": _tensor(b"\x8a\x05\0\0\0\x80\0"),
    "a storage of more than there is": _tensor(b"K\5"),
    "a negative storage": _tensor(b"J\xff\xff\xff\xff"),
    "a tensor that reaches past its storage": _tensor(size=b"K\5\x85"),
    "a tensor that starts behind its storage": _tensor(offset=b"K\4", size=b"K\1\x85"),
    "a tensor that repeats a value a billion times": _tensor(size=b"J\0\0\0\x40\x85", stride=b"K\0\x85"),
    "the state of a tensor": _tensor() + b"(" + _tensor() + b"tb",
    "a storage that is called": b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R",
    "code": b"cposix\nsystem\n" + _text("true") + b"\x85R",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", ["zip", "older"])
def test_what_no_checkpoint_needs_is_refused(name: str, form: str, tmp_path: Path) -> None:
    pickled = START + HOSTILE[name] + b"."
    path = tmp_path / "w.pth"
    if form == "zip":
        path.write_bytes(_checkpoint(pickled))
    else:
        head = b"".join(pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        path.write_bytes(head + pickled + pickle.dumps(["0"], 2) + struct.pack("<Q4f", 4, *range(4)))
    with pytest.raises(WeightsError, match=r"w\.pth: (refused, |not a PyTorch checkpoint)") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_hostile_checkpoints_take_neither_time_nor_memory(tmp_path: Path) -> None:
    """All of them, one after the other, in a process of their own."""
    for number, operations in enumerate(HOSTILE.values()):
        (tmp_path / f"{number}.pth").write_bytes(_checkpoint(START + operations + b"."))
    code = (
        "import resource, sys, time\nfrom trainer import load_model\nfrom facespec.errors import WeightsError\n"
        "from trainer.pickles import check_pickle\n"
        "before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n"
        "for name in sys.argv[1:]:\n    try:\n        load_model(name)\n    except WeightsError:\n"
        "        print('refused')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - start)"
    )
    line = [sys.executable, "-c", code, *sorted(map(str, tmp_path.iterdir()))]
    result = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT, timeout=200)
    *refused, last = result.stdout.splitlines()
    assert refused == ["refused"] * len(HOSTILE)
    kib, seconds = last.split()
    assert int(kib) < 300_000
    assert float(seconds) < 20  # the longest count a quarter of a million operations; a bomb takes minutes


def test_an_archive_that_two_readers_understand_differently_is_read_by_one(tmp_path: Path) -> None:
    """What is loaded is what was checked: PyTorch reads another `data.pkl` here than Python's zipfile does."""
    buffer = io.BytesIO(_checkpoint(START + b"}" + _text("x") + b"K\1s."))
    with zipfile.ZipFile(buffer, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data.pkl", START + b"}" + _text("y") + b"K\2s.")
    path = tmp_path / "w.pth"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(WeightsError, match="found int under 'y'"):
        load_model(path)


def test_an_archive_whose_version_zipfile_does_not_know_is_refused(tmp_path: Path) -> None:
    """1.5 MB that PyTorch would unpack to 1.5 GB."""
    data = bytearray(_checkpoint(START + b"}.", bytes(100_000_000), zipfile.ZIP_DEFLATED))
    at = 0
    while (at := data.find(b"PK\1\2", at)) >= 0:
        data[at + 6 : at + 8] = struct.pack("<H", 99)
        at += 4
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(WeightsError, match="not a PyTorch checkpoint, or damaged"):
        load_model(tmp_path / "w.pth")


HARMLESS: dict[str, Callable[[], object]] = {
    "parameters": lambda: torch.nn.Linear(3, 4).state_dict(),
    "shared": lambda: {"a": torch.zeros(9)[2:5], "b": (tensor := torch.zeros(2, 3)), "c": tensor, "d": tensor.t()},
    "kinds": lambda: [torch.zeros(2).to(kind) for kind in (torch.half, torch.bfloat16, torch.double, torch.bool)],
    "empty": lambda: {"e": torch.zeros(0), "s": torch.zeros(()), "p": torch.nn.Parameter(torch.zeros(2))},
    "plain": lambda: {"n": None, "t": (1, 2.5, True, "x"), "l": [[1], {}], "k": {(1, 2): 3, 4: 5}, "i": 1 << 40},
    "a scheduler": lambda: {"milestones": collections.Counter({190: 1}), "o": collections.OrderedDict(a=1)},
    "a size": lambda: {"size": torch.Size([1, 2]), "device": torch.device("cpu"), "kind": torch.float32},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_checkpoints_hold_is_taken(name: str) -> None:
    content = HARMLESS[name]()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as file:
        parts = {item.filename.partition("/")[2]: item.file_size for item in file.infolist()}
        pickled = file.read(next(item for item in file.namelist() if item.endswith("/data.pkl")))
    storages = {part.removeprefix("data/"): size for part, size in parts.items() if part.startswith("data/")}
    check_pickle(io.BytesIO(pickled), storages)
    with pytest.raises(ValueError, match="pickle exhausted before seeing STOP"):
        check_pickle(io.BytesIO(pickled[:-1]), storages)


def test_a_whole_run_is_taken_in_both_forms(tmp_path: Path) -> None:
    model = load_model().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [190, 220])
    content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "s": scheduler.state_dict()}
    for new in (True, False):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        assert load_model(tmp_path / "w.pth").spec.backbone == "mobilenet0.25"


def test_the_refusal_says_what_the_pickle_asks_for() -> None:
    with pytest.raises(UnsafePickleError, match=r"more than plain float tensors \(posix\.system\), which can run code"):
        check_pickle(io.BytesIO(START + HOSTILE["code"] + b"."), {})
    with pytest.raises(UnsafePickleError, match=r"the operation FRAME, which torch.save does not write"):
        check_pickle(io.BytesIO(pickle.dumps({"a": frozenset([1])}, 4)), {})
