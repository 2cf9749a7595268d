"""Runs one after the other: each is published as it finishes, and a table of all grows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import get_token

from fixefficientnet import manifest
from fixefficientnet._internal.files import write_text
from fixefficientnet.errors import FixEfficientNetError, PublishError
from fixefficientnet.options import PublishOptions
from fixefficientnet.publishing.index import PublishedModel
from fixefficientnet.publishing.publish import publish, published
from fixefficientnet.reproduce import run as runs
from fixefficientnet.reproduce import table
from fixefficientnet.reproduce.log import Log
from fixefficientnet.reproduce.run import Job
from fixefficientnet.reproduce.session import Session
from fixefficientnet.reproduce.table import Row


@dataclass(frozen=True)
class Repository:
    """Where runs of variants are published.

    Attributes:
        name: ORGANISATION/NAME on the Hub.
        options: Options of a publication.
    """

    name: str
    options: PublishOptions


class Series:
    """Runs one after the other.

    Args:
        jobs: The runs; with a repository, of different variants.
        accelerator: Processes, devices, precision.
        output: Folder that the runs' folders are in.
        repository: Where each is published as it finishes; None: nowhere.
        show: Shows the table, each time that it grew; None: nobody wants it, and it is not written either.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        accelerator: Accelerator,
        output: Path,
        repository: Repository | None = None,
        show: Callable[[Sequence[Row]], None] | None = None,
    ):
        self._jobs, self._accelerator, self._output = jobs, accelerator, output
        self._repository, self._show = repository, show
        console = jobs[0].console if jobs else None
        log = Log(output, enabled=bool(accelerator.is_main_process), console=console)
        self._session, self._say = Session(accelerator, output, log), log.say
        self._there: Mapping[str, PublishedModel] = {}

    def run(self) -> None:
        """Runs what is not published yet.

        A publication that fails ends nothing: the next run begins, and the same call publishes later what is finished.

        Raises:
            PublishError: The Hub does not tell what it has, before anything is run; or runs were not published.
            FixEfficientNetError: A run failed; those before it are finished, and published.
        """
        self._there, differing = self._session.on_main(self._ask)
        for key, differences in differing.items():
            self._say(f"{self._name} has {key} by another recipe:\n  " + "\n  ".join(differences))
        failed = list(differing)
        for job in self._jobs:
            key = job.recipe.variant
            if key in self._there:
                self._say(f"{key} is published already: {self._name} {self._there[key].version}.")
            elif key not in differing:
                runs.run(job, self._accelerator)
                self._say(f"{job.folder}/report.md, {job.folder}/report.html")
                failed += [key] * (not self._publish(job))
            self._session.on_main(self._grow)
        if failed:
            with self._session.alike():
                raise PublishError(
                    f"Not published: {', '.join(failed)}; the reasons are above. The same command publishes what is "
                    "finished. What is there by another recipe stays: choose another repository, or replace it with "
                    "`fixefficientnet publish --replace`."
                )

    @property
    def _name(self) -> str:
        return self._repository.name if self._repository else ""

    def _ask(self) -> tuple[dict[str, PublishedModel], dict[str, list[str]]]:
        """What the repository has of these runs, and where its recipes differ, by the variant's key."""
        if self._repository is None:
            return {}, {}
        if get_token() is None:
            raise PublishError("Nothing was run: you are not logged in to the Hub. `hf auth login`, or set HF_TOKEN.")
        recipes = {
            job.recipe.variant: runs.halved_before(job.recipe, job.folder) if job.options.auto_batch else job.recipe
            for job in self._jobs
        }
        return published(recipes, self._repository.name, self._repository.options)

    def _publish(self, job: Job) -> bool:
        """Publishes a finished run; whether that succeeded."""
        repository = self._repository
        if repository is None:
            return True

        def done() -> tuple[Mapping[str, PublishedModel], str]:
            deltas = publish([job.folder], repository.name, repository.options).deltas
            assert deltas is not None
            return deltas.models, deltas.message

        try:
            models, message = self._session.on_main(done)
        except FixEfficientNetError as error:
            if isinstance(error.__cause__, KeyboardInterrupt | SystemExit):
                raise
            self._say(f"{job.recipe.variant} is finished, and not published. {error}")
            return False
        self._there = {**self._there, **models}
        self._say(f"{job.recipe.variant} is published: {repository.name}, {message}")
        return True

    def _grow(self) -> None:
        """Writes and shows the table: these runs, and the paper's other variants that are finished in the folder."""
        if self._show is None:
            return
        folders = {key: self._output / key for key, variant in manifest.load().items() if variant.paper}
        mine = {job.recipe.variant: job.folder for job in self._jobs}
        rows = []
        for key, folder in (folders | mine).items():
            variant, there = manifest.find(key), self._there.get(key)
            row = Row.of_run(variant, folder, there.version if there else None)
            if there and not row.measured:
                row = Row(variant, there.measured, there.comparable, None, there.version)
            rows += [row] * bool(row.measured or key in mine)
        write_text(self._output / table.FILENAME, table.as_markdown(rows))
        self._show(rows)
