"""The streamed module is the module: its own class, and what users' code finds on it."""

from __future__ import annotations

import abc
import copy
import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from waits import LIMIT_S

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


# -- names -----------------------------------------------------------------------------------------


class Named(Layers):
    """Has all of our names itself, each in another way."""

    stats = "mine"

    def __init__(self) -> None:
        super().__init__()
        self.build()
        self.plan = nn.Linear(WIDTH, WIDTH)
        self.module = nn.Linear(WIDTH, WIDTH)
        self.map = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.register_buffer("fetch", torch.ones(3))
        self.trace = nn.Parameter(torch.ones(WIDTH))
        self.resize = 7

    def __getattr__(self, name: str) -> Any:
        return "made" if name == "shrink" else super().__getattr__(name)

    @property
    def expect(self) -> str:
        raise RuntimeError("not now")

    def close(self) -> str:
        return "closed"

    def __enter__(self) -> str:
        return "entered"

    def __exit__(self, *_: object) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map[0](self.module(self.plan(super().forward(x)))) * self.trace


def test_the_modules_own_names_are_its_own(tmp_path: Path) -> None:
    resident, module = make(Named), make(Named)
    with wsm.handle(wsm.stream(module, file_of(resident, tmp_path), **BUDGETS)) as streamed:
        assert streamed is module
        assert torch.equal(module(inputs()), resident(inputs()))
        assert isinstance(module.plan, nn.Linear)
        assert isinstance(module.module, nn.Linear)
        assert (module.stats, module.resize, module.shrink) == ("mine", 7, "made")
        assert torch.equal(module.fetch, torch.ones(3))
        assert isinstance(module.trace, nn.Parameter)
        assert module.close() == "closed"
        with module as entered:
            assert entered == "entered"
        with pytest.raises(RuntimeError, match="not now"):
            _ = module.expect
        handle = wsm.handle(module)
        assert handle.plan.streams
        assert handle.stats()["passes"] == 1
        assert torch.equal(handle.fetch("plan.weight"), resident.plan.weight)
        handle.expect(1, 1)
        handle.resize(device_memory="8MiB")
        with pytest.raises(ValueError, match="in all"):
            handle.shrink("1GiB")
        with handle.trace(tmp_path / "trace.json"):
            module(inputs())
    assert type(module) is Named


def test_names_that_a_module_gets_while_it_streams(tmp_path: Path) -> None:
    module = make(Plain)
    with wsm.stream(module, file_of(module, tmp_path), **BUDGETS):
        handle = wsm.handle(module)
        assert module.plan is handle.plan
        module.plan = nn.Linear(2, 2)
        with pytest.raises(KeyError, match="attribute 'stats' already exists"):
            module.register_buffer("stats", torch.ones(2))  # as for names of any class
        with pytest.raises(KeyError, match="attribute 'fetch' already exists"):
            module.fetch = nn.Parameter(torch.ones(2))
        module.shrink = "small"
        assert isinstance(module.plan, nn.Linear)
        assert module.shrink == "small"
        del module.plan
        assert module.plan is handle.plan


def test_handle_says_what_is_not_streamed(tmp_path: Path) -> None:
    module = make(Plain)
    with pytest.raises(ValueError, match=r"this Plain is not streamed$"):
        wsm.handle(module)
    outer = nn.Sequential(nn.Identity(), module)
    with wsm.stream(module, file_of(module, tmp_path), **BUDGETS):
        with pytest.raises(ValueError, match="not streamed: give its module '1', which is"):
            wsm.handle(outer)
        assert wsm.handle(outer[1]) is wsm.handle(module)
    with pytest.raises(ValueError, match="is not streamed"):
        wsm.handle(module)
    with pytest.raises(ValueError, match="this int is not streamed"):
        wsm.handle(3)


# -- what is made of it ----------------------------------------------------------------------------


def test_what_its_class_makes_is_an_original(tmp_path: Path) -> None:
    layers = make(Plain).layers
    with wsm.stream(layers, file_of(layers, tmp_path), **BUDGETS) as streamed:
        half = streamed[:2]
        assert type(half) is nn.ModuleList
        assert list(half) == list(streamed)[:2]
    stack = make(lambda: nn.Sequential(*make(Plain).layers))
    with wsm.stream(stack, file_of(stack, tmp_path), **BUDGETS) as streamed:
        assert type(streamed[1:]) is nn.Sequential
        assert type(streamed[1:]) is type(stack[:1])
    described = make(Described)
    with wsm.stream(described, file_of(described, tmp_path), **BUDGETS) as streamed:
        assert type(type(streamed)(width=3)) is Described
        assert type(dataclasses.replace(streamed, tags=["new"])) is Described


def test_two_of_one_class_are_of_one_class(tmp_path: Path) -> None:
    one, two, file = make(Plain), make(Plain), file_of(make(Plain), tmp_path)
    with wsm.stream(one, file, **BUDGETS), wsm.stream(two, file, **BUDGETS):
        assert type(one) is type(two)
        kind = weakref.ref(type(one))
    del one, two
    gc.collect()
    assert kind() is None  # nothing keeps it


class Fixed(Layers):
    """Its class cannot be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.build()

    @property
    def __class__(self) -> type:
        return Fixed


def test_a_class_that_cannot_be_changed_leaves_the_handle(tmp_path: Path) -> None:
    resident, module = make(Fixed), make(Fixed)
    with pytest.warns(UserWarning, match=r"class of this Fixed cannot be changed.*wsm_ext\.handle"):
        streamed = wsm.stream(module, file_of(resident, tmp_path), **BUDGETS)
    assert streamed is module
    with wsm.handle(module) as entered:
        assert entered is module
        assert torch.equal(module(inputs()), resident(inputs()))
        with pytest.raises(RuntimeError, match="load_state_dict"):
            module.load_state_dict(resident.state_dict())
        with pytest.raises(TypeError, match="copied or pickled"):
            copy.deepcopy(module)
    assert type(module) is Fixed
    assert "_wsm_streamed" not in module.__dict__


def test_a_bare_module_can_be_streamed(tmp_path: Path) -> None:
    module = nn.Module()
    module.layers = make(Plain).layers
    with wsm.stream(module, file_of(module, tmp_path), **BUDGETS) as streamed:
        assert streamed.plan.streams
        assert torch.equal(streamed.layers[0](inputs()), make(Plain).layers[0](inputs()))
    assert type(module) is nn.Module


# -- a stream beside another one -------------------------------------------------------------------


def test_a_part_and_a_whole_are_not_streamed_at_once(tmp_path: Path) -> None:
    whole, other = make(Plain), make(Plain)
    file = file_of(whole, tmp_path)
    part = whole.layers
    with wsm.stream(whole, file, **BUDGETS):
        for inner, path in ((part, "layers"), (part[1], "layers.1")):
            message = rf"it is module '{path}' of a Plain that is streamed already: close\(\)"
            with pytest.raises(ValueError, match=message):
                wsm.stream(inner, device="cpu")
        other.layers[2] = part[2]
        with pytest.raises(ValueError, match=r"its module 'layers.2' is module 'layers.2' of a Pl"):
            wsm.stream(other, file, **BUDGETS)
        other.layers[2] = nn.Linear(WIDTH, WIDTH)
        with wsm.stream(other, file, **BUDGETS):  # the refused one has left nothing behind
            pass
    with (
        wsm.stream(part, **BUDGETS),
        pytest.raises(ValueError, match=r"its module 'layers' is a module that is streamed alr"),
    ):
        wsm.stream(whole, file, **BUDGETS)
    with wsm.stream(whole, file, **BUDGETS):
        pass


def test_activations_may_be_shared_with_a_streamed_module(tmp_path: Path) -> None:
    act = nn.Tanh()
    one, two = (nn.Sequential(nn.Linear(WIDTH, WIDTH), act, nn.Linear(WIDTH, WIDTH)) for _ in "ab")
    file = file_of(one, tmp_path)
    chosen = {**BUDGETS, "units": "leaf"}
    with wsm.stream(one, file, **chosen), wsm.stream(two, file, **chosen):
        assert torch.equal(one(inputs()), two(inputs()))


def test_threads_that_stream_one_module_at_once(tmp_path: Path) -> None:
    module, file = make(Plain), file_of(make(Plain), tmp_path)
    together = threading.Barrier(4)
    outcomes: list[Any] = []

    def work() -> None:
        together.wait(LIMIT_S)
        try:
            outcomes.append(wsm.handle(wsm.stream(module, file, **BUDGETS)))
        except ValueError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
    [handle] = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    assert len(refused) == 3
    assert all("streamed already" in text for text in refused)
    assert torch.equal(module(inputs()), make(Plain)(inputs()))
    handle.close()
