"""Uploading to the Hub, with its client replaced: there is no network in tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.pictures import write_images

from clora.collection.card import model_card
from clora.collection.hub import Destination, cached_revision, check_destination, is_repo_id, upload
from clora.collection.metadata import read_collection
from clora.collection.write import LORA_FILE
from clora.commands import distill as engine
from clora.commands.distill import distill
from clora.errors import CloraError
from clora.testing import random_lora, tiny_config


class FakeHub:
    """Stands for huggingface_hub.HfApi; records the requests."""

    endpoint = "https://hub.test"

    def __init__(self):
        self.created, self.uploaded, self.error = [], [], None
        self.repositories: dict[str, bool] = {}  # id to whether it is private
        self.role = "write"

    def __call__(self):
        return self

    def whoami(self):
        return {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": self.role}}}

    def repo_exists(self, repo_id):
        return repo_id in self.repositories

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.repositories[repo_id])

    def create_repo(self, repo_id, exist_ok, private):
        assert exist_ok
        if self.error:
            raise self.error
        self.created.append(repo_id)
        self.repositories.setdefault(repo_id, private)

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        from huggingface_hub.utils import filter_repo_objects

        if self.error:
            raise self.error
        files = [file.relative_to(folder_path).as_posix() for file in folder_path.rglob("*") if file.is_file()]
        self.uploaded.append((repo_id, sorted(filter_repo_objects(files, allow_patterns=allow_patterns))))


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    return fake


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/..x", "me/with space", "-me/x", "", "me/x.git"])
def test_an_invalid_id(hub, repo_id):
    with pytest.raises(CloraError, match="is not a repository id, expected owner/name"):
        check_destination(Destination(repo_id))


def test_no_login(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(CloraError, match="no login for me/x; run `hf auth login` or set HF_TOKEN"):
        check_destination(Destination("me/x"))


def test_no_right_to_write(hub):
    with pytest.raises(CloraError, match="expected a repository of me or us, found you/x"):
        check_destination(Destination("you/x"))
    hub.role = "read"
    with pytest.raises(CloraError, match="the token may only read"):
        check_destination(Destination("me/x"))


def test_a_public_repository_is_no_private_one(hub, tmp_path):
    assert check_destination(Destination("x", private=True)).repo_id == "me/x"
    hub.repositories["me/x"] = False
    with pytest.raises(CloraError, match="me/x exists and is public"):
        check_destination(Destination("x", private=True))
    with pytest.raises(CloraError, match="me/x exists and is public"):
        upload(tmp_path, Destination("me/x", private=True), ["*"])
    assert hub.uploaded == []
    upload(tmp_path, Destination("us/y", private=True), ["*"])
    assert hub.repositories["us/y"]


def test_the_error_of_an_upload_states_that_nothing_is_lost(hub, tmp_path):
    hub.error = OSError("no connection")
    folder = tmp_path / "my collection"
    with pytest.raises(CloraError, match=f"{folder} is complete, but.*no connection") as failed:
        upload(folder, Destination("me/x", private=True), ["a", "b c"])
    # hf takes one name after each --include.
    expected = f"later: hf upload me/x '{folder}' --include a --include 'b c' --private)"
    assert expected in str(failed.value)


def test_ids_with_an_owner():
    assert is_repo_id("black-forest-labs/FLUX.2-klein-base-4B")
    assert not any(is_repo_id(text) for text in ("clora-studio", "/home/me/x", "./a", "a/b/c", "a b/c"))


def test_the_revision_of_a_pipeline_in_the_cache(monkeypatch):
    known = {"me/base": "/cache/models--me--base/snapshots/c0ffee/model_index.json"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: known.get(repo))
    assert (cached_revision("me/base"), cached_revision("me/other"), cached_revision("folder")) == (
        "c0ffee",
        None,
        None,
    )


@pytest.fixture
def config(tiny_folder, tmp_path, monkeypatch):
    """The config of a job; the test replaces its slow parts."""
    from clora.lora.save import save_lora
    from clora.testing import tiny_pipeline

    monkeypatch.setattr("clora.commands.distill.draw_samples", lambda *arguments: b"a picture")
    save_lora(random_lora(tiny_pipeline().transformer, 2, 0), tmp_path / "snow.safetensors")
    effects = [{"name": "snow", "lora": str(tmp_path / "snow.safetensors"), "prompt": "make it snow"}]
    sources = {"sources": str(write_images(tmp_path / "images", 1))}
    return tiny_config(effects, pipeline=str(tiny_folder), output=str(tmp_path / "out"), data=sources)


@pytest.mark.parametrize("samples", [False, True])
def test_distill_uploads_the_collection_and_nothing_else(hub, config, monkeypatch, tmp_path, capsys, samples):
    def encode(config, adapter, teachers, cache, device):
        assert hub.created == [], "no repository before there is a collection"
        assert "samples.png, which shows pictures from training, is " in capsys.readouterr().err
        return SimpleNamespace(previews=None)

    def train(config, adapter, teachers, data, report, *rest):
        (tmp_path / "out" / "mine.txt").write_text("not the collection's")
        (tmp_path / "out" / "scheduler" / "mine.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "out" / "scheduler" / "mine.txt").write_text("not the collection's")
        return teachers["snow"]

    monkeypatch.setattr(engine, "encode_data", encode)
    monkeypatch.setattr(engine, "train_student", train)
    folder = distill(config, "collection", push_samples=samples)
    files = ["README.md", LORA_FILE, *["samples.png"] * samples, "scheduler/scheduler_config.json"]
    assert hub.uploaded == [("me/collection", files)]
    card = (folder / "README.md").read_text("utf-8")
    assert "load_lora_weights('me/collection')" in card
    assert ("samples.png" in card) == samples
    assert (folder / "samples.png").exists()


def test_what_has_changed_is_not_uploaded(hub, config, monkeypatch, tmp_path):
    def damage(*arguments):
        file = tmp_path / "out" / LORA_FILE
        file.write_bytes(file.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(engine, "encode_data", lambda *arguments: SimpleNamespace(previews=None))
    monkeypatch.setattr(engine, "train_student", lambda config, adapter, teachers, *rest: teachers["snow"])
    monkeypatch.setattr(engine, "_add_samples", damage)
    with pytest.raises(CloraError, match="is not uploaded: its files are no longer as they were written"):
        distill(config, "collection")
    assert hub.created == hub.uploaded == []


@pytest.mark.parametrize("is_edited", [False, True])
def test_a_finished_collection_is_uploaded_without_training_again(hub, config, monkeypatch, is_edited):
    monkeypatch.setattr(engine, "encode_data", lambda *arguments: SimpleNamespace(previews=None))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_student", lambda config, adapter, teachers, *rest: teachers["snow"])
        card = distill(config) / "README.md"
    assert "load_lora_weights('path/to/this/folder')" in card.read_text("utf-8")
    if is_edited:
        card.write_text(card.read_text("utf-8") + "\nMine.\n", "utf-8")
    before = card.read_text("utf-8")
    monkeypatch.setattr(engine, "train_student", None)
    distill(config, "collection")
    assert [repo_id for repo_id, _ in hub.uploaded] == ["me/collection"]
    named = model_card(read_collection(card.parent), "me/collection")
    assert card.read_text("utf-8") == (before if is_edited else named)


def test_a_bad_id_stops_before_the_pipeline_is_loaded(hub, config, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "load_adapter", None)
    monkeypatch.setattr(engine, "encode_data", None)
    with pytest.raises(CloraError, match="not a repository id"):
        distill(config, "not/an/id")
    assert not (tmp_path / "out").exists()


def test_no_repository_is_left_behind_by_input_that_cannot_be_used(hub, config):
    effects = [config.effects[0].model_copy(update={"lora": "missing.safetensors"})]
    with pytest.raises(CloraError, match="does not exist"):
        distill(config.model_copy(update={"effects": tuple(effects)}), "collection")
    assert hub.created == []
