from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from facespec.addresses import hide_secrets, without_secrets

SECRET_FORMS = [
    "rtsp://admin:geheim@10.0.0.2:554/stream1",
    "rtsp://geheim@10.0.0.2/stream1",
    "rtsp://admin:ge@geheim/x@10.0.0.2/stream1",
    "rtsp://admin:geheim#?/@10.0.0.2/stream1",
    "rtsp://10.0.0.2:554/user=admin_password=geheim_channel=1_stream=0.sdp",
    "rtsp://10.0.0.2:554/user=admin&password=geheim&channel=1&stream=0.sdp?",
    "rtsp://10.0.0.2/h264?username=admin&password=geheim",
    "rtsp://10.0.0.2/live?loginuse=admin&loginpas=geheim",
    "http://10.0.0.2/videostream.cgi?user=admin&pwd=geheim&resolution=32",
    "http://10.0.0.2/a?psw=geheim",
    "http://10.0.0.2/a?pw=geheim",
    "http://10.0.0.2/a?p=geheim",
    "http://10.0.0.2/a?jwt=geheim",
    "http://10.0.0.2/a?credential=geheim",
    "http://10.0.0.2/a?X-Amz-Credential=geheim&X-Amz-Signature=geheim",
    "http://10.0.0.2/a?access_token=geheim",
    "http://10.0.0.2/a#access_token=geheim",
    "http://10.0.0.2/a?api_key=geheim;sig=geheim",
    "http://10.0.0.2/a?p%61ssword=geheim",
    "http://10.0.0.2/a?geheim",
    "http://10.0.0.2/a;jsessionid=geheim",
    "http://10.0.0.2/a;pw=geheim?x=1",
    "http://10.0.0.2/token/geheim/index.m3u8",
    "http://10.0.0.2/pwd=geheim/index.m3u8",
    "http://10.0.0.2/p%61ss%3Dgeheim/index.m3u8",
    "http://10.0.0.2/hls/a1b2c3d4e5f60718geheim/index.m3u8",
    "http://10.0.0.2/eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.geheim/index.m3u8",
    "srt://10.0.0.2:9000?streamid=#!::u=admin,r=geheim",
    "srt://10.0.0.2:9000?mode=caller&passphrase=geheim&pbkeylen=16",
    "srt://10.0.0.2:9000?streamid=publish:camera:admin:geheim",
    "rtmp://10.0.0.2/live/geheim",
    "rtmps://10.0.0.2:443/app/geheim?x=geheim",
    "rtsp:/admin:geheim@10.0.0.2/a",
    "rtsp:admin:geheim@10.0.0.2/a",
    "rtsp//admin:geheim@10.0.0.2/a",
    "//admin:geheim@10.0.0.2/a",
    "admin:geheim@10.0.0.2/a",
    "RTSP://admin:geheim@10.0.0.2/a",
    "rtsp:/10.0.0.2/a?pwd=geheim",
    "http://10.0.0.2/a?url=rtsp://u:geheim@10.0.0.2/x",
    "udp://10.0.0.2:5000?localaddr=geheim",
    "http://10.0.0.2/a?auth=geheim%26x",
    "tcp://10.0.0.2:9;password=geheim",
    "http://10.0.0.2/a?hash=geheim&channel=1",
    "http://10.0.0.2/a?session:geheim",
    "rtsp://10.0.0.2/11?u=admin&p=geheim",
    "http://10.0.0.2/snap.jpg?usr=admin&geheim",
    "rtsp://me:p@geheim/w#or?d@10.0.0.2/a",
    "rtsp://me:a\ngeheim@10.0.0.2/a",
]
"""Addresses as cameras, servers and clouds have them, and mistyped ones; the secret is geheim."""


@pytest.mark.parametrize("address", SECRET_FORMS)
def test_no_form_of_address_shows_its_secret(address: str) -> None:
    shown = without_secrets(address)
    assert "geheim" not in shown
    assert "10.0.0.2" in shown
    assert "***" in shown
    assert without_secrets(shown) == shown
    assert "geheim" not in hide_secrets(f"[Errno 5] it fails: {address}".replace("\n", ""))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://me:geheim@host:554/a", "rtsp://***@host:554/a"),
        ("http://host/a?user=me&pwd=geheim&x=1", "http://host/a?user=***&pwd=***&x=1"),
        ("srt://host:9?mode=caller&passphrase=geheim", "srt://host:9?mode=caller&passphrase=***"),
        ("https://host/a?access_token=geheim#t=1", "https://host/a?access_token=***#t=1"),
        ("http://host/a?API_KEY=geheim;Signature=geheim&b=1", "http://host/a?API_KEY=***;Signature=***&b=1"),
        ("http://host/a?client_secret=geheim&authorization=geheim",
         "http://host/a?client_secret=***&authorization=***"),
        ("http://host/pass=open/a?page=1", "http://host/***/a?page=1"),
        ("rtmp://host/live/geheim", "rtmp://host/live/***"),
        ("rtsp:/me:geheim@host/a", "rtsp:/***@host/a"),
    ],
)  # fmt: skip
def test_what_is_shown_of_an_address(address: str, shown: str) -> None:
    assert without_secrets(address) == shown


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://host:554/a?channel=1&subtype=0",
        "rtsp://host:554/Streaming/Channels/101",
        "rtsp://host/cam/realmonitor?channel=1&subtype=0",
        "rtsp://host/axis-media/media.amp?resolution=640x480&fps=15&codec=h264",
        "http://host/hls/index.m3u8",
        "rtmp://host/live",
        "udp://239.1.1.1:5000",
        "rtsp://[::1]:554/onvif1",
        "me@home.mp4",
        "clip:2.mp4",
        "C:/videos/a=b.mp4",
        "/a b/x?.mp4",
    ],
)
def test_what_tells_cameras_and_files_apart_is_kept(text: str) -> None:
    assert without_secrets(text) == text
    assert hide_secrets(f"it fails: {text}, twice") == f"it fails: {text}, twice"


@pytest.mark.parametrize("where", ["error", "usage", "traceback", "thread"])
def test_what_ends_a_command_shows_no_secret(where: str) -> None:
    """Whatever message it is, a library's too."""
    body = {
        "error": "raise DataError('x: rtsp://me:geheim@host/a?p=geheim does not answer')",
        "usage": "ArgumentParser('x').parse_args(['rtsp://me:geheim@host/a'])",
        "traceback": "raise ZeroDivisionError('rtsp://me:geheim@host/a')",
        "thread": "t = threading.Thread(target=open, args=['rtsp://me:geheim@host/a']); t.start(); t.join(); return 1",
    }[where]
    setup = "import threading\nfrom facespec.cli import *\nfrom facespec.errors import *"
    code = f"{setup}\ndef main():\n    {body}\nrun(main)"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=root)
    assert result.returncode in (1, 2)
    assert "rtsp://***@host/a" in result.stderr
    assert "geheim" not in result.stderr + result.stdout
    assert ("Traceback" in result.stderr) is (where in ("traceback", "thread"))
