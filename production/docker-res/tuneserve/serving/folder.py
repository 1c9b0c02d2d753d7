"""The composition root of a server of one folder: a version, a Hugging Face model, or one that brings its own code."""

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuneserve.errors import TuneserveError
from tuneserve.serving.http.app import Adapter, create_app
from tuneserve.serving.lifetime import LOAD_S, Root
from tuneserve.serving.service import Service
from tuneserve.serving.slot import Slot
from tuneserve.serving.sources import Sources
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)


class FolderApplication(Root):
    """As `Application`, for one model that is what its folder says, and never changes; adapters ask it.

    Args:
        settings: of the server.
        folder: of the model.
        threads: CPU threads to compute with.
        importing: the command that makes a version of a model that was trained elsewhere.
        environ: that command's environment variables.
        adapters: of the platforms that the server speaks to.

    Raises:
        SettingsError: traces cannot be sent.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        *,
        threads: int,
        importing: Sequence[str],
        environ: Mapping[str, str],
        adapters: Sequence[Adapter],
    ) -> None:
        super().__init__(settings)
        self.slot = Slot()
        self._folder = folder
        self._sources = Sources(settings, threads=threads, importing=importing, environ=environ)
        self.asgi = create_app(
            settings,
            Service.of(self.slot, timeout_s=settings.request_timeout_s, max_inputs=settings.max_batch_texts),
            None,
            adapters=adapters,
            lifespan=self._lifespan,
            telemetry=self._traces.telemetry,
            drain=self.drain,
        )
        self._loading = threading.Thread(target=self._load, name="load", daemon=True)

    def start(self) -> None:
        """Load the model, which is not waited for."""
        self.slot.phase = "loading"
        self._loading.start()

    def _end(self) -> None:
        self._sources.close()
        if self._loading.ident is not None:
            self._loading.join(LOAD_S)
        self.was_loading = self._loading.is_alive()
        self.slot.close()

    def _load(self) -> None:
        try:
            model = self._sources.open(self._sources.prepare(self._folder), self._folder.name)
        except Exception as error:
            if not isinstance(error, TuneserveError):
                logger.exception("%s cannot be loaded", self._folder)
            if not self._closed:
                self.slot.fail(error)
            return
        if self._closed:
            model.close()
            return
        self.slot.take(model)
