"""The container's command as a real process: it trains, answers, leaves when told to, and then has nothing to train."""

from pathlib import Path

import httpx
import loop
import tiny


def test_the_command_trains_answers_and_leaves(tmp_path: Path) -> None:
    environment = {
        **tiny.RECIPE,
        **tiny.paths(tmp_path),
        "DATASET": str(tiny.write_csv(tmp_path / "reviews.csv", tiny.sentences(160))),
        "BASE_MODEL": str(tiny.make_base_model(tmp_path / "base")),
        "HOST": "127.0.0.1",
        "PORT": str(loop.free_port()),
    }
    service = loop.Service(environment, tmp_path / "out.log")
    try:
        service.start()
        service.wait("/readyz", lambda body: body["phase"] == "ready")
        answer = httpx.post(f"{service.url}/inference", json={"text": "a great film"})
        assert (answer.status_code, answer.json()["label"]) == (200, "good")
        assert service.end() == 0
        said, _ = service.command("train")
        assert "nothing to train" in said
    finally:
        if service.process is not None:
            service.process.kill()
            service.process.wait()
