"""Loading: the files it accepts, the damage it names, the memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.errors import ModelLoadError
from llmserve.models.config import read_model_config


@pytest.fixture
def folder(tmp_path, build_model):
    """A tiny Llama in several shards."""
    build_model("Llama").save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


@pytest.fixture
def single(tmp_path, build_model):
    """A tiny Llama in one file."""
    build_model("Llama").save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change) -> None:
    """Rewrites model.safetensors after `change` has altered its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_progress_reaches_the_end(folder, load):
    reports: list[tuple[int, int]] = []
    load(folder, progress=lambda done, total: reports.append((done, total)))
    done = [report[0] for report in reports]
    assert done == sorted(set(done))
    assert (
        reports[-1][0]
        == reports[-1][1]
        == sum(t.nbytes for f in folder.glob("*.safetensors") for t in load_file(f).values())
    )


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_types_are_converted(stored, single, load, driver_class, prompt):
    def round_all(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(torch.float16).to(stored) if stored != torch.bfloat16 else tensor.to(stored)

    edit(single, round_all)
    found = driver_class(load(single)).step({0: prompt})[0]
    edit(single, lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}))
    assert torch.equal(found, driver_class(load(single)).step({0: prompt})[0])


def test_harmless_extras_are_ignored(tmp_path, build_model, load):
    model = build_model("Llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ["model.layers.1.mlp.up_proj.weight", "missing"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), ["model.norm.weight", "[65]", "[64]"]),
        (lambda t: t.update({"model.layers.0.mlp.router.weight": torch.ones(3)}), ["mlp.router.weight", "not known"]),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(3)}), ["model.layers.3", "not known"]),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), ["model.norm.weight", "I8"]),
    ],
)
def test_wrong_tensors_are_named(single, load, change, words):
    edit(single, change)
    with pytest.raises(ModelLoadError) as caught:
        load(single)
    for word in [str(single), *words]:
        assert word in caught.value.message


class TestDamage:
    def test_truncated_shard(self, folder, load):
        shard = sorted(folder.glob("*.safetensors"))[3]
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(ModelLoadError, match=rf"{shard.name} is truncated: the tensor '"):
            load(folder)

    @pytest.mark.parametrize("length", [0, 5, 8, 60])
    def test_truncated_header(self, single, load, length):
        path = single / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
            load(single)

    def test_header_is_not_json(self, single, load):
        path = single / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[8] = ord("[")
        path.write_bytes(data)
        with pytest.raises(ModelLoadError, match="not JSON"):
            load(single)

    def test_size_does_not_fit_the_shape(self, single, load):
        path = single / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header["model.norm.weight"]["shape"] = [32]
        text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
        path.write_bytes(data[:8] + text + data[8 + size :])
        with pytest.raises(ModelLoadError, match=r"model\.norm\.weight"):
            load(single)

    def test_unaligned_data_is_read(self, single, load, driver_class, prompt):
        expected = driver_class(load(single)).step({0: prompt})[0]
        path = single / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        path.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
        assert torch.equal(driver_class(load(single)).step({0: prompt})[0], expected)

    def test_missing_shard(self, folder, load):
        shard = sorted(folder.glob("*.safetensors"))[0]
        shard.unlink()
        with pytest.raises(ModelLoadError, match=rf"{shard.name} is missing"):
            load(folder)

    def test_index_does_not_leave_the_folder(self, folder, load):
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))
        with pytest.raises(ModelLoadError, match="same folder"):
            load(folder)

    def test_no_weights(self, single, load):
        (single / "model.safetensors").rename(single / "pytorch_model.bin")
        with pytest.raises(ModelLoadError, match="pickles"):
            load(single)


MEASURE = """
import sys, torch
from pathlib import Path
from llmserve.kernels.reference import ReferenceOps
from llmserve.models.config import read_model_config
from llmserve.models.loader import load_model
from llmserve.models.weights import open_weights

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))

class MeteredOps(ReferenceOps):
    '''Looks at memory where it is highest: a matrix and its packed form are both alive.'''
    peak = 0
    def pack_linear(self, weight, bias=None, fmt="dense"):
        packed = super().pack_linear(weight, bias, fmt)
        self.peak = max(self.peak, anonymous_bytes())
        return packed

path = Path(sys.argv[1])
config = read_model_config(path)
ops = MeteredOps()
ops.linear(torch.ones(2, 8), ops.pack_linear(torch.ones(8, 8)))  # the libraries' own memory comes before
before = anonymous_bytes()
model = load_model(open_weights(path, config), config, torch.float32, torch.device("cpu"), ops, max_model_len=64)
print(ops.peak - before, anonymous_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of anonymous memory")
def test_memory_holds_one_copy_of_the_model(tmp_path, build_model):
    """Mapped files are the page cache's; what counts is memory of our own."""
    model = build_model("Llama", hidden_size=1024, intermediate_size=2048, vocab_size=4096, num_hidden_layers=4)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert model_bytes > 150e6
    model.save_pretrained(tmp_path)
    del model
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    peak, after = map(int, result.stdout.split())
    assert after >= 0.95 * model_bytes  # the measure sees the weights
    assert peak < 1.15 * model_bytes
    assert after < 1.05 * model_bytes


def test_config_of_a_folder_and_its_weights_must_agree(single, load):
    config = json.loads((single / "config.json").read_text())
    config["intermediate_size"] = 97
    (single / "config.json").write_text(json.dumps(config))
    assert read_model_config(single).intermediate_size == 97
    with pytest.raises(ModelLoadError, match=r"gate_proj.*\[96, 64\].*\[97, 64\]"):
        load(single)
