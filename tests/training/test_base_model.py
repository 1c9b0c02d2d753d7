"""Where a base model comes from, and whether its weights are what they should be."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from jobs import train
from safetensors.numpy import save_file

from tuneserve.errors import BaseModelError
from tuneserve.settings import Settings
from tuneserve.training.base_model import PACKAGE, PACKAGED, PACKAGED_REVISION, PACKAGED_SHA256, BaseModel, resolve

pytestmark = pytest.mark.usefixtures("brief")


def write_model(folder: Path, *weights: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for number, name in enumerate(weights):
        save_file({"weight": np.full(10, number, np.float32)}, folder / name)
    return folder


def find(name: str | Path, tmp_path: Path, *, revision: str = "") -> BaseModel:
    return resolve(str(name), revision=revision, cache=tmp_path / "cache")


def refusal(name: str | Path, tmp_path: Path, *, revision: str = "") -> str:
    with pytest.raises(BaseModelError) as caught:
        find(name, tmp_path, revision=revision)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(name) in message
    return message


def test_a_folder_is_taken_as_it_is_and_known_by_the_hash_of_its_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine", "model.safetensors")
    found = find(folder, tmp_path, revision="ignored")
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (found.source, found.revision, found.sha256, found.folder) == ("folder", "", sha256, folder)
    assert json.loads(json.dumps(found.record())) == {
        "name": str(folder),
        "source": "folder",
        "revision": "",
        "sha256": sha256,
    }


def test_a_folder_is_found_by_a_relative_path_and_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "owner" / "mine", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [find(name, tmp_path).folder for name in ("owner/mine", "./owner/mine", "~/owner/mine")] == [folder] * 3


def test_weights_in_several_files_count_all_of_them(tmp_path: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder = write_model(tmp_path / "sharded", *shards)
    before = find(folder, tmp_path).sha256
    assert find(shutil.copytree(folder, tmp_path / "copy"), tmp_path).sha256 == before
    for shard in shards:
        changed = shutil.copytree(folder, tmp_path / shard)
        save_file({"weight": np.zeros(9, np.float32)}, changed / shard)
        assert find(changed, tmp_path).sha256 != before


@pytest.mark.parametrize(
    ("removed", "added"),
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("model.safetensors", "model.safetensors.index.json"),
        ("config.json", ""),
    ],
)
def test_a_folder_without_safe_weights_or_configuration_is_refused(removed: str, added: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine", "model.safetensors")
    (folder / removed).unlink()
    if added:
        (folder / added).write_bytes(b"{}")
    message = refusal(folder, tmp_path)
    assert "should hold config.json and *.safetensors; weights in pickles are not loaded" in message


def bring_code(folder: Path, name: str, marker: Path) -> None:
    """Let a file of the model's ask for code of its own, which leaves a mark if it runs."""
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    mapped = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "own.Own")
    content = json.loads((folder / name).read_text()) | {"auto_map": mapped | {"AutoTokenizer": ["own.Own"] * 2}}
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused_and_its_code_not_run(
    name: str, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "mine", "model.safetensors")
    for file in {"config.json", name}:
        (folder / file).write_text('{"model_type": "own"}')
    bring_code(folder, name, tmp_path / "marker")
    with pytest.raises(BaseModelError, match=rf"brings code of its own \(auto_map in {name}\)"):
        train(environment, BASE_MODEL=str(folder))
    assert not (tmp_path / "marker").exists()


def test_of_a_model_that_transformers_knows_the_code_beside_it_is_passed_over(
    environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tiny.make_base_model(tmp_path / "mine")
    for name in ("config.json", "tokenizer_config.json"):
        bring_code(folder, name, tmp_path / "marker")
    train(environment, BASE_MODEL=str(folder), N_EPOCHS="1")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "../none", "~/none", f"/{'x' * 300}"])
def test_a_path_to_nothing_is_refused(name: str, tmp_path: Path) -> None:
    assert refusal(name, tmp_path) == f"BASE_MODEL={name}: there is no such folder."


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(write_model(tmp_path / "mine") / "config.json", tmp_path)


@pytest.mark.parametrize("name", ["a/b/c", "two words", "-x", "owner/name@main", "x" * 200])
def test_what_can_be_no_hub_name_is_refused_without_asking(name: str, tmp_path: Path) -> None:
    assert "no hub name looks like that" in refusal(name, tmp_path)


def test_the_default_comes_from_the_package_with_the_weights_of_the_hub(tmp_path: Path) -> None:
    name = Settings().base_model
    assert name == PACKAGED
    for revision in ("", PACKAGED_REVISION):
        found = find(name, tmp_path, revision=revision)
        assert (found.source, found.revision, found.sha256) == ("package", PACKAGED_REVISION, PACKAGED_SHA256)
        assert hashlib.sha256((found.folder / "model.safetensors").read_bytes()).hexdigest() == PACKAGED_SHA256


def test_tampered_weights_of_the_package_are_refused_and_it_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of the same name that stands first on the path, and that an import would not survive."""
    folder = write_model(tmp_path / "site" / PACKAGE / "model", "model.safetensors")
    (folder.parent / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    with pytest.raises(BaseModelError, match=f"{PACKAGED_SHA256}: do not trust them") as caught:
        find(PACKAGED, tmp_path)
    assert str(folder) in str(caught.value)
    assert PACKAGE not in sys.modules


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_cannot_be_read_is_said(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine", "model.safetensors")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / name)  # to itself: nobody can read it, not even root
    message = refusal(folder, tmp_path)
    assert len(message) < 600
    assert name in message


def test_a_hub_name_is_downloaded_without_pickles_and_known_by_its_commit(
    hub: tuple[str, Path], ask_hub: Callable[..., None], tmp_path: Path
) -> None:
    address, folder = hub
    ask_hub(address)
    commit = hashlib.sha1(b"the only commit").hexdigest()
    repository = write_model(folder / "models" / "owner" / "model", "model.safetensors")
    for name in ("tokenizer.json", "vocab.txt", "pytorch_model.bin", "training_args.bin", "model.onnx", "code.py"):
        (repository / name).write_bytes(b"{}")
    pickles = write_model(folder / "models" / "owner" / "pickles")
    (pickles / "pytorch_model.bin").write_bytes(b"")
    found = find("owner/model", tmp_path)
    assert (found.source, found.revision) == ("hub", commit)
    files = ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert sorted(path.name for path in found.folder.iterdir()) == files
    assert find("owner/model", tmp_path, revision=commit) == found
    no_model = "neither a folder here nor a model on the hub."
    no_revision = "BASE_MODEL=owner/model: the hub has no revision 'v2' of it."
    assert refusal("owner/model", tmp_path, revision="v2") == no_revision
    for name in ("owner/none", "none"):
        assert refusal(name, tmp_path) == f"BASE_MODEL={name}: {no_model}"
    assert refusal(PACKAGED, tmp_path, revision="main") == f"BASE_MODEL={PACKAGED}: {no_model}"
    with pytest.raises(BaseModelError, match="weights in pickles are not loaded"):
        find("owner/pickles", tmp_path)
    ask_hub("http://127.0.0.1:9")  # what was downloaded needs no hub any more
    assert find("owner/model", tmp_path) == found


def test_a_hub_out_of_reach_is_a_clear_error(unreachable: str, ask_hub: Callable[..., None], tmp_path: Path) -> None:
    ask_hub(unreachable, patience_s=0.1)
    message = refusal("owner/model", tmp_path)
    assert message.startswith("BASE_MODEL=owner/model is not a folder here, and the hub cannot be reached")
    assert message.endswith("Give a local folder, or use the default, which needs no network.")
