"""Addresses of cameras and streams, as they may be shown: without what could be a password."""

from __future__ import annotations

import re
from urllib.parse import unquote

_HIDDEN = "***"
_START = re.compile(r"(?:(?:rtsps?|rtmps?|https?|udp|srt|tcp):/*|[a-z][a-z0-9+.-]+:/+|[a-z]*//+)?", re.IGNORECASE)
_SUSPICIOUS = re.compile(
    "pass|pwd|psw|pw$|^p$|token|key|secret|auth|sig|jwt|cred|login|user|usr|account|sess|sid|streamid|ticket|hash|"
    "cookie|code$|^pin|^id$|uuid|nonce|api",
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    "ch|chn|channel|stream|subtype|profile|resolution|size|width|height|quality|fps|framerate|codec|format|mode|"
    "transport|unicast|proto|protocol|latency|pkt_size|t",
    re.IGNORECASE,
)
_PLAIN_VALUE, _PLAIN_NUMBER = re.compile("[A-Za-z0-9.]{1,12}"), re.compile("[0-9]{1,2}")
_NAME = re.compile("[A-Za-z_-]{1,24}")
_RANDOM = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[\w.~+-]{16,}|[\w.~+-]{32,}|[0-9]{12,}")
_IN_TEXT = re.compile(r"""[^\s'"(]*(?::/|//|:\S*@)\S*?(?=[,.;:)'"]*(?:\s|$))""")


def without_secrets(address: str) -> str:
    """Return an address of which scheme, host and a plain path are left, and what is sure to be harmless of the rest.

    A password may hold any character, so everything up to the last @ counts as one. It may stand in the path, as some
    cameras and all RTMP servers have it; what looks drawn at random there is hidden. An address may be mistyped
    (`rtsp:/user:password@host`); a text that has no sign of one is returned as it is.
    """
    start = _START.match(address)
    scheme = start[0] if start else ""
    rest = address[len(scheme) :]
    if not scheme and not re.search(r":.*@", rest, re.DOTALL):
        return address
    if "@" in rest:
        scheme, rest = f"{scheme}{_HIDDEN}@", rest.rpartition("@")[2]
    place, *more = re.split(r"([?#])", rest)
    host, *parts = place.split("/")
    plain = re.match(r"[^;&=]*(?![^;&])", host)
    shown = [plain[0] + _pairs(host[plain.end() :], ";&") if plain else _HIDDEN]
    for number, part in enumerate(parts):
        name = unquote(parts[number - 1]) if number else ""
        keyed = scheme.lower().startswith("rtmp") and number > 0  # rtmp://host/application/key
        follows = _SUSPICIOUS.search(name) is not None and _NAME.fullmatch(name) is not None
        hidden = part and (keyed or follows or _is_suspicious(unquote(part)))
        shown.append(_HIDDEN if hidden else part)
    marks = zip(more[::2], more[1::2], strict=True)
    return "/".join([scheme + shown[0], *shown[1:]]) + "".join(mark + _pairs(text, "&;") for mark, text in marks)


def _is_suspicious(part: str) -> bool:
    """Whether a part of a path may be, or hold, a secret."""
    if "=" in part or ":" in part:
        return bool(_SUSPICIOUS.search(part)) or _pairs(part, "&;_,") != part
    return _RANDOM.fullmatch(part.rpartition(".")[0] or part) is not None


def _pairs(text: str, separators: str) -> str:
    """Return `name=value&...` with the values hidden, but for those of names that are known, and small numbers."""
    shown = []
    for item in re.split(f"([{separators}])", text):
        name, equals, value = item.partition("=")
        known = _HARMLESS.fullmatch(name) and _PLAIN_VALUE.fullmatch(value)
        if item in separators or not (_SUSPICIOUS.search(name) or not (known or _PLAIN_NUMBER.fullmatch(value))):
            shown.append(item)
        else:
            shown.append(f"{name}={_HIDDEN}" if equals and _NAME.fullmatch(name) else _HIDDEN)
    return "".join(shown)


def hide_secrets(text: str) -> str:
    """Return a text, as a message of another's, with the addresses in it `without_secrets`."""
    return _IN_TEXT.sub(lambda found: without_secrets(found[0]), text)
