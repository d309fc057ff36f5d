"""Put a composed model on the hub."""

import glob
from os import PathLike
from pathlib import Path

from granite_switch.compose.verify import verify
from granite_switch.compose.write import io_config
from granite_switch.core.checkpoint import INDEX, Checkpoint
from granite_switch.core.files import inside
from granite_switch.core.remote import MODULE
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.staging import held
from granite_switch.errors import OutputError

_OURS = ["*.safetensors", "io_configs/*", "additional_chat_templates/*"]  # what an earlier version can have left there
# of a base's own small files, those that transformers and vLLM read
_SMALL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "README.md"),
    *(MODULE, "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "adapter_index.json"),
)


def push(
    model: str | PathLike[str], repo: str, *, private: bool = False, revision: str | None = None, message: str = ""
) -> str:
    """Verify a composed model and upload it with its model card. What the repository held of an earlier one goes.

    What else is in the folder stays there.

    Args:
        model: the composed model's folder.
        repo: the hub repository, `owner/name`; made if it is not there.
        private: make it private, if it is made; it must not be public.
        revision: the branch; made if it is not there.
        message: of the commit.

    Returns:
        Where it is.

    Raises:
        CheckpointError: the model does not verify; nothing is uploaded.
        OutputError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    folder = Path(model).resolve()
    with held(folder):
        spec = verify(folder)
        files = format_files(folder, spec)
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.repo_info(repo).private:
                raise OutputError(f"{repo}: is public already", hint="make it private on the hub first")
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"{spec.base_model} with {', '.join(spec.names)}",
                allow_patterns=[glob.escape(name) for name in files],
                delete_patterns=_OURS,
            )
            return f"{api.endpoint}/{repo}"
        except OutputError:
            raise
        except Exception as error:  # which HTTP client's errors these are depends on the hub library's version
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise OutputError(f"{repo}: cannot be pushed ({lines[0]})", hint="hf auth login; hf auth whoami") from None


def format_files(folder: Path, spec: SwitchSpec) -> list[str]:
    """The files of a model's folder that docs/format.md names, by their paths in it."""
    names = [*_SMALL, INDEX, *Checkpoint(folder).files, *(io_config(adapter.name) for adapter in spec.active)]
    names += [path.name for pattern in ("LICENSE*", "NOTICE*") for path in folder.glob(pattern)]
    names += [f"additional_chat_templates/{path.name}" for path in folder.glob("additional_chat_templates/*.jinja")]
    return [name for name in dict.fromkeys(names) if inside(folder, name).is_file()]
