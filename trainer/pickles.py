"""What the pickle of a checkpoint holds, judged before PyTorch loads it.

`torch.load(weights_only=True)` runs no code, and lets a kilobyte build gigabytes, recurse until the process dies, or
hash for hours. Here the operations are followed without making what they make: only their sizes.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_OPERATIONS = 250_000
"""A checkpoint of a training run has some 50 for each tensor."""

MAX_PARTS = 1_000_000
"""Parts of an object, each counted as often as it is met; 64 characters are one more."""

MAX_DEPTH = 50
MAX_KEY_PARTS = 150

_ITEM_BYTES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
_ITEM_BYTES |= {"Bool": 1, "Untyped": 1}
_STORAGES = {f"torch {name}Storage": nbytes for name, nbytes in _ITEM_BYTES.items()}
_STORAGES |= {"torch.storage UntypedStorage": 1}
_TENSORS = {f"torch._utils _rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_DICTS = {"collections OrderedDict", "collections Counter"}
_OTHERS = {"torch._utils _rebuild_parameter", "torch Size", "torch device"}
_KINDS = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
_GLOBALS = {*_STORAGES, *_TENSORS, *_DICTS, *_OTHERS, *(f"torch {name}" for name in _KINDS)}

# what they take from the stack; those that take all down to a mark are -1
_MAKE = {"TUPLE": -1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "EMPTY_TUPLE": 0, "REDUCE": 2, "BINPERSID": 1}
_CHANGE = {"APPEND": 1, "APPENDS": -1, "SETITEM": 2, "SETITEMS": -1, "BUILD": 1}
_PUSH = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_PUSH |= {"SHORT_BINSTRING", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "GLOBAL"}


class UnsafePickleError(ValueError):
    """A pickle asks for what no checkpoint needs; the message says what."""


@dataclass(eq=False)
class _Item:
    """An object that the pickle makes."""

    value: Any = None  # of numbers and texts; the items of a tuple; what a global is called; elements of a storage
    kind: str = ""  # operation that made it; the global, where that is called
    parts: int = 1
    depth: int = 1
    is_part: bool = False  # of another one, whose size would be wrong if this one grew


def check_pickle(file: BinaryIO, storage_bytes: int | Mapping[str, int]) -> None:
    """Read a pickle to its end, and refuse it unless it holds plain tensors and values of a sensible size.

    Args:
        file: At the start of the pickle.
        storage_bytes: Size of each storage that lies beside it, by its key; or what all of them may have together.

    Raises:
        UnsafePickleError: It asks for more.
        ValueError: It is damaged.
    """
    try:
        _Check(storage_bytes).run(file)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a pickle of tensors ({type(error).__name__})") from None


class _Check:
    """The stack and the memo of a pickle."""

    def __init__(self, storage_bytes: int | Mapping[str, int]) -> None:
        self.storage_bytes = storage_bytes
        self.stack: list[_Item] = []
        self.marks: list[int] = []  # lengths of the stack
        self.work = 0  # parts of what functions are called with
        self.known: dict[str, int] = {}  # bytes of the storages met so far
        self.known_bytes = 0

    def run(self, file: BinaryIO) -> None:
        stack, marks = self.stack, self.marks
        memo: dict[Any, _Item] = {}
        for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
            name = operation.name
            if number > MAX_OPERATIONS:
                raise UnsafePickleError(f"its pickle has more than {MAX_OPERATIONS} operations")
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name in _PUSH:
                stack.append(self._value(name, argument))
            elif name in _MAKE or name in _CHANGE:
                count = _MAKE.get(name, _CHANGE.get(name, 0))
                taken = self._take(len(stack) - marks.pop() if count < 0 else count)
                if name in _MAKE:
                    stack.append(_Item(taken, name))
                self._add(stack[-1], taken)
                self._judge(name, stack[-1], taken)
            elif name not in ("PROTO", "STOP"):
                raise UnsafePickleError(f"its pickle has the operation {name}, which torch.save does not write")

    def _take(self, count: int) -> list[_Item]:
        """Take items from the top of the stack."""
        if count > len(self.stack) - (self.marks[-1] if self.marks else 0):
            raise IndexError
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _value(self, name: str, argument: Any) -> _Item:
        if name == "GLOBAL" and argument not in _GLOBALS:
            raise UnsafePickleError(
                f"its pickle asks for more than plain float tensors ({argument.replace(' ', '.')[:80]}), which can run "
                "code; save a plain state_dict instead"
            )
        if name == "LONG1" and abs(argument) >= 1 << 64:  # equal hashes can be had of longer ones
            raise UnsafePickleError("its pickle holds a number of more than 64 bits")
        parts = 1 + len(argument) // 64 if isinstance(argument, (str, bytes)) else 1
        return _Item(argument, name, parts)

    def _add(self, item: _Item, taken: list[_Item]) -> None:
        if item.is_part:
            raise UnsafePickleError("its pickle changes an object that is a part of another")
        for part in taken:
            if part is item:
                raise UnsafePickleError("its pickle makes an object that contains itself")
            part.is_part = True
            item.parts += part.parts
            item.depth = max(item.depth, part.depth + 1)
        if item.parts > MAX_PARTS:
            raise UnsafePickleError(f"its pickle makes an object of more than {MAX_PARTS} parts")
        if item.depth > MAX_DEPTH:
            raise UnsafePickleError(f"its pickle nests more than {MAX_DEPTH} objects")

    def _judge(self, name: str, item: _Item, taken: list[_Item]) -> None:
        """Look at what an operation does to its operands; `item` is what it makes or changes."""
        if name in ("SETITEM", "SETITEMS"):
            if any(key.parts > MAX_KEY_PARTS for key in taken[::2]):
                raise UnsafePickleError("its pickle has a key of many parts")
        elif name == "BUILD" and item.kind not in _DICTS:
            raise UnsafePickleError("its pickle sets the state of what is no OrderedDict")
        elif name == "REDUCE":
            function, arguments = taken
            self.work += arguments.parts
            if function.kind != "GLOBAL" or function.value in _STORAGES or self.work > MAX_PARTS:
                raise UnsafePickleError("its pickle makes calls that torch.save does not write")
            item.kind = function.value
            if item.kind in _TENSORS:
                self._tensor(*(part.value for part in arguments.value[:4]))
        elif name == "BINPERSID":
            _, storage, key, _, count = (part.value for part in taken[0].value[:5])
            self._storage(storage, str(key), count)
            item.value, item.kind = count, name

    def _tensor(self, elements: int, offset: int, size: list[_Item], strides: list[_Item]) -> None:
        shape, steps = [part.value for part in size], [part.value for part in strides]
        if min((offset, *shape, *steps)) < 0 or len(shape) > 64:
            raise ValueError("a tensor has no such size")
        values = math.prod(shape)
        last = offset + sum((side - 1) * step for side, step in zip(shape, steps, strict=True))
        if values and max(last + 1, values) > elements:
            raise UnsafePickleError(f"a tensor claims {values} values, its storage holds {elements}")

    def _storage(self, storage: str, key: str, count: int) -> None:
        nbytes = count * _STORAGES[storage]
        if key not in self.known:
            self.known[key] = nbytes
            self.known_bytes += nbytes
        held = self.storage_bytes
        fits = nbytes == held[key] if isinstance(held, Mapping) else self.known_bytes <= held
        if nbytes < 0 or nbytes != self.known[key] or not fits:
            raise UnsafePickleError(f"the storage {key[:20]} claims {nbytes} bytes, which is not what the file holds")
