import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_project import IDENTITY, backbone, model_config, random_network, tiny_project

from ldm_core.autoencoders.autoencoder import load_autoencoder
from ldm_core.errors import UserError
from ldm_core.files import upload_folder
from ldm_core.generation import PictureGenerator
from ldm_core.model_directory import ModelConfig, Reference, load_model, save_model

TEXTS = {name: Reference(uri=f"/far/away/{name}", digest=f"of {name}") for name in ("t5", "clip")}


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "project" / "teacher")


def save(uri: str, config: ModelConfig | None = None, seed: int = 0) -> str:
    network = random_network(backbone(), seed)
    return save_model(uri, config or model_config(TEXTS), network.state_dict(), "# A card\n")


@pytest.mark.parametrize("former", [1, 2])
def test_a_model_of_a_former_format_is_named_as_such(uri, former):
    save(uri)
    path = Path(uri, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": former}))
    with pytest.raises(UserError, match=f"in format {former}, this program reads 3: train it"):
        load_model(uri)


def changed(**values: object) -> ModelConfig:
    return model_config(TEXTS).model_copy(update=values)


def test_round_trip(uri):
    digest = save(uri)
    config, network, read_digest = load_model(uri)
    assert config == model_config(TEXTS)
    assert read_digest == digest
    assert not network.training
    for name, weight in random_network(backbone()).state_dict().items():
        assert torch.equal(network.state_dict()[name], weight)
    files = {path.name for path in Path(uri).iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md"}
    assert Path(uri, "README.md").read_text() == "# A card\n"


def test_weights_in_another_memory_order(uri):
    weights = random_network(backbone()).state_dict()
    turned = {name: w.mT.contiguous().mT if w.ndim == 2 else w for name, w in weights.items()}
    save_model(uri, model_config(TEXTS), turned, "")
    loaded = load_model(uri)[1].state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_a_project_can_be_moved_as_a_whole(tmp_path):
    uri = Path(tiny_project(tmp_path / "here"))
    _, _, digest = load_model(str(uri))
    there = tmp_path / "somewhere" / "else" / "there"
    there.parent.mkdir(parents=True)
    shutil.move(uri.parent, there)
    config, _, moved_digest = load_model(str(there / "teacher"))
    assert config.t5.uri == str(there / "text" / "t5")
    assert moved_digest == digest
    PictureGenerator.load(str(there / "teacher"))  # which finds the encoders


def test_what_lies_outside_the_project_stays_where_it_is(tmp_path, uri):
    near, far = str(tmp_path / "project" / "vae"), str(tmp_path / "shared" / "t5")
    config = changed(autoencoder=Reference(uri=near, digest="a"), t5=Reference(uri=far, digest="t"))
    save(uri, config)
    stored = json.loads(Path(uri, "config.json").read_text())
    assert stored["autoencoder"]["uri"] == "../vae"
    assert stored["t5"]["uri"] == far
    shutil.move(tmp_path / "project", tmp_path / "deep")
    moved = load_model(str(tmp_path / "deep" / "teacher"))[0]
    assert moved.autoencoder.uri == str(tmp_path / "deep" / "vae")
    assert moved.t5.uri == far


def test_a_folder_of_a_similar_name_is_not_inside(tmp_path, uri):
    sibling = str(tmp_path / "project-2" / "t5")
    save(uri, changed(t5=Reference(uri=sibling, digest="t")))
    assert json.loads(Path(uri, "config.json").read_text())["t5"]["uri"] == sibling


def test_a_relative_path_is_that_of_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("root/teacher", changed(t5=Reference(uri="root/text/t5", digest="t")))
    monkeypatch.chdir("/")
    loaded = load_model(str(tmp_path / "root" / "teacher"))[0]
    assert loaded.t5.uri == str(tmp_path / "root" / "text" / "t5")


def test_the_digest_is_of_what_the_model_does(tmp_path, uri):
    digest = save(uri)
    elsewhere = {
        name: Reference(uri=f"s3://b/{name}", digest=r.digest) for name, r in TEXTS.items()
    }
    assert save(str(tmp_path / "b"), changed(**elsewhere, lineage={"run": "r2"})) == digest
    others = [
        save(str(tmp_path / "c"), seed=1),
        save(str(tmp_path / "d"), changed(guidance=2.0)),
        save(str(tmp_path / "e"), changed(latents_std=(0.2, 0.25, 0.31))),
        save(str(tmp_path / "f"), changed(t5=Reference(uri=TEXTS["t5"].uri, digest="another"))),
    ]
    assert len({digest, *others}) == 5


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=f"no model at {tmp_path} .*ldm train"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"_class_name": "UNet2DModel", "sample_size": 8}',
            "not of .* of class UNet2DModel",
        ),
        ("{", "not JSON"),
        ("[]", "not of a teacher"),
        ('{"format": 9, "kind": "teacher"}', "another version of this program: format: "),
    ],
)
def test_another_programs_config(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json is .*{words}") as refusal:
        load_model(str(tmp_path))
    assert len(str(refusal.value)) < 500


def test_weights_missing_cut_short_or_of_another_network(uri):
    save(uri)
    weights = Path(uri, "model.safetensors")
    whole = weights.read_bytes()
    other = random_network(backbone().model_copy(update={"width": 24}))
    save_model(f"{uri}-2", model_config(TEXTS), other.state_dict(), "")
    for data in (whole[: len(whole) // 2], b"", Path(f"{uri}-2", weights.name).read_bytes()):
        weights.write_bytes(data)
        with pytest.raises(UserError, match=f"{uri}/model.safetensors .* config.json"):
            load_model(uri)
    weights.unlink()
    with pytest.raises(UserError, match=f"{uri}/model.safetensors is missing"):
        load_model(uri)


def test_a_changed_autoencoder_is_refused_with_both_digests(tmp_path):
    def train_autoencoder(seed: int) -> str:
        torch.manual_seed(seed)
        module = AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4)
        module.save_pretrained(tmp_path / "autoencoder")
        return load_autoencoder(str(tmp_path / "autoencoder")).digest

    tiny_project(tmp_path)
    config, network, _ = load_model(str(tmp_path / "teacher"))
    first = train_autoencoder(0)
    reference = Reference(uri=str(tmp_path / "autoencoder"), digest=first)
    config = config.model_copy(update={"autoencoder": reference})
    save_model(str(tmp_path / "teacher"), config, network.state_dict(), "")
    assert PictureGenerator.load(str(tmp_path / "teacher")).autoencoder.digest == first
    second = train_autoencoder(1)
    with pytest.raises(UserError, match=f"autoencoder {first}, but .*autoencoder now .*{second}"):
        PictureGenerator.load(str(tmp_path / "teacher"))


def test_in_a_bucket(tmp_path, s3):
    local = Path(tiny_project(tmp_path))
    remote = tiny_project(f"{s3}/models/project")
    config, network, digest = load_model(remote)
    assert config.clip.uri == f"{s3}/models/project/text/clip"
    mine, same_network, same_digest = load_model(str(local))
    assert digest == same_digest
    assert config.autoencoder == mine.autoencoder == IDENTITY
    for name, weight in same_network.state_dict().items():
        assert torch.equal(network.state_dict()[name], weight)
    upload_folder(tmp_path, f"{s3}/models/copy")  # from disk to bucket, references and all
    copied = PictureGenerator.load(f"{s3}/models/copy/teacher")
    assert (copied.digest, copied.config.t5.uri) == (digest, f"{s3}/models/copy/text/t5")
