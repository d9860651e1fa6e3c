"""Sends an exported model, with its card, to the Hugging Face hub.

Run it as ``proxykd push runs/my_run/export/student --to owner/name``. The token is that of
``hf auth login``, or the variable ``HF_TOKEN``; ``HF_ENDPOINT`` names another hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from proxykd_jax.artifacts import check_export
from proxykd_jax.cli import program, run_work
from proxykd_jax.errors import UserError

SUMMARY = "Send an exported model, with its card, to the Hugging Face hub."
_CARD = "README.md"
_LEFT_OUT = [".*", "*.tmp"]


def command(argv: Sequence[str] | None = None) -> int:
    """Sends the folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog=program("push"), description=SUMMARY, allow_abbrev=False)
    parser.add_argument("folder", help="exported model, such as runs/my_run/export/student")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    arguments = parser.parse_args(argv)

    def work() -> int:
        print(
            main(
                arguments.folder, arguments.to, public=arguments.public, message=arguments.message
            ),
            flush=True,
        )
        return 0

    return run_work(work)


def main(folder: Path | str, to: str, *, public: bool = False, message: str | None = None) -> str:
    """Sends a folder to a repository, which is made if there is none.

    Args:
      folder: an exported model; its files are compared with their digests first.
      to: the repository, ``owner/name``.
      public: whether a new repository is public. One that exists stays as it is.
      message: message of the commit.

    Returns:
      The address of the commit.

    Raises:
      UserError: the folder is no exported model or is damaged, or the hub refuses.
    """
    folder = Path(folder)
    for names in ((_CARD,), ("config.json", "adapter_config.json")):
        if not any((folder / name).is_file() for name in names):
            raise UserError(
                f"{folder} holds no {' or '.join(names)}, so it is no model that proxykd export "
                "wrote. Name a folder such as runs/my_run/export/student."
            )
    check_export(folder)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(to, private=not public, exist_ok=True)
        found = api.upload_folder(
            repo_id=to,
            folder_path=folder,
            ignore_patterns=_LEFT_OUT,
            commit_message=message or f"Upload {folder.name} with proxykd push",
        )
    except HFValidationError as error:
        raise UserError(f"--to {to}: a repository is named owner/name ({error}).") from error
    except LocalTokenNotFoundError as error:
        raise UserError(_no_token(to)) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError(_no_token(to)) from error
        raise UserError(f"The hub did not take {folder} for {to}: {_first_line(error)}") from error
    except OSError as error:
        raise UserError(
            f"The hub {api.endpoint} cannot be reached: {_first_line(error)}"
        ) from error
    return str(found.commit_url)


def _no_token(to: str) -> str:
    return (
        f"The hub does not let you write to {to}. Log in with hf auth login, or set HF_TOKEN to a "
        "token that may write there."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    sys.exit(command())
