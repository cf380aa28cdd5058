import pytest
from conftest import tiny_batch, tiny_classifier
from tiny_models import tiny_model
from torch import nn

from hf_lora import LoRAConfig, inject_lora, lora_layers
from hf_lora.lora.architectures import ARCHITECTURES, separate
from hf_lora.lora.head import find_head
from hf_lora.lora.targets import find_targets, guess


@pytest.fixture(scope="module")
def bert():
    return tiny_classifier("bert")


def names(model, **options):
    return [target.name for target in find_targets(model, LoRAConfig(**options), find_head(model))]


def layer(number):
    return f"bert.encoder.layer.{number}.attention"


def test_roles_come_in_the_models_order(bert):
    expected = [f"{layer(n)}.{end}" for n in (0, 1) for end in ("self.query", "self.value", "output.dense")]
    assert names(bert, projections="oqv") == expected


def test_the_feed_forward_layer_is_not_the_output_projection(bert):
    assert names(bert, projections="o") == [f"{layer(0)}.output.dense", f"{layer(1)}.output.dense"]


def test_listed_names_are_whole_dotted_suffixes(bert):
    assert names(bert, target_modules=["query"]) == [f"{layer(0)}.self.query", f"{layer(1)}.self.query"]
    assert names(bert, target_modules=[f"{layer(1)}.self.key"]) == [f"{layer(1)}.self.key"]
    with pytest.raises(ValueError, match="got 'uery'"):
        names(bert, target_modules=["uery"])


def test_an_expression_must_match_the_whole_name(bert):
    assert names(bert, target_modules=r".*layer\.0\..*(query|key)") == [
        f"{layer(0)}.self.query",
        f"{layer(0)}.self.key",
    ]
    with pytest.raises(
        ValueError, match=r"got the expression 'query', which must match a whole name; candidates: bert"
    ):
        names(bert, target_modules="query")


def test_all_linear_leaves_the_head_out(bert):
    linears = [n for n, m in bert.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
    assert names(bert, target_modules="all-linear") == linears


def test_all_linear_of_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="target_modules='all-linear' selects nothing; got a IBert"):
        inject_lora(tiny_model("ibert"), LoRAConfig(target_modules="all-linear"))


def test_the_head_is_never_a_target(bert):
    with pytest.raises(ValueError, match="got 'classifier'"):
        names(bert, target_modules=["classifier"])


@pytest.mark.parametrize(("layers", "expected"), [([0], [0]), ([-1], [1]), ([1, 0, -1], [0, 1])])
def test_layers_count_from_the_start_or_the_end(bert, layers, expected):
    assert names(bert, projections="q", layers=layers) == [f"{layer(n)}.self.query" for n in expected]


def test_a_block_that_is_not_there_is_an_error(bert):
    with pytest.raises(ValueError, match=r"got \[2, -3\]; expected -2 to 1"):
        names(bert, layers=[0, 2, -3])


def test_names_of_another_architecture_list_candidates(bert):
    with pytest.raises(
        ValueError, match=r"does not have; got 'q_proj'; candidates: .*layer\.\*\.attention\.self\.query"
    ):
        names(bert, target_modules=["q_proj", "v_proj"])


def test_a_role_that_matches_nothing_is_an_error():
    model = tiny_classifier("bert")
    for block in model.bert.encoder.layer:
        block.attention.self.v = block.attention.self.value
        del block.attention.self.value
    with pytest.raises(
        ValueError, match=r"the value projection matches nothing; .* attention\.self\.value; candidates"
    ):
        names(model, projections="qv")


def test_an_unknown_model_type_and_a_plain_module_name_the_way_out(bert):
    with pytest.raises(ValueError, match=r"needs a transformers model; got Sequential .* target_modules"):
        names(nn.Sequential(nn.Linear(2, 2)))


def test_a_layer_type_that_cannot_be_adapted_is_named(bert):
    with pytest.raises(
        ValueError, match=r"cannot adapt 'bert.embeddings.LayerNorm'; got a LayerNorm; expected one of Linear"
    ):
        names(bert, target_modules=["embeddings.LayerNorm"])


OFFERED = ["self.query", "self.key", "self.value", "attention.output.dense"]


def unknown(model_type="bert"):
    model = tiny_classifier(model_type)
    model.config.model_type = "brand-new"
    return model


def test_an_unknown_model_type_gets_a_guess_in_the_error_and_is_not_touched():
    model = unknown()
    with pytest.raises(ValueError, match="the projections of model type 'brand-new' are not known") as error:
        inject_lora(model, LoRAConfig())
    assert "q=self.query, k=self.key, v=self.value, o=attention.output.dense" in str(error.value)
    assert f"target_modules={OFFERED}" in str(error.value)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_guess_can_be_used_as_it_is_offered():
    model = unknown()
    names = inject_lora(model, LoRAConfig(target_modules=OFFERED))
    model.config.model_type, twin = "bert", tiny_classifier("bert")
    assert names == inject_lora(twin, LoRAConfig(projections="qkvo"))


def test_a_users_own_entry_works_like_any_other():
    model = unknown("distilbert")
    ARCHITECTURES.register("brand-new", separate("attention", "q_lin", "k_lin", "v_lin", "attention.out_lin"))
    try:
        inject_lora(model, LoRAConfig(projections="qo"))
    finally:
        del ARCHITECTURES._entries["brand-new"]
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"q_lin", "out_lin"}
    model(**tiny_batch())


def test_nothing_that_looks_like_attention_says_so():
    assert "nothing in it looks like an attention" in guess(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["layer.1.attention.self.query"], "layers": [0]},
            "without a module to adapt; got \\[0\\]",
        ),
        (
            {"target_modules": ["layer.0.attention.self.query"], "layers": [0, 1]},
            "got \\[1\\]; expected some of \\[0\\]",
        ),
        ({"target_modules": r".*layer\.0.*query", "layers": [-1]}, "without a module to adapt; got \\[1\\]"),
        ({"target_modules": ["query", "pooler.dense"], "layers": [0]}, "leaves out all of 'pooler.dense'"),
        (
            {"target_modules": ["query", "layer.1.attention.self.key"], "layers": [0]},
            "all of 'layer.1.attention.self.key'",
        ),
        ({"target_modules": ["pooler.dense"], "layers": [0]}, "lie in no numbered block"),
        ({"target_modules": ["query"], "layers": [7]}, "got \\[7\\]; expected -2 to 1"),
        ({"target_modules": ["query"], "layers": [0, -3]}, "got \\[-3\\]; expected -2 to 1"),
    ],
    ids=str,
)
def test_blocks_that_leave_out_what_is_asked_for_are_refused(bert, options, message):
    with pytest.raises(ValueError, match=message) as error:
        names(bert, **options)
    assert "\n" not in str(error.value)


def test_negative_blocks_count_from_the_models_last_one():
    four = tiny_classifier("bert", num_hidden_layers=4)
    expression = r".*layer\.[123]\..*query"
    assert names(four, target_modules=expression, layers=[-3]) == [f"{layer(1)}.self.query"]
    # A set of modules may lie partly outside the blocks: `pooler.dense` does.
    assert all(".layer.3." in name for name in names(four, target_modules="all-linear", layers=[-1]))


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("patterns", "unused"),
    [
        ({"layer.7.*": 2}, ["layer.7.*"]),
        ({"query": 2, "value": 4, "uery": 2}, ["uery"]),
        ({".*": 2, "query": 4}, ["query"]),
        ({"query": 2, ".*": 4}, []),
    ],
    ids=str,
)
def test_patterns_that_decide_nothing_are_said(pattern, patterns, unused, caplog):
    inject_lora(tiny_classifier("bert"), LoRAConfig(**{pattern: patterns}))
    told = [record.getMessage() for record in caplog.records if record.name == "hf_lora.lora.inject"]
    assert (
        told == [f"patterns of ranks or alphas that decide about no adapted module: {unused}"][: len(unused)]
    )
