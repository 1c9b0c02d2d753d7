"""build.py against a real engine and real registries, mostly with a Dockerfile that takes seconds."""

import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from docker.errors import NotFound

from .conftest import BUILD, base_image_option, run_build

DOCKERFILE = """\
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}
COPY docker-res /production/docker-res
ARG WORDS
RUN echo "the words are <$WORDS>, the proxy is <$HTTPS_PROXY$no_proxy>"
RUN printf 'one of its lines\\n' >&2; test "$WORDS" != fail
"""

NAME = "tuneserve-test-build"

Build = Callable[..., Any]


@pytest.fixture
def build(engine: Any, tmp_path: Path) -> Iterator[Build]:
    """Run build.py on a small project; every tag that it could make is removed afterwards."""
    package = tmp_path / "production" / "docker-res" / "tuneserve"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "4.5.6"\n')
    (tmp_path / "production" / "Dockerfile").write_text(DOCKERFILE)
    small = Path(shutil.copy(BUILD, tmp_path / "production"))

    def run(*options: str, script: Path = small, **environ: str) -> Any:
        return run_build("--name", NAME, *base_image_option(), *options, script=script, **environ)

    yield run
    for image in engine.images.list(filters={"reference": [NAME, f"*/{NAME}", f"*/*/{NAME}"]}):
        engine.images.remove(image.id, force=True)


def tags(engine: Any, repository: str = NAME) -> set[str]:
    """Every tag that the engine has of a repository."""
    return {tag for image in engine.images.list(repository) for tag in image.tags if tag.startswith(f"{repository}:")}


def test_a_release_is_tagged_with_its_version_and_as_latest(engine: Any, build: Build) -> None:
    done = build()
    assert done.returncode == 0, done.stderr
    assert tags(engine) == {f"{NAME}:4.5.6", f"{NAME}:latest"}


@pytest.mark.parametrize("version", ["1.2.0-SNAPSHOT", "1.2.0-rc.1"])
def test_a_prerelease_never_becomes_latest(engine: Any, build: Build, version: str) -> None:
    assert build("--version", version).returncode == 0
    assert tags(engine) == {f"{NAME}:{version}"}


def test_progress_shows_each_step_and_what_it_prints(build: Build) -> None:
    done = build("--build-arg", "WORDS=to be, or=not")
    assert "Step 4/" in done.stdout
    assert "the words are <to be, or=not>" in done.stdout
    assert "one of its lines" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_failing_step_fails_the_build_in_its_own_words(engine: Any, build: Build) -> None:
    done = build("--build-arg", "WORDS=fail")
    assert done.returncode == 1
    assert "one of its lines" in done.stdout
    assert "returned a non-zero code: 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert tags(engine) == set()


def test_a_base_image_that_does_not_exist_is_an_error_in_one_line(build: Build) -> None:
    done = build("--base-image", "127.0.0.1:9/no/such:image")
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_proxy_is_there_while_building_and_not_in_the_image(engine: Any, build: Build) -> None:
    done = build("--proxy", "http://proxy.invalid:3128", no_proxy="inside.invalid")
    assert "the proxy is <http://proxy.invalid:3128inside.invalid>" in done.stdout
    image = engine.images.get(f"{NAME}:4.5.6")
    assert "proxy.invalid" not in str(image.attrs) + str(image.history())


def test_a_push_that_is_taken_prints_the_digests(engine: Any, image: Any, build: Build, registry: str) -> None:
    done = build(
        "--image-prefix", f"{registry}/team", "--push", script=BUILD
    )  # the job's own image, from image's layers
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    pushed = dict(re.findall(r"Pushed (\S+), digest (sha256:[0-9a-f]{64})\.", done.stdout))
    assert set(pushed) == tags(engine, f"{registry}/team/{NAME}")
    assert f"{registry}/team/{NAME}:latest" in pushed
    assert {tag: engine.images.get_registry_data(tag).id for tag in pushed} == pushed


def test_a_snapshot_is_pushed_without_latest(engine: Any, build: Build, registry: str) -> None:
    repository = f"{registry}/{uuid.uuid4()}/{NAME}"  # where no test has been before
    done = build("--version", "7.0.0-SNAPSHOT", "--image_prefix", repository.removesuffix(f"/{NAME}"), "--deploy")
    assert done.returncode == 0, done.stderr
    assert engine.images.get_registry_data(f"{repository}:7.0.0-SNAPSHOT").id
    with pytest.raises(NotFound):
        engine.images.get_registry_data(f"{repository}:latest")


def test_a_push_that_is_denied_fails_in_the_registrys_words(build: Build, denying_registry: str) -> None:
    done = build("--image-prefix", denying_registry, "--push")
    assert done.returncode == 1
    assert "no basic auth credentials" in done.stderr
    assert "digest" not in done.stdout
    assert "Traceback" not in done.stderr
