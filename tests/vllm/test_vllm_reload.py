"""Loaders, reloading and weights from a trainer: the adapters are renewed, kept or refused, never old ones or noise."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import running, start, transformers_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from granite_switch.errors import CheckpointError, ServingError

PROMPT = [7, 60, 61, 90, 12, 33]


@pytest.fixture(scope="module")
def renewed(composed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The composed model after some training of base and adapters."""
    new = tmp_path_factory.mktemp("renewed") / "model"
    shutil.copytree(composed, new)
    for file in new.glob("*.safetensors"):
        changed = {n: t * 1.2 if "_lora" in n or "down_proj" in n else t for n, t in load_file(file).items()}
        save_file(changed, file, metadata={"format": "pt"})
    return new


def prompts_for(llm: LLM) -> list[list[int]]:
    """Text under the base and under each adapter."""
    tokens = llm.llm_engine.model_config.hf_config.switch_spec.control_slots
    return [PROMPT, *([*PROMPT, token, 41, 42] for token in tokens)]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def reload(llm: LLM, **options: Any) -> None:
    llm.collective_rpc("reload_weights", kwargs=options)
    llm.reset_prefix_cache()


def test_reloading_renews_base_and_adapters(composed: Path, renewed: Path, tmp_path: Path) -> None:
    shutil.copytree(composed, tmp_path / "old")  # vLLM reads the new folder from then on
    with running(tmp_path / "old") as llm:
        prompts = prompts_for(llm)
        assert texts(llm, prompts) == written(composed, prompts)
        reload(llm, weights_path=str(renewed))
        assert texts(llm, prompts) == written(renewed, prompts) != written(composed, prompts)
        part = list(load_file(renewed / "adapter-citations.safetensors").items())
        with pytest.raises(CheckpointError, match=r"answerability.*: missing"):
            reload(llm, weights_iterator=part)


def test_a_folder_that_lacks_adapters_or_has_others_is_refused(composed: Path, renewed: Path, tmp_path: Path) -> None:
    old, bare, other = tmp_path / "old", tmp_path / "bare", tmp_path / "other"
    for folder, model in ((old, composed), (bare, renewed), (other, renewed)):
        shutil.copytree(model, folder)
    config = json.loads((other / "config.json").read_text())
    config["switch"]["adapters"][0]["alpha"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    remove_adapters(bare)
    with running(old) as llm:
        prompts = prompts_for(llm)
        with pytest.raises(CheckpointError, match=rf"(?s){bare}: .*: missing"):
            reload(llm, weights_path=str(bare))
        with pytest.raises(CheckpointError, match=rf"{other}: .*has other adapters"):
            reload(llm, weights_path=str(other))
        reload(llm, weights_path=str(old))
        assert texts(llm, prompts) == written(composed, prompts)
        remove_adapters(old)
        with pytest.raises(CheckpointError, match=rf"(?s){old}: .*: missing"):
            reload(llm)
        reload(llm, weights_path=str(renewed))
        assert texts(llm, prompts) == written(renewed, prompts)


def remove_adapters(folder: Path) -> None:
    for file in folder.glob("adapter-*.safetensors"):
        file.unlink()
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if "_lora" not in name}
    index.write_text(json.dumps(content))


def test_a_stream_of_the_whole_base_alone_is_reported(
    composed: Path, renewed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = {name: tensor for name, tensor in tensors_of(renewed).items() if "_lora" not in name}
    mixed = tmp_path / "mixed"
    shutil.copytree(renewed, mixed)
    for file in composed.glob("adapter-*.safetensors"):
        shutil.copy(file, mixed)
    with running(composed) as llm:
        prompts = prompts_for(llm)
        reload(llm, weights_iterator=[pair for pair in base.items() if pair[0] != "model.norm.weight"])
        assert not caplog.records
        for _ in range(2):
            caplog.clear()
            reload(llm, weights_iterator=list(base.items()))
            assert [record.levelname for record in caplog.records] == ["WARNING"]
            assert "replaced the whole base and no adapter" in caplog.text
        assert texts(llm, prompts) == written(mixed, prompts)


class Pieces(NCCLWeightTransferEngine):
    """Loads by vLLM's own steps, one tensor a call, out of a folder in place of a trainer's memory."""

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super(NCCLWeightTransferEngine, self).__init__(config, vllm_config, device, model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        for pair in tensors_of(Path(update_info["folder"])).items():
            if update_info["only"] in pair[0] and (update_info["adapters"] or "_lora" not in pair[0]):
                self.model.load_weights([pair])

    def shutdown(self) -> None: ...


WeightTransferEngineFactory.register_engine("pieces", Pieces)


def test_a_trainer_sends_weights_in_pieces(
    composed: Path, renewed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def send(folder: Path, only: str = "", adapters: bool = True) -> None:
        llm.collective_rpc("start_weight_update")
        llm.collective_rpc("update_weights", args=({"folder": str(folder), "only": only, "adapters": adapters},))
        llm.collective_rpc("finish_weight_update")
        llm.reset_prefix_cache()

    with running(composed, weight_transfer_config={"backend": "pieces"}) as llm:
        prompts = prompts_for(llm)
        old, new = written(composed, prompts), written(renewed, prompts)
        assert texts(llm, prompts) == old
        send(renewed)
        assert texts(llm, prompts) == new
        send(composed, "_proj.weight")  # of the base
        send(composed, "citations-B.")
        mixed = tmp_path / "mixed"
        shutil.copytree(renewed, mixed)
        was = tensors_of(composed)
        for file in mixed.glob("*.safetensors"):
            tensors = load_file(file)
            back = {name: was[name] for name in tensors if "_proj.weight" in name or "citations-B." in name}
            save_file(tensors | back, file, metadata={"format": "pt"})
        assert texts(llm, prompts) == written(mixed, prompts)
        assert not caplog.records
        send(renewed, adapters=False)
        assert "replaced the whole base and no adapter" in caplog.text
        with pytest.raises(CheckpointError, match=r"answerability.*: missing"):
            remove_adapters(mixed)
            reload(llm, weights_path=str(mixed))


def test_random_adapters_do_not_stay_beside_weights_that_are_real(composed: Path) -> None:
    tensors = tensors_of(composed)
    base = [pair for pair in tensors.items() if "_lora" not in pair[0]]
    with running(composed, load_format="dummy") as llm:
        with pytest.raises(CheckpointError, match="the adapters have random values"):
            reload(llm, weights_iterator=base)
        reload(llm, weights_iterator=list(tensors.items()))
        reload(llm, weights_iterator=base)


def test_a_sharded_state_is_refused_since_it_holds_no_adapters(composed: Path, tmp_path: Path) -> None:
    with running(composed) as llm:
        llm.collective_rpc("save_sharded_state", kwargs={"path": str(tmp_path)})
    assert list(tmp_path.glob("*.safetensors"))
    for file in composed.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    with pytest.raises(Exception, match="--load-format sharded_state: does not pass the adapters"):
        start(tmp_path, load_format="sharded_state")


@pytest.mark.skipif(find_spec("runai_model_streamer") is None, reason="runai-model-streamer is not installed")
def test_the_runai_streamer_hands_over_the_adapters(
    composed: Path, reference: Callable[[list[int], int], list[int]]
) -> None:
    with running(composed, load_format="runai_streamer") as llm:
        prompts = prompts_for(llm)
        assert texts(llm, prompts) == [reference(prompt, 8) for prompt in prompts]


def test_two_switch_models_in_one_process_do_not_meet(composed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(composed, other)
    for file in other.glob("adapter-*.safetensors"):
        save_file({name: tensor * 1.3 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with running(composed) as first, running(other) as second:
        tokens = first.llm_engine.model_config.hf_config.switch_spec.control_slots
        prompts = [[*PROMPT, token, 41, 42] for token in tokens]
        for _ in range(2):
            assert texts(first, prompts) == written(composed, prompts)
            assert texts(second, prompts) == written(other, prompts) != written(composed, prompts)


def test_a_loader_that_hands_over_no_adapters_is_refused(composed: Path) -> None:
    class OfAnotherKind(DummyModelLoader):
        """Fills the parameters without asking the model, as loaders of sharded states do."""

    register_model_loader("of_another_kind")(OfAnotherKind)
    with pytest.raises(ServingError, match="--load-format of_another_kind does not pass the adapters"):
        start(composed, load_format="of_another_kind")


def test_a_loader_that_leaves_the_last_step_out_does_not_serve_the_base_alone(composed: Path) -> None:
    class WithoutLastStep(DefaultModelLoader):
        """As vLLM's Tensorizer loader, which never calls `process_weights_after_loading`."""

        def __init__(self, load_config: Any) -> None:
            load_config.load_format = "auto"
            super().__init__(load_config)

        def load_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
            with patch("vllm.model_executor.model_loader.base_loader.process_weights_after_loading"):
                return super().load_model(*args, **kwargs)

    register_model_loader("without_last_step")(WithoutLastStep)
    with (
        pytest.raises(ServingError, match="does not pass the adapters"),
        running(composed, load_format="without_last_step") as llm,
    ):
        texts(llm, [PROMPT])


def texts(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def written(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """By the transformers backend."""
    model = transformers_model(folder)
    model.generation_config.eos_token_id = None
    return [model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False)[0, len(p) :].tolist() for p in prompts]
