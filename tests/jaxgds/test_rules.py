"""Sharding rules: the parsing, and what ships, against JAX's own sharding arithmetic."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxgds.rules import Mesh, Rule, fitted, read_mesh, read_rules, shipped


LAYERS = {
    "llama": """self_attn.q_proj.weight tp -
        self_attn.k_proj.weight tp -
        self_attn.o_proj.weight - tp
        mlp.gate_proj.weight tp -
        mlp.up_proj.weight tp -
        mlp.down_proj.weight - tp
        input_layernorm.weight -
        post_attention_layernorm.weight -""",
    "qwen3": """self_attn.v_proj.weight tp -
        self_attn.v_proj.bias tp
        self_attn.q_norm.weight -
        mlp.down_proj.weight - tp
        mlp.gate.weight - -
        mlp.experts.17.gate_proj.weight tp -
        mlp.experts.17.down_proj.weight - tp""",
    "gemma3_text": """self_attn.k_norm.weight -
        self_attn.o_proj.weight - tp
        mlp.up_proj.weight tp -
        pre_feedforward_layernorm.weight -
        post_feedforward_layernorm.weight -""",
    "mixtral": """self_attn.q_proj.weight tp -
        block_sparse_moe.gate.weight - -
        block_sparse_moe.experts.7.w1.weight tp -
        block_sparse_moe.experts.7.w2.weight - tp
        block_sparse_moe.experts.7.w3.weight tp -""",
}


@pytest.mark.parametrize("model_type", LAYERS)
def test_shipped_rules_are_megatrons(model_type):
    rules = shipped({"model_type": model_type})
    for line in LAYERS[model_type].splitlines():
        name, *spec = line.split()
        shape = (64,) * len(spec)
        rule = fitted(rules.of(f"model.layers.11.{name}"), name, shape, Mesh({"tp": 8}))
        assert rule.spec == tuple(() if axis == "-" else (axis,) for axis in spec), name
        quantised = len(spec) == 2 and "gate.weight" not in name
        assert rule.contract == (1 if quantised else None), name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert rules.of(name).contract is None


AXES = {"a": 2, "b": 2, "c": 2}


@settings(deadline=None)
@given(st.permutations("abc"), st.lists(st.integers(0, 2), min_size=3, max_size=3), st.data())
def test_each_part_is_owned_by_the_lowest_rank_that_jax_gives_it(axes, dims, data):
    """Axes a, b and c, in some order, each split one of the dimensions (or none)."""
    used = data.draw(st.integers(0, 3))
    spec = tuple(
        tuple(x for x, d in zip(axes[:used], dims, strict=False) if d == n) for n in range(3)
    )
    mesh, shape = Mesh(AXES), (8, 8, 8)
    devices = jax.make_mesh((2, 2, 2), tuple(AXES))
    sharding = NamedSharding(devices, PartitionSpec(*(s or None for s in spec)))
    ranks = {device: rank for rank, device in enumerate(devices.devices.flat)}
    parts = mesh.parts(spec)
    expected: dict[tuple[int, ...], int] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
        part = tuple(a // (n // p) for (a, _), n, p in zip(bounds, shape, parts, strict=True))
        expected[part] = min(ranks[device], expected.get(part, 8))
    assert {part: mesh.owner(spec, part) for part in expected} == expected


@pytest.mark.parametrize("text", ["", "tp", "tp=", "tp=0", "tp=-1", "tp=2,tp=4", "8", "t p=2"])
def test_refuses_a_mesh(text):
    with pytest.raises(ValueError, match="expected axis=size"):
        read_mesh(text)


def test_reads_a_mesh():
    assert read_mesh("dp=2,tp=4") == Mesh({"dp": 2, "tp": 4})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rule = 3", "not a rules file"),
        ("[[rules]]", r"has \['rules'\]"),
        ("[[rule]]\nnames = ['*']", "has names, spec"),
        ("[[rule]]\nnames = ['*']\nspec = ['tp']\nsepc = 1", "has names, spec"),
        ("[[rule]]\nnames = '*'\nspec = []", "not a list of patterns"),
        ("[[rule]]\nnames = ['*']\nspec = ['tp', ['dp', 'tp']]", "each mesh axis once"),
        ("[[rule]]\nnames = ['*']\nspec = [1]", "each mesh axis once"),
        ("[[rule]]\nnames = ['*']\nspec = []\ncontract = -1", "dimension"),
        ("[[rule]", "not a rules file"),
    ],
)
def test_refuses_a_rules_file(tmp_path, text, why):
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=why) as e:
        read_rules(file)
    assert str(file) in str(e.value)


def test_the_first_rule_that_fits_decides(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(
        "[[rule]]\nnames=['a.*', 'b']\nspec=[['x', 'y'], '']\n[[rule]]\nnames=['*b']\nspec=[]"
    )
    rules = read_rules(file)
    assert rules.of("a.b").spec == (("x", "y"), ())
    assert rules.of("bb").spec == ()
    with pytest.raises(ValueError, match=r"no rule is for the parameter 'c'.*--rules"):
        rules.of("c")


@pytest.mark.parametrize(
    ("rule", "shape", "why"),
    [
        (Rule((), (("tp",),)), (12,), "12 does not divide by 8"),
        (Rule((), (("x",),)), (8,), "the mesh {'tp': 8} lacks"),
        (Rule((), ((), ())), (8,), "too few dimensions"),
        (Rule((), (), 0), (8,), "too few dimensions"),
        (Rule((), (), 2), (8, 8), "too few dimensions"),
    ],
)
def test_refuses_a_rule_that_does_not_fit(rule, shape, why):
    with pytest.raises(ValueError, match=why) as e:
        fitted(rule, "model.w", shape, Mesh({"tp": 8}))
    assert "model.w" in str(e.value)


def test_no_rules_ship_for_an_unknown_model():
    with pytest.raises(ValueError, match="model type 'gpt2'.*--rules"):
        shipped({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="model type None"):
        shipped(None)
