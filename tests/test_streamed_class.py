"""The streamed module is the module: its own class, and what users' code finds on it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import wsm_ext as wsm

MIB = 1 << 20
WIDTH = 512
# Some of four layers of 1 MiB stream.
BUDGETS: dict[str, Any] = {
    "device": "cpu",
    "device_memory": 4 * MIB,
    "host_memory": 4 * MIB,
    "units": "layer",
    "config": {"chunk_mb": 0.125, "staging_mb": 1, "lookahead_units": 0, "poison": True},
}


class Layers(nn.Module):
    """What the classes below stream: four layers."""

    def build(self) -> None:
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Plain(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.build()


REGISTERED: list[tuple[type, str]] = []


class Registering(Layers):
    def __init_subclass__(cls, *, key: str, **_: Any) -> None:
        REGISTERED.append((cls, key))


class Registered(Registering, key="one"):
    def __init__(self) -> None:
        super().__init__()
        self.build()


class Counting(type):
    made: ClassVar[list[str]] = []
    calls = 0

    def __new__(mcs, name: str, bases: Any, namespace: Any) -> Any:
        mcs.made.append(name)
        return super().__new__(mcs, name, bases, namespace)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        Counting.calls += 1
        return super().__call__(*args, **kwargs)


class WithMetaclass(Layers, metaclass=Counting):
    def __init__(self) -> None:
        super().__init__()
        self.build()


class Abstract(Layers, abc.ABC):
    @abc.abstractmethod
    def name(self) -> str: ...


class Concrete(Abstract):
    def __init__(self) -> None:
        super().__init__()
        self.build()

    def name(self) -> str:
        return "concrete"


class Concreter(Concrete):
    pass


class Slotted(Layers):
    __slots__ = ("held",)

    def __init__(self) -> None:
        super().__init__()
        self.held = 5
        self.build()


class Frozen(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.build()
        self.__dict__["sealed"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "sealed" in self.__dict__:
            raise AttributeError(f"{name} cannot be set: this is frozen")
        super().__setattr__(name, value)


@dataclasses.dataclass(eq=False)
class Described(Layers):
    width: int = WIDTH
    tags: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.build()


class Mixin:
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings


class Mixed(Layers, Mixin):
    def __init__(self, *, needed: int) -> None:
        super().__init__()
        self.needed = needed
        self.build()


CLASSES: dict[str, Callable[[], Any]] = {
    "plain": Plain,
    "registered": Registered,
    "metaclass": WithMetaclass,
    "abstract": Concrete,
    "slots": Slotted,
    "frozen": Frozen,
    "dataclass": Described,
    "mixed": lambda: Mixed(needed=3),
}


def make(kind: Callable[[], Any]) -> Any:
    torch.manual_seed(7)
    module = kind()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def file_of(module: nn.Module, folder: Path) -> Path:
    file = folder / "net.safetensors"
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, file)
    return file


def inputs() -> torch.Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", CLASSES)
def test_modules_of_all_kinds_of_classes(kind: str, tmp_path: Path) -> None:
    resident, module = make(CLASSES[kind]), make(CLASSES[kind])
    original, bases = type(module), list(type(module).__subclasses__())
    told, made = list(REGISTERED), list(Counting.made)
    want = resident(inputs())
    streamed = wsm.stream(module, file_of(resident, tmp_path), **BUDGETS)
    assert streamed is module
    assert streamed.plan.streams
    assert isinstance(module, original)
    assert isinstance(module, wsm.StreamedModule)
    assert type(module) is not original
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(module), name) == getattr(original, name)
    assert str(type(module)) == str(original)
    assert repr(module) == repr(resident)
    for _ in range(2):
        assert torch.equal(module(inputs()), want)
    streamed.close()
    assert type(module) is original
    assert not isinstance(module, wsm.StreamedModule)
    assert not hasattr(module, "plan")
    assert "_wsm_streamed" not in module.__dict__
    assert (REGISTERED, Counting.made) == (told, made)
    del bases


def test_isinstance_of_an_abstract_class_is_not_mixed_up(tmp_path: Path) -> None:
    module = make(Concrete)
    with wsm.stream(module, file_of(module, tmp_path), **BUDGETS):
        assert not isinstance(make(Concreter), type(module))
        assert not isinstance(make(Concrete), type(module))
    assert isinstance(make(Concreter), Concrete)
    assert issubclass(Concreter, Concrete)
