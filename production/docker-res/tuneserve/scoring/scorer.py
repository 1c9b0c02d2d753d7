"""A model as a function of tables, for notebooks, and for Ray, Spark and others that spread it over machines."""

import os
from functools import lru_cache
from typing import Any

import pyarrow as pa

from tuneserve import find_version, load
from tuneserve.scoring.job import answer
from tuneserve.serving.model import Model
from tuneserve.tables.parquet import append_answers
from tuneserve.tables.rows import Columns, require_columns


class Scorer:
    """Puts the answers of one version behind the rows of a table, in the columns that `predict` writes.

    It can be pickled: what travels is how to load the model, which each process does when it scores its first table,
    once for all Scorers of one version and settings: engines unpickle one for every task, in processes that they keep.

    Args:
        folder: a store, of which the champion answers, or the folder of one version; read where the scoring is done.
        text_column: that holds the texts; empty to find it as `predict` does.
        settings: as `tuneserve.load` takes them.
    """

    def __init__(self, folder: str | os.PathLike[str], *, text_column: str = "", **settings: object) -> None:
        self.folder, self.text_column, self.settings = os.fspath(folder), text_column, settings
        self._model: Model | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows with their answers; a row that cannot be answered has an error and no label.

        Raises:
            DataError: the table does not say which column holds the text.
            TuneserveError: the model cannot be loaded; see `tuneserve.load`.
        """
        if self._model is None:
            self._model = _load(os.fspath(find_version(self.folder).folder), tuple(sorted(self.settings.items())))
        types = [(name, str(kind)) for name, kind in zip(table.column_names, table.schema.types, strict=True)]
        text = require_columns(types, Columns(self.text_column), "The table", labelled=False).text
        texts = table.column(text).to_pylist()
        return append_answers(table, table.column_names, answer(texts, self._model.predict, self._model.id))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}


@lru_cache(maxsize=1)
def _load(folder: str, settings: tuple[tuple[str, object], ...]) -> Model:
    return load(folder, **dict(settings))
