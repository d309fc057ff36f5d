"""Put a composed model on the hub."""

from os import PathLike
from pathlib import Path

from granite_switch.compose.verify import verify
from granite_switch.core.staging import held
from granite_switch.errors import OutputError

_OURS = ["*.safetensors", "io_configs/*", "additional_chat_templates/*"]  # what an earlier version can have left there


def push(
    model: str | PathLike[str], repo: str, *, private: bool = False, revision: str | None = None, message: str = ""
) -> str:
    """Verify a composed model and upload it with its model card. What the repository held of an earlier one goes.

    Args:
        model: the composed model's folder.
        repo: the hub repository, `owner/name`; made if it is not there.
        private: make it private, if it is made.
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
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"{spec.base_model} with {', '.join(spec.names)}",
                delete_patterns=_OURS,
            )
            return f"{api.endpoint}/{repo}"
        except Exception as error:  # which HTTP client's errors these are depends on the hub library's version
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise OutputError(f"{repo}: cannot be pushed ({lines[0]})", hint="hf auth login; hf auth whoami") from None
