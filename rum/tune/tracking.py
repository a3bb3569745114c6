"""MLflow as the record of a search: the driver alone writes, off its own loop, each thing once.

MLflow shows what Optuna's study and the trials' checkpoints hold. Everything here can be done
again without harm: runs are found by tag before they are made, points are written only where
they are missing. A driver that died is caught up with by the conductor.
"""

import fcntl
import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES

from rum.errors import TrackingError
from rum.tasks import Task
from rum.train import TrackingConfig
from rum.training.loop import Report
from rum.tune.database import make_whole
from rum.tune.provenance import option_text

CONNECT_SECONDS = 10.0
DATABASE_SECONDS = 60.0  # MLflow makes its tables the first time

logger = logging.getLogger(__name__)
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for every small file
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # says how it makes tables

STUDY_TAG = "rum.study"
STUDY_ID_TAG = "rum.study_id"
TRIAL_TAG = "rum.trial"
PARENT_TAG = "mlflow.parentRunId"
# What a study is rebuilt from, as JSON: MLflow's own parameters are text.
PARAMETERS_TAG = "rum.parameters"
ATTRIBUTES_TAG = "rum.attributes"
CONSTRAINTS_TAG = "rum.constraints"
SEQUENCE_TAG = "rum.sampler_sequence"
TARGET_TAG = "rum.target"
METRICS_PER_REQUEST = 1000  # MLflow takes no more
DEFINITION_FILE = "definition.json"

# Status of a run: MLflow's own words.
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
INTERRUPTED = "SCHEDULED"  # no process has it now; resume=yes goes on


def tracking_uri(config: TrackingConfig, output_dir: Path) -> str:
    """The tracking URI in force: configured, else MLFLOW_TRACKING_URI, else SQLite."""
    default = f"sqlite:///{output_dir.absolute() / 'mlflow.db'}"
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def connect(config: TrackingConfig, output_dir: Path) -> tuple[MlflowClient, str]:
    """Opens the tracking store and finds or makes the experiment.

    Returns:
        The client and the experiment's id.

    Raises:
        TrackingError: If the store cannot be used; a server has ten seconds to answer, a database
            that is not a file a minute.
    """
    uri = tracking_uri(config, output_dir)
    is_local = uri.startswith(("sqlite:", "file:", "/"))
    answer: queue.SimpleQueue[tuple[MlflowClient, str] | Exception] = queue.SimpleQueue()

    def open_store() -> None:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            _make_local_database(uri)
            if _is_database(uri) and not is_local:
                _check_database(uri)
            client = MlflowClient(tracking_uri=uri)
            answer.put((client, _experiment_id(client, config.experiment, uri, output_dir)))
        except Exception as error:  # noqa: BLE001  # raised again below, in the caller's thread
            answer.put(error)

    threading.Thread(target=open_store, daemon=True).start()
    shown = _without_password(uri)
    # A local database may take longer the first time, when its tables are made.
    seconds = DATABASE_SECONDS if _is_database(uri) else CONNECT_SECONDS
    try:
        result = answer.get(timeout=None if is_local else seconds)
    except queue.Empty:
        raise TrackingError(
            f"MLflow at {shown} did not answer within {seconds:.0f} s. Is the server up, "
            "and MLFLOW_TRACKING_URI (or tracking.uri) right?"
        ) from None
    if isinstance(result, Exception):
        reason = _without_password(str(result))
        raise TrackingError(f"MLflow at {shown} cannot be used: {reason}") from None
    return result


def _is_database(uri: str) -> bool:
    """Whether MLflow reaches a database from here, not through a server of its own."""
    return re.split("[+:]", uri, maxsplit=1)[0] in DATABASE_ENGINES


def _check_database(uri: str) -> None:
    """Connects once: MLflow would try again for minutes where nothing listens."""
    engine = sqlalchemy.create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _make_local_database(uri: str) -> None:
    """Makes MLflow's SQLite file with its tables where there is none."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists() or not path.parent.is_dir():
        return
    with path.with_name(f"{path.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not path.exists():  # another process made it meanwhile
            make_whole(path, lambda new: _make_tables(f"sqlite:///{new}"))


def _make_tables(uri: str) -> None:
    MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def _without_password(text: str) -> str:
    """The text without the user and password of any URI in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def artifact_location(uri: str, output_dir: Path) -> str | None:
    """Where a new experiment's artifacts go; None leaves it to the tracking server.

    With a database, also one on another machine, MLflow would put them into ./mlruns of the
    folder that the search was started in.
    """
    if _is_database(uri) or uri.startswith("file:"):
        return (output_dir.absolute() / "mlartifacts").as_uri()
    return None


def _experiment_id(client: MlflowClient, name: str, uri: str, output_dir: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment {name!r} was deleted: restore it, or choose tracking.experiment=..."
        )
    if found is not None:
        return str(found.experiment_id)
    location = artifact_location(uri, output_dir)
    # The kind decides which pages the UI shows first: training runs, not language-model traces.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=kind))
    except MlflowException:
        made = client.get_experiment_by_name(name)  # by another process, meanwhile
        if made is None:
            raise
        return str(made.experiment_id)


class Tracker:
    """Writes one study's runs: a parent, and a child for each trial.

    Calls return at once; a thread writes in order, several epochs of a run in one request where
    it has fallen behind. An error in it is raised by the next call of `flush`.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str,
        study: str,
        task: Task,
        tags: Mapping[str, str],
        parameters: Mapping[str, Any],
        study_id: str = "",
    ) -> None:
        """Finds or makes the parent run.

        Args:
            client: From `connect`, as `experiment_id`.
            experiment_id: Where the runs are.
            study: Name of the study.
            task: Its data set goes into every run.
            tags: Of every run.
            parameters: Of the parent run.
            study_id: Tells the study from others of its name that record here too.
        """
        self._study_id = study_id
        self.client = client
        self._experiment_id = experiment_id
        self._study = study
        self._task = task
        self._tags = dict(tags)
        self._run_ids: dict[int | None, str] = {}
        self._logged: dict[str, set[int]] = {}
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._metrics: dict[str, list[Metric]] = {}  # by run, to be written next
        self._error: Exception | None = None
        self._existing = dict(study_runs(client, experiment_id, study, study_id))
        self.parent_id = self._open_run(None, study, {}, parameters)
        self._thread = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._thread.start()

    def _open_run(
        self,
        number: int | None,
        name: str,
        tags: Mapping[str, str],
        parameters: Mapping[str, Any],
        began: datetime | None = None,
    ) -> str:
        """Finds or makes a run and marks it as running; completes one that was half made."""
        known = self._known_run_id(number)
        if known is not None:
            self.client.update_run(known, status=RUNNING)
            if number is not None:
                self.client.set_tag(known, "rum.state", "running")  # it was interrupted or paused
            there = self._existing[number].data.params if number in self._existing else parameters
            parameters = {k: value for k, value in parameters.items() if k not in there}
            run_id = known
        else:
            run = self.client.create_run(
                self._experiment_id,
                start_time=milliseconds(began),
                run_name=name,
                tags={
                    **self._tags,
                    STUDY_TAG: self._study,
                    STUDY_ID_TAG: self._study_id,
                    **tags,
                },
            )
            run_id = str(run.info.run_id)
        if not parameters:
            return run_id
        params = [Param(key, option_text(value)) for key, value in parameters.items()]
        self.client.log_batch(run_id, params=params)
        dataset = Dataset(
            name=self._task.corpus,
            digest=self._task.checksum[:16],
            source_type="local",
            source=self._task.source,
        )
        context = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(run_id, [DatasetInput(dataset, context)])
        self._run_ids[number] = run_id
        self._logged.setdefault(run_id, set())
        return run_id

    def _write(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    job()
                    if self._queue.empty():
                        self._write_metrics()
                except Exception as error:  # noqa: BLE001  # raised by flush, in the driver
                    self._error = error
                    reason = _without_password(str(error))
                    logger.error("MLflow stopped taking records: %s", reason)

    def _add_metrics(self, run_id: str, metrics: list[Metric]) -> None:
        waiting = self._metrics.setdefault(run_id, [])
        waiting += metrics
        if len(waiting) >= METRICS_PER_REQUEST // 2:
            self._write_metrics(run_id)

    def _write_metrics(self, run_id: str | None = None) -> None:
        """Writes the metrics of a run that wait, or all."""
        for each in list(self._metrics) if run_id is None else [run_id]:
            waiting = self._metrics.pop(each, [])
            for first in range(0, len(waiting), METRICS_PER_REQUEST):
                batch = waiting[first : first + METRICS_PER_REQUEST]
                self.client.log_batch(each, metrics=batch)

    def _enqueue(self, job: Callable[[], None]) -> None:
        self._queue.put(job)

    @property
    def num_waiting(self) -> int:
        """Records that are not written yet."""
        return self._queue.qsize()

    def flush(self) -> None:
        """Waits until all is written.

        Raises:
            TrackingError: If something could not be; resume=yes writes it again.
        """
        done = threading.Event()

        def job() -> None:
            self._write_metrics()
            done.set()

        self._queue.put(job)
        while not done.wait(0.1) and self._error is None and self._thread.is_alive():
            pass
        if self._error is not None:
            reason = _without_password(str(self._error))
            raise TrackingError(
                f"MLflow stopped taking records: {reason}. Nothing is lost: the study and the "
                "checkpoints have them, and resume=yes writes what is missing"
            ) from None

    def close(self, status: str) -> None:
        """Ends the parent run, waits for all records, and stops the thread."""

        def job() -> None:
            self._write_metrics(self.parent_id)
            self._set_status(self.parent_id, status)

        self._enqueue(job)
        try:
            self.flush()
        finally:
            self._queue.put(None)

    def _set_status(self, run_id: str, status: str, at: datetime | None = None) -> None:
        if status in (RUNNING, INTERRUPTED):
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status, milliseconds(at))

    def start_trial(
        self,
        number: int,
        name: str,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        parent_id: str | None = None,
        began: datetime | None = None,
    ) -> None:
        """Finds or makes the run of a trial, which `began` then, and marks it as running."""

        def job() -> None:
            own = {TRIAL_TAG: str(number), PARENT_TAG: parent_id or self.parent_id, **tags}
            self._open_run(number, name, own, parameters, began)

        self._enqueue(job)

    def _known_run_id(self, number: int | None) -> str | None:
        """The run of a trial (None: the parent), known or found; also reads its epochs."""
        if number not in self._run_ids and number in self._existing:
            run_id = str(self._existing[number].info.run_id)
            self._run_ids[number] = run_id
            history = self.client.get_metric_history(run_id, "step")
            self._logged[run_id] = {point.step for point in history}
        return self._run_ids.get(number)

    def log_report(self, number: int | None, report: Report) -> None:
        """Writes an epoch's metrics of a trial (None: of the parent), once."""
        values = dict(report)
        epoch = int(values.pop("epoch"))
        now = int(time.time() * 1000)

        def job() -> None:
            run_id = self.run_id(number)
            if epoch in self._logged[run_id]:
                return
            self._logged[run_id].add(epoch)
            self._add_metrics(
                run_id, [Metric(key, value, now, epoch) for key, value in values.items()]
            )

        self._enqueue(job)

    def mark_trial(
        self,
        number: int | None,
        status: str,
        tags: Mapping[str, str],
        at: datetime | None = None,
    ) -> None:
        """Sets status and tags of a trial's run (None: the parent's), ended `at` then, or now."""

        def job() -> None:
            run_id = self.run_id(number)
            self._write_metrics(run_id)
            self.client.log_batch(run_id, tags=[RunTag(k, v[:5000]) for k, v in tags.items()])
            self._set_status(run_id, status, at)

        self._enqueue(job)

    def log_best(self, metric: str, value: float, trials: int) -> None:
        """Writes the study's best value so far to the parent run, by number of trials ended."""
        self.log_summary({f"best/{metric}": value}, trials)

    def log_summary(self, values: Mapping[str, float], trials: int) -> None:
        """Writes numbers about the whole study to the parent run, by number of trials ended."""
        now = int(time.time() * 1000)
        points = [Metric(name, value, now, trials) for name, value in values.items()]
        self._enqueue(lambda: self._add_metrics(self.parent_id, points))

    def log_text(self, text: str, file: str) -> None:
        """Writes an artifact of the parent run."""
        self._enqueue(lambda: self.client.log_text(self.parent_id, text, file))

    def log_text_once(self, number: int | None, text: str, file: str) -> None:
        """Writes an artifact of a trial's run (None: the parent's) unless it has it already."""

        def job() -> None:
            run_id = self.run_id(number)
            there = self.client.list_artifacts(run_id) if number in self._existing else []
            if file not in {artifact.path for artifact in there}:
                self.client.log_text(run_id, text, file)

        self._enqueue(job)

    def tag_study(self, key: str, value: str) -> None:
        """Sets a tag of the parent run."""
        self._enqueue(lambda: self.client.set_tag(self.parent_id, key, value))

    def known_status(self, number: int) -> str | None:
        """Status of a trial's run when this tracker began; None if there was none."""
        run = self._existing.get(number)
        return None if run is None else str(run.info.status)

    def run_id(self, number: int | None) -> str:
        """Id of a trial's run, which must have been started; from outside only after `flush`."""
        run_id = self._known_run_id(number)
        assert run_id is not None, f"trial {number} has no run"
        return run_id


def ended(status: str | None) -> bool:
    """Whether a run's status is final."""
    return status in (FINISHED, FAILED, KILLED)


def milliseconds(at: datetime | None) -> int | None:
    """A time as MLflow has it."""
    return None if at is None else int(at.timestamp() * 1000)


def study_runs(
    client: MlflowClient, experiment_id: str, study: str, study_id: str = ""
) -> Iterator[tuple[int | None, Run]]:
    """A study's runs with their trial's number; the parent's is None."""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], study_filter(study, study_id), max_results=1000, page_token=token
        )
        for run in page:
            number = run.data.tags.get(TRIAL_TAG)
            yield None if number is None else int(number), run
        token = page.token
        if not token:
            return


def study_names_in(client: MlflowClient, experiment_id: str) -> list[str]:
    """The studies of an MLflow experiment."""
    known = client.search_runs([experiment_id], f"tags.`{TARGET_TAG}` != ''")
    return sorted({run.data.tags[STUDY_TAG] for run in known})


def read_text(client: MlflowClient, run_id: str, file: str) -> str:
    """A text artifact of a run.

    Raises:
        TrackingError: If there is none.
    """
    with tempfile.TemporaryDirectory(prefix="rum-artifact-") as folder:
        try:
            return Path(client.download_artifacts(run_id, file, folder)).read_text()
        except (MlflowException, OSError) as error:
            raise TrackingError(f"run {run_id} has no {file} in MLflow: {error}") from error


def study_filter(study: str, study_id: str) -> str:
    """The search for a study's runs."""
    by_name = f'tags.`{STUDY_TAG}` = "{study}"'
    return f'{by_name} and tags.`{STUDY_ID_TAG}` = "{study_id}"' if study_id else by_name


def trial_run(
    client: MlflowClient, experiment_id: str, study: str, number: int, study_id: str = ""
) -> Run:
    """The run of a study's trial.

    Raises:
        TrackingError: If there is none.
    """
    where = f'{study_filter(study, study_id)} and tags.`{TRIAL_TAG}` = "{number}"'
    try:
        runs = client.search_runs([experiment_id], where, max_results=1)
    except MlflowException as error:
        raise TrackingError(f"cannot look for trial {number} of {study}: {error}") from error
    if not runs:
        raise TrackingError(f"MLflow has no run of trial {number} of study {study}")
    return runs[0]
