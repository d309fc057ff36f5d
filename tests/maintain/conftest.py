"""Adapters to add to models and to update them with."""

from pathlib import Path

import pytest
from artefacts import make_adapter
from recipes import ALL, ASSISTANT


@pytest.fixture(scope="session")
def pool(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/ and two/: adapters of the same names, the second of other ranks, targets and technologies."""
    folder = tmp_path_factory.mktemp("pool")
    make_adapter(folder / "one/a", base, seed=11, rank=2, targets=ALL)
    make_adapter(folder / "one/b", base, seed=12, rank=3, invocation=ASSISTANT)
    make_adapter(folder / "one/c.d", base, seed=13, rank=4, targets=("down_proj",), invocation="<rewrite>")
    make_adapter(folder / "two/a", base, seed=21, rank=5, targets=("q_proj",), invocation="<guardian>")
    make_adapter(folder / "two/b", base, seed=22, rank=1, targets=ALL, invocation="<rewrite>", use_rslora=True)
    make_adapter(
        folder / "two/c.d", base, seed=23, targets=("o_proj", "k_proj"), rank_pattern={"o_proj": 2},
        alpha_pattern={"layers.1.self_attn.k_proj": 3},
    )  # fmt: skip
    (folder / "one/a/io.yaml").write_text("model: null\nresponse_format: null\ntransformations: null\n")
    return folder
