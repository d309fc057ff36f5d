"""Refusals when an engine is configured."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from artefacts import edit_json
from conftest import start
from vllm import ModelRegistry
from vllm.config.cache import CacheDType
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.platforms import current_platform

from granite_switch.errors import ServingError
from granite_switch.vllm import register
from granite_switch.vllm.limits import limits


def configured(**options: Any) -> Any:
    """The part of vLLM's configuration that the limits read; a dotted name changes one value."""
    adapter = SimpleNamespace(ranks={"model.layers.0.mlp.up_proj": options.pop("rank", 16)})
    spec = SimpleNamespace(hiding=options.pop("hiding", None), adapters=[adapter] * options.pop("adapters", 1))
    model = {"runner_type": "generate", "max_model_len": 4096, "dtype": torch.bfloat16, "enable_prompt_embeds": False}
    model["use_mla"] = False
    model |= {key: options.pop(key) for key in list(options) if key in model}
    cache = SimpleNamespace(cache_dtype=options.pop("cache_dtype", "auto"))
    model_config = SimpleNamespace(hf_config=SimpleNamespace(switch_spec=spec), **model)
    load_config = SimpleNamespace(load_format=options.pop("load_format", "auto"))
    rest = {"lora_config": None, "speculative_config": None, "weight_transfer_config": None}
    rest |= {"load_config": load_config, **options}
    return SimpleNamespace(model_config=model_config, cache_config=cache, **rest)


def refused(cpu: bool, **options: Any) -> str:
    """The reason for a refusal; empty if the configuration is allowed."""
    with patch.object(type(current_platform), "is_cpu", lambda self: cpu):
        try:
            limits(None).verify_and_update_config(configured(**options))
        except ServingError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("cpu", [True, False])
def test_cache_types_are_allowed_by_name(cpu: bool) -> None:
    allowed = {"auto", "float16", "bfloat16"} | ({"fp8", "fp8_e4m3", "fp8_e5m2"} if cpu else set())
    every = set(CacheDType.__args__) | {"a_kind_to_come"}
    assert {kind for kind in every if not refused(cpu, cache_dtype=kind)} == allowed
    assert "--kv-cache-dtype nvfp4" in refused(cpu, cache_dtype="nvfp4")


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runner_type": "pooling"}, "--runner pooling"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "speculative decoding with eagle3"),
        ({"speculative_config": SimpleNamespace(method="draft_model")}, "speculative decoding with draft_model"),
        ({"load_format": "tensorizer"}, "--load-format tensorizer"),
        ({"load_format": "ipc_cache"}, "--load-format ipc_cache"),
        *(
            ({"weight_transfer_config": SimpleNamespace(backend=backend)}, f"--weight-transfer-config {backend}")
            for backend in ("sparse_nccl", "sharded_rdt", "nccl_m2n", "modelexpress")
        ),
        ({"use_mla": True}, "multi-head latent attention"),
        ({"max_model_len": 1 << 22}, "--max-model-len"),
        ({"adapters": 4096}, "at most 4,095"),
        ({"hiding": object()}, "granite-switch upgrade OLD NEW"),
    ],
)
def test_what_was_not_tried_is_refused_in_words(cpu: bool, options: Any, words: str) -> None:
    assert words in refused(cpu, **options)


def test_what_gpus_kernels_do_not_take_is_refused_there_alone() -> None:
    for options, words in [({"rank": 513}, "rank 513"), ({"dtype": torch.float32}, "--dtype float32")]:
        assert words in refused(False, **options)
        assert not refused(True, **options)
    assert not refused(False)
    for backend in ("nccl", "ipc", "of_a_trainer"):
        assert not refused(False, weight_transfer_config=SimpleNamespace(backend=backend))
    for method in ("ngram", "suffix"):
        assert not refused(False, speculative_config=SimpleNamespace(method=method))


def test_a_switch_model_does_not_draft_for_another() -> None:
    with pytest.raises(ServingError, match="as a draft model"):
        limits(None).verify_and_update_model_config(SimpleNamespace(runner_type="draft"))


def test_the_bases_hook_runs_first() -> None:
    seen = []
    base = SimpleNamespace(verify_and_update_config=seen.append, verify_and_update_model_config=seen.append)
    limits(base).verify_and_update_config(config := configured())
    limits(base).verify_and_update_model_config(config.model_config)
    assert seen == [config, config.model_config]


def test_registering_again_changes_no_name() -> None:
    register()
    before = set(ModelRegistry.get_supported_archs()), set(MODELS_CONFIG_MAP)
    register()
    assert before == (set(ModelRegistry.get_supported_archs()), set(MODELS_CONFIG_MAP))
    assert {"GraniteSwitchForCausalLM", "Qwen3SwitchForCausalLM"} <= before[0]
    assert not [name for name in before[0] if "SwitchSwitch" in name]


PROGRAM = """
import json, sys
from transformers import AutoConfig, GraniteConfig
from vllm import ModelRegistry
from vllm.transformers_utils.config import _CONFIG_REGISTRY

class Native(GraniteConfig):
    model_type = "granite_switch"

_CONFIG_REGISTRY["granite_switch"] = Native
ModelRegistry.register_model("GraniteSwitchForCausalLM", "vllm.model_executor.models.granite:GraniteForCausalLM")
from granite_switch.vllm import register
register()
register()
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder)
    model = ModelRegistry.models[config.architectures[0]]
    print(type(config).__name__, model.module_name)
"""


def test_a_checkpoint_that_is_not_ours_goes_to_the_class_that_was_there(composed: Path, tmp_path: Path) -> None:
    shutil.copy(composed / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", switch=None)
    command = [sys.executable, "-c", PROGRAM, str(composed), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"VLLM_PLUGINS": ""}, check=True)
    assert done.stdout.splitlines()[-2:] == [
        "GraniteSwitchConfig granite_switch.vllm.model",
        "Native vllm.model_executor.models.granite",
    ]


@pytest.mark.parametrize("options", [{"enable_lora": True, "enable_prompt_embeds": True}, {"runner": "pooling"}])
def test_an_engine_refuses_at_its_start(composed: Path, options: Any) -> None:
    with pytest.raises(Exception, match=r"cannot be served with these settings(?s:.*)--(enable-lora|runner)"):
        start(composed, **options)
