import gc
import logging
import os

import pytest
import torch
from conftest import randomize, tiny_classifier, tiny_tokenizer
from datasets import Dataset
from helpers_training import arguments
from tiny_models import LENGTH, PAD, ROWS, TEXT, tiny_inputs, tiny_model

from hf_lora import LoRAConfig, LoRATrainer, inject_lora
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.lora.architectures import ARCHITECTURES, ROLES
from hf_lora.prefix.cache import PaddedBatch, PrefixCache

TWO_STACKS = r"one list of blocks .* got 2 .*encoder\..*decoder\."
NOT_CALLED = "blocks that run once each; got 0 calls"
PADDING = "frozen blocks that see the padding, with padding on the right"
LOGITS = "other logits from the kept states"
REFUSED = {
    **dict.fromkeys(
        ["bart", "mbart", "plbart", "mvp", "t5", "mt5", "umt5", "bigbird_pegasus", "t5gemma"], TWO_STACKS
    ),
    **dict.fromkeys(["funnel", "squeezebert"], NOT_CALLED),
    **dict.fromkeys(["yoso", "nystromformer", "convbert"], PADDING),
    **dict.fromkeys(["xlm", "flaubert"], LOGITS),
    **dict.fromkeys(["lilt", "luke"], "does not run without its frozen blocks"),
    "albert": "in the first of 1 blocks",
    "longformer": r"shape \(batch, length, width\); got \(1, 8, 32\)",
    "canine": r"shape \(batch, length, width\); got \(4, 6, 32\)",
    "xlnet": r"shape \(batch, length, width\); got \(12, 4, 32\)",
}
WITH_ROLES = [model_type for model_type in TEXT if ARCHITECTURES.get(model_type).reason is None]


def adapted(model_type, **options):
    """Two blocks, the upper one adapted, in evaluation mode: no dropout anywhere."""
    model = tiny_model(model_type, **options)
    roles = "".join(role for role in ROLES if ARCHITECTURES.get(model_type).projections(role))
    inject_lora(model, LoRAConfig(rank=2, projections=roles, layers=(-1,)))
    randomize(model)
    return model


def cache_of(model, directory, tokens=1000, mode="memory", limit=1e9):
    return PrefixCache(model, tokens, mode=mode, limit=limit, directory=directory)


def step(model, batch):
    """Loss, logits and every gradient of a training step."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.logits.detach(), gradients


def per_token(value):
    return value.dim() > 1 and value.shape[1] == LENGTH


def shuffled_and_wider(batch, side):
    """The same examples in another order, with three more columns of padding on one side."""
    order, wider = [2, 0, 3, 1], {}
    for name, value in batch.items():
        value = value[order]
        if per_token(value):
            extra = value.new_full((ROWS, 3, *value.shape[2:]), PAD if name == "input_ids" else 0)
            value = torch.cat([extra, value] if side == "left" else [value, extra], dim=1)
        wider[name] = value
    return wider


def padded_left(batch):
    moved = dict(batch)
    for name, value in batch.items():
        if per_token(value):
            moved[name] = torch.stack(
                [
                    row.roll(int((mask == 0).sum()), 0)
                    for row, mask in zip(value, batch["attention_mask"], strict=True)
                ]
            )
    return moved


def assert_steps_equal(model, batch, cache):
    with cache.replaying(batch):
        cached = step(model, batch)
    torch.testing.assert_close(cached, step(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", WITH_ROLES)
def test_a_step_from_the_cache_equals_an_ordinary_step_or_is_refused(model_type, tmp_path):
    """Recorded in one batch and read in another; for every model type of the table."""
    model, batch = adapted(model_type), tiny_inputs(model_type)
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]), cache_of(model, tmp_path).replaying(batch):
            pass
        return
    cache = cache_of(model, tmp_path)
    assert_steps_equal(model, batch, cache)
    assert len(cache.store) == ROWS
    assert_steps_equal(model, shuffled_and_wider(batch, "right"), cache)
    assert len(cache.store) == ROWS


@pytest.mark.parametrize(
    "model_type", ["llama", "opt", "bloom", "gptj", "mixtral", "gemma2", "modernbert-decoder", "falcon"]
)
def test_padding_on_the_left_is_exact_where_positions_come_from_the_mask_or_are_relative(
    model_type, tmp_path
):
    model, batch = adapted(model_type), tiny_inputs(model_type)
    cache = cache_of(model, tmp_path)
    assert_steps_equal(model, batch, cache)
    store = cache.store
    assert_steps_equal(model, padded_left(batch), cache)
    assert_steps_equal(model, shuffled_and_wider(padded_left(batch), "left"), cache)
    assert cache.store is store and len(store) == ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("bert", "frozen blocks that see the padding"),  # absolute positions
        ("gpt2", "frozen blocks that see the padding"),
        ("roberta", "other logits"),  # its head reads the first token, which is padding
    ],
)
def test_padding_on_the_left_is_refused_where_it_changes_anything(model_type, why, dtype, tmp_path):
    model, batch = adapted(model_type).to(dtype), padded_left(tiny_inputs(model_type))
    expected = rf"would not be exact; got {why}.*, with padding on the left: .*; pad on the right"
    with pytest.raises(ValueError, match=expected), cache_of(model, tmp_path).replaying(batch):
        pass


def test_a_kind_of_padding_that_comes_later_is_checked_too(tmp_path):
    model, batch = adapted("bert"), tiny_inputs("bert")
    cache = cache_of(model, tmp_path)
    with cache.replaying(batch):
        pass
    with pytest.raises(ValueError, match="padding on the left"), cache.replaying(padded_left(batch)):
        pass


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_half_precision_states_are_kept_as_they_are(mode, tmp_path):
    model, batch = adapted("bert").to(torch.bfloat16), tiny_inputs("bert")
    cache = cache_of(model, tmp_path, mode=mode)
    expected, _ = cache.prefix.observe({n: v for n, v in batch.items() if n != "labels"})
    with cache.replaying(batch):
        states = cache.states(PaddedBatch.of(batch))
    real = batch["attention_mask"].bool()
    assert states.dtype == torch.bfloat16
    assert torch.equal(states[real], expected[real]) and not states[~real].any()


def test_equal_examples_are_kept_once_and_what_finds_no_room_is_run_again(tmp_path, caplog):
    """Room for two of the three different examples."""
    model, batch = adapted("bert"), tiny_inputs("bert")
    twice = {name: value[[0, 0, 1, 2]] for name, value in batch.items()}
    cache = cache_of(model, tmp_path, tokens=2 * LENGTH)
    with caplog.at_level(logging.WARNING):
        assert_steps_equal(model, twice, cache)
        assert_steps_equal(model, twice, cache)
    assert len(cache.store) == 2
    assert [record.message[:45] for record in caplog.records] == [
        "cache_frozen_prefix: the examples change betwe"[:45]
    ]


def test_an_example_is_all_of_its_inputs_and_none_of_its_padding():
    ids = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7], [7, 5, 6]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1]])
    types = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]])
    extra = torch.tensor([3, 3, 3, 3, 3])
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "extra": extra}
    keys = PaddedBatch.of({**batch, "labels": torch.arange(5)}).keys()
    assert [keys.index(key) for key in keys] == [0, 1, 2, 3, 0]
    other = PaddedBatch.of({**batch, "extra": extra + 1}).keys()
    assert not set(keys) & set(other)


def test_the_part_of_a_batch_has_no_column_of_padding():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    batch = PaddedBatch.of(
        {"input_ids": torch.arange(16).view(4, 4), "attention_mask": mask, "n": torch.arange(4)}
    )
    assert batch.spans == ((0, 4), (1, 3), (2, 3), (0, 4)) and batch.padding == ("left", "right")
    part = batch.part([2, 1])
    assert part.inputs["input_ids"].tolist() == [[9, 10], [5, 6]] and part.inputs["n"].tolist() == [2, 1]
    assert part.spans == ((1, 2), (0, 2)) and part.padding == ("left",)


def test_a_batch_without_tokens_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"needs input_ids \(batch, length\) in a batch; got pixel_values"),
        cache_of(adapted("bert"), tmp_path).replaying({"pixel_values": torch.zeros(1, 3, 8, 8)}),
    ):
        pass


# In a training run: what LoRATrainer does with it.


EXAMPLES, BLOCKS, DEPTH = 18, 4, 2


def examples(size=EXAMPLES):
    """Rows of 3 to 11 tokens that differ, whose first one tells the label."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(5, 40, (3 + row % 9,), generator=generator).tolist() for row in range(size)]
    labels = [row % 3 for row in range(size)]
    return Dataset.from_dict(
        {
            "input_ids": [
                [10 + label, row, *tokens]
                for row, (label, tokens) in enumerate(zip(labels, ids, strict=True))
            ],
            "attention_mask": [[1] * (2 + len(tokens)) for tokens in ids],
            "labels": labels,
        }
    )


def classifier(dropout=0.0):
    model = tiny_classifier(
        "bert",
        num_hidden_layers=BLOCKS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(1)
    inject_lora(model, LoRAConfig(rank=4, layers=(-2, -1), dropout=dropout))
    return model


def trainer(directory, cache="memory", model=None, cls=LoRATrainer, **options):
    defaults = {"max_steps": -1, "num_train_epochs": 3, "cache_frozen_prefix": cache}
    return cls(
        model=model or classifier(),
        args=arguments(directory, **{**defaults, **options}),
        train_dataset=examples(),
        eval_dataset=examples(6),
        processing_class=tiny_tokenizer(),
    )


def logged(run, name="loss"):
    return [entry[name] for entry in run.state.log_history if name in entry]


def assert_same_training(run, reference, **tolerance):
    tolerance = {"atol": 1e-5, "rtol": 1e-4, **tolerance}
    assert len(logged(run)) == len(logged(reference)) == run.state.global_step
    torch.testing.assert_close(logged(run), logged(reference), **tolerance)
    torch.testing.assert_close(adapter_tensors(run.model), adapter_tensors(reference.model), **tolerance)


def count_rows(model):
    """A list of how many rows each call of the first block's attention gets; going around calls nothing."""
    rows = []
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        ("memory", {}),
        ("disk", {}),
        ("auto", {}),
        ("memory", {"gradient_accumulation_steps": 2}),
        ("memory", {"train_sampling_strategy": "group_by_length"}),
        ("memory", {"max_tokens_per_batch": 40}),
        ("memory", {"class_weights": "1,2,0.5", "label_smoothing_factor": 0.1}),
        ("memory", {"eval_strategy": "epoch"}),
        ("memory", {"dataloader_num_workers": 1}),
        ("memory", {"remove_unused_columns": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_a_run_with_the_cache_gives_the_adapter_of_the_run_without(cache, options, tmp_path):
    """No dropout anywhere: what differs is the rounding, since an example is recorded among others."""
    runs = [trainer(tmp_path / kind, kind, **options) for kind in (cache, "no")]
    for run in runs:
        run.train()
    assert_same_training(*runs)
    torch.testing.assert_close(
        logged(runs[0], "eval_loss"), logged(runs[1], "eval_loss"), atol=1e-5, rtol=1e-4
    )


def test_each_model_of_model_init_has_a_cache_of_its_own(tmp_path):
    runs = [trainer(tmp_path / kind, kind) for kind in ("memory", "no")]
    for run in runs:
        run.model_init = lambda: classifier()
        for _ in range(2):
            run.train()
    assert_same_training(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_trains_the_same(use_reentrant, tmp_path):
    """Reentrant checkpoints drop every gradient behind an input that requires none."""
    options = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    run, reference = trainer(tmp_path / "a", **options), trainer(tmp_path / "b", "no")
    run.train()
    reference.train()
    assert_same_training(run, reference)


def test_every_example_is_run_once_whatever_the_number_of_epochs(tmp_path):
    run = trainer(tmp_path)
    rows = count_rows(run.model)
    run.train()
    # For each of the two kinds of padding at most: an ordinary batch, and its shortest example alone; and the two
    # probes of three rows that `first_token_only` makes.
    assert EXAMPLES < sum(rows) <= EXAMPLES + 2 * (4 + 1) + 2 * 3
    plain = trainer(tmp_path, "no")
    rows = count_rows(plain.model)
    plain.train()
    assert sum(rows) == 3 * EXAMPLES + 2 * 3


def test_dropout_in_the_trained_blocks_stays_on(tmp_path):
    """No weight moves and the data come in the same order; only dropout makes any two losses differ."""
    losses = []
    for seed in (0, 1):
        run = trainer(tmp_path, model=classifier(dropout=0.5), data_seed=0, seed=seed, learning_rate=0.0)
        run.train()
        losses.append(logged(run))
    assert len(set(losses[0]) | set(losses[1])) == 2 * len(losses[0])


@pytest.mark.slow
def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path, **options)
    whole.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    tolerance = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(adapter_tensors(resumed.model), adapter_tensors(whole.model), **tolerance)


def traces(model):
    """Everything that a hook or a swapped forward leaves on a module."""
    hooks = [name for name in vars(torch.nn.Module()) if name.endswith("hooks")]
    return {
        name: (module.__dict__.get("forward"), *(len(getattr(module, hook)) for hook in hooks))
        for name, module in model.named_modules()
    }


class Stop(Exception):
    pass


class Stopping(LoRATrainer):
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise Stop
        return super().compute_loss(*args, **kwargs)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux lists the open files there")
@pytest.mark.parametrize("cls", [LoRATrainer, Stopping])
def test_nothing_is_left_behind(cls, tmp_path):
    """On the model, on the disk, and among the open files; also after an exception."""
    run = trainer(tmp_path, "disk", cls=cls)
    before, files = traces(run.model), set(os.listdir("/proc/self/fd"))
    try:
        run.train()
    except Stop:
        assert cls is Stopping
    gc.collect()
    assert traces(run.model) == before
    assert list(tmp_path.iterdir()) == [] and set(os.listdir("/proc/self/fd")) <= files


def test_a_training_set_that_does_not_fit_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, frozen_prefix_cache_gb=1e-6)
    before = {name: tensor.clone() for name, tensor in adapter_tensors(run.model).items()}
    with pytest.raises(ValueError, match=r"not fit in memory; got 0.0 MB for 162 tokens; .*use .*=disk"):
        run.train()
    torch.testing.assert_close(adapter_tensors(run.model), before, atol=0, rtol=0)


def test_every_block_trained_is_refused(tmp_path):
    model = tiny_classifier("bert")
    inject_lora(model, LoRAConfig(rank=4))
    with pytest.raises(
        ValueError, match=r"first of 2 blocks; adapt the top ones only, such as --lora_layers -2 -1"
    ):
        trainer(tmp_path, model=model).train()


def test_a_stream_of_examples_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.train_dataset = run.train_dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"needs a training set with a length .* got IterableDataset"):
        run.train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("neftune_noise_alpha", 5.0),
        ("is_fsdp_enabled", True),
        ("is_deepspeed_enabled", True),
    ],
)
def test_what_goes_around_the_models_forward_is_refused(name, value, tmp_path):
    run = trainer(tmp_path)
    setattr(run, name, value)
    shown = {"is_fsdp_enabled": "FSDP", "is_deepspeed_enabled": "DeepSpeed"}.get(name, name)
    with pytest.raises(ValueError, match=rf"does not work with {shown}; got 'memory'; "):
        run.train()


def test_torch_compile_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.args.torch_compile = True
    with pytest.raises(ValueError, match="does not work with torch_compile"):
        run.train()
