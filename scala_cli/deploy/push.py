"""Publishes a family, or one width of it, on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from scala_cli.cost import cost
from scala_cli.deploy.card import model_card
from scala_cli.deploy.slice import slice_model, tell_untrained
from scala_cli.errors import ScalaError
from scala_cli.files import refuse_occupied, whole_directory
from scala_cli.models.checkpoint import copy_files, read_about
from scala_cli.models.hub import TRANSPORT, quiet_hub
from scala_cli.models.locate import CARD, CHECKPOINT_FILES
from scala_cli.models.slimmable import Ratio
from scala_cli.plot import arms_picture, can_draw, save
from scala_cli.slicing.point import find_point
from scala_cli.tasks import task_named
from scala_cli.tasks.base import main_column
from scala_cli.watch import Watcher

PICTURE = "widths.svg"
OURS = {*CHECKPOINT_FILES, PICTURE}


def write_repository(
    checkpoint: Path, repo: str, ratio: Ratio | None, target: Path, force: bool, watch: Watcher
) -> None:
    """Writes the folder to upload: the weights and settings as timm reads them, and a model card.

    Args:
        ratio: the one width to publish; None publishes the family.

    Raises:
        ScalaError: a name that the Hub rejects, or an occupied target. Others as `slice_model`.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if "/" not in repo:
        raise ScalaError("that is not a valid name of a repository.", remedy="name_repository")
    refuse_occupied(target, force, OURS, source=checkpoint)
    full, _, record, points = read_about(checkpoint)
    task = task_named(record.task)
    points = points if ratio is None else (find_point(ratio, points, full.size),)
    main = main_column(task)
    rows = [
        {
            **point.columns(),
            **cost(full.at_point(point)),
            main: record.measured(point, main),
            "spread": None,
        }
        for point in points
    ]
    drawn = ratio is None and can_draw() and all(row[main] is not None for row in rows)
    with whole_directory(target) as fresh:
        if ratio is None:
            copy_files(checkpoint, fresh)
            tell_untrained(record, points, watch)
        else:
            slice_model(checkpoint, points[0], fresh, force=True, watch=watch)
        if drawn:
            save(arms_picture([{"arm": repo, "points": rows}], task), fresh / PICTURE)
        spec = full if ratio is None else full.at_point(points[0])
        card = model_card(
            repo, spec, record, rows, family=ratio is None, repository=True, picture=PICTURE if drawn else ""
        )
        (fresh / CARD).write_text(card, encoding="utf-8")


@quiet_hub()
def upload(folder: Path, repo: str, private: bool) -> str:
    """Uploads a folder as a repository, created if it does not exist; returns its address.

    Raises ScalaError without a token, without a network, or if the Hub refuses.
    """
    if get_token() is None:
        raise ScalaError("there is no token for the Hub.", remedy="log_in")
    hub = HfApi()
    try:
        hub.create_repo(repo, private=private or None, exist_ok=True)
        if private and not hub.repo_info(repo).private:
            raise ScalaError(f"{repo} exists already, and is public.", "Name another repository.")
        told = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with scala-vit")
    except HfHubHTTPError as error:
        raise ScalaError(
            f"the Hub refuses {repo}: {error.server_message or type(error).__name__}.", remedy="check_token"
        ) from None
    except ValueError as error:  # the card is not valid
        raise ScalaError(
            f"the Hub rejects the model card: {' '.join(str(error).split())[:160]}", remedy="mend_card"
        ) from None
    except (OSError, TRANSPORT) as error:
        raise ScalaError(
            f"the Hub cannot be reached: {type(error).__name__}.", remedy="upload_later"
        ) from None
    return str(told.commit_url).partition("/commit/")[0]
