"""Upload a composed model to the hub."""

import glob
from os import PathLike
from pathlib import Path

from granite_switch.composition.verify import verify
from granite_switch.core.checkpoint import INDEX, Checkpoint
from granite_switch.core.files import inside
from granite_switch.core.layout import io_config
from granite_switch.core.remote import MODULE
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.staging import held
from granite_switch.errors import OutputError, first_line

_OURS = ["*.safetensors", "io_configs/*", "additional_chat_templates/*"]  # files that an earlier upload may have left
# small files that transformers and vLLM read
_SMALL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "README.md"),
    *(MODULE, "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "adapter_index.json"),
)


def push(
    model: str | PathLike[str], repo: str, *, private: bool = False, revision: str | None = None, message: str = ""
) -> str:
    """Verify a composed model, upload it with its model card, and return the repository's URL.

    Only files that belong to the format are uploaded. The repository's files of an earlier model are deleted.

    Args:
        model: the composed model's folder.
        repo: the hub repository, `owner/name`; created if it does not exist.
        private: create it as private; an existing repository must not be public.
        revision: the branch; created if it does not exist.
        message: the commit message.

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
                raise OutputError(f"{repo}: is already public", hint="make it private on the hub first")
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
        except Exception as error:  # the class depends on the hub library's HTTP client
            reason = first_line(error)
            raise OutputError(f"{repo}: cannot be pushed ({reason})", hint="hf auth login; hf auth whoami") from None


def format_files(folder: Path, spec: SwitchSpec) -> list[str]:
    """Return the relative paths of the files in a model's folder that docs/format.md names."""
    names = [*_SMALL, INDEX, *Checkpoint(folder).files, *(io_config(adapter.name) for adapter in spec.active)]
    names += [path.name for pattern in ("LICENSE*", "NOTICE*") for path in folder.glob(pattern)]
    names += [f"additional_chat_templates/{path.name}" for path in folder.glob("additional_chat_templates/*.jinja")]
    return [name for name in dict.fromkeys(names) if inside(folder, name).is_file()]
