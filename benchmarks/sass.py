"""One block of threads runs sm_90 machine code on the CPU, and a model says how many cycles it would take.

The results are those of the machine code. The cycles are a model, not a measurement: each warp issues in order, an
instruction waits for what it reads (`LATENCY`), and between two barriers no unit of the multiprocessor does more than
it can (`UNITS`). The figures are assumptions, of the order of what is published about Hopper. Caches, the banks of
shared memory and the fetch of instructions are left out. Instructions that the finish kernel does not use are refused.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LATENCY = {  # cycles until a result can be read, or the next instruction follows; 5 for what is not named
    **dict.fromkeys(("LDG", "LD"), 300),  # from the second-level cache
    **dict.fromkeys(("LDS", "LDC", "ULDC", "S2R", "S2UR"), 30),
    **dict.fromkeys(("MUFU", "POPC", "FLO", "UFLO", "BREV", "F2I", "I2F", "SHFL", "VOTE", "VOTEU", "REDUX"), 20),
    **{"ATOMS": 60, "BAR": 25, "BRA": 8},
}
GENERIC_SHARED = 40  # of a load that turns out to be of shared memory
UNITS = {  # which unit an instruction keeps busy, and the cycles for a warp; the integer unit for 2 if it is not named
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "IMAD", "MOV"), ("float", 1)),
    **dict.fromkeys(("MUFU", "POPC", "FLO", "BREV", "F2I", "I2F"), ("special", 8)),
    **dict.fromkeys(("LDS", "STS", "LDG", "STG", "LD", "ST", "ATOMS"), ("memory", 0)),  # 1 for each 128 bytes
    **dict.fromkeys(("BRA", "BAR", "BSSY", "BSYNC", "WARPSYNC", "NOP", "EXIT", "YIELD"), ("issue", 0)),
}
UNIT_NAMES = ("issue", "float", "integer", "special", "memory")  # the last one serves the four schedulers together
WARP, SCHEDULERS, MASK = 32, 4, 0xFFFFFFFF
SHARED_WINDOW = 0x7F00  # upper half of the generic addresses of shared memory
PARAMETERS = 0x210  # where sm_90 has the parameters of a kernel in constant memory
PREDICATES, ALWAYS, ZEROS = 320, (327, 335), (255, 319)  # rows of `Machine.words`

LINE = re.compile(r"/\*\w+\*/\s+(?:@(!?U?P\w)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
FLOATS = {"FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "MUFU", "FCHK", "F2I"}
COMPARE: dict[str, Any] = {
    **{
        "LT": np.less,
        "LE": np.less_equal,
        "GT": np.greater,
        "GE": np.greater_equal,
        "EQ": np.equal,
        "NE": np.not_equal,
    },
    **{"GEU": lambda a, b: ~(a < b), "GTU": lambda a, b: ~(a <= b), "NEU": np.not_equal},
    "NAN": lambda a, b: np.isnan(a) | np.isnan(b),
}
COMBINE = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


def _row(name: str) -> int:
    """Return the row of a register or a predicate."""
    kind, number = re.fullmatch(r"(U?[RP])(\w+)", name).groups()  # type: ignore[union-attr]
    first, last = {"R": (0, 255), "UR": (256, 63), "P": (PREDICATES, 7), "UP": (PREDICATES + 8, 7)}[kind]
    return first + (last if number in "ZT" else int(number))


class Instruction:
    """A line of nvdisasm's listing.

    Attributes:
        op, modifiers: Of IMAD.WIDE.U32, "IMAD" and {"WIDE", "U32"}; `base` lacks the U of the uniform data path.
        targets, sources: Rows that are written, the register first; the other operands.
        reads, writes: All rows that it waits for, and those that are ready after `latency`.
        jump: Where a branch leads: an index.
    """

    def __init__(self, text: str, guard: str | None, op: str, operands: str) -> None:
        self.text, self.guard = text.strip(), guard
        self.op, *modifiers = op.split(".")
        self.modifiers = set(modifiers)
        self.base = self.op.removeprefix("U")
        self.uniform = self.base != self.op or self.op in ("S2UR", "VOTEU", "REDUX")
        self.width = 4 if "128" in modifiers else 1 + bool({"64", "WIDE"} & self.modifiers or self.op == "CS2R")
        label = re.search(r"`\((.+?)\)", operands)
        self.label, self.jump = label[1] if label else "", -1
        parts = [part for part in re.sub(r"\.reuse|`\(.*|\s", "", operands).split(",") if part]
        written = 0
        if (
            self.op not in ("ST", "STS", "STG", "BAR", "BRA", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "WARPSYNC")
            and parts
        ):
            first = self.base in ("ISETP", "FSETP", "PLOP3", "SHFL", "VOTE", "VOTEU") or (
                parts[0][0] == "P" and "LOP3" in op
            )
            written = 1 + first
            while self.base in ("IADD3", "LEA") and re.fullmatch(r"U?P\d", parts[written]):
                written += 1  # carries
        self.targets = sorted(_row(part) for part in parts[:written])
        if self.op in ("ISETP", "FSETP", "PLOP3"):
            self.targets = [_row(parts[0]), _row(parts[1])]
        self.sources = parts[written:]
        named = re.findall(r"\b(U?[RP](?:\d+|Z|T))\b(\.64)?", f"{guard or ''} {operands}")
        wide = {_row(name) + i for name, pair in named for i in range(2 if pair else self.width if "R" in name else 1)}
        self.reads = np.array(sorted(wide | {ZEROS[0]}))
        self.writes = np.array(
            [row + i for row in self.targets for i in range(self.width if row < PREDICATES else 1)], int
        )
        self.unit, self.cycles = UNITS.get(self.op, ("integer", 2))
        self.latency = LATENCY.get(self.op, 5)


def parse(listing: str, kernel: str) -> list[Instruction]:
    """Return the code of the first kernel that has this in its name, from the output of `nvdisasm -c`."""
    section = next(part for part in listing.split("//-----")[1:] if re.search(rf"\.text\S*{kernel}", part[:400]))
    code: list[Instruction] = []
    labels = {}
    for line in section.splitlines():
        if found := LINE.search(line):
            code.append(Instruction(found[0], *found.groups()))
        elif label := re.fullmatch(r"(\S+):", line.strip()):
            labels[label[1]] = len(code)
    for instruction in code:
        instruction.jump = labels.get(instruction.label, -1)
    return code


def _signed(x: Array) -> Array:
    return ((x & MASK) ^ (1 << 31)) - (1 << 31)


def _logic(table: int, a: Array, b: Array, c: Array) -> Array:
    """Return, bit by bit, the entry of a truth table."""
    terms = [(a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c) for k in range(8) if table >> k & 1]
    return np.bitwise_or.reduce(terms) if terms else a & ~a


class Machine:
    """One block: its registers and predicates, its shared memory, and the clocks of its warps.

    `memory` stands for the memory of the GPU; the pointers among the parameters lead into it.
    """

    def __init__(self, code: list[Instruction], threads: int, parameters: bytes, memory: Array) -> None:
        self.code, self.warps = code, threads // WARP
        self.words = np.zeros((PREDICATES + 16, threads), np.uint32)
        self.words[list(ALWAYS)] = 1
        self.constants = np.zeros(1024, np.uint32)
        self.constants[0] = threads
        self.constants[PARAMETERS // 4 :][: len(parameters) // 4] = np.frombuffer(parameters, np.uint32)
        self.shared = np.full(1 << 14, 0xA5A5A5A5, np.uint32)
        self.memory, self.base = memory.view(np.uint32), memory.ctypes.data
        self.at = np.zeros(threads, int)
        self.alive, self.waits = np.ones(threads, bool), np.zeros(threads, bool)
        self.clock, self.since = np.zeros(self.warps), 0.0
        self.ready = np.zeros((PREDICATES + 16, self.warps))
        self.busy = np.zeros((SCHEDULERS, len(UNIT_NAMES)))
        self.issued = self.barriers = 0

    def run(self) -> float:
        """Run the block to its end; return the cycles of the model."""
        with np.errstate(all="ignore"):
            while self.alive.any():
                free = self.alive & ~self.waits
                at = int(self.at[free].min())  # those behind go first, so that the lanes of a warp meet again
                self._step(self.code[at], at, np.flatnonzero(free & (self.at == at)))
        return self._settle()

    def _settle(self) -> float:
        """Return when all is done that was begun since the last barrier: no sooner than the units allow."""
        units = max(self.busy[:, :-1].max(), self.busy[:, -1].sum())
        self.busy[:] = 0
        self.since = max(float(self.clock.max()), self.since + units)
        return self.since

    def _step(self, i: Instruction, at: int, lanes: Array) -> None:
        self.at[lanes] = at + 1
        warps, counts = np.unique(lanes // WARP, return_counts=True)
        issue = np.maximum(self.clock[warps], self.ready[i.reads][:, warps].max(axis=0))
        self.clock[warps] = issue + 1
        self.ready[i.writes[:, None], warps] = issue + i.latency
        self.issued += len(warps)
        np.add.at(self.busy[:, 0], warps % SCHEDULERS, 1)
        np.add.at(self.busy[:, UNIT_NAMES.index(i.unit)], warps % SCHEDULERS, i.cycles)
        if i.guard:
            lanes = lanes[self.value(i, i.guard, lanes)]
        if i.op == "BRA" and "DIV" not in i.modifiers:  # .DIV is for warps whose lanes are apart
            for source in i.sources:
                lanes = lanes[self.value(i, source, lanes)]
            self.at[lanes] = i.jump
            self.clock[np.unique(lanes // WARP)] += i.latency
        elif i.op == "EXIT":
            self.alive[lanes] = False
        elif i.op == "BAR":
            self.waits[lanes] = True
            if self.waits[self.alive].all():
                self.waits[:] = False
                self.clock[:] = self._settle() + i.latency
                self.barriers += 1
        elif i.op == "WARPSYNC" or "DIV" in i.modifiers:
            if (counts != self.alive.reshape(-1, WARP).sum(axis=1)[warps]).any():
                raise RuntimeError(f"{i.text}: the lanes of a warp are apart")
        elif i.op in ("LD", "LDS", "LDG", "ST", "STS", "STG", "ATOMS"):
            self._access(i, lanes)
        elif i.op not in ("BSSY", "BSYNC", "BREAK", "NOP", "YIELD") and len(lanes):
            self._compute(i, lanes)

    def _address(self, text: str, lanes: Array) -> Array:
        total = np.zeros(len(lanes), np.int64)
        for part in re.findall(r"-?\w+(?:\.64)?", text[text.rindex("[") + 1 :]):
            if part[0] in "RU":
                total += self.pair(part)[lanes] if part.endswith(".64") else self.words[_row(part), lanes]
            else:
                total += int(part, 16)
        return total

    def pair(self, name: str) -> Array:
        """Return the 64 bits of a register and the next one, for every lane of the block."""
        row = _row(name.removesuffix(".64"))
        return self.words[row] | (0 if row in ZEROS else self.words[row + 1].astype(np.int64) << 32)

    def value(self, i: Instruction, text: str, lanes: Array) -> Array:
        """Return an operand for each lane: float32 where the instruction computes with floats, bool, or int64."""
        name = text.strip("-~!|+")
        if re.fullmatch(r"U?P(\d|T)", name):
            return self.words[_row(name), lanes].astype(bool) ^ text.startswith("!")
        if "c[" in name:
            bits = self.constants[self._address(name, lanes) >> 2]
        elif re.fullmatch(r"U?R(\d+|Z)(\.H0_H0)?", name):
            bits = self.words[_row(name.split(".")[0]), lanes]
        elif name.startswith("SR"):
            in_warp = lanes % WARP
            known = {"SR_TID.X": lanes, "SR_LANEID": in_warp, "SR_LTMASK": (1 << in_warp) - 1}
            return known.get(name, np.full(len(lanes), SHARED_WINDOW * (name == "SR_SWINHI")))  # the others are 0 here
        elif i.op in FLOATS and not name.startswith("0x"):
            bits = np.full(len(lanes), np.float32({"QNAN": "nan"}.get(name, name))).view(np.uint32)
        else:
            bits = np.full(len(lanes), int(name, 16) & MASK, np.uint32)
        if i.op in FLOATS:
            floats = np.abs(bits.view(np.float32)) if "|" in text else bits.view(np.float32)
            return -floats if text.startswith("-") else floats
        whole = bits.astype(np.int64)
        return (1 << 32) - whole if text.startswith("-") else MASK - whole if text.startswith("~") else whole

    def _ballot(self, truth: Array, lanes: Array) -> Array:
        """Return, for each lane, a bit for each lane of its warp that says yes."""
        bits = np.bincount(lanes // WARP, truth * 2.0 ** (lanes % WARP), self.warps).astype(np.int64)
        return bits[lanes // WARP]

    def _access(self, i: Instruction, lanes: Array) -> None:
        address = self._address(next(part for part in i.sources if "[" in part), lanes)
        near = (address >> 32 == SHARED_WINDOW) | (i.op in ("LDS", "STS", "ATOMS"))
        if i.op == "LD" and near.all():
            self.ready[i.writes[:, None], np.unique(lanes // WARP)] -= LATENCY["LD"] - GENERIC_SHARED
        touched = np.unique(np.stack([lanes // WARP, address]), axis=1)[0]
        waves = np.ceil(np.bincount(touched, minlength=self.warps) * i.width / WARP)
        np.add.at(self.busy[:, -1], np.arange(self.warps) % SCHEDULERS, waves)
        for memory, which, base in ((self.shared, near, 0), (self.memory, ~near, self.base)):
            at, who = (address[which] - base & (MASK if base == 0 else -1)) >> 2, lanes[which]
            if i.op == "ATOMS":
                values = np.ones(len(who), int) if "INC" in i.modifiers else self.value(i, i.sources[-1], who)
                for word, lane, value in zip(at, who, values.tolist(), strict=True):
                    old = int(memory[word])
                    memory[word] = (old | value if "OR" in i.modifiers else old + value) & MASK
                    if i.targets[0] not in ZEROS:
                        self.words[i.targets[0], lane] = old
                continue
            for part in range(i.width):
                if i.op in ("ST", "STS", "STG"):
                    row = _row(i.sources[-1])
                    memory[at + part] = self.words[row if row in ZEROS else row + part, who]
                elif "U16" in i.modifiers:
                    self.words[i.targets[0], who] = memory[at] >> (address[which] & 2).astype(np.uint32) * 8 & 0xFFFF
                else:
                    self.words[i.targets[0] + part, who] = memory[at + part]

    def _compute(self, i: Instruction, lanes: Array) -> None:
        result, second = self._results(i, lanes)
        if i.uniform:  # one value for a whole warp
            first = np.unique(lanes // WARP, return_index=True)[1]
            lanes = (lanes[first] // WARP * WARP)[:, None] + np.arange(WARP)
            result, second = result[first, None], second if second is None else second[first, None]
        bits = result.view(np.uint32) if result.dtype == np.float32 else result
        if i.targets[0] not in (*ZEROS, *ALWAYS):
            for part in range(i.width if i.targets[0] < PREDICATES else 1):
                self.words[i.targets[0] + part, lanes] = bits.astype(np.int64) >> (32 * part) & MASK
        for number, row in enumerate(i.targets[1:], 1):
            if row not in ALWAYS and second is not None:
                self.words[row, lanes] = second >= number

    def _results(self, i: Instruction, lanes: Array) -> tuple[Array, Array | None]:
        """Return what an instruction writes, and its carry or its second result."""
        words, op = i.modifiers, i.base
        v = [self.value(i, text, lanes) for text in i.sources]
        sign = (lambda x: x) if "U32" in words or i.op in FLOATS else _signed
        if op in ("LDC", "MOV", "S2R", "S2UR", "CS2R"):
            at = self._address(i.sources[0], lanes) // 4 + 1 if op == "LDC" and i.width == 2 else 0
            return v[0] | (self.constants[at].astype(np.int64) << 32 if i.width == 2 and op == "LDC" else 0), None
        if op == "IMAD" and {"WIDE", "HI"} & words:
            third = self.pair(i.sources[2])[lanes]
            if "HI" in words:  # only without signs
                a, b, c = (x.astype(np.uint64) for x in (v[0], v[1], third))
                return (a * b + c >> np.uint64(32)).astype(np.int64), None
            return sign(v[0]) * sign(v[1]) + third, None
        if op in ("IADD3", "VIADD", "IMAD", "LEA"):
            carry = sum((x.astype(np.int64) for x in v if x.dtype == bool), np.int64(0))
            n = [x for x in v if x.dtype != bool]
            if op == "IMAD":
                n = [n[0] * n[1], n[2]]
            elif op == "LEA":
                shift = n[-1]
                upper = _signed(n[0]) >> (32 - shift) if "SX32" in words else n[2] << shift | n[0] >> (32 - shift)
                n = [(upper if "HI" in words else n[0] << shift) & MASK, n[1]]
            return sum(n) + carry, sum(n) + carry >> 32
        if op in ("ISETP", "FSETP"):
            a, b = sign(v[0]), sign(v[1])
            found = next(COMPARE[word] for word in COMPARE if word in words)(a, b)
            if "EX" in words:  # the upper halves, after the lower ones
                found = np.where(a == b, v[3], found)
            return next(COMBINE[word] for word in COMBINE if word in words)(found, v[2]), None
        if op in ("LOP3", "PLOP3"):
            result = _logic(int(v[3][0]), *v[:3])
            return result, (result != 0).astype(int)
        if op == "SHF":
            low, high, by = v[0].astype(np.uint64), v[2].astype(np.uint64), np.minimum(v[1], 63).astype(np.uint64)
            if "S32" in words:
                return _signed(v[2]) >> np.minimum(v[1], 31), None
            both = low | high << np.uint64(32)
            both = both << by if "L" in words else both >> by
            return (both >> np.uint64(32 * ("HI" in words))).astype(np.int64), None
        if op in ("FMNMX", "VIMNMX", "VIADDMNMX"):
            a, b = (sign(v[0] + v[1]), sign(v[2])) if "ADD" in op else (sign(v[0]), sign(v[1]))
            return np.where(v[-1], np.fmin(a, b), np.fmax(a, b)), None
        if op == "REDUX":
            return np.sum([(self._ballot(v[0] >> k & 1, lanes) > 0) * (1 << k) for k in range(32)], axis=0), None
        if op == "SHFL":
            source = lanes // WARP * WARP + (v[1] if "IDX" in words else lanes % WARP - v[1])
            inside = source // WARP == lanes // WARP
            return self.words[_row(i.sources[0]), np.where(inside, source, lanes)], inside.astype(int)
        if op == "PRMT":
            both, chosen = v[0] | v[2] << 32, [v[1] >> 4 * k & 15 for k in range(4)]
            parts = [(both >> 8 * (one & 7) & 255, one & 8) for one in chosen]
            return np.sum([np.where(s, (x >> 7) * 255, x) << 8 * k for k, (x, s) in enumerate(parts)], axis=0), None
        if op == "FCHK" and not all((np.abs(np.log2(np.abs(x))) < 100).all() for x in v):
            raise NotImplementedError(f"{i.text}: a division by its slow path")
        simple = {
            **dict.fromkeys(("SEL", "FSEL"), lambda: np.where(v[2], v[0], v[1])),
            **dict.fromkeys(("VOTE", "VOTEU"), lambda: self._ballot(v[0], lanes)),
            "FCHK": lambda: np.zeros(len(lanes), bool),
            "FADD": lambda: v[0] + v[1],
            "FMUL": lambda: v[0] * v[1],
            "FFMA": lambda: (v[0].astype(np.float64) * v[1] + v[2]).astype(np.float32),
            "MUFU": lambda: np.float32(1) / v[0],
            "I2FP": lambda: sign(v[0]).astype(np.float32),
            "I2F": lambda: v[0].astype(np.float32),  # no rounding below 2^24
            "F2I": lambda: np.trunc(v[0]).astype(np.int64),
            "HADD2": lambda: (v[1] & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32),
            "POPC": lambda: np.bitwise_count(v[0]),
            "FLO": lambda: np.where(v[0] > 0, np.frexp(v[0])[1] - 1, MASK) ^ 31 * ("SH" in words),
            "BREV": lambda: sum((v[0] >> k & 1) << (31 - k) for k in range(32)),
            "IABS": lambda: np.abs(_signed(v[0])),
        }
        if op not in simple or (i.op == "MUFU" and "RCP" not in words):
            raise NotImplementedError(i.text)
        return simple[op](), None
