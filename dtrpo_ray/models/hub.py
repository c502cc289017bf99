"""Find a model by its directory, or by its id on the Hugging Face Hub: fetched once, into the hub's cache.

huggingface_hub does the work, so its environment variables hold: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN.
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from dtrpo_ray.config.produce import is_hub_id
from dtrpo_ray.errors import ModelError

# what a model and its tokenizer are made of: no code, no pickled weights; and no folder within the repository
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
FOLDERS = "*/*"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model directory; its name, the folder's or org/name@commit; and the commit (a hash) if the hub gave it."""

    path: Path
    name: str
    commit: str | None = None

    @classmethod
    def find(cls, where: str) -> "ModelSource":
        """Return the directory `where`, or fetch the hub's model `org/name` or `org/name@revision`.

        A revision is a branch, tag or commit; absent, it is the branch main. If the hub cannot be reached, the commit
        that the cache holds is taken. Raises ModelError.
        """
        if Path(where).is_dir():
            return cls(Path(where).resolve(), Path(where).resolve().name)
        repo, _, revision = where.partition("@")
        if not is_hub_id(where):
            raise ModelError(f"{where}: no such model directory; a hub id is org/name or org/name@revision")
        try:
            found = snapshot_download(
                repo,
                revision=revision or "main",
                allow_patterns=FILES,
                ignore_patterns=FOLDERS,
                library_name="dtrpo_ray",
            )
        except Exception as error:  # the hub's own errors, httpx's, and OSError of the cache have no common base
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(
                f"{where}: no such directory, and not to be had from {constants.ENDPOINT} ({reason}). Check the id; "
                "`hf auth login` if it is private; or copy the files here, and give their directory"
            ) from None
        path = Path(found)
        if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
            raise ModelError(f"{where}: has no config.json or no *.safetensors; other weights are not read")
        return cls(path, f"{repo}@{path.name}", path.name)
