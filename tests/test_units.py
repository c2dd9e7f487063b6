"""Which units a module falls into, by mode."""

import pytest
import torch
from torch import nn

from wsm_ext.modules.units import Unit, find_units


class Mixer(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.up = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.down(self.up(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Mixer()
        self.mlp = Mixer()
        self.post_attention_layernorm = nn.LayerNorm(4, bias=False)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.mlp(self.act(self.post_attention_layernorm(self.self_attn(x))))


class OtherLayer(Layer):
    pass


class Scaled(Layer):
    """A layer with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Holder(nn.Module):
    """Runs the modules that it is given."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return x


def stack(*layers) -> nn.ModuleList:
    return nn.ModuleList(layers)


def decoder(layer=Layer, count: int = 3) -> Holder:
    return Holder(
        model=Holder(
            embed=nn.Embedding(8, 4),
            layers=nn.ModuleList(layer() for _ in range(count)),
            norm=nn.LayerNorm(4, bias=False),
        ),
        lm_head=nn.Linear(4, 8, bias=False),
    )


def check(module: nn.Module, units: list[Unit]) -> None:
    """What holds in every mode: each entry once, true names, exclusive where units lie inside."""
    entries = [(id(entry.owner), entry.key) for unit in units for entry in unit.entries]
    expected = [
        (id(m), k) for m in module.modules() for k, p in m._parameters.items() if p is not None
    ]
    assert sorted(entries) == sorted(expected)
    modules = [unit.module for unit in units]
    for unit in units:
        assert module.get_submodule(unit.name) is unit.module
        assert unit.entries
        for entry in unit.entries:
            owner, _, key = entry.name.rpartition(".")
            assert (module.get_submodule(owner), key) == (entry.owner, entry.key)
        inside = [m for m in unit.module.modules() if m is not unit.module]
        assert unit.encloses_units == any(m is other for m in inside for other in modules)
    order = list(module.modules())
    places = [next(i for i, m in enumerate(order) if m is unit.module) for unit in units]
    assert places == sorted(places)
    assert len({unit.label for unit in units}) == len(units)


def find(module: nn.Module, mode) -> dict[str, Unit]:
    units = find_units(module, mode)
    check(module, units)
    return {unit.name: unit for unit in units}


def labels(units: dict[str, Unit]) -> list[str]:
    return [unit.label for unit in units.values()]


def entries(unit: Unit) -> list[str]:
    return [entry.name for entry in unit.entries]


# Modes


@pytest.mark.parametrize("mode", ["layer", "auto"])
def test_layers_are_whole_and_the_rest_is_by_owner(mode):
    units = find(decoder(), mode)
    assert labels(units) == [
        "unit=model.embed",
        "layer=0",
        "layer=1",
        "layer=2",
        "unit=model.norm",
        "unit=lm_head",
    ]
    assert [unit.layer for unit in units.values()] == [None, 0, 1, 2, None, None]
    assert entries(units["model.layers.1"]) == [
        "model.layers.1.self_attn.up.weight",
        "model.layers.1.self_attn.down.weight",
        "model.layers.1.mlp.up.weight",
        "model.layers.1.mlp.down.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ]
    assert not any(unit.encloses_units for unit in units.values())


def test_groups_are_the_children_of_a_layer():
    units = find(decoder(count=2), "group")
    assert labels(units) == [
        "unit=model.embed",
        "layer=0 group=attn",
        "layer=0 group=mlp",
        "layer=0 group=post_attention_layernorm",
        "layer=1 group=attn",
        "layer=1 group=mlp",
        "layer=1 group=post_attention_layernorm",
        "unit=model.norm",
        "unit=lm_head",
    ]
    assert units["model.layers.1.mlp"].layer == 1


def test_a_layers_own_parameters_are_an_exclusive_group():
    units = find(decoder(Scaled, count=1), "group")
    layer = units["model.layers.0"]
    assert (layer.label, layer.encloses_units) == ("layer=0", True)
    assert entries(layer) == ["model.layers.0.scale"]
    assert not units["model.layers.0.mlp"].encloses_units


def test_leaves_are_the_owners():
    units = find(decoder(Scaled, count=1), "leaf")
    assert labels(units) == [
        "unit=model.embed",
        "layer=0",
        "layer=0 unit=self_attn.up",
        "layer=0 unit=self_attn.down",
        "layer=0 unit=mlp.up",
        "layer=0 unit=mlp.down",
        "layer=0 unit=post_attention_layernorm",
        "unit=model.norm",
        "unit=lm_head",
    ]
    assert units["model.layers.0"].encloses_units


@pytest.mark.parametrize(
    ("child", "group"),
    [
        ("attention", "attn"),
        ("linear_attn", "attn"),
        ("Attention_1", "attn"),
        ("mlp", "mlp"),
        ("ffn", "mlp"),
        ("feed_forward", "mlp"),
        ("block_sparse_moe", "mlp"),
        ("mixer", "mixer"),
        ("attn_norm", "attn_norm"),
        ("ln_1", "ln_1"),
        ("attn_ln", "attn_ln"),
    ],
)
def test_names_of_groups(child, group):
    module = Holder(layers=stack(Holder(**{child: Mixer()}), Holder(**{child: Mixer()})))
    assert labels(find(module, "group")) == [f"layer=0 group={group}", f"layer=1 group={group}"]


def test_two_groups_of_one_kind_have_different_labels():
    module = Holder(layers=stack(Holder(self_attn=Mixer(), cross_attn=Mixer(), mlp=Mixer())))
    assert labels(find(module, "group")) == [
        "layer=0 group=attn",
        "layer=0 group=cross_attn",
        "layer=0 group=mlp",
    ]


def test_a_layer_without_children_is_one_group():
    module = Holder(layers=stack(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert labels(find(module, "group")) == ["layer=0", "layer=1"]


def test_names_choose_modules_whole():
    units = find(decoder(count=2), ["model.layers.0", "model.layers.1.mlp"])
    assert labels(units) == [
        "unit=model.embed",
        "layer=0",
        "layer=1 unit=self_attn.up",
        "layer=1 unit=self_attn.down",
        "layer=1 unit=mlp",
        "layer=1 unit=post_attention_layernorm",
        "unit=model.norm",
        "unit=lm_head",
    ]
    assert len(units["model.layers.0"].entries) == 5


@pytest.mark.parametrize("names", [["model", "model.layers.0"], ["model.layers.0", "model"]])
def test_a_name_inside_another_is_carved_out(names):
    units = find(decoder(count=2), names)
    assert list(units) == ["model", "model.layers.0", "lm_head"]
    assert units["model"].encloses_units
    assert not units["model.layers.0"].encloses_units
    assert len(units["model.layers.0"].entries) == 5
    assert len(units["model"].entries) == 2 + 5


def test_the_whole_module_is_named_by_the_empty_name():
    module = decoder(count=1)
    units = find(module, [""])
    assert labels(units) == ["unit=Holder"]
    assert len(units[""].entries) == 8


def test_no_names_at_all_leave_all_by_owner():
    module = decoder(count=1)
    assert labels(find(module, [])) == labels(find(module, "leaf"))


# Stacks


@pytest.mark.parametrize("build", [nn.Sequential, stack])
def test_stacks_of_blocks(build):
    units = find(Holder(blocks=build(Layer(), Layer())), "layer")
    assert labels(units) == ["layer=0", "layer=1"]


def test_a_stack_of_one_layer():
    assert labels(find(decoder(count=1), "layer"))[1] == "layer=0"


def test_a_sequential_of_leaves_is_no_stack():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    units = find(net, "layer")
    assert labels(units) == ["unit=0", "unit=2"]
    assert [unit.layer for unit in units.values()] == [None, None]


def test_a_sequential_with_one_block_is_no_stack():
    net = nn.Sequential(Mixer(), nn.Linear(4, 8))
    assert labels(find(net, "layer")) == ["unit=0.up", "unit=0.down", "unit=1"]


def test_a_sequential_may_hold_layers_among_others():
    net = nn.Sequential(nn.Embedding(8, 4), Layer(), Layer(), nn.Linear(4, 8))
    units = find(net, "layer")
    assert labels(units) == ["unit=0", "layer=1", "layer=2", "unit=3"]


def test_a_sequential_of_sequentials_is_searched():
    net = nn.Sequential(nn.Sequential(Layer(), Layer(), Layer()), nn.Sequential(nn.Linear(4, 8)))
    assert labels(find(net, "layer")) == ["layer=0", "layer=1", "layer=2", "unit=1.0"]


def test_a_stack_inside_a_layer_is_not_looked_for():
    net = Holder(layers=stack(*(Holder(experts=stack(Mixer(), Mixer())) for _ in range(2))))
    assert labels(find(net, "layer")) == ["layer=0", "layer=1"]


def test_a_list_of_unlike_modules_is_searched():
    net = Holder(parts=stack(nn.Embedding(8, 4), Holder(blocks=stack(Layer(), Layer()))))
    assert labels(find(net, "layer")) == ["unit=parts.0", "layer=0", "layer=1"]


def test_classes_that_alternate_are_a_stack():
    net = Holder(layers=stack(*((OtherLayer if i % 3 == 2 else Layer)() for i in range(6))))
    assert labels(find(net, "layer")) == [f"layer={i}" for i in range(6)]


def test_several_stacks_have_qualified_labels():
    net = Holder(
        encoder=Holder(layers=stack(Layer(), Layer())), decoder=Holder(layers=stack(Layer()))
    )
    units = find(net, "layer")
    assert labels(units) == [
        "unit=encoder.layers.0",
        "unit=encoder.layers.1",
        "unit=decoder.layers.0",
    ]
    assert [(unit.stack, unit.layer) for unit in units.values()] == [
        ("encoder.layers", 0),
        ("encoder.layers", 1),
        ("decoder.layers", 0),
    ]
    assert labels(find(net, "group"))[:2] == [
        "unit=encoder.layers.0 group=attn",
        "unit=encoder.layers.0 group=mlp",
    ]
    assert labels(find(net, "leaf"))[0] == "unit=encoder.layers.0.self_attn.up"


def test_lists_without_parameters_are_no_stacks():
    net = Holder(rotary=stack(nn.Identity(), nn.Identity()), layers=stack(Layer(), Layer()))
    assert labels(find(net, "layer")) == ["layer=0", "layer=1"]


def test_the_index_counts_layers_without_parameters():
    net = Holder(layers=stack(nn.Identity(), Layer(), nn.Identity(), Layer()))
    assert labels(find(net, "layer")) == ["layer=1", "layer=3"]


def test_module_dicts_are_searched():
    net = Holder(towers=nn.ModuleDict({"text": Holder(layers=stack(Layer(), Layer()))}))
    assert list(find(net, "layer")) == ["towers.text.layers.0", "towers.text.layers.1"]


def test_layers_that_are_bare_lists_fall_into_what_they_list():
    net = Holder(layers=stack(stack(Mixer(), Mixer()), stack(Mixer(), Mixer())))
    units = find(net, "layer")
    assert labels(units) == ["layer=0 unit=0", "layer=0 unit=1", "layer=1 unit=0", "layer=1 unit=1"]
    assert [unit.layer for unit in units.values()] == [0, 0, 1, 1]


# Owners


def test_a_module_with_parameters_and_units_inside_is_exclusive():
    net = Holder(layers=stack(Layer(), Layer()))
    net.token = nn.Parameter(torch.zeros(1))
    units = find(net, "layer")
    assert labels(units) == ["unit=Holder", "layer=0", "layer=1"]
    assert units[""].encloses_units
    assert entries(units[""]) == ["token"]


@pytest.mark.parametrize("mode", ["layer", "leaf", "group", []])
def test_modules_that_read_their_children_are_whole(mode):
    attention = nn.MultiheadAttention(4, 2)
    units = find(Holder(pool=attention), mode)
    assert list(units) == ["pool"]
    assert "pool.out_proj.weight" in entries(units["pool"])


@pytest.mark.parametrize("mode", ["layer", "leaf", "group"])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_fused_layers_are_whole(kind, mode):
    net = Holder(layers=stack(kind(4, 2, 8), kind(4, 2, 8)))
    assert labels(find(net, mode)) == ["layer=0", "layer=1"]


@pytest.mark.parametrize("mode", ["layer", "leaf"])
def test_parameters_of_containers_go_to_the_module_that_runs(mode):
    net = Holder(inner=Holder(box=nn.ModuleDict({"w": nn.ParameterList([torch.zeros(2)] * 2)})))
    net.inner.scales = nn.ParameterDict({"a": torch.zeros(1)})
    units = find(net, mode)
    assert list(units) == ["inner"]
    assert entries(units["inner"]) == ["inner.box.w.0", "inner.box.w.1", "inner.scales.a"]
    assert units["inner"].entries[0].owner is net.inner.box["w"]


def test_parameters_with_nothing_that_runs_above_are_refused():
    with pytest.raises(ValueError, match="parameter '0' has no module above it with a forward"):
        find_units(nn.ParameterList([torch.zeros(1)]), "layer")


def test_a_forward_on_the_instance_counts():
    box = nn.ParameterList([torch.zeros(1)])
    box.forward = lambda x: x
    assert list(find(box, "layer")) == [""]


def test_modules_and_slots_without_parameters_are_left_out():
    net = Holder(
        act=nn.ReLU(), batch=nn.BatchNorm1d(4, affine=False), out=nn.Linear(4, 4, bias=False)
    )
    units = find(net, "layer")
    assert list(units) == ["out"]
    assert entries(units["out"]) == ["out.weight"]
    assert find_units(nn.ReLU(), "layer") == []


# Sharing


def test_a_tied_parameter_has_a_slot_in_each_unit():
    net = decoder(count=1)
    net.lm_head.weight = net.model.embed.weight
    units = find(net, "layer")
    assert entries(units["model.embed"]) == ["model.embed.weight"]
    assert entries(units["lm_head"]) == ["lm_head.weight"]


@pytest.mark.parametrize("mode", ["layer", "leaf", "group", []])
def test_a_module_at_two_places_counts_once_by_its_first_name(mode):
    shared = nn.Linear(4, 4)
    units = find(Holder(first=shared, again=shared), mode)
    assert list(units) == ["first"]
    assert len(units["first"].entries) == 2


def test_a_layer_that_repeats_counts_once():
    layer = Layer()
    units = find(Holder(layers=stack(layer, layer, Layer())), "layer")
    assert labels(units) == ["layer=0", "layer=2"]


def test_a_module_inside_two_layers_is_a_unit_of_its_own():
    shared = Mixer()
    net = Holder(layers=stack(Layer(), Layer(), Layer()))
    net.layers[0].shared = net.layers[2].shared = shared
    units = find(net, "layer")
    assert list(units) == ["layers.0", "layers.0.shared", "layers.1", "layers.2"]
    assert [unit.encloses_units for unit in units.values()] == [True, False, False, True]
    assert len(units["layers.0.shared"].entries) == 2
    assert units["layers.0.shared"].label == "layer=0 unit=shared"


def test_a_module_inside_a_layer_and_outside_is_a_unit_of_its_own():
    net = Holder(layers=stack(Layer(), Layer()))
    net.extra = net.layers[0].mlp
    units = find(net, "layer")
    assert list(units) == ["layers.0", "layers.0.mlp", "layers.1"]


def test_what_is_shared_inside_the_shared_is_carved_out_in_turn():
    shared = Mixer()
    net = Holder(layers=stack(Layer(), Layer(), Layer()))
    net.layers[0].shared = net.layers[1].shared = shared
    net.layers[2].only = shared.up
    units = find(net, "layer")
    assert list(units)[:3] == ["layers.0", "layers.0.shared", "layers.0.shared.up"]
    assert entries(units["layers.0.shared"]) == ["layers.0.shared.down.weight"]


# What is refused


@pytest.mark.parametrize("units", ["layers", "Layer", "", "model.layers.0"])
def test_unknown_modes_are_refused(units):
    with pytest.raises(ValueError, match="'leaf' or a list of module names, not '" + units):
        find_units(decoder(), units)


def test_an_unknown_name_is_refused_with_close_ones():
    with pytest.raises(ValueError, match=r"no module 'model\.layer\.1'.*'model\.layers\.1'"):
        find_units(decoder(), ["model.layer.1"])


def test_the_name_of_a_parameter_is_no_module():
    with pytest.raises(ValueError, match=r"no module 'lm_head\.weight'.*'lm_head'"):
        find_units(decoder(), ["lm_head.weight"])


def test_a_named_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.act' has no parameters"):
        find_units(decoder(), ["model.layers.0.act"])


def test_a_named_module_without_a_forward_is_refused():
    with pytest.raises(ValueError, match=r"'model\.layers' .*ModuleList.*'model\.layers\.0'"):
        find_units(decoder(), ["model.layers"])
