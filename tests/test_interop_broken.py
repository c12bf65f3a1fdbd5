"""Files that are truncated, changed, hostile or of another kind are refused by name; nothing is run or written."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_files import D_IN, D_SAE, PEERS, dictionary_learning, nanda, openai, saelens, sparsify, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import pipeline
from sae.interop import registry
from sae.interop.files import InteropError
from sae.jobs.checkpoint import CheckpointError


def weights_of(path: Path) -> Path:
    """The file with the tensors of a dictionary made by `foreign_files`."""
    directory = path if path.is_dir() else path.parent
    return next(p for p in sorted(directory.rglob("*")) if p.suffix in (".safetensors", ".pt", ".pth", ".npz"))


@pytest.fixture(params=sorted(PEERS))
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return PEERS[request.param](tmp_path / "peer", weights())


def refused(path: Path, out: Path) -> str:
    """The message of a refused import, which must leave no files behind."""
    with pytest.raises(InteropError) as caught:
        pipeline.import_dictionary(path, out, hook_point="blocks.0.hook_mlp_out")
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_is_cut_short(foreign: Path, tmp_path: Path, kept: float) -> None:
    file = weights_of(foreign)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    assert str(file) in refused(foreign, tmp_path / "out")


def test_meaningless_bytes(foreign: Path, tmp_path: Path) -> None:
    file = weights_of(foreign)
    file.write_bytes(bytes(range(256)) * 40)
    assert str(file) in refused(foreign, tmp_path / "out")


def test_a_configuration_that_is_not_a_json_object(foreign: Path, tmp_path: Path) -> None:
    directory = foreign if foreign.is_dir() else foreign.parent
    configs = list(directory.glob("*.json"))
    for content in ("{", "[1]", '{"d_in": NaN}', "\x00", "[" * 100_000):
        for config in configs:
            config.write_text(content)
        if configs:
            assert str(configs[0]) in refused(foreign, tmp_path / "out")


@pytest.mark.parametrize("make", [dictionary_learning, nanda, openai])
def test_a_pickle_with_code_is_not_run(tmp_path: Path, make: Callable[..., Path]) -> None:
    """A file that would create another one if it were unpickled; the end of the test proves that it would."""
    path = make(tmp_path / "peer", weights())
    file, witness = weights_of(path), tmp_path / "witness"
    command = f"open({str(witness)!r}, 'w').close()"
    hostile = f"cbuiltins\nexec\n(V{command}\ntR.".encode()
    whole = file.read_bytes()
    file.write_bytes(hostile)  # the bare pickle of old torch files
    assert "none is run" in refused(path, tmp_path / "out")
    file.write_bytes(whole)
    inside = {name: zipfile.ZipFile(file).read(name) for name in zipfile.ZipFile(file).namelist()}
    with zipfile.ZipFile(file, "w") as archive:  # and within the archive of new ones
        for name, content in inside.items():
            archive.writestr(name, hostile if name.endswith("data.pkl") else content)
    assert "none is run" in refused(path, tmp_path / "out")
    assert not witness.exists()
    torch.load(file, weights_only=False)
    assert witness.exists()


def test_an_object_in_a_pt_file(tmp_path: Path) -> None:
    path = dictionary_learning(tmp_path / "peer", weights())
    torch.save(torch.nn.Linear(2, 2), path / "ae.pt")
    assert "none is run" in refused(path, tmp_path / "out")
    torch.save([torch.zeros(2)], path / "ae.pt")
    assert "expected a dictionary of tensors, got list" in refused(path, tmp_path / "out")


WRONG_SHAPES = {"W_enc": (D_IN, D_SAE + 1), "W_dec": (D_SAE, D_IN + 1), "b_enc": (D_SAE - 1,), "b_dec": (D_IN, 1)}


@pytest.mark.parametrize("name", WRONG_SHAPES)
@pytest.mark.parametrize("peer", sorted(PEERS))
def test_tensors_that_do_not_fit_each_other(tmp_path: Path, peer: str, name: str) -> None:
    made = weights()
    made[name] = torch.ones(WRONG_SHAPES[name])
    # a sparsify file also records d_sae; with d_sae = 20 · 6, only the tensors are a reason to refuse it
    said = refused(PEERS[peer](tmp_path / "peer", made), tmp_path / "out")
    assert any(word in said for word in ("do not fit", "in the configuration", "a transcoder"))


@pytest.mark.parametrize("shape", [(), (D_SAE,), (D_IN, 0), (1, D_IN, D_SAE)])
def test_tensors_that_are_not_matrices(tmp_path: Path, shape: tuple[int, ...]) -> None:
    said = refused(saelens(tmp_path / "peer", weights() | {"W_dec": torch.ones(shape)}), tmp_path / "out")
    assert "W_dec must be a matrix" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_dec"])
def test_numbers_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    made = weights()
    made[name].view(-1)[3] = value
    assert f"{name} holds NaN or infinite" in refused(saelens(tmp_path / "peer", made), tmp_path / "out")


def test_integer_weights(tmp_path: Path) -> None:
    made = weights() | {"b_enc": torch.ones(D_SAE, dtype=torch.int32)}
    assert "b_enc must be a tensor of floating-point" in refused(saelens(tmp_path / "peer", made), tmp_path / "out")


def test_a_tensor_too_many_or_too_few(tmp_path: Path) -> None:
    """An unknown tensor may change what the dictionary computes."""
    path = dictionary_learning(tmp_path / "peer", weights())
    state = torch.load(path / "ae.pt", weights_only=True)
    torch.save(state | {"W_skip": torch.ones(2)}, path / "ae.pt")
    assert "it also holds W_skip" in refused(path, tmp_path / "out")
    del state["bias"]
    torch.save(state, path / "ae.pt")
    assert "it lacks bias" in refused(path, tmp_path / "out")


@pytest.mark.parametrize("architecture", ["convolutional", "", None, 7, ["standard"], {"a": 1}])
def test_an_unknown_architecture(tmp_path: Path, architecture: object) -> None:
    path = saelens(tmp_path / "peer", weights())
    config = json.loads((path / "cfg.json").read_text()) | {"architecture": architecture}
    (path / "cfg.json").write_text(json.dumps(config))
    assert "unknown architecture" in refused(path, tmp_path / "out")


def test_an_unknown_class(tmp_path: Path) -> None:
    path = dictionary_learning(tmp_path / "peer", weights(), dict_class="IdentityDict")
    assert "unknown dict_class 'IdentityDict'; known are AutoEncoder," in refused(path, tmp_path / "out")


@pytest.mark.parametrize("k", [0, -1, "3", 2.5, None, True, [3]])
def test_a_k_that_is_not_a_positive_integer(tmp_path: Path, k: object) -> None:
    assert "k must be a positive whole number" in refused(
        sparsify(tmp_path / "layers.1", weights(), k=k), tmp_path / "out"
    )


def test_a_k_larger_than_the_dictionary(tmp_path: Path) -> None:
    said = refused(saelens(tmp_path / "peer", weights(), "topk", k=D_SAE + 1), tmp_path / "out")
    assert f"topk needs 1 <= k <= d_sae = {D_SAE}" in said


def test_a_size_that_differs_from_the_tensors(tmp_path: Path) -> None:
    said = refused(saelens(tmp_path / "peer", weights(), d_sae=10**12), tmp_path / "out")
    assert f"d_sae is 1000000000000 in the configuration but {D_SAE} in the tensors" in said


ANYTHING = [None, True, False, 0, 1, -3, 0.5, 1e300, "", "none", "topk", [], [1], {}, {"k": 2}, {"hook_name": [1]}]
SETTINGS = [
    "architecture",
    "k",
    "d_in",
    "metadata",
    "normalize_activations",
    "hook_name",
    "model_name",
    "apply_b_dec_to_input",
    "activation_fn_kwargs",
    "activation_fn",
    "hook_head_index",
]


@settings(max_examples=40, deadline=None)
@given(data=st.dictionaries(st.sampled_from(SETTINGS), st.sampled_from(ANYTHING), max_size=3))
def test_any_setting_of_any_kind_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]
) -> None:
    path = saelens(tmp_path_factory.mktemp("peer"), weights())
    config = json.loads((path / "cfg.json").read_text()) | data
    (path / "cfg.json").write_text(json.dumps(config))
    try:
        sae = registry.read(path)
    except InteropError:
        return
    assert sae.d_sae == D_SAE


def test_a_directory_without_a_dictionary_gets_a_list_of_formats(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    said = refused(tmp_path, tmp_path / "out")
    assert "it holds notes.txt" in said
    assert all(f"{peer.NAME}: {peer.FILES}" in said for peer in registry.PEERS.values())
    assert "no such file" in refused(tmp_path / "nowhere", tmp_path / "out")


def test_files_of_two_peers_in_one_directory_need_a_format(tmp_path: Path) -> None:
    path = saelens(tmp_path / "both", weights())
    (path / "sae.safetensors").write_bytes(b"")
    assert "several formats (sae-lens, sparsify); choose one (--format)" in refused(path, tmp_path / "out")
    assert registry.read(path, "sae-lens").d_sae == D_SAE
    with pytest.raises(InteropError, match="got 'pickle'"):
        registry.read(path, "pickle")


def test_a_dictionary_of_ours_is_not_foreign(tmp_path: Path) -> None:
    sae = registry.read(saelens(tmp_path / "peer", weights()))
    pipeline.export(sae, "native", tmp_path / "ours")
    assert "not a dictionary that can be imported" in refused(tmp_path / "ours", tmp_path / "out")
    with pytest.raises(CheckpointError):  # and a foreign one is not taken for ours
        pipeline.export(tmp_path / "peer", "native", tmp_path / "out")


def test_nothing_here_needs_the_peers_packages() -> None:
    assert not {"sae_lens", "dictionary_learning", "sparsify", "llamascopium"} & sys.modules.keys()
