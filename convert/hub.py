"""An exported directory goes to the hub."""

import importlib.util
from pathlib import Path

from bothways.errors import InputError


def check_name(name: str) -> None:
    """Raises InputError before any work: no such name can be, or `huggingface_hub` is missing."""
    if name.count("/") != 1 or not all(name.split("/")):
        raise InputError(f"--push {name} is no name on the hub; give OWNER/NAME")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError("--push needs huggingface_hub: `pip install huggingface_hub`, then `hf auth login`")


def push_directory(home: Path, name: str) -> str:
    """Upload a directory into a repository of this name, made private where there is none; returns its address.

    Raises:
      InputError: the hub cannot be reached, or refuses; the directory stays where it is.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        address = str(api.create_repo(name, private=True, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=home)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as e:
        reason = str(e).strip().split("\n")[0][:200]
        raise InputError(
            f"{home} is written, and uploading it as {name} failed ({type(e).__name__}: {reason}); "
            f"`hf auth login`, then `hf upload {name} {home}`"
        ) from e
    return address
