"""The container's command as a real process: it trains, reports, answers, leaves when told to, and then has no work."""

from pathlib import Path

import httpx
import loop
import tiny


def test_the_command_trains_answers_and_leaves(tmp_path: Path) -> None:
    environment = {
        **tiny.RECIPE,
        "REPORT": "1",
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
        service.wait("/jobs", lambda jobs: jobs[0]["state"] == "finished")
        [version] = (tmp_path / "MODEL" / "versions").iterdir()
        assert f"Report of version {version.name}" in (version / "report" / "index.html").read_text()
        assert service.end() == 0
        said, _ = service.command("train")
        assert "nothing to train" in said
    finally:
        if service.process is not None:
            service.process.kill()
            service.process.wait()
