"""Pushing to a Hub on this machine with the real client: what travels, what is said, and what a run leaves there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer
from fake_hub import FakeHub, as_json, folder_files
from helpers_commands import Captured
from helpers_training import arguments, assert_same_tensors, dataset, injected
from huggingface_hub import constants, snapshot_download
from transformers import TrainerCallback
from transformers.utils.hub import PushInProgress
from werkzeug import Response

from hf_lora import LoRATrainer
from hf_lora.adapters.directory import read_adapter
from hf_lora.adapters.hub import adapter_contents, push_adapter
from hf_lora.adapters.info import FILE
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.cli import main as cli
from hf_lora.training.checkpoints import checkpoints, problem

Patch = pytest.MonkeyPatch
CARD = "---\nlicense: mit\n---\n# A card\n\n![curve](training_curve.png)\n<img src='./matrix.png'>\n"


@pytest.fixture(params=[(".safetensors",), ()], ids=["large", "regular"])
def hub(request: pytest.FixtureRequest, monkeypatch: Patch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub with large file storage, or one that takes every file as it is; the client of this process uses it."""
    with FakeHub(large=request.param) as server:
        server.use(monkeypatch, tmp_path, token="hf_me")
        yield server


@pytest.fixture
def large_hub(monkeypatch: Patch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path, token="hf_me")
        yield server


@pytest.fixture
def adapter(adapter_dir: Path, tmp_path: Path) -> Path:
    """A copy of the adapter with a card that shows two pictures, among files that are nobody else's business."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_dir, folder)
    (folder / "README.md").write_text(CARD)
    for name in ("training_curve.png", "matrix.png", "private.png"):
        (folder / name).write_bytes(b"\x89PNG " + name.encode())
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "model.safetensors",
        "tokenizer.pkl",
        "notes.txt",
        ".env",
    ):
        (folder / name).write_bytes(b"secret")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "tokenizer.json").write_text("{}")
    return folder


TRAVEL = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "hf_lora.json",
    "matrix.png",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_curve.png",
]


def contents_of(folder: Path, names: list[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def test_only_the_adapters_own_files_travel_in_one_commit(hub: FakeHub, adapter: Path):
    url = push_adapter(adapter, "me/x", commit_message="First")
    repository = hub.repositories["me/x"]
    assert repository.files() == contents_of(adapter, TRAVEL)
    assert repository.history() == ["First", "initial commit"]
    assert url == f"{hub.url}/me/x/commit/{repository.refs['main']}"
    assert not repository.private
    large = [path for path in repository.files() if hub.is_large(path)]
    assert sum(request.startswith("PUT /storage/") for request in hub.requests) == len(large)


def test_a_repeated_push_sends_nothing_and_a_changed_file_only_itself(hub: FakeHub, adapter: Path):
    first = push_adapter(adapter, "me/x")
    hub.requests.clear()
    assert push_adapter(adapter, "me/x") == first
    assert not [request for request in hub.requests if "commit" in request or "PUT" in request]
    (adapter / "README.md").write_text(CARD + "More.\n")
    hub.requests.clear()
    push_adapter(adapter, "me/x")
    assert hub.repositories["me/x"].history() == [
        "Upload LoRA adapter",
        "Upload LoRA adapter",
        "initial commit",
    ]
    assert hub.repositories["me/x"].files() == contents_of(adapter, TRAVEL)
    assert not [request for request in hub.requests if "PUT" in request]


def test_a_branch_is_made_and_main_stays(hub: FakeHub, adapter: Path):
    push_adapter(adapter, "me/x")
    main = hub.repositories["me/x"].files()
    (adapter / "README.md").write_text(CARD + "Second.\n")
    for _ in range(2):
        push_adapter(adapter, "me/x", revision="v2/second")
    repository = hub.repositories["me/x"]
    assert repository.files("main") == main
    assert repository.files("v2/second") == contents_of(adapter, TRAVEL)
    assert repository.history("v2/second")[0] == "Upload LoRA adapter"
    assert len(repository.history("v2/second")) == 3


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        (None, r"not valid \(status 400: not a branch"),  # a commit
        ("two words", r"not valid \(status 400: Invalid branch name: two words"),
        ("refs/pr/7", r"not valid \(status 400: Invalid branch name"),
    ],
)
def test_a_revision_that_is_no_branch(
    revision: str | None, message: str, large_hub: FakeHub, adapter: Path
) -> None:
    push_adapter(adapter, "me/x")
    repository = large_hub.repositories["me/x"]
    (adapter / "README.md").write_text(CARD + "Changed.\n")
    with pytest.raises(ValueError, match=message) as error:
        push_adapter(adapter, "me/x", revision=revision or repository.refs["main"])
    assert "\n" not in str(error.value)
    assert list(repository.refs) == ["main"] and len(repository.history()) == 2


def test_a_pull_request_to_a_repository_of_others(hub: FakeHub, adapter: Path):
    repository = hub.publish("other/x", {"README.md": b"# Theirs\n"})
    assert push_adapter(adapter, "other/x", create_pr=True) == f"{hub.url}/other/x/discussions/1"
    assert repository.files("main") == {"README.md": b"# Theirs\n"}
    assert repository.files("refs/pr/1") == contents_of(adapter, TRAVEL)
    with pytest.raises(ValueError, match=r"'other/x' could not be pushed to; the token may not do that.*403"):
        push_adapter(adapter, "other/x")
    with pytest.raises(ValueError, match=r"starts from the branch 'main'; got revision 'v2'"):
        push_adapter(adapter, "other/x", create_pr=True, revision="v2")


def test_private_is_private_or_refused(large_hub: FakeHub, adapter: Path):
    push_adapter(adapter, "me/hidden", private=True)
    push_adapter(adapter, "me/hidden", private=True)
    assert large_hub.repositories["me/hidden"].private
    push_adapter(adapter, "me/open")
    (adapter / "README.md").write_text(CARD + "Private words.\n")
    before = large_hub.repositories["me/open"].files()
    with pytest.raises(ValueError, match=r"'me/open' exists and is public; got private"):
        push_adapter(adapter, "me/open", private=True)
    assert large_hub.repositories["me/open"].files() == before


def test_a_name_alone_is_the_users_own_and_an_organization_is_its_own(large_hub: FakeHub, adapter: Path):
    push_adapter(adapter, "short")
    push_adapter(adapter, "team/x")
    assert sorted(large_hub.repositories) == ["me/short", "team/x"]


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("me/x", "", r"'me/x' cannot be pushed to without an access token; .*HF_TOKEN"),
        ("me/x", "hf_unknown", r"the Hub does not accept the token.*401"),
        ("me/x", "hf_reader", r"the token may not do that.*403"),
        ("other/x", "hf_me", r"the token may not do that.*403"),
        ("a/b/c", "hf_me", r"not a repository id; got 'a/b/c'"),
        ("me/two words", "hf_me", r"not a repository id; got 'me/two words'"),
    ],
)
def test_who_may_not_is_told_in_one_line(
    repo_id: str, token: str, message: str, large_hub: FakeHub, adapter: Path, monkeypatch: Patch
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=message) as error:
        push_adapter(adapter, repo_id)
    assert "\n" not in str(error.value)
    assert large_hub.repositories == {}


def test_a_token_given_counts_more_than_that_of_the_environment(large_hub: FakeHub, adapter: Path):
    with pytest.raises(ValueError, match="403"):
        push_adapter(adapter, "me/x", token="hf_reader")
    push_adapter(adapter, "other/x", token="hf_other")
    assert list(large_hub.repositories) == ["other/x"]


def test_offline_and_without_a_network(large_hub: FakeHub, adapter: Path, monkeypatch: Patch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'me/x' cannot be pushed to; got HF_HUB_OFFLINE=1"):
        push_adapter(adapter, "me/x")
    assert large_hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"'me/x' could not be pushed to; the Hub cannot be reached"):
        push_adapter(adapter, "me/x")


@pytest.mark.parametrize(
    ("request_made", "status", "message"),
    [
        ("POST /api/repos/create", 503, r"does not work at the moment; try again later \(status 503"),
        ("POST /api/repos/create", None, "the connection broke off"),
        ("POST /api/models/me/x/commit", None, "the connection broke off"),
        ("POST /api/models/me/x/commit", 412, "somebody else has changed it meanwhile; try again"),
        ("POST /api/models/me/x/commit", 409, "somebody changes it at the same time"),
        ("PUT /storage", 403, r"the token may not do that.*403"),
        ("POST /api/validate-yaml", 413, "the files are too large"),
    ],
)
def test_what_was_interrupted_leaves_nothing_and_goes_through_when_repeated(
    request_made: str, status: int | None, message: str, large_hub: FakeHub, adapter: Path
):
    large_hub.fail(request_made, status)
    with pytest.raises(ValueError, match=message) as error:
        push_adapter(adapter, "me/x")
    assert "\n" not in str(error.value) and "'me/x'" in str(error.value)
    assert all(repository.files() == {} for repository in large_hub.repositories.values())
    push_adapter(adapter, "me/x")
    assert large_hub.repositories["me/x"].files() == contents_of(adapter, TRAVEL)
    assert len(large_hub.repositories["me/x"].history()) == 2


def test_an_answer_that_is_not_a_hubs(large_hub: FakeHub, adapter: Path):
    large_hub.fail("POST /api/repos/create", Response(b"<p/>"))
    with pytest.raises(ValueError, match=r"'me/x' could not be pushed to; the Hub cannot be reached"):
        push_adapter(adapter, "me/x")


def test_a_bad_card_is_one_line(large_hub: FakeHub, adapter: Path):
    problems = ['"base_model" with value "/data/bert" is not valid.', '"license" must be one of [mit]']
    answer = {"errors": [{"message": text} for text in problems], "warnings": []}
    large_hub.fail("POST /api/validate-yaml", as_json(answer, 400))
    with pytest.raises(ValueError, match=r"'me/x'.* the card's metadata is not valid \(") as error:
        push_adapter(adapter, "me/x")
    assert f"({'; '.join(problems)}); mend the YAML" in str(error.value) and "\n" not in str(error.value)
    assert large_hub.repositories["me/x"].files() == {}


def test_the_token_itself_never_travels(large_hub: FakeHub, adapter: Path):
    (adapter / "vocab.txt").write_text("auth hf_me")
    with pytest.raises(ValueError, match=r"nothing is pushed, since vocab.txt holds the access token"):
        push_adapter(adapter, "me/x")
    assert large_hub.requests == []


def test_nothing_broken_is_pushed(large_hub: FakeHub, adapter: Path):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors in .* was changed after it was written"):
        push_adapter(adapter, "me/x")
    with pytest.raises(ValueError, match=r"not an adapter directory; adapter_model.safetensors is missing"):
        push_adapter(adapter / "checkpoint-2", "me/x")
    outside = adapter.parent / "elsewhere.txt"
    outside.write_text("not the adapter's")
    (adapter / "vocab.txt").symlink_to(outside)
    with pytest.raises(ValueError, match=r"vocab.txt in .* is a link to another place"):
        adapter_contents(adapter)
    assert large_hub.requests == []


def test_a_base_model_that_others_cannot_have_is_told(
    large_hub: FakeHub, adapter: Path, tiny_bert_dir: Path, caplog: pytest.LogCaptureFixture
):
    push_adapter(adapter, "me/x")
    assert [record.getMessage() for record in caplog.records if record.name == "hf_lora.adapters.hub"] == [
        f"the base model is a directory of this machine, {tiny_bert_dir}; elsewhere it has to be given"
    ]


def run(*argv: object) -> int:
    return cli.main(["push", *map(str, argv)])


def test_the_command_prints_the_files_and_the_commit(large_hub: FakeHub, adapter: Path, capsys: Captured):
    argv = ("--adapter", adapter, "--repo_id", "me/x", "--commit_message", "Mine", "--private")
    assert run(*argv) == 0
    out = capsys.readouterr().out
    repository = large_hub.repositories["me/x"]
    for name in TRAVEL:
        assert f"│ {name} " in out and f" {(adapter / name).stat().st_size:,} │" in out
    url = f"{large_hub.url}/me/x/commit/{repository.refs['main']}"
    assert out.splitlines()[-1] == url
    assert repository.private and repository.history()[0] == "Mine"
    assert run(*argv) == 0
    assert capsys.readouterr().out == out and repository.history() == ["Mine", "initial commit"]


def test_the_commands_json(large_hub: FakeHub, adapter: Path, capsys: Captured):
    argv = ("--adapter", adapter, "--repo_id", "me/x", "--json")
    assert run(*argv, "--revision", "v2") == 0
    report = json.loads(capsys.readouterr().out)
    head = large_hub.repositories["me/x"].refs["v2"]
    assert report == {
        "repo_id": "me/x",
        "revision": "v2",
        "url": f"{large_hub.url}/me/x/commit/{head}",
        "commit": head,
        "pull_request": None,
        "files": {name: (adapter / name).stat().st_size for name in TRAVEL},
    }
    assert run(*argv, "--revision", "v2") == 0
    assert json.loads(capsys.readouterr().out) == report
    (adapter / "README.md").write_text(CARD + "Changed.\n")
    assert run(*argv, "--create_pr") == 0
    request = json.loads(capsys.readouterr().out)
    assert request["pull_request"] == request["url"] == f"{large_hub.url}/me/x/discussions/1"


# The Trainer


def pushing(folder: Path, **options: Any) -> LoRATrainer:
    defaults = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 2, "hub_always_push": True}
    return LoRATrainer(
        model=injected(),
        args=arguments(folder, **{**defaults, **options}),
        train_dataset=dataset(),
        processing_class=tiny_tokenizer(),
    )


FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", FILE]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
STEPS = [f"Training in progress, step {step}" for step in (6, 4, 2)]


@pytest.mark.parametrize(
    ("strategy", "messages", "folders"),
    [
        ("end", [], []),
        ("every_save", STEPS, []),
        ("checkpoint", STEPS, ["last-checkpoint"]),
        ("all_checkpoints", STEPS, ["checkpoint-2", "checkpoint-4", "checkpoint-6"]),
    ],
)
def test_each_strategy_pushes_the_adapter_and_what_it_says_of_checkpoints(
    strategy: str, messages: list[str], folders: list[str], large_hub: FakeHub, tmp_path: Path
):
    run = pushing(tmp_path / "run", hub_model_id="me/run", hub_strategy=strategy)
    run.train()
    repository = large_hub.repositories["me/run"]
    assert repository.history() == [*messages, "initial commit"]
    top = {path: content for path, content in repository.files().items() if "/" not in path}
    newest = tmp_path / "run" / "checkpoint-6"
    assert top == (contents_of(newest, FILES + TOKENIZER) if messages else {})
    below = {path: content for path, content in repository.files().items() if "/" in path}
    local = {
        folder: newest if folder == "last-checkpoint" else tmp_path / "run" / folder for folder in folders
    }
    assert below == {
        f"{folder}/{path}": content
        for folder, source in local.items()
        for path, content in folder_files(source).items()
    }
    assert not (tmp_path / "run" / "training_args.bin").exists()

    commit = run.push_to_hub()
    # The last checkpoint's adapter is that of the end: there is nothing to add to it.
    assert repository.history() == [*(messages or ["End of training"]), "initial commit"]
    assert commit.oid == repository.refs["main"]
    at_end = {path: content for path, content in repository.files().items() if "/" not in path}
    assert at_end == contents_of(tmp_path / "run", FILES + TOKENIZER)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_on_the_hub(large_hub: FakeHub, tmp_path: Path):
    whole = pushing(tmp_path / "whole", push_to_hub=False)
    whole.train()
    first = pushing(tmp_path / "first", hub_model_id="me/run", hub_strategy="checkpoint", save_total_limit=1)
    first.add_callback(StopAt(4))
    first.train()
    snapshot_download("me/run", allow_patterns="last-checkpoint/*", local_dir=tmp_path / "fetched")
    checkpoint = tmp_path / "fetched" / "last-checkpoint"
    assert problem(checkpoint) is None
    second = pushing(tmp_path / "second", push_to_hub=False)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert_same_tensors(adapter_tensors(second.model), adapter_tensors(whole.model))


class StopAt(TrainerCallback):
    """Ends the training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_the_arguments_of_the_hub_keep_their_meaning(large_hub: FakeHub, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setenv("HF_TOKEN", "")
    run = pushing(
        tmp_path / "named",
        hub_token="hf_me",
        hub_private_repo=True,
        hub_revision="trial",
        hub_strategy="every_save",
        save_strategy="epoch",
        max_steps=-1,
        num_train_epochs=2,
    )
    assert run.hub_model_id == "me/named"
    assert sorted(large_hub.repositories["me/named"].refs) == ["main", "trial"]
    run.train()
    repository = large_hub.repositories["me/named"]
    assert repository.private
    assert repository.history("main") == ["initial commit"]
    epochs = [f"Training in progress, epoch {epoch}" for epoch in (2, 1)]
    assert repository.history("trial") == [*epochs, "initial commit"]
    run.facts.model_name = "Named"
    run.save_model()
    assert repository.history("trial") == ["Model save", *epochs, "initial commit"]
    commit = run.push_to_hub(commit_message="Later", blocking=False, revision="other").result()
    assert repository.refs["other"] == commit.oid
    assert repository.files("other") == repository.files("trial")


@pytest.mark.parametrize("always", [False, True])
def test_while_a_push_still_runs_the_next_one_waits_only_if_always_asked_for(
    always: bool, large_hub: FakeHub, tmp_path: Path
):
    run = pushing(tmp_path / "run", hub_model_id="me/run", hub_strategy="every_save", hub_always_push=always)
    run.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    running: Future[Any] = Future()
    run.push_in_progress = PushInProgress([running])
    run._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    added = run.push_in_progress.jobs[1:]
    assert [job.result().oid for job in added] == (
        [large_hub.repositories["me/run"].refs["main"]] if always else []
    )
    assert len(large_hub.repositories["me/run"].history()) == (2 if always else 1)


def test_push_to_hub_without_the_argument(large_hub: FakeHub, tmp_path: Path):
    run = pushing(tmp_path / "run", push_to_hub=False, save_strategy="no")
    run.train()
    assert large_hub.requests == []
    run.push_to_hub(private=True)
    assert large_hub.repositories["me/run"].private
    assert large_hub.repositories["me/run"].files() == contents_of(tmp_path / "run", FILES + TOKENIZER)


def test_who_may_not_push_is_told_before_the_training(large_hub: FakeHub, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ValueError, match="'me/run' cannot be pushed to without an access token"):
        pushing(tmp_path / "run", hub_model_id="me/run")


def test_a_push_that_fails_loses_nothing_of_the_run(
    large_hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = pushing(tmp_path / "run", hub_model_id="me/run", hub_strategy="every_save")
    large_hub.fail("POST /api/models/me/run/commit", 500, times=2)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert [path.name for path in checkpoints(tmp_path / "run")] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert large_hub.repositories["me/run"].history() == [STEPS[0], "initial commit"]
    told = [
        record.getMessage() for record in caplog.records if record.name == "hf_lora.training.checkpointing"
    ]
    assert [message.partition(":")[0] for message in told] == [
        f"not pushed ({at})" for at in (STEPS[2], STEPS[1])
    ]
    large_hub.fail("POST /api/validate-yaml", None, times=9)
    with pytest.raises(
        ValueError, match=r"the adapter is saved in '.*run', but not on the Hub: 'me/run'.*hf-lora push"
    ):
        run.push_to_hub()
    assert_same_tensors(dict(read_adapter(tmp_path / "run").tensors), adapter_tensors(run.model))
    large_hub.failures.clear()
    push_adapter(tmp_path / "run", "me/run")
    assert large_hub.repositories["me/run"].files() == contents_of(tmp_path / "run", FILES + TOKENIZER)
