"""A process by itself; `test_ddp` has two."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from facespec.errors import ConfigError
from trainer.distributed import World, has_bf16, join_world


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_by_itself_is_the_whole_world() -> None:
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.leads, world.device.type) == (0, 1, True, "cpu")
        assert not torch.distributed.is_initialized()
        assert world.gather({"a": 1}) == {"a": 1}
        assert world.gather_rows(torch.tensor([1.0, 2.5])) == [[1.0, 2.5]]
        model = torch.nn.Linear(1, 1)
        before = model.weight.item()
        world.agree(model)
        assert model.weight.item() == before
    assert not World(torch.device("cpu"), 1, 2).leads


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_variables_that_are_no_numbers_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "first")
    with pytest.raises(ConfigError, match=r"RANK, WORLD_SIZE and LOCAL_RANK are torchrun's.*'first'"):
        with join_world("cpu"):
            pass


def test_processes_without_a_meeting_place_are_told_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"do not find each other \(.*\): start them with torchrun") as caught:
        with join_world("cpu"):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
@pytest.mark.parametrize("cuda", [0, 2])
def test_where_a_process_computes(device: str, cuda: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU or without: how many there are is all that is asked."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    if device == "cuda" and not cuda:
        with pytest.raises(ConfigError, match=r"run\.device is 'cuda': PyTorch finds none here, use --device cpu"):
            with join_world(device):
                pass
        return
    with join_world(device) as world:
        expected = torch.device("cuda", 1) if cuda and device != "cpu" else torch.device("cpu")
        assert world.device == expected
    assert taken == ([expected] if expected.type == "cuda" else [])
    monkeypatch.setenv("LOCAL_RANK", "2")
    if expected.type == "cuda":
        words = "there are 2 CUDA devices for 3 or more processes: torchrun --nproc-per-node 2"
        with pytest.raises(ConfigError, match=words), join_world(device):
            pass


def test_a_process_computes_on_the_gpu_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    with join_world("cuda:1") as world:
        assert world.device == torch.device("cuda", 1)
    assert taken == [world.device]
    for variables, device, words in (
        ({}, "cuda:2", "run.device is 'cuda:2': there are 2 CUDA devices, the first is cuda:0"),
        ({"WORLD_SIZE": "2"}, "cuda:1", "run.device is 'cuda:1': 2 processes do not share a GPU, use --device cuda"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError) as caught, join_world(device):
            pass
        assert str(caught.value) == words


def test_bf16_is_taken_where_the_processor_has_it() -> None:
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        pytest.skip("what this processor can do is not written there")
    assert has_bf16(torch.device("cpu")) == ("avx512_bf16" in info.read_text().split())
