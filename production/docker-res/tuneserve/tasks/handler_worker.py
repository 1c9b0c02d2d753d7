"""The process in which an archive's own code answers, started by `handler.py`; it reads requests from a socket.

A frame is two lengths (unsigned, 32 bits, big-endian), a JSON object and a body. This file imports nothing of tuneserve
and runs as a script without its folder on the path, so that no module of the archive meets one of ours. The rules are
those of sagemaker-huggingface-inference-toolkit.
"""

import csv
import ctypes
import importlib.util
import inspect
import io
import json
import os
import re
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FRAME = struct.Struct(">II")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
JSON = "application/json"
ARGUMENTS = {"model_fn": 1, "input_fn": 2, "predict_fn": 2, "output_fn": 2, "transform_fn": 4}
"""The functions, with their arguments besides the context, which each may have or not."""
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
}
"""What a model without `model_fn` is for, by the ending of its architecture's name."""


class Context:
    """The last argument of functions that take one: what the toolkits' context says of model and request."""

    def __init__(self, name: str, folder: str) -> None:
        self.model_name = name
        self.system_properties = {"model_dir": folder, "gpu_id": None, "batch_size": 1}
        self.headers: dict[str, str] = {}
        self.content_type = ""

    def get_request_header(self, index: int, key: str) -> str | None:
        """A header of the request."""
        return self.headers.get(key.lower())

    def get_all_request_header(self, index: int) -> dict[str, str]:
        """All of them."""
        return self.headers

    def set_response_content_type(self, index: int, value: str) -> None:
        """Say what the answer is."""
        self.content_type = value


def load_pipeline(folder: str, task: str) -> Any:
    """A pipeline of transformers, for code that has no `model_fn`."""
    import transformers

    root = next((one for one in (Path(folder), Path(folder, "model")) if (one / "config.json").is_file()), Path(folder))
    if not task:
        names = json.loads((root / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
        task = next((task for ending, task in TASKS.items() if names[0].endswith(ending)), "")
        if not task:
            raise ValueError(f"there is no model_fn, and {names[0]!r} does not say the task: set HF_TASK")
    any_task: Any = task
    return transformers.pipeline(any_task, model=str(root), trust_remote_code=False)


def read_input(data: Any, content_type: str) -> Any:
    """The default `input_fn`: JSON, CSV with a header, or a NumPy array."""
    if content_type == JSON:
        return json.loads(data)
    if content_type == "text/csv":
        rows = list(csv.DictReader(io.StringIO(data)))
        if rows and "inputs" in rows[0]:
            return {"inputs": [row["inputs"] for row in rows]}
        if rows and {"question", "context"} <= set(rows[0]):
            return {"inputs": rows}
        raise ValueError("CSV needs a header row with `inputs`, or with `question` and `context`")
    if content_type == "application/x-npy":
        import numpy as np

        return np.load(io.BytesIO(data), allow_pickle=False)
    raise ValueError(f"content type {content_type!r} is not read without an input_fn: send {JSON} or text/csv")


def predict(data: Any, model: Any) -> Any:
    """The default `predict_fn`."""
    if not isinstance(data, dict):
        return model(data)
    inputs, parameters = data.pop("inputs", data), data.pop("parameters", None)
    return model(inputs, **parameters) if parameters is not None else model(inputs)


def write_json(content: Any, accept: str = JSON) -> tuple[bytes, str]:
    """The default `output_fn`: compact JSON, whatever is accepted."""
    words = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_listed)
    return words.encode(), JSON


def _listed(one: Any) -> Any:
    if hasattr(one, "tolist"):
        return one.tolist()
    raise TypeError(f"object of type {type(one).__name__} cannot be written as JSON")


class Functions:
    """The archive's functions, and defaults for those it does not have, with the model that they are for."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.context = Context(config["name"], config["folder"])
        program = Path(config["program"])
        sys.path.insert(0, str(program.parent))
        spec = importlib.util.spec_from_file_location(program.stem, program)
        if spec is None or spec.loader is None:
            raise ImportError(f"{program.name} is no module")
        module = sys.modules[program.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found: dict[str, Callable[..., Any]] = {
            name: self._called(name, given) for name in ARGUMENTS if (given := getattr(module, name, None))
        }
        middle = ("input_fn", "predict_fn", "output_fn")
        if "transform_fn" in found and set(middle) & set(found):
            raise ValueError(f"Cannot use transform_fn implementation in conjunction with {', '.join(middle)}")
        self._input: Callable[..., Any] = found.get("input_fn", read_input)
        self._predict: Callable[..., Any] = found.get("predict_fn", predict)
        self._output: Callable[..., Any] = found.get("output_fn", write_json)
        self._transform = found.get("transform_fn")
        load: Callable[[str], Any] = found.get("model_fn", lambda folder: load_pipeline(folder, config["task"]))
        self._model = load(config["folder"])

    def _called(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called without the context."""
        given, least = len(inspect.signature(function).parameters), ARGUMENTS[name]
        if given == least:
            return function
        if given == least + 1:
            return lambda *arguments: function(*arguments, self.context)
        raise TypeError(f"{name} definition takes {least} or {least + 1} arguments but {given} were given.")

    def answer(self, head: Mapping[str, Any], body: bytes) -> tuple[bytes, str]:
        """The answer to a request, and its content type."""
        self.context.headers, self.context.content_type = head["headers"], ""
        content_type = (head["headers"].get("content-type") or JSON).partition(";")[0].strip().lower()
        accept = head["headers"].get("accept") or JSON
        accept = JSON if accept == "*/*" else accept
        is_text = content_type.startswith("text/") or content_type.endswith("json")
        data = body.decode() if is_text else body
        if self._transform is not None:
            output = self._transform(self._model, data, content_type, accept)
        else:
            output = self._output(self._predict(self._input(data, content_type), self._model), accept)
        named = ""
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], str):
            output, named = output
        if isinstance(output, str):
            output = output.encode()
        elif not isinstance(output, bytes | bytearray | memoryview):
            output, _ = write_json(output)
        named = named or self.context.content_type or accept
        return bytes(output), named if re.fullmatch(r"[\w.+-]+/[\w.+-]+(; ?[\w.+=-]+)*", named, re.ASCII) else JSON


def send(stream: socket.socket, head: Mapping[str, Any], body: bytes = b"") -> None:
    """Write a frame."""
    raw = json.dumps(head).encode()
    stream.sendall(FRAME.pack(len(raw), len(body)) + raw)
    stream.sendall(body)


def error_of(error: BaseException) -> dict[str, str]:
    """What is said of an exception; all of it goes to the log."""
    traceback.print_exception(error)
    with suppress(Exception):
        return {"kind": type(error).__name__, "message": str(error)[:2000]}
    return {"kind": type(error).__name__, "message": "its message cannot be read"}


def main(config: Mapping[str, Any]) -> None:
    """Load the archive's code and model, say so, and answer until the socket closes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != config["parent"]:  # it died before
        return
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")  # the kernel ends this one first
    stream = socket.socket(fileno=config["descriptor"])
    stream.set_inheritable(False)
    try:
        functions = Functions(config)
    except BaseException as error:  # also what calls sys.exit()
        send(stream, error_of(error))
        return
    send(stream, {})
    reader = stream.makefile("rb")
    while begun := reader.read(FRAME.size):
        head_bytes, body_bytes = FRAME.unpack(begun)
        head, body = json.loads(reader.read(head_bytes)), reader.read(body_bytes)
        try:
            output, content_type = functions.answer(head, body)
            if len(output) > config["max_bytes"]:
                raise ValueError(f"the answer has {len(output)} bytes; the most is {config['max_bytes']}")
            reply: dict[str, str] = {"content_type": content_type}
        except BaseException as error:
            reply, output = error_of(error), b""
        send(stream, reply, output)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv.pop()))
    finally:
        sys.stdout.flush()
        os._exit(0)  # whatever threads the code has started
