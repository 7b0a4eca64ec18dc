"""The kernels' machine code for sm_90: which memory it names, what it computes, and the model of its cycles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kernel_model import CASES, Kernels, compile_kernels, generic_accesses, run_finish
from benchmarks.sass import Machine, parse
from facespec.errors import MissingToolError
from plugins.build import compiler_version, find_nvcc

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    try:
        return compile_kernels()
    except MissingToolError as error:
        pytest.skip(str(error))


def test_every_access_names_its_memory(compiled: Kernels) -> None:
    """A pointer that may lead to shared or to global memory costs both."""
    for heads, code in compiled.code.items():
        used = {instruction.op for instruction in code}
        assert {"LDS", "STS", "LDG", "STG"} <= used, heads
        assert generic_accesses(code) == 0, heads


@pytest.mark.parametrize(
    ("candidates", "faces", "heads", "top_k"),
    [
        (0, 1, "fp32", 5000),
        (6, 1, "fp16", 5000),
        (300, 60, "fp32", 5000),
        (300, 60, "fp16", 5000),
        (600, 40, "fp32", 90),  # selected
        (1100, 20, "fp32", 5000),  # boxes in the workspace
        pytest.param(1024, 300, "fp32", 5000, marks=pytest.mark.slow),
        pytest.param(5000, 50, "fp32", 5000, marks=pytest.mark.slow),  # keys in the workspace
    ],
)
def test_the_machine_code_gives_the_bits_of_the_host(
    candidates: int, faces: int, heads: str, top_k: int, compiled: Kernels
) -> None:
    found = run_finish(compiled, candidates, faces, heads, top_k)  # it raises where an output differs
    assert found["candidates"] == candidates
    assert (found["faces"] > 0) == (candidates > 0)


def test_the_committed_cycles_are_those_of_the_sources(compiled: Kernels) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "kernel_model.json").read_text())
    before, now = record["results"][: len(CASES)], record["results"][len(CASES) :]
    assert [(row["candidates"], row["faces"]) for row in now] == list(CASES)
    by_case = {(row["candidates"], row["faces"]): row["cycles"] for row in before}
    assert all(row["cycles"] < by_case[row["candidates"], row["faces"]] for row in now)
    if record["compiler"] != compiler_version(find_nvcc()):
        pytest.skip(f"another nvcc than {record['compiler']}")
    for row in now[:2]:
        found = run_finish(compiled, row["candidates"], row["faces"])
        assert found == {name: row[name] for name in found}, "python -m benchmarks.kernel_model"


LISTING = """
//--------------------- .text.program
.text.program:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDC.64 R4, c[0x0][0x210] ;
        /*0020*/                   ISETP.GE.U32.AND P0, PT, R0, 0x28, PT ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   VOTE.ANY R6, PT, P0 ;
        /*0060*/               @P0 LDS R6, [R2+0x400] ;
        /*0070*/                   IMAD.WIDE.U32 R4, R0, 0x4, R4 ;
        /*0080*/                   STG.E desc[UR4][R4.64], R6 ;
        /*0090*/                   EXIT ;
.L_x_1:
        /*00a0*/                   IMAD.SHL.U32 R2, R0, 0x4, RZ ;
        /*00b0*/                   STS [R2+0x400], R0 ;
        /*00c0*/                   BRA `(.L_x_0) ;
"""


def test_a_program_by_hand() -> None:
    """Threads from 40 on write their number, by way of shared memory; the others which lanes of their warp are such."""
    memory = np.zeros(64, np.uint32)
    code = parse(LISTING, "program")
    machine = Machine(code, 64, np.array([memory.ctypes.data], np.uint64).tobytes(), memory)
    cycles = machine.run()
    lanes = 0xFFFFFF00  # 8 and more of the second warp
    assert memory.tolist() == [0] * 32 + [lanes] * 8 + list(range(40, 64))
    assert (machine.barriers, machine.issued) == (1, 10 + 14)  # the second warp comes to the barrier in two parts
    chain = 30 + 5 + 8 + 5 + 8 + 25 + 20 + 30  # S2R, ISETP, branch, shift, branch, barrier, VOTE, LDS
    assert chain <= cycles <= chain + len(code)


def test_what_the_machine_does_not_know_is_refused() -> None:
    code = parse(LISTING.replace("VOTE.ANY R6, PT, P0", "DADD R6, R2, R4"), "program")
    memory = np.zeros(64, np.uint32)
    with pytest.raises(NotImplementedError, match="DADD R6, R2, R4"):
        Machine(code, 64, np.array([memory.ctypes.data], np.uint64).tobytes(), memory).run()
