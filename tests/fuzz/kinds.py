"""What is fuzzed: for each kind its seeds, what takes a mutated one, and the errors that it may end in."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import random
import re
import signal
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, features

from facespec.errors import RetinaFaceError
from tests.heic import tiled_heic

SEEDS = Path(__file__).parent / "seeds"
"""What crashed once, in a folder for each kind; it is tried first, and mutated."""

Seeds = list[bytes]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        count: Cases of the short form.
        seeds: Returns what is mutated.
        take: Takes a case, and a folder to write it to; RetinaFaceError is how it may end.
        mend: Makes a mutated case whole again where a checksum would end it at once.
    """

    count: int
    seeds: Callable[[], Seeds]
    take: Callable[[bytes, Path], object]
    mend: Callable[[random.Random, bytes], bytes] = lambda chance, data: data


def case(name: str, seed: int, number: int) -> bytes:
    """Return a case: what crashed once comes first, then mutations; the same for the same numbers."""
    kind = KINDS[name]
    kept = [path.read_bytes() for path in sorted((SEEDS / name).glob("*"))]
    seeds = _seeds(name) + kept
    if number < len(kept):
        return kept[number]
    chance = random.Random(f"{name} {seed} {number}")
    data = mutate(chance, chance.choice(seeds), seeds)
    return kind.mend(chance, data)


@functools.cache
def _seeds(name: str) -> Seeds:
    return KINDS[name].seeds()


def mutate(chance: random.Random, data: bytes, others: Seeds) -> bytes:
    """Return data with a few changes: bits, bytes, numbers, pieces that go, come twice, or come from another seed."""
    changed = bytearray(data)
    head = chance.random() < 0.5  # headers are where most is decided
    ways = chance.choice((3, 8))  # the first three keep the length, on which what follows hangs
    for _ in range(chance.choice((1, 1, 2, 3, 5, 9))):
        at = chance.randrange(min(len(changed), 400) if head and changed else len(changed) + 1)
        length = chance.choice((1, 2, 4, 8, 30, 200))
        way = chance.randrange(ways)
        if way == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif way == 1:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif way == 2:
            number = chance.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, chance.getrandbits(32)))
            changed[at : at + 4] = struct.pack(chance.choice("<>") + "I", number)
        elif way == 3:
            del changed[at : at + length]
        elif way == 4:
            changed[at:at] = changed[at : at + length] * chance.choice((1, 2, 50))
        elif way == 5:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            changed[at : at + chance.choice((0, length))] = other[start : start + length]
        elif way == 6 and chance.random() < 0.3:
            del changed[at:]
        elif way == 7:  # digits in text
            found = list(re.finditer(rb"\d+", bytes(changed[at : at + 200])))
            if found:
                digits = str(chance.choice((0, -1, 1 << 31, 1 << 63, 10**400, 1e400))).encode()
                changed[at + found[0].start() : at + found[0].end()] = digits
    return bytes(changed)


# images


def _image_seeds() -> Seeds:
    import tifffile

    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    pixels[10:30] = np.arange(56, dtype=np.uint8)[None, :, None]
    photo = Image.fromarray(pixels)
    frames = [photo, photo.rotate(90), photo.convert("L").convert("RGB")]
    exif = Image.Exif()
    exif[0x0112] = 6

    def saved(image: Image.Image, form: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    found = [saved(photo.convert(mode), "PNG") for mode in ("RGB", "L", "P", "RGBA", "1", "I;16")]
    found += [saved(photo, "JPEG", exif=exif), saved(photo.convert("CMYK"), "JPEG"), saved(photo, "BMP")]
    found += [saved(photo, "JPEG", progressive=True), saved(photo.convert("L"), "JPEG", progressive=True)]
    for form in ("PNG", "WEBP"):
        found += 3 * [saved(photo, form, save_all=True, append_images=frames[1:], duration=40, exif=exif)]
    found += [saved(photo, "WEBP", lossless=True), saved(photo, "WEBP"), saved(photo.convert("P"), "BMP")]
    found += [saved(photo, form) for form in ("GIF", "JPEG2000")]
    found += [saved(photo, "GIF", save_all=True, append_images=frames[1:])]
    found += [cv2.imencode(form, pixels.astype(kind))[1].tobytes() for form, kind in ((".ras", "u1"), (".hdr", "f4"))]
    if features.check("avif"):
        found += [saved(photo, "AVIF"), saved(photo.convert("RGBA"), "AVIF", exif=exif)]
        found += 2 * [saved(photo, "AVIF", save_all=True, append_images=frames[1:])]
    if find_spec("pillow_heif"):
        found += 2 * [tiled_heic(np.tile(pixels, (2, 2, 1))[:64, :64], 32, 1)]
    for packing in (None, "tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"):
        found.append(saved(photo, "TIFF", compression=packing))
    found.append(saved(photo.convert("1"), "TIFF", compression="group4"))
    for data in (pixels, pixels[..., 0], pixels.astype(np.uint16), pixels.astype(np.float32)):
        for order in ("<", ">"):
            buffer = io.BytesIO()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tifffile.imwrite(
                    buffer, data, tile=(16, 32), byteorder=order, compression="zlib" if order == "<" else None
                )
            found.append(buffer.getvalue())
    found += [saved(photo.convert(mode), "PPM") for mode in ("RGB", "L", "1")]
    return [*found, b"P3 8 4 255\n" + b"1 2 3 " * 32, b"P2 8 4 9\n" + b"1 " * 32, b"P1 8 4\n" + b"1 0 " * 16]


def _take_image(data: bytes, folder: Path) -> None:
    from facespec.images import decode_image

    image = decode_image(data, max_pixels=4_000_000)
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.size <= 12_000_000


def _mend_png(chance: random.Random, data: bytes) -> bytes:
    """Give the chunks of a PNG right checksums; at times change the pixels beneath, or leave a chunk out."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or chance.random() < 0.1:
        return data
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if kind in (b"IDAT", b"fdAT") and chance.random() < 0.5:
            start = 4 * (kind == b"fdAT")
            try:
                rows = bytearray(zlib.decompress(body[start:]))
                rows[169 * chance.randrange(len(rows) // 169)] = chance.randrange(12)  # filter of a row
                body = body[:start] + zlib.compress(bytes(rows))
            except (zlib.error, ValueError):
                pass
        at += 12 + length
        if chance.random() < 0.05:
            continue
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


# models


def _onnx_seeds() -> Seeds:
    """Small networks with the parts of real ones, and the start of a detector's metadata."""
    import onnx
    from onnx import TensorProto, helper

    from facespec.spec import SPEC_KEY, ModelSpec

    found = []
    for opset, shape in ((11, [1, 32, 32, 3]), (19, ["b", "h", "w", 3])):
        weight = helper.make_tensor("w", TensorProto.FLOAT, [32, 3, 1, 1], np.ones(96, np.float32).tobytes(), raw=True)
        nodes = [
            helper.make_node("Cast", ["images"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
            *(helper.make_node("Conv", ["t", "w"], [f"head_{s}"], strides=[s, s]) for s in (8, 16, 32)),
        ]
        outputs = [helper.make_tensor_value_info(f"head_{s}", TensorProto.FLOAT, None) for s in (8, 16, 32)]
        inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)]
        model = helper.make_model(
            helper.make_graph(nodes, "g", inputs, outputs, [weight]), opset_imports=[helper.make_opsetid("", opset)]
        )
        helper.set_model_props(model, {SPEC_KEY: ModelSpec().to_json()})
        found.append(model.SerializeToString())
        model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        model.graph.initializer[0].external_data.add(key="location", value="../w.bin")
        found.append(model.SerializeToString())
    return found


def _take_onnx(data: bytes, folder: Path) -> None:
    from trt_runtime.onnx_model import OnnxModel, open_session

    (folder / "m.onnx").write_bytes(data)
    model = OnnxModel(folder / "m.onnx")
    open_session(model.heads_graph.content, "m.onnx", 1)


def _checkpoint_seeds() -> Seeds:
    import torch

    from facespec.spec import ModelSpec

    states: list[Any] = [{"w": torch.rand(3, 4), "b": torch.zeros(())}]
    states.append({"state_dict": {f"fpn.output{n}.0.weight": torch.rand(64, 64, 1, 1) for n in (1, 2)}, "epoch": 3})
    training = {"settings": {"seed": 1}, "data": "", "step": 1, "sums": {}, "history": [{"epoch": 1.0}]}
    training |= {"weights": states[0], "pixel_term": {}, "optimizer": {"state": {}}, "ema_updates": 0}
    states.append(
        {"format": "retinaface-trt checkpoint 1", "spec": ModelSpec().to_json(), "model": {}, "training": training}
    )
    found = []
    for state in states:
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
            found.append(buffer.getvalue())
    return found


def _mend_checkpoint(chance: random.Random, data: bytes) -> bytes:
    """Mutate the members of an archive rather than the archive, three times in four."""
    if chance.random() < 0.25:
        return data
    source = chance.choice(_seeds("checkpoint"))
    if source[:2] != b"PK":
        return data
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(buffer, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("data.pkl") or chance.random() < 0.1:
                content = mutate(chance, content, [content, b"\x85" * 300, b"q\0h\0\x86" * 30, b"]q\0h\0a", b"(K\1tR"])
            new.writestr(item.filename, content)
    return buffer.getvalue()


def _take_checkpoint(data: bytes, folder: Path) -> None:
    from trainer.checkpoint import load_model, read_training
    from trainer.loop import check_training

    path = folder / "c.pth"
    path.write_bytes(data)
    try:
        check_training(path, read_training(path)[1])
    except RetinaFaceError:
        load_model(path)


# texts


def _text_seeds() -> Seeds:
    label = b"# a/b.jpg\n1 2 30 40 5 6 0.0 7 8 0.0 9 9 0.0 1 2 0.0 3 4 0.0 0.9\n# c.jpg\n-1 -2 3 4\n"
    widerface = b"a/b.jpg\n2\n1 2 30 40 0 0 0 0 0 0\n5 6 7 8 1 0 0 1 0 0\nc.jpg\n0\n0 0 0 0 0 0 0 0 0 0\n"
    faces = [{"id": n, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3.5, 4], "iscrowd": 0} for n in (1, 2)]
    faces[0]["keypoints"] = [1, 2, 2] * 5
    images = [{"id": 1, "file_name": "a/b.jpg", "width": 50, "height": 60}]
    coco = {"images": images, "annotations": faces, "categories": [{"id": 1, "name": "face", "keypoints": ["a"] * 5}]}
    yaml = (
        b"recipe: finetune\nseed: 3\ndata: {size: 640, source: x}\naugment:\n  scales: [0.3, 1.0]\noptimizer.lr: 1e-3\n"
    )
    return [b"L" + label, b"W" + widerface, b"C" + json.dumps(coco).encode(), b"Y" + yaml, b"Ya: &a [1, 2]\nb: *a\n"]


def _take_text(data: bytes, folder: Path) -> None:
    from trainer.config import read_yaml, resolve
    from trainer.data import open_dataset

    name = {b"L": "label.txt", b"W": "x_val_bbx_gt.txt", b"C": "c.json"}.get(data[:1], "c.yaml")
    path = folder / name
    path.write_bytes(data[1:])
    if name == "c.yaml":
        resolve(read_yaml(path))
    else:
        open_dataset(str(path))


def _sidecar_seeds() -> Seeds:
    from tests.engines import make_sidecar

    return [make_sidecar(b"ftrt" + bytes(60)).to_json().encode()]


def _mend_sidecar(chance: random.Random, data: bytes) -> bytes:
    """Give the JSON the hash of itself, so that what it says is read."""
    from trt_runtime.gpu.sidecar import _SELF_HASH, _digest

    try:
        values = json.loads(data)
        values.pop(_SELF_HASH, None)
        return json.dumps({**values, _SELF_HASH: _digest(values)}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


def _take_sidecar(data: bytes, folder: Path) -> None:
    from trt_runtime.gpu.sidecar import check_engine, read_sidecar

    (folder / "f.engine").write_bytes(b"ftrt" + bytes(60))
    (folder / "f.engine.json").write_bytes(data)
    check_engine(folder / "f.engine", read_sidecar(folder / "f.engine"))


# streams


def _video_seeds() -> Seeds:
    import av

    found = []
    for form, codec in (("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=form) as container:
            stream: Any = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(6):
                picture = np.full((48, 64, 3), 40 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "bgr24")))
            container.mux(stream.encode())
        found.append(buffer.getvalue())
    return found


def _take_video(data: bytes, folder: Path) -> None:
    from trt_runtime.media.files import VideoFile

    (folder / "v.mp4").write_bytes(data)
    with VideoFile(folder / "v.mp4", max_pixels=1_000_000) as video:
        for number, _ in enumerate(video):
            if number > 20:
                break


_SECRET = "Zq7hunter2"
_PLACES = (
    "rtsp://{u}:{s}@cam/1", "rtsp://{s}@cam/1", "rtsp://cam:554/user={u}_password={s}_channel=1.sdp",
    "rtsp://cam/live?{k}={s}", "http://cam/snap.cgi?usr={u}&{k}={s}&x=1", "http://cam/a.m3u8#{k}={s}",
    "srt://host:9000?streamid={s}&passphrase={s}", "rtmp://host/app/{s}", "https://{u}:{s}@host:8/a?b=c",
)  # fmt: skip
_KEYS = ("password", "pwd", "pass", "loginpas", "psw", "pw", "jwt", "credential", "token", "access_token", "key")


def _take_address(data: bytes, folder: Path) -> None:
    from trt_runtime.media.live import without_secrets

    chance = random.Random(data)
    word, key = chance.choice(("admin", "a%40b", "é", "x y")), chance.choice(_KEYS)
    secret = _SECRET[: chance.randrange(6, 10)] + chance.choice(("", "@", ":x", "%2F", "é"))
    address = chance.choice(_PLACES).format(u=word, s=secret, k=chance.choice((key, key.upper(), f"x_{key}")))
    shown = without_secrets(address)
    assert _SECRET[:6] not in shown, f"{address} is shown as {shown}"


def _take_fault(data: bytes, folder: Path) -> None:
    """Do what the fuzzer must notice; it is for the fuzzer's own test."""
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"exception":
        raise ZeroDivisionError("not an error of ours")
    if data == b"hang":
        time.sleep(100)
    if data == b"memory":
        np.ones(1200 << 20, np.uint8)
    raise RetinaFaceError("several\nlines" if data == b"lines" else "refused, as it should be")


KINDS = {
    "fault": Kind(0, lambda: [b"none"], _take_fault),
    "image": Kind(4000, _image_seeds, _take_image, _mend_png),
    "onnx": Kind(500, _onnx_seeds, _take_onnx),
    "checkpoint": Kind(300, _checkpoint_seeds, _take_checkpoint, _mend_checkpoint),
    "text": Kind(500, _text_seeds, _take_text),
    "sidecar": Kind(200, _sidecar_seeds, _take_sidecar, _mend_sidecar),
    "video": Kind(200, _video_seeds, _take_video),
    "address": Kind(300, lambda: [b"0123456789abcdef"], _take_address),
}
