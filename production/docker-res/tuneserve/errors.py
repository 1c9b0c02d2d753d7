"""Errors in words that a user can act on. Raised where they are understood, translated once, at the edge."""

from tuneserve.redaction import redact


class TuneserveError(Exception):
    """A failure whose message is meant for the user: the command line prints it without a traceback.

    `exit_code` is the process's answer, `status` the HTTP one. Secrets in the message are left out.
    """

    exit_code = 1
    status = 500

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class SettingsError(TuneserveError):
    """One or more environment variables have values that cannot be used."""

    exit_code = 2


class DataError(TuneserveError):
    """The data set cannot be read, or training on it would give a misleading model."""

    exit_code = 3


class BaseModelError(TuneserveError):
    """The base model cannot be found, verified or used for classification."""

    exit_code = 4


class DeviceError(TuneserveError):
    """The device or precision asked for cannot be had."""

    exit_code = 5


class StoreError(TuneserveError):
    """The model store cannot be read or written."""

    exit_code = 6


class TrainingError(TuneserveError):
    """Training failed to give a usable result (the loss is not a number, say)."""

    exit_code = 7


class WorkerError(TuneserveError):
    """Another process of the same training failed; this has its message and exit code."""

    def __init__(self, words: str, exit_code: int) -> None:
        super().__init__(words)
        self.exit_code = exit_code


class LeavingError(TuneserveError):
    """The server is about to end and does not finish this request."""

    status = 503

    def __init__(self) -> None:
        super().__init__("The server is about to end, and did not finish this request.")


class NoModelError(TuneserveError):
    """There is no model to answer with yet."""

    exit_code = 8
    status = 503


class BusyError(TuneserveError):
    """Another process is training for the same store."""

    exit_code = 9
    status = 409


class RefusedError(TuneserveError):
    """A trained version did not pass the gate; the champion stays."""

    exit_code = 10


class UnauthorizedError(TuneserveError):
    """The request carries no API key, or the wrong one."""

    status = 401


class ForbiddenError(TuneserveError):
    """The server's settings do not allow the request."""

    status = 403


class NotFoundError(TuneserveError):
    """There is nothing of this name."""

    status = 404


class ConflictError(TuneserveError):
    """The name that was given stands for several things."""

    status = 409


class OutOfMemoryError(TuneserveError):
    """There is not enough memory for one model more; the status is what SageMaker wants to hear."""

    status = 507


class UnavailableError(TuneserveError):
    """Feedback's database cannot be used now."""

    status = 503


class TooLargeError(TuneserveError):
    """The request is larger than this server takes."""

    status = 413


class NotAcceptableError(TuneserveError):
    """The client wants its answer in a form that is not written here."""

    status = 406


class EncodingError(TuneserveError):
    """The body is in an encoding that this server does not read."""

    status = 415


class FramingError(TuneserveError):
    """The body is transferred in a way that this server does not know."""

    status = 501


class OverloadedError(TuneserveError):
    """The queue is full; there should be room again after `retry_after_s`."""

    status = 429

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClientGoneError(TuneserveError):
    """The client disconnected before its answer; the status is nginx's and only seen in logs and metrics."""

    status = 499


class TimeoutExceededError(TuneserveError):
    """The request waited longer than it may."""

    status = 504


class InvalidRequestError(TuneserveError):
    """The request is not valid HTTP."""

    status = 400


class HeadersTooLargeError(TuneserveError):
    """The headers of a request are too large."""

    status = 431

    def __init__(self) -> None:
        super().__init__("The headers are larger than this server takes.")


class BodyTimeoutError(TuneserveError):
    """The body of a request did not come in time."""

    status = 408

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The body did not come within {seconds:g} s.")


MAX_FAULTS = 20
"""Most faults of one request that are listed."""


class InvalidInputError(TuneserveError):
    """A request is not as it should be; `faults` say where, in words, and of which kind, as FastAPI lists them."""

    status = 422

    def __init__(self, *faults: tuple[tuple[str | int, ...], str, str]) -> None:
        super().__init__(faults[0][1] if faults else "")
        self.faults = [{"loc": loc, "msg": words, "type": kind} for loc, words, kind in faults]


class TextError(TuneserveError):
    """A text cannot be classified: it is empty, not Unicode, or too long."""

    status = 422


class EngineError(TuneserveError):
    """The engine failed, or gave a figure that is not a number."""


class ArchiveError(TuneserveError):
    """An archive of a model cannot be unpacked; the status is 507 where the disk is full."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class HandlerError(TuneserveError):
    """What the code of a model raised, or how its process ended; `kind` is the exception's name.

    The status is 400 for an exception, as SageMaker's toolkits have it, and 500 where the process itself failed.
    """

    def __init__(self, message: str, *, kind: str, status: int = 400) -> None:
        super().__init__(message)
        self.kind, self.status = kind, status
