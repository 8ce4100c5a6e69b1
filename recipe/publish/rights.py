"""The right to push, asked for before anything expensive starts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from recipe.arguments import PretrainArguments, identity_of
from recipe.arguments.checks import check_repo_id
from recipe.base.errors import UserError
from recipe.base.files import read_yaml
from recipe.publish.hub import limit_requests, reason, refusal
from recipe.publish.names import hub_sources, local_corpora, public_config, wants_private
from recipe.run.directory import HUB_SCHEME


def check_push(args: PretrainArguments, is_fresh: bool) -> tuple[str | None, list[str]]:
    """Check before training that checkpoints can be pushed, and create the repository unless this is a dry run.

    The repository of a run that begins now (`is_fresh`) has to be empty.

    Returns:
        the repository's full id, and lines for the log: that it is private, or that the hub cannot be reached, and
            pushes are tried all the same.

    Raises:
        UserError: there is no token, it is not valid or may not write there, or the repository holds another model.
    """
    if not args.push_to_hub:
        return args.hub_model_id, []
    repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
    check_repo_id("hub_model_id", repo_id)
    if constants.HF_HUB_OFFLINE:
        raise UserError("`push_to_hub` is true and HF_HUB_OFFLINE is set; unset it, or leave `push_to_hub` false")
    if get_token() is None:
        raise UserError("`push_to_hub` needs a token of the hub: run `hf auth login`, or set HF_TOKEN")
    limit_requests()
    api, doing, lines = HfApi(), "the token", []
    sources = hub_sources(args)
    private, local = wants_private(asdict(args), sources), ", ".join(local_corpora(asdict(args), sources))
    if private and args.hub_private_repo is None:
        lines.append(f"the repository is private, since it is of local text ({local}): see `hub_private_repo`")
    try:
        user = api.whoami()
        if (role := user.get("auth", {}).get("accessToken", {}).get("role")) == "read":
            raise UserError(
                f"`push_to_hub` needs a token that may write, and the one of {user['name']} has the role {role}; make "
                "another at https://huggingface.co/settings/tokens"
            )
        repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        doing = f"`hub_model_id` {repo_id}"
        if args.dry_run and not api.repo_exists(repo_id):
            return repo_id, lines
        if not args.dry_run:
            api.create_repo(repo_id, private=private, exist_ok=True)
        check_writing(api, repo_id)
        check_contents(api, repo_id, identity_of(args), sources, is_fresh)
        if private and not api.repo_info(repo_id).private:
            raise UserError(
                f"`hub_model_id` {repo_id} is public, and `hub_private_repo` is true, as it is by default for local "
                f"text{local and f' ({local})'}: choose another, make it private on the hub, or set it to false"
            )
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if refused := refusal(error):
            raise UserError(
                f"`push_to_hub`: the hub refuses {doing} ({reason(refused)}); give a valid token that may write there, "
                "or a `hub_model_id` in a namespace of yours"
            ) from None
        lines.append(f"warning: the hub cannot be reached ({reason(error)}); pushes are tried all the same")
    return repo_id, lines


def check_writing(api: HfApi, repo_id: str) -> None:
    """Ask for a branch that is there already: refused without the right to write, and otherwise changes nothing."""
    try:
        api.create_branch(repo_id, branch="main")
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise


def check_contents(api: HfApi, repo_id: str, identity: dict[str, Any], sources: list[str], is_fresh: bool) -> None:
    """Raise a `UserError` unless the repository is empty or holds earlier checkpoints of the run."""
    files = set(api.list_repo_files(repo_id)) - {".gitattributes", "README.md"}
    if not files:
        return
    if is_fresh:
        raise UserError(
            f"`hub_model_id` {repo_id} already holds files; choose another or, to go on from its checkpoints, give "
            f"--resume_from_checkpoint {HUB_SCHEME}{repo_id}"
        )
    pushed = read_yaml(Path(api.hf_hub_download(repo_id, "config.yaml"))) if "config.yaml" in files else {}
    there, here = (public_config(config, sources) for config in (pushed, identity))
    if different := [name for name in here if there.get(name) != here[name]]:
        raise UserError(
            f"`hub_model_id` {repo_id} holds another experiment, with other values of {', '.join(different)}; choose "
            "another"
        )
