"""Runs one after the other: each is published as it finishes, and a table of all grows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import get_token

from fixefficientnet import manifest
from fixefficientnet._internal.files import write_text
from fixefficientnet.errors import FixEfficientNetError, PublishError, RunError
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
    """Where runs of variants are published: ORGANISATION/NAME on the Hub, and with which options."""

    name: str
    options: PublishOptions


class Series:
    """Runs one after the other, in folders in `output`; with a repository, of different variants.

    `show` is given the table each time that it grew; None: nobody wants it, and it is not written either.
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

        A run or a publication that fails ends nothing: the next run begins, and the same call tries again later. Of
        several processes, a run that fails ends all, as they may not have failed alike.

        Raises:
            PublishError: The Hub does not tell what it has, before anything is run; or runs were not published.
            RunError: Runs failed; the others are finished, and published.
            FixEfficientNetError: The only run failed, or one of several processes.
        """
        self._there, differing = self._session.on_main(self._ask)
        for key, differences in differing.items():
            self._say(f"{self._name} has {key} by another recipe:\n  " + "\n  ".join(differences))
        unpublished, failed = list(differing), []
        for job in self._jobs:
            key = job.recipe.variant
            if key in self._there:
                self._say(f"{key} is published already: {self._name} {self._there[key].version}.")
            elif key not in differing:
                if not self._run(job):
                    failed.append(key)
                elif not self._publish(job):
                    unpublished.append(key)
            self._session.on_main(self._grow)
        with self._session.alike():
            if failed:
                raise RunError(f"Failed: {', '.join(failed)}; the reasons are above. The same command tries again.")
            if unpublished:
                raise PublishError(
                    f"Not published: {', '.join(unpublished)}; the reasons are above. The same command publishes what "
                    "is finished. What is there by another recipe stays: choose another repository, or replace it with "
                    "`fixefficientnet publish --replace`."
                )

    def _run(self, job: Job) -> bool:
        """Runs to the end; whether that succeeded."""
        try:
            runs.run(job, self._accelerator)
        except FixEfficientNetError as error:
            if len(self._jobs) == 1 or self._session.world > 1:
                raise
            self._say(f"{job.recipe.variant} failed. {error}")
            return False
        self._say(f"{job.folder}/report.md, {job.folder}/report.html")
        return True

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
            row = Row.of_run(variant, folder)
            if there:  # whose figures count, whatever lies in the folder
                known = row.hours if row.measured == there.measured else None
                row = Row(variant, there.measured, there.comparable, known, there.version)
            rows += [row] * bool(row.measured or key in mine)
        write_text(self._output / table.FILENAME, table.as_markdown(rows))
        self._show(rows)
