"""What is asked in the Open Inference Protocol: one tensor of texts, in JSON or in the binary extension behind it."""

import re
import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tuneserve.errors import MAX_FAULTS, InvalidInputError, TooLargeError
from tuneserve.serving.http.routes import read_body
from tuneserve.text import has_surrogates

INPUT = "text"
"""The input's name in the model's metadata; a request may give its only input another."""

LENGTH = "Inference-Header-Content-Length"
"""The header that says how many bytes of a body are JSON; tensors stand behind them."""

MOST_DIMENSIONS = 8


class Tensor(BaseModel):
    """One input. Its elements stand in `data`, or behind the JSON where `parameters.binary_data_size` says how many."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MOST_DIMENSIONS)]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: Any = None


class WantedOutput(BaseModel):
    """The name of an output, and whether it is wanted in binary form."""

    name: str
    parameters: dict[str, Any] | None = None


def _unicode(value: str) -> str:
    if has_surrogates(value):
        raise ValueError("should be Unicode text")
    return value


class InferRequest(BaseModel):
    """Texts: one input of the datatype BYTES and any shape that has as many elements."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"inputs": [{"name": INPUT, "shape": [1], "datatype": "BYTES", "data": ["A warm film."]}]}]
        }
    )

    id: Annotated[str, AfterValidator(_unicode)] | None = None
    parameters: dict[str, Any] | None = None
    inputs: Annotated[list[Tensor], Field(min_length=1, max_length=1)]
    outputs: list[WantedOutput] | None = None


def read_infer(body: bytes, length: str | None, most: int) -> tuple[InferRequest, list[str]]:
    """A request and its texts.

    Args:
        body: the JSON, and binary data behind it.
        length: bytes of the JSON, as the header says; None: all.
        most: texts that a request may have.

    Raises:
        InvalidInputError: it is not as the protocol has it.
        TooLargeError: it has more texts.
    """
    size = len(body)
    if length is not None:
        size = int(length) if re.fullmatch(r"[0-9]{1,15}", length) else -1
        if not 0 < size <= len(body):
            found = f"{LENGTH} should be a number from 1 to the body's {len(body)} bytes"
            raise InvalidInputError((("header", LENGTH), found, "value_error"))
    wanted = read_body(InferRequest, body[:size])
    assert isinstance(wanted, InferRequest)
    [tensor] = wanted.inputs
    if tensor.datatype != "BYTES":
        raise wrong(("inputs", 0, "datatype"), f"should be BYTES, not {tensor.datatype[:20]!r}")
    count = prod(tensor.shape)
    if not count:
        raise wrong(("inputs", 0, "shape"), "should have at least one element")
    if count > most:
        raise TooLargeError(f"The request has {count} texts; {most} are the most this server takes.")
    said = tensor.parameters or {}
    if "shared_memory_region" in said:
        raise wrong(("inputs", 0, "parameters"), "shared memory is not supported here")
    rest = memoryview(body)[size:]
    if (binary := said.get("binary_data_size")) is None:
        if len(rest):
            raise wrong(("inputs", 0, "parameters"), "binary_data_size should say what stands behind the JSON")
        return wanted, flat(tensor.data, count)
    if tensor.data is not None:
        raise wrong(("inputs", 0, "data"), "should not be there beside binary data")
    if type(binary) is not int or binary != len(rest):
        raise wrong(("inputs", 0, "parameters"), f"binary_data_size should be the {len(rest)} bytes behind the JSON")
    return wanted, list(split(rest, count))


def flat(data: Any, count: int) -> list[str]:
    """So many strings out of a list, or a list of lists.

    Raises:
        InvalidInputError: these are not just so many strings.
    """
    if not isinstance(data, list):
        raise wrong(("inputs", 0, "data"), "should be a list of strings")
    for _ in range(MOST_DIMENSIONS):
        if not (data and all(isinstance(one, list) for one in data)):
            break
        data = [one for part in data for one in part]
    if len(data) != count:
        raise wrong(("inputs", 0, "data"), f"has {len(data)} elements, and the shape says {count}")
    return strings(data, ("inputs", 0, "data"))


def strings(values: list[Any], place: tuple[str | int, ...]) -> list[str]:
    """The list, if it holds nothing else.

    Raises:
        InvalidInputError: naming the first other elements.
    """
    others = (index for index, one in enumerate(values) if not isinstance(one, str))
    if listed := list(islice(others, MAX_FAULTS)):
        raise InvalidInputError(*((("body", *place, one), "should be a string", "string_type") for one in listed))
    return values


def join(texts: Sequence[str]) -> bytes:
    """The elements of a BYTES tensor: each behind its length, four bytes of which the lowest comes first."""
    encoded = [text.encode() for text in texts]
    return b"".join(part for one in encoded for part in (struct.pack("<I", len(one)), one))


def split(content: memoryview, count: int) -> Iterator[str]:
    """The texts of so many elements; see `join`.

    Raises:
        InvalidInputError: there are not just so many, or one is not UTF-8.
    """
    begin = 0
    for index in range(count):
        if begin + 4 > len(content):
            raise wrong(("inputs", 0), f"element {index} of {count} is missing in the binary data")
        [size] = struct.unpack_from("<I", content, begin)
        end = begin + 4 + size
        if end > len(content):
            raise wrong(("inputs", 0), f"element {index} says that it has {size} bytes, more than there are")
        try:
            yield str(content[begin + 4 : end], "utf-8")
        except UnicodeDecodeError:
            raise wrong(("inputs", 0), f"element {index} is not UTF-8") from None
        begin = end
    if begin != len(content):
        raise wrong(("inputs", 0), f"the binary data have {len(content) - begin} bytes behind the last element")


def wrong(place: tuple[str | int, ...], words: str) -> InvalidInputError:
    """What is wrong with one place of a body."""
    return InvalidInputError((("body", *place), words, "value_error"))
