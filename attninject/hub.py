"""Where a delta may lie: a file, a folder, or a repository of the Hugging Face hub; and how one gets there.

`huggingface_hub` does the transfer: timm brings it, it caches, resumes, and knows tokens and private repositories.
Names are written as timm writes them: `hf-hub:user/name@revision`, `local-dir:FOLDER`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attninject import plugins
from attninject.errors import HubError
from attninject.wording import first_line

HUB, LOCAL = "hf-hub:", "local-dir:"
DELTA = "attninject.safetensors"
"""The delta of a model in a repository."""
RUN = "best.safetensors"
"""The delta in the folder of a run, which may be pushed whole."""
WANTED = (DELTA, RUN, "experiment.json", "classes.txt", plugins.RECORD)
"""What is fetched; a repository may hold more."""


def names_folder(name: str | os.PathLike[str]) -> bool:
    """Whether a name stands for a folder or a repository, where a run's files may be, and not for a file."""
    text = os.fspath(name)
    return text.startswith((HUB, LOCAL)) or os.path.isdir(text)


def folder_of(name: str | os.PathLike[str]) -> Path:
    """The folder of a name: itself, or where a repository's files lie after they were fetched.

    Raises:
        HubError: no such repository, revision or access, or the hub cannot be reached.
    """
    text = os.fspath(name)
    if text.startswith(LOCAL):
        return Path(text.removeprefix(LOCAL))
    if not text.startswith(HUB):
        return Path(text)
    from huggingface_hub import snapshot_download

    repo, _, revision = text.removeprefix(HUB).partition("@")
    with _said(repo, revision):
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(WANTED)))


def delta_of(name: str | os.PathLike[str]) -> Path:
    """The delta's file behind a name: a file, or a folder or repository that holds one.

    Raises:
        HubError: see `folder_of`; or no delta is in the folder.
    """
    path = folder_of(name)
    if not path.is_dir():
        return path
    for file in (DELTA, RUN):
        if (path / file).is_file():
            return path / file
    raise HubError(f"{os.fspath(name)} holds no delta: neither {DELTA} nor {RUN} is in it")


def publish(
    folder: Path, name: str, *, private: bool | None = None, revision: str | None = None,
    message: str = "Attention blocks, with attninject", token: str | None = None,
) -> str:  # fmt: skip
    """Put the files of a folder into a repository, which is made if it is not there; returns its address.

    Args:
        folder: what is put there, all of it.
        name: `user/name`, also with `hf-hub:` in front; or `local-dir:FOLDER`.
        private: of a new repository.
        revision: the branch; one that is not there is made.
        message: of the commit.
        token: None: the one that `hf auth login` or HF_TOKEN left.

    Raises:
        HubError: no access, no such name, or the hub cannot be reached.
    """
    if name.startswith(LOCAL):
        target = Path(name.removeprefix(LOCAL))
        if not target.is_dir() and target.exists():
            raise HubError(
                f"{target} is a file: {LOCAL} takes the name of a folder, which is made if it is not there"
            )
        shutil.copytree(folder, target, dirs_exist_ok=True)
        return str(target)
    from huggingface_hub import HfApi

    repo = name.removeprefix(HUB)
    api = HfApi(token=token)
    with _said(repo, revision or ""):
        made = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, revision=revision, commit_message=message)
    return str(made)


@contextmanager
def _said(repo: str, revision: str) -> Iterator[None]:
    """What the hub refuses, in a sentence."""
    from huggingface_hub import errors

    at = f" at {revision}" if revision else ""
    try:
        yield
    except errors.HFValidationError as error:
        raise HubError(
            f"{repo!r} is no name of a repository, such as user/name: {first_line(error)}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"there is no repository {repo}, or you have no access to it: see `hf auth login`, HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(f"{repo}{at} is not in the cache, and the hub cannot be reached") from error
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as error:
        raise HubError(f"the hub refused {repo}{at}: {first_line(error)}") from error
    except (
        OSError,
        getattr(errors, "HTTPError", OSError),
    ) as error:  # of its newer versions: no OSError any more
        raise HubError(f"the hub cannot be reached for {repo}{at}: {first_line(error)}") from error
