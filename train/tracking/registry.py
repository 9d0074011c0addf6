"""MLflow's model registry: an exported model becomes a version of a registered one, linked to the run that trained it."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from powernap.model.errors import PowernapError
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.delivery import one_line, prepare_mlflow, sync_run, tracking_uri


class RegistryError(PowernapError):
    """Why a model cannot be registered, in one line."""


class Registry:
    """The server or database that has a run.

    Raises:
        RegistryError, DeliveryError: if MLflow does not have the run, or cannot be reached. Nothing is registered then.
    """

    def __init__(self, run_folder: Path, model: str) -> None:
        if not model.strip() or set(model) & set("/:"):
            raise RegistryError(f"--register '{model}': write a name without / and :")
        if not RunFolder(run_folder).mlflow_run_id:
            raise RegistryError(
                f"--register: MLflow does not have {run_folder}: it was trained without run.trackers=[mlflow]"
            )
        prepare_mlflow()
        sync_run(run_folder)
        from mlflow import MlflowClient

        self._model = model
        self._client: Any = MlflowClient(tracking_uri(run_folder))
        self._run_id = RunFolder(run_folder).mlflow_run_id

    def add(self, exported: Path, step: int) -> str:
        """Copy the files of a folder to the run's artifacts and make them a new version of the model; returns its number."""
        from mlflow.exceptions import MlflowException

        place = f"models/step_{step}-{exported.name}"
        try:
            self._client.log_artifacts(self._run_id, str(exported), place)
            with suppress(MlflowException):  # it exists
                self._client.create_registered_model(self._model)
            version = self._client.create_model_version(
                self._model, f"runs:/{self._run_id}/{place}", run_id=self._run_id, tags={"step": str(step)}
            )
        except MlflowException as error:
            raise RegistryError(f"--register: {exported} is written, but not registered: {one_line(error)}") from None
        return str(version.version)
