"""The way to the Hub and back: what is pushed, what is refused, and what an interrupted push leaves behind."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapter_files import RESULTS, save_adapter
from hub_server import READER, WITHOUT_WAITS
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file

from medct import MedCTModel
from medct.adapters_medct import adapter_fingerprint
from medct.cli import main
from medct.common.paths import find_paths
from medct.publishing import push as hub_module
from medct.publishing.cards import GENERATED
from medct.publishing.push import PushError, commit_of, left_out, push_adapter, push_model, push_shards

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def base(converted, tmp_path) -> Path:
    """A converted model of this test's own."""
    return shutil.copytree(converted, tmp_path / "ct-clip")


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return save_adapter(base, tmp_path / "run", results=RESULTS)


@pytest.fixture
def pushed_base(hub, base, monkeypatch) -> str:
    """The base on the Hub; returns its commit."""
    hub.connect(monkeypatch)
    return push_model(base, "org/base").split("/")[-1]


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Waits are recorded and skipped."""
    noted: list[float] = []
    monkeypatch.setattr("time.sleep", noted.append)
    return noted


# there and back

PULL = """
import sys, torch
from peft import AutoPeftModelForFeatureExtraction, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

commit, adapter_commit, inputs, results = sys.argv[1:]
code = {"trust_remote_code": True}
batch = load_file(inputs)
def base():
    return AutoModel.from_pretrained("org/base", revision=commit, **code)

@torch.no_grad()
def logits(model):
    return model.eval()(**batch).logits_per_image

found = {"base": logits(base())}
found["peft"] = logits(PeftModel.from_pretrained(base(), "org/site-b", revision=adapter_commit))
model = base()
model.load_adapter("org/site-b")
found["transformers"] = logits(model)
found["auto peft"] = logits(AutoPeftModelForFeatureExtraction.from_pretrained("org/site-b", **code))
found["auto model"] = logits(AutoModel.from_pretrained("org/site-b", **code))
assert type(model).__module__.startswith("transformers_modules.")
AutoProcessor.from_pretrained("org/base", revision=commit, **code)

def refused(load):
    try:
        load()
    except (OSError, ValueError) as error:
        print("refused:", error)

model.visual_projection.weight.data += 1
refused(lambda: model.load_adapter("org/site-b", "again"))
refused(lambda: model.load_adapter("org/pickled", "pickled"))
refused(lambda: AutoModel.from_pretrained("org/pickled", **code))
save_file(found, results)
"""


def test_base_and_adapter_are_pushed_and_pulled_without_medct(hub, base, adapter, pushed_base, model, batch, tmp_path):
    url = push_adapter(adapter, "org/site-b", base="org/base", base_revision=pushed_base)
    with torch.no_grad():
        expected = {"base": model(**batch).logits_per_image}
        adapted = PeftModel.from_pretrained(model, adapter).eval()(**batch).logits_per_image
    expected |= dict.fromkeys(("peft", "transformers", "auto peft", "auto model"), adapted)
    save_file(batch, tmp_path / "inputs.safetensors")
    results = tmp_path / "results.safetensors"
    pickled = {"adapter_config.json": (adapter / "adapter_config.json").read_bytes(), "adapter_model.bin": b"pickle"}
    code_and_config = {
        name: content for name, content in hub.files("org/base").items() if name.endswith(("json", "py"))
    }
    hub.add_files("model", "org/pickled", pickled | {"pytorch_model.bin": b"pickle"} | code_and_config)
    hub.cut_answer("GET .*base/resolve/.*safetensors", after_bytes=1000)
    hub.fail("GET .*site-b/resolve/.*safetensors", status=429, retry_after=1)

    arguments = (pushed_base, url.split("/")[-1], tmp_path / "inputs.safetensors", results)
    run = hub.run(WITHOUT_WAITS + PULL, *arguments, home=tmp_path / "home", medct=False)
    assert run.returncode == 0, run.stderr
    found = load_file(results)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
    assert not torch.allclose(found["base"], found["peft"])
    assert f"Load its base, org/base at revision {pushed_base}." in run.stdout
    assert run.stdout.count("refused:") == 3
    assert "org/pickled has no adapter_model.safetensors" in run.stdout
    assert hub.count("GET .*base/resolve/.*model.safetensors") == 2  # once cut short, once whole
    assert hub.count("GET .*bin") == 0


# what is pushed


def test_a_base_is_pushed_with_its_code_and_card(hub, base, pushed_base):
    (base / "train_config.json").write_text(
        '{"data": "/wards/3/site-b"}', encoding="utf-8"
    )  # as a run that adapts all weights leaves it
    push_model(base, "org/adapted")
    assert json.loads(hub.files("org/adapted")["train_config.json"]) == {"data": "site-b"}
    (base / "train_config.json").unlink()
    files = hub.files("org/base")
    assert files.keys() == {path.name for path in base.iterdir()} | {".gitattributes"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "cc-by-nc-sa-4.0"
    assert 'revision = "org/base", "COMMIT"' in card.text
    assert len(hub.repo("model", "org/base").commits) == 2  # the first one makes the repository


def test_an_adapter_names_its_base_by_id_and_commit(hub, adapter, pushed_base):
    (adapter / "studies.csv").write_text("patient-17", encoding="utf-8")
    (adapter / "roc.png").write_bytes(b"png")
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    push_adapter(adapter, "org/site-b", base="org/base", base_revision="main")
    files = hub.files("org/site-b")
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", pushed_base)
    memory = json.loads(files["medct_adapter.json"])["base"]
    assert (memory["model"], memory["revision"]) == ("org/base", pushed_base)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("org/base", "cc-by-nc-sa-4.0")
    assert card.data.eval_results
    assert f'base, revision = "org/base", "{pushed_base}"' in card.text
    assert 'load_adapter("org/site-b")' in card.text
    assert files["roc.png"] == b"png"
    assert "studies.csv" not in files
    for name, content in files.items():
        assert name.endswith((".safetensors", ".png")) or find_paths(content.decode()) == [], name
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
    assert len(hub.repo("model", "org/site-b").commits) == 2


@pytest.mark.parametrize("what", ["adapter", "model"])
def test_nothing_of_an_earlier_adapter_stays_beside_other_weights(hub, base, adapter, pushed_base, what):
    push_adapter(adapter, "org/a", base="org/base", base_revision="main")
    hub.add_file("model", "org/a", "notes.txt", b"mine")
    for name in ("medct_adapter.json", "results.json"):
        (adapter / name).unlink()
    if what == "adapter":
        push_adapter(adapter, "org/a", base="org/base", base_revision="main")
    else:
        push_model(base, "org/a")
    files = hub.files("org/a")
    assert not {"medct_adapter.json", "results.json"} & files.keys()
    assert ("adapter_config.json" in files) == (what == "adapter") and files["notes.txt"] == b"mine"


def test_a_moving_revision_is_resolved_to_a_commit(hub, base, pushed_base):
    assert commit_of("org/base") == commit_of("org/base", "main") == commit_of("org/base", pushed_base) == pushed_base
    assert commit_of(str(base)) is None


def test_edits_of_the_card_are_kept(hub, adapter, pushed_base):
    page = "---\nlicense: mit\n---\n\nMy own words."
    (adapter / "README.md").write_text(page, encoding="utf-8")
    push_adapter(adapter, "org/a", base="org/base", base_revision="main")
    assert hub.files("org/a")["README.md"].decode() == page
    (adapter / "README.md").write_text(f"old\n{GENERATED}\n", encoding="utf-8")
    push_adapter(adapter, "org/a", base="org/base", base_revision="main")
    assert b"## Results" in hub.files("org/a")["README.md"]


def test_the_phantom_base_can_be_pushed(hub, monkeypatch):
    hub.connect(monkeypatch)
    push_model(ROOT / "phantom_base", "org/phantoms", private=True)
    assert hub.repo("model", "org/phantoms").private
    assert b"class MedCTModel" in hub.files("org/phantoms")["modeling_medct.py"]


# what is refused


def test_an_adapter_of_a_local_base_is_refused(hub, adapter, monkeypatch, refused):
    hub.connect(monkeypatch)
    message = refused("push", adapter, "org/a")
    assert message.endswith(
        "was trained on a folder of this machine (ct-clip), which no one else can load: push that first (medct "
        "push ct-clip ORG/BASE), then pass --base ORG/BASE --base_revision COMMIT."
    )
    assert hub.requests == []


def test_a_base_without_a_commit_is_refused(hub, adapter, pushed_base, refused):
    assert "Pass --base_revision COMMIT." in refused("push", adapter, "org/a", "--base", "org/base")
    at = ("--base_revision", "v9")
    assert "is not on the Hub at revision v9" in refused("push", adapter, "org/a", "--base", "org/base", *at)


def test_another_base_than_the_one_trained_on_is_refused(hub, adapter, base, pushed_base):
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, base / "model.safetensors")
    with pytest.raises(PushError, match="The weights of org/base are not those of ct-clip"):
        push_adapter(adapter, "org/a", base="org/base", base_revision=pushed_base)


def test_what_an_adapter_remembers_is_pushed_by_transformers_too(hub, base, adapter, monkeypatch, tmp_path):
    hub.connect(monkeypatch)
    model = MedCTModel.from_pretrained(base)
    model.load_adapter(adapter)
    model.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="org/again", private=True)
    pushed = hub.files("org/again")
    for name in ("medct_adapter.json", "adapter_model.safetensors"):
        assert pushed[name] == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("stale", ["medct_adapter.json", "results.json"])
def test_figures_of_other_weights_are_not_pushed(hub, adapter, pushed_base, stale):
    """As PEFT leaves them, which saves weights into any folder."""
    models = {"base": {}, "adapted": {"adapter_fingerprint": adapter_fingerprint(adapter)}}
    results = RESULTS | {"provenance": RESULTS.get("provenance", {}) | {"models": models}}
    other = {"medct_adapter.json": RESULTS, "results.json": results}[stale]
    (adapter / "results.json").write_text(json.dumps(other), encoding="utf-8")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    described = json.loads((adapter / "medct_adapter.json").read_text(encoding="utf-8"))
    if stale == "results.json":
        described["adapter_fingerprint"] = None
    (adapter / "medct_adapter.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(PushError, match=f"{stale} is of other weights"):
        push_adapter(adapter, "org/a", base="org/base", base_revision=pushed_base)


@pytest.mark.filterwarnings("ignore:.*validating metadata in README")
@pytest.mark.parametrize("name", ["org/base", "org/ct-clip"])  # whose licence is known by its name, if by no card
def test_an_unknown_licence_is_not_guessed(hub, adapter, base, monkeypatch, refused, name):
    hub.connect(monkeypatch)
    (base / "README.md").write_text("no metadata", encoding="utf-8")
    push_model(base, name)
    at = ("--base", name, "--base_revision", "main")
    if name == "org/base":
        assert "names no licence" in refused("push", adapter, "org/a", *at)
    main(["push", str(adapter), "org/a", *at, "--license", "apache-2.0"])
    assert ModelCard(hub.files("org/a")["README.md"].decode()).data.license == "apache-2.0"


def test_an_adapter_takes_the_licence_of_its_base(hub, adapter, pushed_base, refused):
    at = ("--base", "org/base", "--base_revision", pushed_base)
    said = refused("push", adapter, "org/a", *at, "--license", "apache-2.0")
    assert said == (
        "org/base is licensed cc-by-nc-sa-4.0, and an adapter takes its base's licence. Leave out --license."
    )
    assert ("model", "org/a") not in hub.repos
    main(["push", str(adapter), "org/a", *at, "--license", "CC-BY-NC-SA-4.0"])
    assert ModelCard(hub.files("org/a")["README.md"].decode()).data.license == "cc-by-nc-sa-4.0"


@pytest.mark.parametrize("name", ["checkpoints/optimizer.bin", "adapter_model.pt"])
def test_pickles_are_refused(hub, adapter, name, refused):
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).write_bytes(b"")
    assert "Pickles can hold code" in refused("push", adapter, "org/a")


def test_what_is_not_an_adapter_or_model_is_refused(base, adapter, tmp_path, refused):
    assert "no such folder" in refused("push", tmp_path / "nowhere", "org/a")
    assert "no such folder" in refused("push", tmp_path / "nowhere", "org/a", "--base", "org/base")
    assert "Leave out --base." in refused("push", base, "org/a", "--base", "org/base")
    assert "Leave out --license." in refused("push", base, "org/a", "--license", "mit")
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refused("push", adapter, "org/a")
    (base / "README.md").unlink()
    assert "has no README.md" in refused("push", base, "org/a")
    (base / "modeling_medct.py").unlink()
    assert "lacks its code (modeling_medct.py)" in refused("push", base, "org/a")
    (base / "model.safetensors").unlink()
    assert "no safetensors" in refused("push", base, "org/a")


def test_what_decided_the_figures_is_pushed_without_where_it_lay(hub, base, adapter, pushed_base):
    """Settings name the base's repository, and neither paths nor the table of studies are pushed."""
    models = {"adapted": {"model": str(base), "revision": None, "fingerprint": "f"}}
    settings = {"model": str(base), "revision": None, "data": ["/my scans"], "adapter": "."}
    decided = {"settings": settings, "models": models, "command": ["medct", "train"], "studies": {}, "versions": {}}
    decided |= {"code": {"version": "1", "commit": None, "modified": None}, "seed": 0}
    decided["machine"] = {"device": "d", "processes": 1, "threads": 1, "mixed_precision": "no"}
    (adapter / "results.json").write_text(json.dumps(RESULTS | {"provenance": decided}), encoding="utf-8")
    (adapter / "results.studies.csv").write_text("file_name,patient\nDOE.nii,DOE\n", encoding="utf-8")
    assert "results.studies.csv" in left_out(adapter)
    push_adapter(adapter, "org/site-b", base="org/base", base_revision=pushed_base)
    files = hub.files("org/site-b")
    found = json.loads(files["results.json"])["provenance"]
    assert found["settings"] == {"model": "org/base", "revision": pushed_base, "data": ["my scans"], "adapter": "."}
    assert found["models"]["adapted"] == {"model": "org/base", "revision": pushed_base, "fingerprint": "f"}
    assert "results.studies.csv" not in files
    assert not any(b"DOE" in content or str(base).encode() in content for content in files.values())


def test_a_path_of_this_machine_is_refused(hub, base, refused):
    (base / "README.md").write_text("see /home/me/notes", encoding="utf-8")
    assert "names a path of this machine (/home/me/notes)" in refused("push", base, "org/a")


def test_a_private_push_does_not_become_public(hub, base, pushed_base, refused):
    assert "org/base is already public" in refused("push", base, "org/base", "--private")


def test_a_user_without_write_access_is_told_so_at_once(hub, base, monkeypatch, waits, refused):
    for token, words in ((READER, "403"), ("hf_wrong", "401"), (None, "401")):
        hub.connect(monkeypatch, token)
        assert words in refused("push", base, "org/a")
    assert ("model", "org/a") not in hub.repos
    assert waits == []  # a retry cannot help


def test_a_bad_card_is_refused_in_the_hubs_words(hub, base, monkeypatch, refused):
    hub.connect(monkeypatch)
    (base / "README.md").write_text("---\nlicense: my-own\n---\n", encoding="utf-8")
    message = refused("push", base, "org/a")
    assert '"license" must be one of' in message
    assert "finish with" not in message


def test_offline_mode_is_reported_once(base, capfd, refused):
    assert "offline mode is enabled" in refused("push", base, "org/a")
    assert capfd.readouterr().err == ""


# faults on the way


@pytest.mark.parametrize("request_line", ["POST .*repos/create", "POST .*commit/main", "POST .*preupload", "PUT /lfs"])
@pytest.mark.parametrize("fault", ["error", "upload", "answer"])
def test_temporary_faults_are_overcome_in_one_commit(hub, base, monkeypatch, waits, request_line, fault):
    hub.connect(monkeypatch)
    if fault == "error":
        hub.fail(request_line, status=503, times=2)
    elif fault == "upload":
        hub.cut_upload(request_line, after_bytes=10)
    else:
        hub.cut_answer(request_line)
    push_model(base, "org/base")
    assert hub.files("org/base").keys() >= {"model.safetensors", "config.json"}
    assert len(hub.repo("model", "org/base").commits) == 2
    assert waits


@pytest.mark.filterwarnings("ignore:.*validating metadata in README")
def test_a_busy_hub_is_given_the_time_it_asks_for(hub, base, monkeypatch, waits, capsys):
    hub.connect(monkeypatch)
    hub.fail("POST .*commit/main", status=429, retry_after=42)
    push_model(base, "org/base")
    assert 42 in waits
    assert "too many requests (429); retrying in 42 s" in capsys.readouterr().err
    hub.fail("POST .*commit/main", status=429, retry_after=3600)
    (base / "README.md").write_text("changed", encoding="utf-8")
    with pytest.raises(PushError, match="too many requests"):
        push_model(base, "org/base")
    assert 3600 not in waits


def test_a_push_that_fails_leaves_the_folder_and_the_command(hub, adapter, pushed_base, waits, refused):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    hub.fail("POST .*org/site-b/commit", status=500, times=len(hub_module.WAITS_S) + 1)
    at = ("--base", "org/base", "--base_revision", pushed_base)
    message = refused("push", adapter, "org/site-b", "--private", *at)
    command = message.split("finish with: medct ")[1]
    assert f"{adapter} is intact" in message
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    main(command.split())
    assert "adapter_model.safetensors" in hub.files("org/site-b")
    assert hub.repo("model", "org/site-b").private


def test_what_stays_at_home_is_told(hub, base, monkeypatch, capsys):
    hub.connect(monkeypatch)
    for name in ("studies.csv", "notes/patients.txt", "checkpoint.log"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("mine", encoding="utf-8")
    capsys.readouterr()
    main(["push", str(base), "org/base"])
    *told, url = capsys.readouterr().out.splitlines()
    assert told == [f"not pushed: {name}" for name in ("checkpoint.log", "notes/patients.txt", "studies.csv")]
    assert url.startswith("http")
    assert not {"studies.csv", "notes/patients.txt", "checkpoint.log"} & set(hub.files("org/base"))


def test_no_scan_goes_to_a_public_data_set(tmp_path, monkeypatch):
    api = SimpleNamespace(
        create_repo=lambda *_, **__: None,
        repo_info=lambda *_, **__: SimpleNamespace(private=False),
        upload_folder=lambda **_: pytest.fail("nothing is sent"),
    )
    monkeypatch.setattr(hub_module, "HfApi", lambda: api)
    with pytest.raises(PushError, match="org/shards is public, but patients' scans must not be"):
        push_shards(tmp_path, "org/shards")
