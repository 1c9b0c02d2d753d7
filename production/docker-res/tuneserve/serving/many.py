"""The composition root of a server whose models come and go: of the folder MODELS, or as a platform says."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuneserve.adapters.catalog import OF_MANY
from tuneserve.errors import NotFoundError, SettingsError
from tuneserve.hardware import memory_limit
from tuneserve.serving.http.app import create_app
from tuneserve.serving.lifetime import LOAD_S, Root
from tuneserve.serving.registry import Registry
from tuneserve.serving.service import Service
from tuneserve.serving.slot import Slot
from tuneserve.serving.sources import Sources
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

HEADROOM, LEAST_HEADROOM = 0.03, 16 << 20
"""Share of the memory that loads leave to requests, and the fewest bytes, which do not shrink with the limit."""


class ManyApplication(Root):
    """As `Application`, for many models.

    Args:
        settings: of the server.
        threads: CPU threads to compute with.
        importing: the command that makes a version of a model that was trained elsewhere.
        environ: that command's environment variables.

    Raises:
        SettingsError: MODELS is no folder, or PINNED_MODELS are not in it, or traces cannot be sent.
    """

    def __init__(
        self, settings: Settings, *, threads: int, importing: Sequence[str], environ: Mapping[str, str]
    ) -> None:
        super().__init__(settings)
        self.slot = Slot()
        """Empty: no model is there for as long as the server. It fails if a pinned one cannot be loaded."""
        self._settings = settings
        self._sources = Sources(settings, threads=threads, importing=importing, environ=environ)
        self._pinned = self._find_pinned()
        limit = settings.memory_limit or memory_limit()
        self.models = Registry(
            self._sources.open,
            prepare=self._sources.prepare,
            size=self._sources.size,
            find=self._sources.find if settings.models else None,
            metrics=self.slot.metrics,
            limit=limit,
            headroom=max(round(HEADROOM * limit), LEAST_HEADROOM),
            pinned={path.name for path in self._pinned},
            evicts=bool(settings.models),
        )
        service = Service(
            {},
            metrics=self.slot.metrics,
            models=self.models,
            timeout_s=settings.request_timeout_s,
            max_inputs=settings.max_batch_texts,
        )
        self.asgi = create_app(
            settings,
            service,
            None,
            adapters=OF_MANY,
            lifespan=self._lifespan,
            telemetry=self._traces.telemetry,
            drain=self.drain,
        )

    def start(self) -> None:
        """Load the pinned models, which is not waited for."""
        if not self._settings.api_key.get_secret_value():
            logger.warning(
                "API_KEY is not set: whoever reaches the port may ask all models, and load and unload %s",
                "those in MODELS" if self._settings.models else "any folder that this process can read",
            )
        for path in self._pinned:
            self.models.load(path.name, path).add_done_callback(
                lambda done: self.slot.fail(error) if (error := done.exception()) and not self._closed else None
            )

    def _end(self) -> None:
        self._sources.close()
        self.was_loading = not self.models.close(wait_s=LOAD_S)

    def _find_pinned(self) -> list[Path]:
        settings = self._settings
        if settings.models and not Path(settings.models).expanduser().is_dir():
            raise SettingsError(f"MODELS={settings.models}: there is no such folder.")
        names = [name for one in settings.pinned_models.split(",") if (name := one.strip())]
        try:
            return [self._sources.find(name) for name in names]
        except NotFoundError as error:
            raise SettingsError(f"PINNED_MODELS={settings.pinned_models}: {error} It should be in MODELS.") from None
